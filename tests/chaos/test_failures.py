"""A rank that raises, dies, hangs or disagrees is named, and the next job runs."""

import os
import random
import signal
import threading
import time

import chaos_jobs
import pytest
import torch

from tpcheck.errors import IllegalDegreeError, ScheduleError
from tpcheck.groups.jobs import Job
from tpcheck.groups.pool import RankPool

torch.set_num_threads(1)
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def pool():
    with RankPool(4) as pool:
        yield pool


def job(function, payload=None, size=2, timeout_s=PATIENCE_S):
    assert callable(getattr(chaos_jobs, function))
    return Job(f"chaos_jobs:{function}", payload, size, timeout_s)


def failure_of(pool, *args, **fields):
    (result,) = pool.run([job(*args, **fields)])
    assert result.failure is not None
    assert result.replies == ()
    assert_next_job_runs(pool)
    return result.failure


def assert_next_job_runs(pool):
    for size in (4, 2):
        (result,) = pool.run([job("healthy", size=size)])
        assert result.failure is None, result.failure
        assert result.replies[0]["sum"].tolist() == [size * (size + 1) / 2] * 4


def test_a_rank_that_raises_while_the_others_wait_is_blamed_with_its_exception(pool):
    failure = failure_of(pool, "raise_on", {"rank": 2}, size=4)
    assert failure.kind == "raised"
    assert failure.message == "rank 2 raised ValueError: a bad shape"
    assert (failure.rank, failure.exception_type) == (2, "ValueError")
    assert isinstance(failure.exception, ValueError)
    assert 'raise ValueError("a bad shape")' in failure.traceback
    assert "tpcheck/groups/worker.py" not in failure.traceback
    assert failure.in_flight == dict.fromkeys((0, 1, 3), "#1 all_reduce([4, 64] float32, sum)")
    assert set(failure.stacks) == {0, 1, 2, 3}
    assert "in raise_on" in failure.stacks[0]
    assert "tpcheck/groups/worker.py" not in failure.stacks[0]


def test_an_exception_of_every_rank_keeps_its_type_and_attributes(pool):
    failure = failure_of(pool, "refuse", size=4)
    assert failure.message.startswith("every rank raised IllegalDegreeError: heads=6")
    assert isinstance(failure.exception, IllegalDegreeError)
    assert failure.exception.legal_tp_sizes == (1, 2, 3)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("exit_politely", "every rank raised SystemExit: enough"),
        ("raise_unpicklable", "every rank raised _Stubborn: two arguments"),
        ("raise_speechless", "every rank raised _Speechless: its text raises RuntimeError"),
        ("return_lambda", "every rank raised TypeError: chaos_jobs:return_lambda returned a funct"),
    ],
)
def test_odd_exceptions_become_text(pool, function, message):
    failure = failure_of(pool, function)
    assert failure.kind == "raised"
    assert failure.message.startswith(message)


def test_a_rank_that_exits_is_blamed_and_not_those_that_lost_their_peer(pool):
    failure = failure_of(pool, "leave", {"rank": 1}, size=4)
    assert (failure.kind, failure.rank) == ("died", 1)
    assert failure.message == "rank 1 exited with code 3 before it answered"


def test_a_segmentation_fault_leaves_the_stack_of_the_rank(pool):
    failure = failure_of(pool, "crash", {"rank": 0})
    assert failure.message == "rank 0 was killed by SIGSEGV"
    assert "in crash" in failure.stacks[0]


