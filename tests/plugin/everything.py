"""A user's test file with one test of each kind; test_plugin_runs.py copies and runs it."""

import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import tpcheck
from tpcheck.pytest_plugin import tp_degrees

HELD = {}
FEW = settings(max_examples=30)


def subject_of(hidden, *, twist=lambda tp, y: y, reduce=lambda tp, y: tp.all_reduce(y), bias=1.0):
    """An MLP; `twist` changes a rank's partial before it is reduced, `bias` is added after."""

    @tpcheck.subject(vocab_size=16, seq_len=4)
    def build(tp):
        embed = tp.weight("embed", 16, hidden)
        up = tp.weight("up", 24 * hidden, hidden).chunk(tp.size, 0)[tp.rank]
        down = tp.weight("down", hidden, 24 * hidden).chunk(tp.size, 1)[tp.rank]
        added = tp.weight("bias", hidden)

        def forward(ids):
            y = reduce(tp, twist(tp, embed[ids] @ up.T @ down.T)) + bias * added
            return y @ embed.T

        return forward

    return build


def doubled(tp, y):
    return y if tp.size == 1 else y * 2


def twice_on_real_ranks(tp, y):
    return y * 2 if int(os.environ.get("WORLD_SIZE", "1")) > 1 else y


def held_by_the_process(tp, y):
    return y * HELD.setdefault(tp.size, tp.rank + 1) / (tp.rank + 1)


def by_process_group(tp, y):
    y = y.clone()
    dist.all_reduce(y, group=tp.process_group)
    return y


def refuse(tp, y):
    if tp.size > 1:
        raise tpcheck.IllegalDegreeError(f"tp_size={tp.size}, but it is too small")
    return y


def test_plain(tp_check, tp_pool):
    report = tp_check(subject_of(8))
    assert report.outcome == "PASS"
    assert [verdict.tp_size for verdict in report.verdicts] == list(tp_pool.degrees)
    assert report.path.backend == tp_pool.backend == "gloo"


def test_plain_wrong(tp_check):
    tp_check(subject_of(8, twist=doubled))


def test_report_of_the_pool(tp_pool):
    assert tp_pool.run(subject_of(8, twist=doubled)).outcome == "WRONG"


def test_no_such_option(tp_check):
    tp_check(subject_of(8), tp_size=2)


def test_beyond_the_world(tp_check):
    tp_check(subject_of(8), tp_sizes=(2, 16))


def test_undecorated(tp_check):
    tp_check(lambda tp: None)


@FEW
@given(hidden=st.integers(1, 40), tp_size=tp_degrees())
def test_property(tp_check, hidden, tp_size):
    tp_check(subject_of(hidden), tp_sizes=(tp_size,))


@FEW
@given(hidden=st.integers(1, 40), tp_size=tp_degrees())
def test_property_wrong(tp_check, hidden, tp_size):
    twist = doubled if hidden >= 3 else lambda tp, y: y
    tp_check(subject_of(hidden, twist=twist), tp_sizes=(tp_size,))


@FEW
@given(hidden=st.integers(1, 40))
def test_two_bugs(tp_check, hidden):
    tp_check(subject_of(hidden, twist=doubled if hidden > 5 else refuse), tp_sizes=(2,))


@settings(max_examples=5)
@given(hidden=st.integers(1, 4))
def test_only_real_ranks_differ(tp_check, hidden):
    tp_check(subject_of(hidden, twist=twice_on_real_ranks), tp_sizes=(2,))


@FEW
@given(hidden=st.integers(1, 4))
def test_only_simulation_differs(tp_check, hidden):
    tp_check(subject_of(hidden, twist=held_by_the_process), tp_sizes=(2,))


@settings(max_examples=3)
@given(hidden=st.integers(1, 4))
def test_needs_real_ranks(tp_check, hidden):
    report = tp_check(subject_of(hidden, reduce=by_process_group), tp_sizes=(2,))
    assert report.path.backend == "gloo"


@settings(max_examples=3, deadline=None, derandomize=True, print_blob=False)
@given(hidden=st.integers(1, 4))
def test_own_settings(tp_check, hidden):
    tp_check(subject_of(hidden), tp_sizes=(2,))
    inner = test_own_settings._hypothesis_internal_use_settings
    assert (inner.max_examples, inner.deadline, inner.derandomize) == (3, None, True)


@FEW
@given(tp_size=tp_degrees())
def test_degrees(tp_pool, tp_size):
    assert tp_size in tp_pool.degrees


@pytest.mark.tp(min_size=2)
def test_world_of_two(tp_pool):
    assert tp_pool.world >= 2


@pytest.mark.tp(min_size=32)
def test_world_of_thirty_two(tp_pool):
    raise AssertionError("it should be skipped")


def test_torch_is_the_users(tp_check):
    assert torch.get_default_dtype() == torch.float32
