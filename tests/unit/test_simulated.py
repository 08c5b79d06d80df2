"""Simulated ranks: what collectives return, how jobs fail, and that ranks keep their own state.

Jobs here are closures: in one process the payload is handed over as it is, so `call` runs it.
"""

import contextvars
import gc
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import greenlet
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tpcheck.errors import BackendError, ScheduleError, SubjectError
from tpcheck.groups.jobs import Job, JobResult, in_seconds
from tpcheck.groups.simulated import SimulatedGroup, SimulatedRanks, SimulatedWorld
from tpcheck.numerics.reduction import KINDS, reduce, reduce_sum
from tpcheck.trace import RankFailure

Body = Callable[[SimulatedWorld], Any]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)  # a process that forks later must not have others


def call(world: SimulatedWorld, body: Body) -> Any:
    return body(world)


def run(body: Body, size: int, reduction: str = "ring", timeout_s: float = 60.0) -> JobResult:
    (result,) = SimulatedRanks(reduction).run([Job(f"{__name__}:call", body, size, timeout_s)])
    return result


def replies(body: Body, size: int, reduction: str = "ring") -> tuple[Any, ...]:
    result = run(body, size, reduction)
    assert result.failure is None, result.failure
    return result.replies


def failure(body: Body, size: int, timeout_s: float = 60.0) -> RankFailure:
    result = run(body, size, timeout_s=timeout_s)
    assert result.failure is not None
    assert result.replies == ()
    return result.failure


def group(world: SimulatedWorld, seed: int = 0) -> SimulatedGroup:
    return world.group(seed=seed, dtype=torch.float32, weight_dtype=torch.bfloat16)


