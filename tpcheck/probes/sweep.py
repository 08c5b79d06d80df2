"""Probe an all-reduce over degrees, dtypes and message sizes, and find where it changes.

Requirement: libraries choose another algorithm by message size, so one size says little: the sizes
are swept, and between two that are reduced differently the exact switch is searched for. Every
degree's ranks are opened once; what a rank cannot do is one error that names the message.

[Short Messages] A message of few elements has fewer chunks than ranks, so that orders appear as it
grows. That is one and the same ring; only the orders of a long message can be said to change.
[NCCL] The same calls go to NCCL, whose version the environment records. None was run yet: its
switches, fused additions and AVG are expected from its source, and only emulated in tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tpcheck import environment
from tpcheck.errors import BackendError, SubjectError, TPCheckError
from tpcheck.groups.jobs import Job, Ranks
from tpcheck.groups.opening import backend_room, open_ranks
from tpcheck.numerics.order import Chunk, Tree
from tpcheck.numerics.probed_reduction import ProbedMessage, ProbedReduction
from tpcheck.probes.probing import ProbeTask, RankReading
from tpcheck.progress import Progress
from tpcheck.subjects import SubjectRef

DEFAULT_TP_SIZES = (2, 4, 8)
DEFAULT_SIZES = (1, *(2 * 4**k for k in range(11)))
"""Elements: 1 to 2^21, where a message in float32 is 8 MiB."""

BUILT_IN = "all_reduce"

_SHORT = 64
"""Elements per rank below which orders may be missing; NCCL's chunks have 16 bytes at least."""


@dataclass(frozen=True, slots=True)
class MessageProbe:
    """How one message is reduced.

    order: read, invisible or unreadable; `reason` says why. wire, chunks: see ProbedMessage; none
    where the order is unreadable. repeatable: the same bits call after call. disagreeing_ranks:
    those whose bits are not rank 0's. reproduced: the emulation returns the same bits on random
    operands. average: what explains the bits of AVG; none where AVG is not there to be probed.
    """

    tp_size: int
    dtype: str
    count: int
    order: str
    wire: str | None
    chunks: tuple[Chunk, ...]
    repeatable: bool
    disagreeing_ranks: tuple[int, ...]
    reproduced: bool | None
    average: tuple[str, ...] | None
    reason: str = ""

    @property
    def orders(self) -> tuple[tuple[Tree | None, str | None], ...]:
        """Return the distinct trees with their accumulators, in the order of their elements."""
        return tuple(dict.fromkeys((one.tree, one.accumulator) for one in self.chunks))


@dataclass(frozen=True, slots=True)
class SwitchPoint:
    """`last` elements are still reduced as the smaller messages are, `first` are not any more."""

    tp_size: int
    dtype: str
    last: int
    first: int
    change: str


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Everything that was probed, and what it was probed on."""

    collective: str
    environment: dict[str, Any]
    messages: tuple[MessageProbe, ...]
    switch_points: tuple[SwitchPoint, ...] = field(default=())

    def reduction(self) -> ProbedReduction:
        """Return what was read as a reduction for simulated ranks: this machine's bits."""
        return ProbedReduction(
            tuple(
                ProbedMessage(one.tp_size, one.dtype, one.count, one.wire, one.chunks)
                for one in self.messages
                if one.wire is not None and all(chunk.accumulator for chunk in one.chunks)
            )
        )


def probe_reductions(
    tp_sizes: Sequence[int] | None = None,
    *,
    backend: str = "auto",
    ranks_per_gpu: int | None = None,
    dtypes: Sequence[str] = ("bfloat16", "float16", "float32"),
    sizes: Sequence[int] = DEFAULT_SIZES,
    collective: SubjectRef | None = None,
    timeout_s: float = 120.0,
    progress: Progress | None = None,
) -> ProbeReport:
    """Probe every message size in every dtype at every degree.

    Args:
        tp_sizes: at least 2 each; None for those of 2, 4 and 8 that the backend can hold.
        sizes: elements of a message; also in between where the reduction changes.
        collective: a user's `fn(tensor) -> tensor`, None for the backend's all-reduce.
        timeout_s: of one message.

    Raises:
        TPCheckError: a degree, size or collective that cannot be probed here.
        BackendError: the backend cannot hold the ranks.
    """
    degrees = _degrees(tp_sizes, backend, ranks_per_gpu)
    if backend == "sim" and collective is not None:
        raise BackendError(
            f"--collective={collective.label}: runs over torch.distributed, which simulated ranks"
            " do not have; use --backend gloo or nccl"
        )
    counts = sorted(set(sizes))
    messages: list[MessageProbe] = []
    switches: list[SwitchPoint] = []
    total = len(degrees) * len(dtypes) * len(counts)
    with open_ranks(backend, max(degrees), ranks_per_gpu) as ranks:
        for degree in degrees:
            for dtype in dict.fromkeys(dtypes):
                bench = _Bench(ranks, degree, dtype, collective, timeout_s)
                found: list[MessageProbe] = []
                for count in counts:
                    if progress is not None:
                        progress(len(messages) + len(found), total, bench.name(count))
                    found.append(bench.probe(count))
                messages += found
                switches += _switches(bench, found)
        label = ranks.label
    facts = environment.collect(backend=label, device="cuda" if "nccl" in label else "cpu")
    name = collective.label if collective else BUILT_IN
    return ProbeReport(name, facts, tuple(messages), tuple(switches))


