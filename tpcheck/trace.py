"""What one execution left behind: collectives, casts, outputs, or the way a rank failed.

Requirement: everything a verdict needs travels from a rank to the parent as plain frozen data.
Torch is imported for type checkers only: a Trace holds tensors, but this module does not need any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective call as a rank made it. `dtype` is the wire dtype, `shape` the input's."""

    sequence: int
    op: str
    shape: tuple[int, ...]
    dtype: str
    detail: str = ""
    fqn: str = ""

    def describe(self) -> str:
        """Say the call in one phrase: `all_reduce([4, 64] bfloat16, sum)`."""
        if not self.dtype:  # a barrier carries no tensor
            return f"{self.op}()"
        detail = f", {self.detail}" if self.detail else ""
        return f"{self.op}({list(self.shape)} {self.dtype}{detail})"

    @property
    def dim(self) -> int:
        """Where a reduce-scatter cuts, or a gather joins."""
        return int(self.detail.removeprefix("dim=")) if self.detail.startswith("dim=") else 0

    def signature(self) -> tuple[str, tuple[int, ...], str, str]:
        """What has to be equal on every rank."""
        return (self.op, self.shape, self.dtype, self.detail)


@dataclass(frozen=True, slots=True)
class NarrowCast:
    """A cast inside forward to a dtype narrower than the one tpcheck asked the subject to use."""

    fqn: str
    source: str
    target: str
    count: int


@dataclass(frozen=True, slots=True)
class RankFailure:
    """Why a job on several ranks has no result.

    kind: `raised`, `died`, `hung`, `schedule` (ranks disagree on the next collective) or
    `environment` (the group itself could not be set up). `rank` is the first one to blame, None
    when it cannot be told. `in_flight` and `stacks` are per rank, as far as they could be had.
    """

    kind: str
    message: str
    rank: int | None = None
    exception_type: str = ""
    exception: BaseException | None = None
    traceback: str = ""
    in_flight: Mapping[int, str] = field(default_factory=dict)
    stacks: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trace:
    """One rank's execution of a task.

    outputs: input id -> the subject's output, whole on rank 0 and (unless asked for) digests only
    elsewhere. digests: input id -> hash of the output's bytes, dtype and shape, on every rank.
    collectives: phase ("build" or an input id) -> calls in order. facts: what carried the run.
    """

    rank: int
    outputs: Mapping[str, torch.Tensor]
    digests: Mapping[str, str]
    collectives: Mapping[str, tuple[Collective, ...]]
    casts: tuple[NarrowCast, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