def operand(rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


# Collectives


@pytest.mark.parametrize("reduction", KINDS)
@pytest.mark.parametrize("op", ["sum", "max", "min", "avg"])
def test_all_reduce_is_the_emulated_reduction(reduction, op):
    shape, dtype = (3, 5, 7), torch.bfloat16
    expected = reduce([operand(r, shape, dtype) for r in range(4)], op, reduction)
    got = replies(lambda w: group(w).all_reduce(operand(w.rank, shape, dtype), op), 4, reduction)
    assert all(torch.equal(tensor, expected) for tensor in got)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_all_gather_concatenates_in_rank_order(dim):
    expected = torch.cat([operand(r, (2, 3, 4)) for r in range(3)], dim)
    got = replies(lambda w: group(w).all_gather(operand(w.rank, (2, 3, 4)), dim), 3)
    assert all(torch.equal(tensor, expected) for tensor in got)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_reduce_scatter_keeps_this_ranks_piece_of_the_sum(dim):
    operands = [operand(r, (4, 8, 12), torch.bfloat16) for r in range(4)]
    total = reduce_sum([x.movedim(dim, 0).contiguous() for x in operands])
    got = replies(lambda w: group(w).reduce_scatter(operands[w.rank], dim), 4)
    for rank, tensor in enumerate(got):
        assert torch.equal(tensor, total.chunk(4)[rank].movedim(0, dim))
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize(("split", "concat"), [(0, 0), (0, 1), (1, 0)])
def test_all_to_all_exchanges_pieces(split, concat):
    operands = [operand(r, (4, 6)) for r in range(2)]
    got = replies(lambda w: group(w).all_to_all(operands[w.rank], split, concat), 2)
    for rank, tensor in enumerate(got):
        expected = torch.cat([x.chunk(2, split)[rank] for x in operands], concat)
        assert torch.equal(tensor, expected)


def test_broadcast_returns_the_sources_tensor():
    got = replies(lambda w: group(w).broadcast(operand(w.rank, (5,)), src=2), 4)
    assert all(torch.equal(tensor, operand(2, (5,))) for tensor in got)


def test_barrier_lets_no_rank_pass_before_the_last_has_come():
    log: list[str] = []

    def body(world):
        log.append(f"before {world.rank}")
        group(world).barrier()
        log.append(f"after {world.rank}")

    replies(body, 3)
    assert [line.split()[0] for line in log] == ["before"] * 3 + ["after"] * 3


@pytest.mark.parametrize("size", [5, 40_000])
@pytest.mark.parametrize("name", ["all_reduce", "all_gather", "broadcast", "all_to_all"])
def test_every_rank_owns_its_result_and_keeps_its_operand(name, size):
    arguments = {"all_gather": (0,), "broadcast": (0,), "all_to_all": (0, 0)}.get(name, ())

    def body(world):
        tp = group(world)
        x = operand(world.rank, (2 * size,))
        before = x.clone()
        result = getattr(tp, name)(x, *arguments)
        seen = result.clone()
        tp.barrier()
        result.fill_(world.rank)
        tp.barrier()
        assert torch.equal(x, before)
        assert (result == world.rank).all()
        return seen

    first, second = replies(body, 2)
    assert torch.equal(first, second) or name == "all_to_all"


@pytest.mark.parametrize("size", [1, 2, 64])
def test_any_number_of_ranks_agrees_on_the_sum(size):
    got = replies(lambda w: group(w).all_reduce(torch.tensor([1, w.rank])).tolist(), size)
    assert got == ([size, size * (size - 1) // 2],) * size


def test_results_carry_no_gradient():
    def body(world):
        x = torch.ones(3, requires_grad=True)
        y = group(world).all_reduce(x * 2)
        return y.requires_grad, y.is_inference(), x.requires_grad

    assert replies(body, 2) == ((False, False, True),) * 2


def test_an_error_inside_a_collective_is_raised_by_every_ranks_call():
    def body(world):
        with pytest.raises(RuntimeError, match="Bool"):
            group(world).all_reduce(torch.ones(2, dtype=torch.bool), "avg")
        return group(world).all_reduce(torch.ones(1)).item()

    assert replies(body, 3) == (3.0, 3.0, 3.0)


def test_calls_are_logged_and_can_be_intercepted():
    def double(tp, call, x, run):
        return run(2 * x)

    def body(world):
        tp = group(world)
        tp.all_gather(torch.ones(2), 0)
        tp.interceptor = double
        tp.recorder.fqn = "layers.0.mlp"
        reduced = tp.all_reduce(torch.ones(2)).tolist()
        return reduced, [(c.sequence, c.fqn, c.describe()) for c in tp.recorder.take()]

    expected = (
        [4.0, 4.0],
        [
            (0, "", "all_gather([2] float32, dim=0)"),
            (1, "layers.0.mlp", "all_reduce([2] float32, sum)"),
        ],
    )
    assert replies(body, 2) == (expected, expected)


def test_weights_are_equal_on_every_rank_and_owned_by_each():
    def body(world):
        tp = group(world, seed=3)
        w = tp.weight("w", 200, 200)
        before = w.clone()
        tp.barrier()
        w.mul_(world.rank)
        tp.barrier()
        return before, w

    ranks = SimulatedRanks()
    results = ranks.run([Job(f"{__name__}:call", body, size) for size in (1, 3)])
    (alone, _), *_ = results[0].replies
    for rank, (before, after) in enumerate(results[1].replies):
        assert torch.equal(before, alone)
        assert torch.equal(after, alone * rank)
    ranks.close()
    ranks.close()


@pytest.mark.parametrize("name", ["process_group", "mesh"])
def test_there_is_no_process_group_to_hand_out(name):
    result = failure(lambda w: getattr(group(w), name), 2)
    assert result.kind == "raised"
    assert isinstance(result.exception, BackendError)
    assert "the simulated backend has none; use --backend gloo" in result.message


# Schedules


def test_ranks_in_different_collectives_are_named():
    def body(world):
        tp = group(world)
        tp.barrier()
        if world.rank == 3:
            return tp.all_gather(torch.ones(2, 3), 1)
        return tp.all_reduce(torch.ones(4, 64, dtype=torch.bfloat16))

    result = failure(body, 4)
    assert (result.kind, result.rank, result.exception_type) == ("schedule", 3, "ScheduleError")
    assert result.message == (
        "ranks 0-2 wait in all_reduce([4, 64] bfloat16, sum) (#1),"
        " rank 3 in all_gather([2, 3] float32, dim=1) (#1)"
    )
    assert isinstance(result.exception, ScheduleError)
    assert str(result.exception) == result.message
    assert result.in_flight[3] == "#1 all_gather([2, 3] float32, dim=1)"
    assert "tp.all_gather(torch.ones(2, 3), 1)" in result.stacks[3]


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (
            lambda tp: tp.all_reduce(torch.ones(3)),
            lambda tp: tp.all_reduce(torch.ones(4)),
            "rank 0 waits in all_reduce([3] float32, sum) (#0),"
            " rank 1 in all_reduce([4] float32, sum) (#0)",
        ),
        (
            lambda tp: tp.all_reduce(torch.ones(3)),
            lambda tp: tp.all_reduce(torch.ones(3).half()),
            "rank 0 waits in all_reduce([3] float32, sum) (#0),"
            " rank 1 in all_reduce([3] float16, sum) (#0)",
        ),
        (
            lambda tp: tp.all_reduce(torch.ones(3)),
            lambda tp: tp.all_reduce(torch.ones(3), "max"),
            "rank 0 waits in all_reduce([3] float32, sum) (#0),"
            " rank 1 in all_reduce([3] float32, max) (#0)",
        ),
        (
            lambda tp: tp.broadcast(torch.ones(3), 0),
            lambda tp: tp.barrier(),
            "rank 0 waits in broadcast([3] float32, src=0) (#0), rank 1 in barrier() (#0)",
        ),
        (
            lambda tp: tp.barrier(),
            lambda tp: None,
            "rank 0 waits in barrier() (#0), rank 1 has returned",
        ),
        (
            lambda tp: None,
            lambda tp: tp.barrier(),
            "rank 0 has returned, rank 1 waits in barrier() (#0)",
        ),
    ],
)
def test_any_difference_in_a_call_is_a_schedule_failure(first, second, text):
    result = failure(lambda w: (first if w.rank == 0 else second)(group(w)), 2)
    assert (result.kind, result.rank, result.message) == ("schedule", None, text)


def test_what_an_interceptor_sends_instead_is_what_ranks_must_agree_on():
    def body(world):
        tp = group(world)
        tp.interceptor = lambda tp, call, x, run: run(x[: 2 + world.rank])
        return tp.all_reduce(torch.ones(4))

    assert failure(body, 2).message == (
        "rank 0 waits in all_reduce([2] float32, sum) (#0),"
        " rank 1 in all_reduce([3] float32, sum) (#0)"
    )


def test_equal_ranks_stand_together_and_long_lists_are_cut():
    def body(world):
        if world.rank in (0, 2, 3, 6):
            return None
        return group(world).all_reduce(torch.ones(world.rank))

    result = failure(body, 10)
    assert result.message == (
        "ranks 0,2-3,6 have returned, rank 1 waits in all_reduce([1] float32, sum) (#0),"
        " rank 4 in all_reduce([4] float32, sum) (#0), rank 5 in all_reduce([5] float32, sum) (#0)"
        " and 3 more ranks elsewhere"
    )


# Ranks that raise


def test_the_lowest_raising_rank_is_reported_and_the_others_unwind():
    unwound: list[int] = []

    def body(world):
        tp = group(world)
        try:
            tp.barrier()
            if world.rank >= 2:
                raise ValueError("first line\nsecond line")
            tp.all_reduce(torch.ones(2))
        finally:
            unwound.append(world.rank)

    result = failure(body, 4)
    assert (result.kind, result.rank, result.exception_type) == ("raised", 2, "ValueError")
    assert result.message == "rank 2 raised ValueError: first line"
    assert isinstance(result.exception, ValueError)
    assert "Traceback" in result.traceback
    assert 'raise ValueError("first line\\nsecond line")' in result.traceback
    assert "second line" in result.traceback
    assert result.in_flight == dict.fromkeys((0, 1), "#1 all_reduce([2] float32, sum)")
    assert sorted(unwound) == [0, 1, 2, 3]


def test_a_cause_is_in_the_traceback_and_frames_are_let_go():
    def body(world):
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    result = failure(body, 2)
    assert "KeyError: 'inner'" in result.traceback
    assert result.exception.__traceback__ is None
    assert result.exception.__cause__.__traceback__ is None


def test_an_exception_without_words_is_a_failure_by_its_type():
    class Speechless(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    def body(world):
        raise Speechless

    result = failure(body, 2)
    assert result.message == "rank 0 raised Speechless: its text raises RuntimeError"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.99994, "3"), (120.0, "120"), (119.2, "119.2"), (3599.96, "3600"), (0.2, "0.2")],
)
def test_time_that_is_left_is_written_as_it_was_given(seconds, text):
    assert in_seconds(seconds) == f"{text} s"