@dataclass(frozen=True, slots=True)
class _Bench:
    """Ranks of one degree, the dtype of the messages, and what reduces them."""

    ranks: Ranks
    degree: int
    dtype: str
    collective: SubjectRef | None
    timeout_s: float

    def name(self, count: int) -> str:
        return f"tp={self.degree}, {count} elements of {self.dtype}"

    def probe(self, count: int) -> MessageProbe:
        replies: Sequence[RankReading] = self._run("probe_message", self._task(count), count)
        read = replies[0].reading
        assert read is not None  # rank 0 always reads
        message, calls = read.message, list(zip(*(one.digests for one in replies), strict=True))
        repeatable = all(len(set(one.digests)) == 1 for one in replies)
        visible = message is not None and any(one.tree is not None for one in message.chunks)
        return MessageProbe(
            tp_size=self.degree,
            dtype=self.dtype,
            count=count,
            order="read" if visible else "invisible" if message else "unreadable",
            wire=message.wire if message else None,
            chunks=message.chunks if message else (),
            repeatable=repeatable,
            disagreeing_ranks=tuple(
                rank
                for rank in range(self.degree)
                if any(digests[rank] != digests[0] for digests in calls)
            ),
            reproduced=read.reproduced,
            average=read.average,
            reason=read.reason if repeatable or message else "the bits change from call to call",
        )

    def explains(self, count: int, probe: MessageProbe) -> bool:
        """Say whether a message is reduced by the orders of this probe."""
        work = (self._task(count), probe.chunks, probe.wire)
        return bool(self._run("explains", work, count)[0])

    def _task(self, count: int) -> ProbeTask:
        return ProbeTask(self.dtype, count, self.collective)

    def _run(self, function: str, payload: Any, count: int) -> Sequence[Any]:
        job = Job(f"tpcheck.probes.probing:{function}", payload, self.degree, self.timeout_s)
        (result,) = self.ranks.run([job])
        failure = result.failure
        if failure is None:
            return result.replies
        if isinstance(failure.exception, TPCheckError):
            raise failure.exception
        kind = SubjectError if self.collective else BackendError
        who = self.collective.label if self.collective else BUILT_IN
        raise kind(f"{who}: {failure.message} [{self.name(count)}]")


def _switches(bench: _Bench, probes: Sequence[MessageProbe]) -> list[SwitchPoint]:
    """Return where consecutive messages are reduced differently, each to the exact size."""
    found = []
    for smaller, larger in pairwise(probes):
        change = _change(smaller, larger)
        if change:
            last, first = _searched(bench, smaller, larger)
            found.append(SwitchPoint(bench.degree, bench.dtype, last, first, change))
    return found


def _searched(bench: _Bench, smaller: MessageProbe, larger: MessageProbe) -> tuple[int, int]:
    """Bisect between two sizes by one message each. An order that cannot be read stays coarse."""
    last, first = smaller.count, larger.count
    if not smaller.chunks or (smaller.reproduced, larger.reproduced) != (True, True):
        return last, first
    by_smaller = not set(larger.orders) <= set(smaller.orders) or smaller.wire != larger.wire
    while first - last > 1:
        middle = (last + first) // 2
        if by_smaller:
            as_smaller = bench.explains(middle, smaller)
        else:
            as_smaller = not bench.explains(middle, larger)
        last, first = (middle, first) if as_smaller else (last, middle)
    return last, first


def _change(smaller: MessageProbe, larger: MessageProbe) -> str:
    """Say what is different about the larger message; nothing if it is reduced alike."""
    if smaller.order != larger.order:
        return f"order {smaller.order} -> {larger.order}"
    if smaller.wire != larger.wire:
        return f"wire {smaller.wire} -> {larger.wire}"
    before, after = smaller.orders, larger.orders
    if before == after:
        return ""
    if before == after[: len(before)] and smaller.count < _SHORT * smaller.tp_size:
        return ""  # [Short Messages]
    rounding = [sorted({str(accumulator) for _, accumulator in one}) for one in (before, after)]
    if rounding[0] != rounding[1]:
        return "accumulator {} -> {}".format(*map("/".join, rounding))
    if len(before) != len(after):
        return f"{len(before)} orders -> {len(after)}"
    return "other orders"


def _degrees(
    asked: Sequence[int] | None, backend: str, ranks_per_gpu: int | None
) -> tuple[int, ...]:
    room = backend_room(backend, ranks_per_gpu)
    if asked is None:
        degrees = tuple(one for one in DEFAULT_TP_SIZES if one <= room)
        if not degrees:
            raise BackendError(f"backend {backend} holds {room} ranks here, but 2 should be there")
        return degrees
    for one in asked:
        if not 2 <= one <= room:
            raise TPCheckError(
                f"tp={one}, but should be 2 to {room}: one rank reduces nothing, and more than"
                f" {room} do not fit backend {backend} here"
            )
    return tuple(asked)
