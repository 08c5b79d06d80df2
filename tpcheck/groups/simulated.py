"""Simulated ranks: every rank of a TP group in one process and one thread, as greenlets.

Requirement: a case must cost milliseconds, 64 ranks must fit a laptop, and a schedule mismatch must
be an immediate, exact error. A collective parks the rank until all have arrived; then the calls are
compared, the result is computed once (numerics/reduction.py) and every rank goes on with its own.

What one thread cannot do: a rank stuck in a C call is not pre-empted (one stuck in Python is, by
SIGALRM, when the job runs in the main thread and nobody else has armed that timer); module globals,
`threading.local` and the generators of `random` and numpy are shared by all ranks; and a collective
inside a C++ op or a backward pass is refused, because suspending there would abort the process (see
[No Parking]). Nor can torch.compile trace through a parked rank. `--backend gloo` has none of these
limits.
"""

from __future__ import annotations

import contextvars
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor

from tpcheck.errors import BackendError, SubjectError
from tpcheck.groups.base import RecordedGroup, Recorder, dtype_name
from tpcheck.groups.jobs import Job, JobResult
from tpcheck.groups.simulated_failures import (
    Alarm,
    RankHung,
    Standing,
    hung_failure,
    raised_failure,
    schedule_failure,
)
from tpcheck.groups.surroundings import exit_raises, one_thread, restored_environment
from tpcheck.groups.thread_state import Neutral, ThreadState, neutral
from tpcheck.groups.weights import MemoryStore, WeightSource, WeightStore
from tpcheck.numerics.probed_reduction import ProbedReduction
from tpcheck.numerics.reduction import KINDS, reduce, reduce_sum
from tpcheck.outputs import Digests
from tpcheck.trace import Collective

_CPU = torch.device("cpu")
_MAX_SIZE = 256
_LAZY_BYTES = 1 << 16
"""From here on a copy-on-write clone is cheaper than a copy."""
_MAX_KILLS = 100

Combine = Callable[[list[Tensor]], Sequence[Tensor]]
"""Every rank's operand, in rank order -> every rank's result."""


class SimulatedRanks:
    """Run jobs on simulated ranks, one job after the other. Reductions are of the given kind.

    `reduction` is one of KINDS, or a reduction that was probed: the bits of another machine.
    """

    label = "sim"
    max_size = _MAX_SIZE

    def __init__(self, reduction: str | ProbedReduction = "ring") -> None:
        if not isinstance(reduction, ProbedReduction) and reduction not in KINDS:
            raise BackendError(
                f"backend sim: reduction={reduction!r}, but should be one of {', '.join(KINDS)}"
            )
        self.reduction = reduction
        self.store = MemoryStore()

    def run(self, jobs: Sequence[Job]) -> list[JobResult]:
        """Run every job; results in the order given.

        Raises:
            BackendError: a job wants more ranks than `max_size`.
        """
        for job in jobs:
            if not 1 <= job.size <= self.max_size:
                raise BackendError(
                    f"backend sim: size={job.size}, but should be from 1 to {self.max_size}"
                )
        with one_thread(), exit_raises():
            return [_Session(job, self.store, self.reduction).run() for job in jobs]

    def close(self) -> None:
        """Forget the weights."""
        self.store = MemoryStore()