def test_system_exit_is_a_failure_and_does_not_end_the_process():
    result = failure(lambda w: exit(0), 2)
    assert (result.kind, result.rank, result.exception_type) == ("raised", 0, "SystemExit")


def test_keyboard_interrupt_reaches_the_caller_after_the_ranks_unwound():
    unwound: list[int] = []

    def body(world):
        try:
            group(world).barrier()
            if world.rank == 1:
                raise KeyboardInterrupt
            group(world).barrier()
        finally:
            unwound.append(world.rank)

    with pytest.raises(KeyboardInterrupt):
        run(body, 3)
    assert sorted(unwound) == [0, 1, 2]


def test_a_collective_in_a_finally_block_does_not_park_forever():
    unwound: list[int] = []

    def body(world):
        tp = group(world)
        try:
            tp.barrier()
            if world.rank == 0:
                raise ValueError("stop")
            tp.barrier()
        finally:
            try:
                tp.all_reduce(torch.ones(1))
            finally:
                unwound.append(world.rank)

    result = failure(body, 3)
    assert result.kind == "schedule"
    assert sorted(unwound) == [0, 1, 2]


def test_a_rank_that_swallows_everything_is_given_up():
    def body(world):
        tp = group(world)
        if world.rank == 0:
            raise ValueError("stop")
        while not stop:
            try:
                tp.barrier()
            except BaseException:
                pass

    stop: list[int] = []
    assert failure(body, 2).kind == "raised"
    stop.append(1)
    gc.collect()


