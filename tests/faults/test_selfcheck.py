"""Every planted fault is caught at every degree, by the check that names it; clean code is not.

A check that no fault needs cannot fail for a reason of its own: each has one that only it catches.
Faults are planted in two processes side by side, in simulation.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
import torch

import tpcheck
from tpcheck.errors import SubjectError
from tpcheck.faults import FAULTS
from tpcheck.records import CHECK_NAMES, FAIL
from tpcheck.workflow import FaultResult, selfcheck

torch.set_num_threads(1)
TP_SIZES = (2, 4, 8)
ALONE = ("rank_agreement", "repeatability", "tiling", "decode", "drift", "schedule")
"""Checks with a fault that no other deciding check sees."""


def planted(name: str) -> FaultResult:
    torch.set_num_threads(1)
    (result,) = selfcheck(TP_SIZES, faults=[name])
    return result


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[FaultResult]]]:
    """The results of the faults that this process's selected tests ask for."""
    asked = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and "name" in getattr(item, "callspec", _Nothing).params
    }
    if "PYTEST_XDIST_WORKER" in os.environ:
        yield _Lazy()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as processes:
        yield {name: processes.submit(planted, name) for name in FAULTS if name in asked}
        processes.shutdown(cancel_futures=True)


class _Nothing:
    params: dict[str, str] = {}  # noqa: RUF012


class _Lazy(dict[str, "Future[FaultResult]"]):
    """Results made when they are asked for: xdist already runs tests side by side."""

    def __missing__(self, name: str) -> Future[FaultResult]:
        future: Future[FaultResult] = Future()
        future.set_result(planted(name))
        self[name] = future
        return future


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_by_the_check_that_names_it(results, name):
    fault, result = FAULTS[name], results[name].result()
    assert fault.caught_by in result.caught_by
    assert not result.survived
    assert (result.fault, result.thread, result.expected) == (name, fault.thread, fault.caught_by)
    assert result.drift or result.reason, "where drift misses it, a reason says why"
    if fault.caught_by in ALONE:
        # a derived tolerance is shown, but decides nothing
        assert set(result.caught_by) - {"allclose"} == {fault.caught_by}


def test_every_check_has_a_fault_of_its_own():
    caught_by = {fault.caught_by for fault in FAULTS.values()}
    assert caught_by == set(CHECK_NAMES) - {"plan", "allclose"}


@pytest.mark.parametrize("check", ALONE)
def test_what_only_one_check_sees_is_seen_by_no_other_at_any_degree(check):
    fault = next(fault for fault in FAULTS.values() if fault.caught_by == check)
    report = tpcheck.run(
        f"builtin:llama-tiny+{fault.name}",
        (2, 4),
        backend="sim",
        confirm=False,
        dtypes=fault.dtypes or ("bfloat16", "float16"),
        seed=5,
    )
    for verdict in report.verdicts:
        deciding = {
            name
            for name, found in verdict.checks.items()
            if found.outcome == FAIL and found.facts.get("decides", name != "allclose")
        }
        assert deciding == {check}
        assert verdict.outcome not in ("PASS", "INCONCLUSIVE")


@pytest.mark.parametrize("name", ["llama-tiny", "qwen3-tiny", "gpt2-tiny", "olmo2-tiny"])
def test_clean_code_passes_and_no_check_fails(name):
    report = tpcheck.run(
        f"builtin:{name}", (2, 4), backend="sim", dtypes=("bfloat16", "float16", "float32")
    )
    assert report.outcome == "PASS"
    for verdict in report.verdicts:
        assert not [c for c, found in verdict.checks.items() if found.outcome == FAIL]
        assert verdict.checks["structural"].facts["relative_rms"] < 1e-14


def test_results_come_in_the_order_of_the_faults_with_progress():
    seen = []
    names = ["wrong_shard_dim", "extra_collective"]
    found = selfcheck((2,), faults=names, progress=lambda *step: seen.append(step))
    assert [result.fault for result in found] == names
    assert seen == [(0, 2, "wrong_shard_dim"), (1, 2, "extra_collective"), (2, 2, "done")]


def test_a_survivor_is_called_one():
    caught = FaultResult("f", "", "structural", ("structural",), False, False, 1, "too small")
    assert not caught.survived
    missed = FaultResult("f", "", "structural", ("drift",), True, True, 1, None)
    unseen = FaultResult("f", "", "structural", ("structural",), False, True, 1, None)
    assert missed.survived
    assert unseen.survived


def test_an_unknown_fault_is_named():
    with pytest.raises(SubjectError, match="fault='nope', but should be one of double_bias"):
        selfcheck(faults=["nope"])