@dataclass(slots=True)
class _Rank:
    """One rank: its greenlet, the thread state it left, and the collective it waits in."""

    number: int
    state: ThreadState
    body: Callable[[_Rank], None]
    greenlet: Any = None
    call: Collective | None = None
    operand: Tensor | None = None
    combine: Combine | None = None
    value: Any = None
    reply: Any = None
    error: BaseException | None = None

    def switch(self) -> None:
        """Run until the next collective or the end. `value` is what the collective returns."""
        self.greenlet.switch(self)

    def kill(self) -> None:
        self.greenlet.throw(GreenletExit)

    def standing(self) -> Standing:
        frame = self.greenlet.gr_frame if self.call is not None else None
        return Standing(self.number, self.call, frame)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What a rank gets instead of a result: the error that the collective raises on every rank."""

    error: Exception


class _Session:
    """One job: runs the ranks in turn until all have returned or one has failed."""

    def __init__(self, job: Job, store: WeightStore, reduction: str | ProbedReduction) -> None:
        module, _, name = job.function.partition(":")
        self.function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        self.job = job
        self.store = store
        self.reduction = reduction
        self.digests = Digests()
        self.hub = getcurrent()
        self.ranks: list[_Rank] = []
        self.alarm = Alarm(job.timeout_s)

    def run(self) -> JobResult:
        with restored_environment(), self.alarm, neutral() as thread:
            self.ranks = [_Rank(r, thread.start, self._body) for r in range(self.job.size)]
            for rank in self.ranks:
                rank.greenlet = greenlet(rank.body, parent=self.hub)
                rank.greenlet.gr_context = contextvars.copy_context()
            try:
                return self._run(thread)
            except RankHung:
                standings = [rank.standing() for rank in self.ranks]
                return JobResult(failure=hung_failure(standings, self.alarm, self.job.timeout_s))
            finally:
                self._end(thread)

    def _run(self, thread: Neutral) -> JobResult:
        while True:
            for rank in self.ranks:
                self.alarm.running = rank.number
                _, rank.state = thread.resume(rank.state, rank.switch)
                self.alarm.running = None
                if rank.error is not None:
                    standings = [r.standing() for r in self.ranks]
                    return JobResult(failure=raised_failure(rank.number, rank.error, standings))
            calls = [rank.call for rank in self.ranks]
            if not any(calls):
                return JobResult(tuple(rank.reply for rank in self.ranks))
            if len({call and call.signature() for call in calls}) > 1:
                return JobResult(failure=schedule_failure([r.standing() for r in self.ranks]))
            self._meet()

    def _meet(self) -> None:
        """Give every rank the result of the collective that all of them wait in."""
        combine = self.ranks[0].combine
        operands = [rank.operand for rank in self.ranks]
        results: Sequence[Any]
        try:
            results = combine(operands) if combine else [None] * len(operands)  # type: ignore[arg-type]
        except Exception as error:
            results = [_Refusal(error)] * len(operands)
        for rank, result in zip(self.ranks, results, strict=True):
            rank.value, rank.call, rank.operand, rank.combine = result, None, None, None

    def _body(self, rank: _Rank) -> None:
        world = SimulatedWorld(self, rank)
        try:
            rank.reply = self.function(world, self.job.payload)
        except (Exception, SystemExit) as error:  # a subject must not end tpcheck with its own code
            rank.error = error

    def _end(self, thread: Neutral) -> None:
        """Unwind the ranks that are still parked, so that their finally blocks run."""
        interrupt: BaseException | None = None
        for rank in self.ranks:
            for _ in range(_MAX_KILLS):
                if rank.greenlet.dead:
                    break
                rank.call = None
                try:
                    self.alarm.running = rank.number
                    _, rank.state = thread.resume(rank.state, rank.kill)
                except RankHung:
                    pass  # in a finally block; the next kill interrupts what is left of it
                except BaseException as error:
                    interrupt = error
                finally:
                    self.alarm.running = None
        self.ranks = []
        if interrupt is not None:
            raise interrupt


class SimulatedWorld:
    """What a job function sees of one simulated rank."""

    backend = "sim"
    device = _CPU

    def __init__(self, session: _Session, rank: _Rank) -> None:
        self.rank = rank.number
        self.size = session.job.size
        self.store = session.store
        self.reduction = session.reduction
        self.digests = session.digests
        self._session = session
        self._rank = rank

    def group(self, *, seed: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> SimulatedGroup:
        """Return this rank's TPGroup for one build of a subject."""
        return SimulatedGroup(self, seed=seed, dtype=dtype, weight_dtype=weight_dtype)

    def meet(self, call: Collective, x: Tensor | None, combine: Combine | None) -> Any:
        """Park until every rank has called the same; return this rank's result."""
        rank = self._rank
        if getcurrent() is not rank.greenlet:
            raise SubjectError(
                f"{call.describe()}: called outside rank {self.rank}'s run (from another thread, or"
                " after it), but should be called by the code under test itself; a group kept in a"
                " global is another rank's here, because simulated ranks share one process: use"
                " --backend gloo"
            )
        _refuse_to_park_inside_cpp(call)
        rank.call, rank.operand, rank.combine = call, x, combine
        self._session.hub.switch()
        value, rank.value = rank.value, None
        if isinstance(value, _Refusal):
            raise value.error
        return value


