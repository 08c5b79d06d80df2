"""Build a task's subject on this rank, for jobs that run it in ways of their own.

Requirement: what a remedy or a clock is held to is the same subject, of the same weights, on the
same inputs, as what execution.py judges.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any, cast

import torch

from tpcheck.execution import Task
from tpcheck.groups.base import RecordedGroup
from tpcheck.groups.jobs import World
from tpcheck.observation.consumption import offer_weights
from tpcheck.observation.modules import evaluating
from tpcheck.subjects import resolve, with_spec

Forward = Callable[..., Any]


def built(
    world: World, task: Task, note: Callable[[str, torch.Tensor], torch.Tensor] | None = None
) -> tuple[RecordedGroup, Forward]:
    """Return this rank's group and the subject's forward, in eval mode.

    Args:
        note: called with every weight that is asked for; gives what the subject gets.

    Raises:
        Exception: whatever the subject raises.
    """
    dtype, weight_dtype = getattr(torch, task.dtype), getattr(torch, task.weight_dtype)
    group = cast(RecordedGroup, world.group(seed=task.seed, dtype=dtype, weight_dtype=weight_dtype))
    subject = resolve(task.subject)
    if task.spec is not None:
        subject = with_spec(subject, task.spec)
    torch.manual_seed(task.seed)
    group.weights.perturb = note
    offer_weights(group.weights, subject.options.weights)
    takes_spec = subject.options.specs is not None and subject.options.spec is not None
    forward = evaluating(
        subject.build(*((group, subject.options.spec) if takes_spec else (group,)))
    )
    group.recorder.take()
    return group, forward


def weigh(world: World, task: Task) -> tuple[str, dict[str, str]]:
    """Return where a subject's weights are from, and name -> `bfloat16 [96, 64] <SHA-256>`.

    Those it asks for ("asked"), before and within its first forward; where it asks for none, its
    own parameters ("parameters"), if it is a module, else nothing ("none").

    Raises:
        Exception: whatever the subject raises.
    """
    found: dict[str, str] = {}

    def note(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in found:
            held = tensor.detach().to("cpu").contiguous()
            sha256 = hashlib.sha256(held.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
            found[name] = f"{str(held.dtype).removeprefix('torch.')} {list(held.shape)} {sha256}"
        return tensor

    with torch.no_grad():
        group, forward = built(world, task, note)
        for input_id in task.order:
            forward(*arguments(group, task, input_id))
        if found or not isinstance(forward, torch.nn.Module):
            return ("asked" if found else "none"), found
        for name, parameter in forward.named_parameters():
            note(name, parameter)
    return ("parameters" if found else "none"), found


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