def test_ranks_in_different_collectives_are_a_schedule_failure_long_before_the_timeout(pool):
    failure = failure_of(pool, "mismatch", {"rank": 3}, size=4)
    assert failure.kind == "schedule"
    assert isinstance(failure.exception, ScheduleError)
    assert failure.message == (
        "ranks 0-2 wait in all_reduce([4, 64] float32, sum) (#1),"
        " rank 3 in all_gather([4, 64] float32, dim=0) (#1)"
    )
    assert "in mismatch" in failure.stacks[3]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_two_dtypes_that_end_a_rank_are_a_schedule_failure_with_every_ranks_call(pool, rank):
    failure = failure_of(pool, "two_dtypes", {"rank": rank}, size=3)
    assert failure.kind == "schedule"
    assert isinstance(failure.exception, ScheduleError)
    assert f"rank {rank} called all_reduce([2] float32, sum) (#0)" in failure.message
    assert "called all_reduce([2] float64, sum) (#0)" in failure.message


def test_a_rank_that_returns_without_a_collective_is_a_schedule_failure(pool):
    failure = failure_of(pool, "return_early", {"rank": 1}, size=4)
    assert failure.kind == "schedule"
    assert failure.message == (
        "ranks 0, 2-3 wait in all_reduce([3] float32, sum) (#1), rank 1 returned after 1 collective"
    )


def test_a_hang_names_the_rank_where_it_is_and_the_operation_the_others_wait_in(pool):
    failure = failure_of(pool, "sleep_before_collective", {"rank": 1}, size=4, timeout_s=2)
    assert (failure.kind, failure.rank) == ("hung", 1)
    assert failure.message.startswith(
        "rank 1 did not return within 2 s: ranks 0, 2-3 wait in"
        " all_reduce([4, 64] bfloat16, sum) (#1), rank 1 is in sleep_before_collective (chaos_jobs"
    )
    assert failure.in_flight[0] == "#1 all_reduce([4, 64] bfloat16, sum)"
    assert "in sleep_before_collective" in failure.stacks[1]


def test_a_stopped_rank_has_no_stack_and_says_so(pool):
    failure = failure_of(pool, "stop", {"rank": 0}, timeout_s=2)
    assert (failure.kind, failure.rank) == ("hung", 0)
    assert failure.stacks[0].startswith("no stack: rank 0 is stopped")


def test_ranks_killed_at_random_moments_never_stop_the_pool(pool):
    moments = random.Random(7)
    hits = 0
    for round_ in range(20):
        size = 2 if round_ % 3 == 0 else 4
        pool.run([job("empty", size=size)])
        world = [
            link for link in map(pool.fleet.link, range(4)) if link.layout.endswith(f"-{size}")
        ]
        timer = threading.Timer(moments.uniform(0.0, 0.15), world[round_ % size].kill_process)
        timer.start()
        (result,) = pool.run([job("loop", {"seconds": 0.3}, size=size)])
        timer.join()
        if result.failure is not None:  # killed before the job began, a rank is replaced unseen
            hits += 1
            assert result.failure.kind == "died", result.failure
            assert result.failure.message.startswith(f"rank {round_ % size} was killed by SIGKILL")
    assert hits >= 5
    assert_next_job_runs(pool)


def test_a_rank_killed_between_jobs_is_replaced_unseen(pool):
    for rank in range(4):
        pool.fleet.link(rank).kill_process()
    time.sleep(0.2)
    assert_next_job_runs(pool)


def test_a_failure_leaves_the_job_beside_it_alone(pool):
    jobs = [job("loop", {"seconds": 1.0}), job("leave", {"rank": 0}), job("healthy")]
    beside, failed, after = pool.run(jobs)
    assert beside.failure is None
    assert failed.failure.kind == "died"
    assert after.failure is None


def test_the_death_of_the_zygote_fails_the_job_and_not_the_session(pool):
    pool.run([job("empty", size=4)])
    zygote = pool.fleet.pids[0]
    timer = threading.Timer(0.2, os.kill, (zygote, signal.SIGKILL))
    timer.start()
    (result,) = pool.run([job("loop", {"seconds": 30}, size=4)])
    timer.join()
    assert result.failure.kind == "died"
    assert "died together with the process that started it" in result.failure.message
    assert_next_job_runs(pool)