class SimulatedGroup(RecordedGroup):
    """A TPGroup whose collectives meet in process. Results carry no gradient, as on Gloo."""

    def __init__(
        self, world: SimulatedWorld, *, seed: int, dtype: torch.dtype, weight_dtype: torch.dtype
    ) -> None:
        super().__init__(
            rank=world.rank,
            size=world.size,
            device=world.device,
            dtype=dtype,
            weight_dtype=weight_dtype,
            weights=WeightSource(
                seed=seed, dtype=dtype, weight_dtype=weight_dtype, store=world.store
            ),
            recorder=Recorder(),
        )
        self._world = world

    def digest(self, name: str, output: Tensor) -> str:
        return self._world.digests.of(name, output)

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        kind = self._world.reduction
        return self._meet("all_reduce", x, op, lambda xs: _one_each(reduce(xs, op, kind), len(xs)))

    def _all_gather(self, x: Tensor, dim: int) -> Tensor:
        def gather(xs: list[Tensor]) -> Sequence[Tensor]:
            return _one_each(torch.cat(xs, dim), len(xs))

        return self._meet("all_gather", x, f"dim={dim}", gather)

    def _reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        kind = self._world.reduction

        def scatter(xs: list[Tensor]) -> Sequence[Tensor]:
            # Gloo reduces all ranks' pieces, stacked in rank order, then keeps one: the ring's
            # chunks follow that order of elements.
            stacked = [torch.stack(x.chunk(len(xs), dim)) for x in xs]
            return [piece.clone() for piece in reduce_sum(stacked, kind).unbind(0)]

        return self._meet("reduce_scatter", x, f"dim={dim}", scatter)

    def _all_to_all(self, x: Tensor, split_dim: int, concat_dim: int) -> Tensor:
        def exchange(xs: list[Tensor]) -> Sequence[Tensor]:
            pieces = [x.chunk(len(xs), split_dim) for x in xs]
            return [torch.cat(arriving, concat_dim) for arriving in zip(*pieces, strict=True)]

        return self._meet(
            "all_to_all", x, f"split_dim={split_dim}, concat_dim={concat_dim}", exchange
        )

    def _broadcast(self, x: Tensor, src: int) -> Tensor:
        return self._meet(
            "broadcast",
            x,
            f"src={src}",
            lambda xs: _one_each(xs[src].clone(memory_format=torch.contiguous_format), len(xs)),
        )

    def _barrier(self) -> None:
        self._world.meet(self._named("barrier", (), "", ""), None, None)

    def _meet(self, op: str, x: Tensor, detail: str, combine: Combine) -> Tensor:
        call = self._named(op, tuple(x.shape), dtype_name(x.dtype), detail)
        result: Tensor = self._world.meet(call, x, combine)
        return result

    def _named(self, op: str, shape: tuple[int, ...], dtype: str, detail: str) -> Collective:
        # The recorder's own entry, unless an interceptor has replaced the tensor.
        calls = self.recorder.calls
        if calls and calls[-1].signature() == (op, shape, dtype, detail):
            return calls[-1]
        sequence = calls[-1].sequence if calls else 0
        return Collective(sequence, op, shape, dtype, detail, self.recorder.fqn)

    @property
    def process_group(self) -> Any:
        raise BackendError(
            "process_group: the simulated backend has none; use --backend gloo for a subject that"
            " calls torch.distributed itself"
        )

    @property
    def mesh(self) -> Any:
        raise BackendError(
            "mesh: the simulated backend has none; use --backend gloo for a subject that needs a"
            " DeviceMesh"
        )


def _one_each(result: Tensor, count: int) -> list[Tensor]:
    """Return the tensor and copies of it: one per rank, so that none sees another's writes."""
    if result.nbytes >= _LAZY_BYTES and hasattr(result, "_lazy_clone"):
        return [result, *(result._lazy_clone() for _ in range(count - 1))]
    return [result, *(result.clone() for _ in range(count - 1))]


def _cpp_entries() -> dict[int, Any]:
    """Return, by id, the code of torch's functions that enter C++ which may call Python back."""
    from torch._ops import OpOverload, OpOverloadPacket
    from torch.autograd import graph

    backward = getattr(graph, "_engine_run_backward", None)
    functions: list[Any] = [OpOverload.__call__, OpOverloadPacket.__call__, backward]
    codes = [getattr(function, "__code__", None) for function in functions]
    return {id(code): code for code in codes if code is not None}


_CPP_ENTRIES = _cpp_entries()


def _refuse_to_park_inside_cpp(call: Collective) -> None:
    """Raise if this collective runs inside a C++ call that called Python back.

    [No Parking] pybind11 and the autograd engine keep a stack of calls per thread. Ranks leave such
    calls in another order than they entered; pybind11 then terminates the process.
    """
    frame: Any = sys._getframe(2)
    while frame is not None:
        if id(frame.f_code) in _CPP_ENTRIES:  # to hash a code is to hash its constants
            raise BackendError(
                f"{call.describe()}: called inside a C++ operator (torch.ops, a custom op or a"
                " backward pass), where a simulated rank cannot be suspended; use --backend gloo"
            )
        frame = frame.f_back
