"""Jobs: what the parent asks ranks to do, and what comes back.

Requirement: the layer that moves work to ranks (simulated, pool, torchrun) knows nothing about
subjects; it gets a function by dotted name and a payload, and returns every rank's reply or one
RankFailure. That keeps the import direction: groups never import execution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tpcheck.trace import RankFailure

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup
    from tpcheck.groups.weights import WeightStore


@dataclass(frozen=True, slots=True)
class Job:
    """Run `function(world, payload)` on `size` ranks. `function` is `package.module:name`.

    The payload must pickle; tensors in it travel as raw bytes.
    """

    function: str
    payload: Any
    size: int
    timeout_s: float = 120.0


@dataclass(frozen=True, slots=True)
class JobResult:
    """Either one reply per rank, in rank order, or the failure that stopped the job."""

    replies: tuple[Any, ...] = ()
    failure: RankFailure | None = None


class JobFailed(Exception):
    """A job ended without replies: what whoever needs them raises."""

    def __init__(self, failure: RankFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def text_of(error: BaseException) -> str:
    """Return an exception's text; one that has none to give (`__str__` raises) says that."""
    try:
        return str(error)
    except Exception as raised:
        return f"its text raises {type(raised).__name__}"


def in_seconds(timeout_s: float) -> str:
    """Write a timeout as it was asked for: what is left of 3 s when a job starts is 2.99994 s.

    Example:
        >>> in_seconds(2.99994), in_seconds(0.2), in_seconds(90.5)
        ('3 s', '0.2 s', '90.5 s')
    """
    return f"{round(timeout_s, 1 if timeout_s >= 1 else 3):g} s"


class World(Protocol):
    """What a job function sees of the ranks it runs on."""

    rank: int
    size: int
    backend: str
    device: torch.device
    store: WeightStore

    def group(self, *, seed: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> TPGroup:
        """Return this rank's TPGroup for one build of a subject."""
        ...


class Ranks(Protocol):
    """Somewhere to run jobs. `label` is the backend name as reports print it."""

    label: str
    max_size: int

    def run(self, jobs: Sequence[Job]) -> list[JobResult]:
        """Run every job, side by side where that is faster; results in the order given."""
        ...

    def close(self) -> None:
        """Free every process and file. Safe to call twice."""
        ...