def test_a_thousand_failing_jobs_leave_no_greenlet_behind():
    def body(world):
        group(world).barrier()
        if world.rank == world.size - 1:
            raise ValueError("stop")
        group(world).all_reduce(torch.ones(world.rank + 1))

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), greenlet.greenlet) and bool(o) for o in gc.get_objects())

    before = alive()
    ranks = SimulatedRanks()
    results = ranks.run([Job(f"{__name__}:call", body, 3)] * 1000)
    assert all(result.failure is not None for result in results)
    assert alive() == before


# What greenlets cannot do


@torch.library.custom_op("tpcheck_tests::collective", mutates_args=())
def collective_op(x: torch.Tensor) -> torch.Tensor:
    return _tp.all_reduce(x)


_tp: Any = None


def test_a_collective_inside_an_operator_is_refused_and_not_an_abort():
    def body(world):
        global _tp
        _tp = group(world)
        return collective_op(torch.ones(2))

    result = failure(body, 2)
    assert isinstance(result.exception, BackendError)
    assert result.message == (
        "rank 0 raised BackendError: all_reduce([2] float32, sum): called inside a C++ operator"
        " (torch.ops, a custom op or a backward pass), where a simulated rank cannot be suspended;"
        " use --backend gloo"
    )


def test_a_collective_inside_a_backward_pass_is_refused():
    class Reduce(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, tp):
            ctx.tp = tp
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return ctx.tp.all_reduce(gradient), None

    def body(world):
        x = torch.ones(2, requires_grad=True)
        Reduce.apply(x, group(world)).sum().backward()

    assert "called inside a C++ operator" in failure(body, 2).message


def test_a_collective_in_an_autograd_function_is_fine():
    class Reduce(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, tp):
            return tp.all_reduce(x)

        @staticmethod
        def backward(ctx, gradient):
            return gradient, None

    def body(world):
        x = torch.ones(2, requires_grad=True)
        Reduce.apply(x, group(world)).sum().backward()
        return x.grad.tolist()

    assert replies(body, 3) == ([1.0, 1.0],) * 3


def test_a_collective_from_another_thread_is_refused():
    def body(world):
        caught: list[BaseException] = []
        tp = group(world)

        def other():
            try:
                tp.all_reduce(torch.ones(2))
            except SubjectError as error:
                caught.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return str(caught[0])

    text = replies(body, 2)[1]
    assert text.startswith("all_reduce([2] float32, sum): called outside rank 1's run")


