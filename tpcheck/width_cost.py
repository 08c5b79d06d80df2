"""What width costs: where the time of a forward goes at each degree, on the ranks that are here.

Requirement: more ranks are worth it only where a forward gets faster, so the forward and every
all-reduce in it are timed at each degree, and an all-reduce by itself over sizes. Times belong to
the backend and the machine they were measured on; the record says which, and a recommendation names
the numbers it rests on. Simulated ranks take turns in one thread, so they have no times to give.

[Waiting] A rank that comes early waits for the last inside the all-reduce. So the time of an
all-reduce is that of the rank that spent least in it, the last to come; the waiting of the others
shows as imbalance: the slowest rank's own work over the mean.
[Bus Bandwidth] Bytes times 2 (t - 1) / t, what a ring moves over each link, per second: comparable
between degrees, as nccl-tests reports it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tpcheck.building import arguments, built, measured_on
from tpcheck.errors import TPCheckError
from tpcheck.execution import Task
from tpcheck.groups.base import RecordedGroup
from tpcheck.groups.jobs import Job, JobFailed, Ranks, World
from tpcheck.observation.clocks import Call, DistributedClock, GroupClock, synchronize

SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 22)
"""Bytes of the all-reduces that are timed by themselves: 1 KiB to 4 MiB."""

REPEATS = 5
"""Timed forwards, after one that is not."""


@dataclass(frozen=True, slots=True)
class SizeCost:
    """All-reduces of one size inside the forward: bytes, calls, seconds of one (see [Waiting])."""

    nbytes: int
    calls: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """All-reduces of one size by themselves, the slowest rank's median; see [Bus Bandwidth]."""

    nbytes: int
    seconds: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class DegreeCost:
    """One degree.

    forward_s: the slowest rank's median; fastest_s, slowest_s: over repeats. communication_s: what
    the collectives of one forward take. share: of a forward that was timed with them; None with a
    `reason` where they cannot be seen. imbalance: slowest rank's own work over the mean.
    """

    tp_size: int
    forward_s: float
    fastest_s: float
    slowest_s: float
    communication_s: float | None
    share: float | None
    imbalance: float | None
    all_reduces: tuple[SizeCost, ...]
    bandwidths: tuple[Bandwidth, ...]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class WidthCost:
    """All degrees of one subject, on `measured_on`, and what they come to."""

    subject: str
    dtype: str
    measured_on: str
    degrees: tuple[DegreeCost, ...]
    recommendation: str

    def to_json(self) -> dict[str, Any]:
        """Return everything by name."""
        return asdict(self)


Calls = tuple[Call, ...]
Timed = tuple[float, Calls]


@dataclass(frozen=True, slots=True)
class RankTimes:
    """What one rank's clock saw, per repeat.

    walls: of the forward. timed: of a forward whose collectives are timed too, with their calls;
    the same forwards where that costs nothing. sweep: (bytes, seconds) of all-reduces alone.
    """

    walls: tuple[float, ...]
    timed: tuple[Timed, ...]
    sweep: tuple[tuple[int, float], ...]
    device: str


def width_cost(
    ranks: Ranks,
    task: Task,
    tp_sizes: Sequence[int],
    *,
    sizes: Sequence[int] = SIZES,
    timeout_s: float = 120.0,
) -> WidthCost:
    """Time a subject's forward and its collectives at TP=1 and at each degree.

    Args:
        task: the subject in its deployed dtype; the first of its `inputs` is run.
        sizes: bytes of the all-reduces timed by themselves.

    Raises:
        TPCheckError: the ranks are simulated, or no degree or size is given.
        JobFailed: a rank raised, died or hung.
    """
    if ranks.label == "sim":
        raise TPCheckError(
            "width: backend=sim, but should be gloo or nccl: simulated ranks take turns in one"
            " thread, so their times say nothing"
        )
    degrees = tuple(dict.fromkeys([1, *tp_sizes]))
    if len(degrees) < 2 or min(degrees) < 1 or not sizes or min(sizes) < 1:
        raise TPCheckError(
            f"width: tp_sizes={tuple(tp_sizes)}, sizes={tuple(sizes)}, but should name a degree"
            " above 1 and a size above 0 bytes"
        )
    measured = []
    for size in degrees:  # one after the other: side by side they would share the machine
        (result,) = ranks.run([Job(f"{__name__}:clocked", (task, tuple(sizes)), size, timeout_s)])
        if result.failure is not None:
            raise JobFailed(result.failure)
        measured.append(degree_cost(size, result.replies))
        device = result.replies[0].device
    where = measured_on(ranks.label, device)
    name = task.subject.label
    said = recommendation(measured, where)
    return WidthCost(name, task.dtype, where, tuple(measured), said)


