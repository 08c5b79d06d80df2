"""Build a task's subject on this rank, for jobs that run it in ways of their own.

Requirement: what a remedy or a clock is held to is the same subject, of the same weights, on the
same inputs, as what execution.py judges.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, cast

import torch

from tpcheck.execution import Task
from tpcheck.groups.base import RecordedGroup
from tpcheck.groups.jobs import World
from tpcheck.observation.consumption import offer_weights
from tpcheck.subjects import resolve, with_spec

Forward = Callable[..., Any]


def built(world: World, task: Task) -> tuple[RecordedGroup, Forward]:
    """Return this rank's group and the subject's forward, in eval mode.

    Raises:
        Exception: whatever the subject raises.
    """
    dtype, weight_dtype = getattr(torch, task.dtype), getattr(torch, task.weight_dtype)
    group = cast(RecordedGroup, world.group(seed=task.seed, dtype=dtype, weight_dtype=weight_dtype))
    subject = resolve(task.subject)
    if task.spec is not None:
        subject = with_spec(subject, task.spec)
    torch.manual_seed(task.seed)
    offer_weights(group.weights, subject.options.weights)
    takes_spec = subject.options.specs is not None and subject.options.spec is not None
    forward = subject.build(*((group, subject.options.spec) if takes_spec else (group,)))
    if isinstance(forward, torch.nn.Module):
        forward.eval()
    group.recorder.take()
    return group, forward


def measured_on(label: str, device: str) -> str:
    """Return where times were taken, as they are always shown: CPU numbers are no GPU numbers."""
    if device != "cpu":
        return f"{label} on {device}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{label} on cpu, {cores} cores for all ranks: says nothing of a GPU"


def arguments(group: RecordedGroup, task: Task, input_id: str) -> list[torch.Tensor]:
    """Return one input as forward takes it: floating ones rounded to what is stored."""
    prepared = []
    for tensor in task.inputs[input_id]:
        tensor = tensor.to(group.device)
        if tensor.dtype.is_floating_point:
            tensor = tensor.to(group.weight_dtype).to(group.dtype)
        prepared.append(tensor.clone())
    return prepared