def test_a_group_outlives_its_job_only_to_say_so():
    (tp, _) = replies(group, 2)
    with pytest.raises(SubjectError, match="called outside rank 0's run"):
        tp.barrier()


def test_a_rank_stuck_in_python_is_interrupted_and_named():
    unwound: list[int] = []

    def body(world):
        try:
            if world.rank == 1:
                while True:
                    pass
            group(world).barrier()
        finally:
            unwound.append(world.rank)

    result = failure(body, 3, timeout_s=0.2)
    assert (result.kind, result.rank) == ("hung", 1)
    assert result.message == "rank 1 did not return within 0.2 s; rank 0 waits in barrier() (#0)"
    assert "while True" in result.stacks[1] or "pass" in result.stacks[1]
    assert "barrier()" in result.stacks[0]
    assert sorted(unwound) == [0, 1]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_timer_that_somebody_else_armed_is_left_alone():
    fired: list[int] = []
    handler = lambda number, frame: fired.append(number)  # noqa: E731
    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        replies(lambda w: group(w).barrier(), 2)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 900
        assert signal.getsignal(signal.SIGALRM) is handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert fired == []


def test_jobs_run_in_other_threads_too():
    results: list[tuple[Any, ...]] = []
    body: Body = lambda w: group(w).all_reduce(torch.ones(1)).item()  # noqa: E731
    thread = threading.Thread(target=lambda: results.append(replies(body, 2)))
    thread.start()
    thread.join()
    assert results == [(2.0, 2.0)]


def test_sizes_and_reductions_are_checked():
    with pytest.raises(BackendError, match="size=257, but should be from 1 to 256"):
        run(lambda w: None, 257)
    with pytest.raises(BackendError, match="reduction='star', but should be one of ring, tree"):
        SimulatedRanks("star")


# Thread state


class SeesOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def observe() -> tuple[Any, ...]:
    """Return what an observer inside the rank can tell about the state around it."""
    x = torch.ones(2, 2, requires_grad=torch.is_grad_enabled())
    y = x @ x
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        y.requires_grad,
        y.is_inference(),
        y.dtype,
        y.device.type,
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        torch.utils._python_dispatch.is_in_torch_dispatch_mode(),
    )


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "inference_off": lambda: torch.inference_mode(False),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast_half": lambda: torch.autocast("cpu", dtype=torch.float16, cache_enabled=False),
    "autocast_off": lambda: torch.autocast("cpu", enabled=False, dtype=torch.float16),
    "dispatch": SeesOps,
    "function": SeesFunctions,
    "dtype": lambda: default_dtype(torch.float64),
    "device": lambda: torch.device("meta"),
    "set_device": lambda: default_device("meta"),
}
TOGETHER = [("no_grad",), ("inference", "autocast"), ("dispatch", "inference", "function", "dtype")]