def clocked(world: World, work: tuple[Task, tuple[int, ...]]) -> RankTimes:
    """Time the forward, its collectives, and all-reduces by themselves, on this rank."""
    task, sizes = work
    with torch.no_grad():
        group, forward = built(world, task)
        given = arguments(group, task, next(iter(task.inputs)))
        clock = GroupClock()
        group.interceptor = clock
        timed = _repeats(lambda: forward(*given), group, clock.calls)
        group.interceptor = None
        walls = tuple(seconds for seconds, _ in timed)
        if group.size > 1 and not timed[0][1]:
            with DistributedClock(group.device) as below:
                timed = _repeats(lambda: forward(*given), group, below.calls)
        sweep = []
        dtype: torch.dtype = getattr(torch, task.dtype)
        for nbytes in sizes if group.size > 1 else ():
            x = torch.zeros(max(1, nbytes // dtype.itemsize), dtype=dtype, device=group.device)
            group.all_reduce(x)
            every = []
            for _ in range(REPEATS):
                group.barrier()
                every.append(_timed(lambda x=x: group.all_reduce(x), group))  # type: ignore[misc]
            sweep.append((x.nbytes, statistics.median(every)))
        group.recorder.take()
    return RankTimes(walls, timed, tuple(sweep), group.device.type)


def degree_cost(tp_size: int, replies: Sequence[RankTimes]) -> DegreeCost:
    """Return what all ranks' clocks come to at one degree."""
    repeats = list(zip(*(reply.timed for reply in replies), strict=True))
    walls = [max(ranks) for ranks in zip(*(reply.walls for reply in replies), strict=True)]
    head = (tp_size, statistics.median(walls), min(walls), max(walls))
    bandwidths = _bandwidths(tp_size, replies)
    seen = repeats[0][0][1]
    if tp_size == 1:
        return DegreeCost(*head, 0.0, 0.0, 1.0, (), bandwidths)
    if not seen:
        reason = "no collective was seen, of the TPGroup or of torch.distributed"
        return DegreeCost(*head, None, None, None, (), bandwidths, reason)
    took = [_least(ranks) for ranks in repeats]
    communication = [sum(seconds for _, _, seconds in calls) for calls in took]
    shares = [
        part / max(wall for wall, _ in ranks)
        for part, ranks in zip(communication, repeats, strict=True)
    ]
    imbalances = [_imbalance(ranks) for ranks in repeats]
    return DegreeCost(
        *head,
        statistics.median(communication),
        statistics.median(shares),
        statistics.median(imbalances),
        _by_size(took),
        bandwidths,
    )


def recommendation(degrees: Sequence[DegreeCost], measured_on: str) -> str:
    """Return which degree to take for the latency of this forward, and on which numbers.

    A wider degree counts as faster only if its slowest repeat beats the narrower one's fastest.
    """
    best = degrees[0]
    for wider in sorted(degrees[1:], key=lambda one: one.tp_size):
        if wider.slowest_s < best.fastest_s:
            best = wider
    others = [one for one in degrees if one is not best]
    against = ", ".join(f"{_ms(one.forward_s)} at tp={one.tp_size}{_shared(one)}" for one in others)
    tied = [one for one in others if one.tp_size > best.tp_size and one.fastest_s <= best.slowest_s]
    close = f"; tp={tied[0].tp_size} is within the spread of repeats" if tied else ""
    return (
        f"tp={best.tp_size}: a forward takes {_ms(best.forward_s)}{_shared(best)},"
        f" against {against}{close} [{measured_on}]"
    )


def _repeats(
    function: Callable[[], Any], group: RecordedGroup, calls: list[Call]
) -> tuple[Timed, ...]:
    """Return each repeat's time with the calls that its clock saw; the first is left out."""
    found = []
    for _ in range(REPEATS + 1):
        group.barrier()
        calls.clear()
        seconds = _timed(function, group)
        found.append((seconds, tuple(calls)))
    return tuple(found[1:])


def _timed(function: Callable[[], Any], group: RecordedGroup) -> float:
    synchronize(group.device)
    started = time.perf_counter()
    function()
    synchronize(group.device)
    return time.perf_counter() - started


def _least(ranks: Sequence[Timed]) -> list[Call]:
    """Return each call with the least that any rank spent in it; see [Waiting]."""
    together = zip(*(calls for _, calls in ranks), strict=True)
    return [(call[0][0], call[0][1], min(seconds for _, _, seconds in call)) for call in together]


def _imbalance(ranks: Sequence[Timed]) -> float:
    work = [max(0.0, wall - sum(call[2] for call in calls)) for wall, calls in ranks]
    mean = statistics.fmean(work)
    return max(work) / mean if mean else 1.0


def _by_size(took: Sequence[Sequence[Call]]) -> tuple[SizeCost, ...]:
    by_size: dict[int, list[float]] = {}
    for op, nbytes, seconds in (call for calls in took for call in calls):
        if op == "all_reduce":
            by_size.setdefault(nbytes, []).append(seconds)
    return tuple(
        SizeCost(nbytes, len(times) // len(took), statistics.median(times))
        for nbytes, times in sorted(by_size.items())
    )


def _bandwidths(tp_size: int, replies: Sequence[RankTimes]) -> tuple[Bandwidth, ...]:
    found = []
    for entries in zip(*(reply.sweep for reply in replies), strict=True):
        nbytes, seconds = entries[0][0], max(one for _, one in entries)
        moved = nbytes * 2 * (tp_size - 1) / tp_size
        found.append(Bandwidth(nbytes, seconds, moved / seconds if seconds else 0.0))
    return tuple(found)


def _shared(one: DegreeCost) -> str:
    if one.share is None or one.tp_size == 1:
        return ""
    return f" ({100 * one.share:.0f} % of it communication)"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