def alone(names: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """Return what a process of its own would observe before, inside and after the modes."""
    seen = [observe()]
    if names:
        with MODES[names[0]]():
            seen += alone(names[1:])
    return [*seen, observe()]


def parked(tp: SimulatedGroup, names: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """Observe as `alone` does, but let every other rank run before each look."""
    tp.barrier()
    seen = [observe()]
    if names:
        with MODES[names[0]]():
            tp.barrier()
            seen += parked(tp, names[1:])
            tp.barrier()
    tp.barrier()
    return [*seen, observe()]


def pad(tp: SimulatedGroup, rounds: int) -> None:
    for _ in range(rounds):
        tp.barrier()


def stops(names: tuple[str, ...]) -> int:
    return 2 + 4 * len(names)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("caller", ["", "no_grad", "inference", "autocast", "dispatch", "device"])
def test_a_mode_on_one_rank_is_not_seen_by_another(name, caller):
    def body(world):
        tp = group(world)
        names = (name,) if world.rank % 2 else ()
        seen = parked(tp, names)
        pad(tp, stops((name,)) - stops(names))
        return seen

    def check() -> None:
        before = observe()
        with_mode, without = alone((name,)), alone(())
        assert replies(body, 4) == (without, with_mode, without, with_mode)
        assert observe() == before

    if caller:
        with MODES[caller]():
            check()
    else:
        check()


@pytest.mark.parametrize("one", TOGETHER)
@pytest.mark.parametrize("other", TOGETHER)
@pytest.mark.parametrize("delay", [0, 1, 3])
def test_ranks_enter_and_leave_their_modes_in_any_order(one, other, delay):
    plans = {0: (0, one), 1: (delay, other), 2: (2 * delay, one)}
    longest = max(wait + stops(names) for wait, names in plans.values())

    def body(world):
        tp = group(world)
        wait, names = plans[world.rank]
        pad(tp, wait)
        seen = parked(tp, names)
        pad(tp, longest - wait - stops(names))
        return seen

    before = observe()
    assert replies(body, 3) == (alone(one), alone(other), alone(one))
    assert observe() == before


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_job_leaves_the_callers_state_alone(name, error):
    def body(world):
        tp = group(world)
        with MODES[name]():
            tp.barrier()
            torch.rand(3)
            if world.rank == 1:
                raise error
            tp.barrier()

    before, rng = observe(), torch.get_rng_state()
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            run(body, 3)
    else:
        assert failure(body, 3).rank == 1
    assert observe() == before
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_dispatch_mode_sees_its_own_ranks_operations_only():
    def body(world):
        tp = group(world)
        if world.rank == 0:
            with SeesOps() as mode:
                tp.all_reduce(torch.ones(64).sin())
                tp.barrier()
            return mode.ops
        torch.ones(64).cos()
        tp.all_reduce(torch.ones(64))
        torch.ones(64).tanh()
        tp.barrier()
        return []

    ops, _ = replies(body, 2)
    assert ops == ["aten.ones.default", "aten.sin.default"]


def test_a_collective_inside_a_dispatch_handler_keeps_the_rest_of_the_handler_apart():
    class Reduces(TorchDispatchMode):
        def __init__(self, tp):
            super().__init__()
            self.tp = tp

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.sin.default:
                result = self.tp.all_reduce(result)
            return result

    def body(world):
        tp = group(world)
        x = torch.full((2,), float(world.rank), requires_grad=True)
        with Reduces(tp):
            first = torch.sin(x)
            second = torch.sin(x + 1)
        return first.tolist() + second.tolist()

    a, b, c = replies(body, 3)
    assert a == b == c
    total = sum(torch.sin(torch.tensor(float(r))).item() for r in range(3))
    assert a[0] == pytest.approx(total)


def test_every_rank_has_its_own_generator_and_starts_from_the_callers():
    torch.manual_seed(5)
    expected = [torch.rand(3).tolist(), torch.rand(3).tolist()]
    seeded = []
    for rank in range(2):
        torch.manual_seed(rank)
        seeded.append(torch.rand(2).tolist())

    def body(world):
        tp = group(world)
        first = torch.rand(3).tolist()
        tp.barrier()
        second = torch.rand(3).tolist()
        torch.manual_seed(world.rank)
        tp.barrier()
        return [first, second], torch.rand(2).tolist()

    torch.manual_seed(5)
    got = replies(body, 2)
    assert got == ((expected, seeded[0]), (expected, seeded[1]))
    assert torch.rand(3).tolist() == expected[0]


def test_every_rank_has_its_own_context_variables():
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    variable.set(7)

    def body(world):
        start = variable.get()
        variable.set(world.rank)
        group(world).barrier()
        return start, variable.get()

    assert replies(body, 3) == ((7, 0), (7, 1), (7, 2))
    assert variable.get() == 7


def test_ranks_compute_on_one_thread_and_leave_the_count_as_it_was():
    def counting(world: SimulatedWorld) -> int:
        return torch.get_num_threads()

    def raising(world: SimulatedWorld) -> None:
        torch.set_num_threads(2)
        raise ValueError("with other threads")

    torch.set_num_threads(3)
    assert replies(counting, 2) == (1, 1)
    assert torch.get_num_threads() == 3
    assert failure(raising, 2).kind == "raised"
    assert torch.get_num_threads() == 3
