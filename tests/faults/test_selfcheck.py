"""Every planted fault is caught at every degree, by the check that names it; clean code is not.

A check that no fault needs cannot fail for a reason of its own: each has one that only it catches.
Faults are planted at TP 2 and 3, in two processes side by side, in simulation; `tpcheck selfcheck`
plants them at 2, 3, 4 and 8.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

import tpcheck
from tests.groups import single_group
from tpcheck.errors import SubjectError, TPCheckError
from tpcheck.fault_cells import find_fault, spec_for
from tpcheck.fault_matrix import MAX_CASES, STAGES, TP_SIZES, FaultMatrix, FaultResult, selfcheck
from tpcheck.faults import FAULTS, Fault
from tpcheck.faults.planting import full_weight, reduce_with
from tpcheck.records import CHECK_NAMES, FAIL
from tpcheck.render.selfcheck import render_selfcheck
from tpcheck.shard_plan import legal_tp_sizes

torch.set_num_threads(1)
DEGREES = (2, 3)
ALONE = ("plan", "schedule", "decode", "rank_agreement", "repeatability", "tiling", "drift")
"""Checks with a fault that no other deciding check sees."""


def planted(name: str) -> FaultResult:
    torch.set_num_threads(1)
    (result,) = selfcheck(DEGREES, faults=[name], casts=False).results
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
    assert result.tp_sizes == tuple(size for size in DEGREES if size >= fault.min_tp)
    assert 1 <= result.cases_needed <= MAX_CASES
    seen_by_drift = all(seen == result.tp_sizes for seen in result.drift.values())
    assert seen_by_drift or result.reason, "where drift misses it, a reason says why"
    assert result.first_stage == min(set(result.caught_by) - {"allclose"}, key=STAGES.index)
    if fault.caught_by in ALONE:
        # a derived tolerance is shown, but decides nothing
        assert set(result.caught_by) - {"allclose"} == {fault.caught_by}


def test_there_are_faults_enough_and_each_names_a_public_thread():
    assert len(FAULTS) >= 60
    for fault in FAULTS.values():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", fault.thread), fault.name
        assert fault.description, fault.name
        everywhere = fault.drift is True
        assert everywhere or fault.reason, fault.name


def test_every_check_has_a_fault_of_its_own():
    caught_by = {fault.caught_by for fault in FAULTS.values()}
    assert caught_by == set(CHECK_NAMES) - {"allclose"} == set(STAGES)


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_a_fault_is_planted_where_its_degree_is_legal_or_the_plan_is_at_fault(tp_size):
    for fault in FAULTS.values():
        if tp_size >= fault.min_tp:
            legal = tp_size in legal_tp_sizes(spec_for(fault, tp_size), up_to=tp_size)
            assert legal is (fault.caught_by != "plan"), fault.name


def test_a_degree_at_which_a_fault_cannot_be_planted_is_named():
    with pytest.raises(SubjectError, match=r"fault double_bias: tp=7, but should be a degree"):
        spec_for(find_fault("double_bias"), 7)


@pytest.mark.parametrize("name", ["llama-tiny", "qwen3-tiny", "gpt2-tiny", "olmo2-tiny"])
def test_clean_code_passes_and_no_check_fails(name):
    report = tpcheck.run(
        f"builtin:{name}", (2, 4), backend="sim", dtypes=("bfloat16", "float16", "float32")
    )
    assert report.outcome == "PASS"
    for verdict in report.verdicts:
        assert not [c for c, found in verdict.checks.items() if found.outcome == FAIL]
        assert verdict.checks["structural"].facts["relative_rms"] < 1e-14


@pytest.mark.parametrize("check", ALONE)
def test_what_only_one_check_sees_is_seen_by_no_other_when_typed_as_a_subject(check):
    fault = next(fault for fault in FAULTS.values() if fault.caught_by == check)
    report = tpcheck.run(
        f"builtin:llama-tiny+{fault.name}",
        (2, 4),
        backend="sim",
        confirm=False,
        dtypes=fault.dtypes or ("bfloat16", "float16"),
        seed=5,
    )
    assert report.verdicts
    for verdict in report.verdicts:
        deciding = {
            name
            for name, found in verdict.checks.items()
            if found.outcome == FAIL and found.facts.get("decides", name != "allclose")
        }
        assert deciding == {check}
        assert verdict.outcome not in ("PASS", "INCONCLUSIVE")


def test_results_come_in_the_order_of_the_faults_with_progress():
    seen = []
    names = ["wrong_shard_dim", "extra_collective"]
    found = selfcheck((2,), faults=names, progress=lambda *step: seen.append(step))
    assert [result.fault for result in found.results] == names
    assert seen == [(0, 2, "wrong_shard_dim"), (1, 2, "extra_collective"), (2, 2, "done")]


def test_a_fault_that_needs_more_ranks_is_left_out_and_proves_nothing():
    matrix = selfcheck((2,), faults=["summed_by_arrival", "extra_collective"], casts=False)
    left, caught = matrix.results
    assert (left.tp_sizes, left.caught_by, left.cases_needed) == ((), (), None)
    assert left.reason == "not planted: needs tp >= 3"
    assert not left.survived
    assert caught.caught_by == ("schedule",)
    text = render_selfcheck(matrix.to_json())
    assert text.startswith("PASS: 1 of 1 planted faults are caught\n")
    assert "summed_by_arrival: not planted: needs tp >= 3" in text
    assert not selfcheck((2,), faults=["summed_by_arrival"], casts=False).passed


def test_a_fault_that_does_nothing_survives(monkeypatch):
    nothing = Fault("nothing", "a/b#1", "nothing", "structural", lambda decoder, tp: None)
    monkeypatch.setitem(FAULTS, "nothing", nothing)
    matrix = selfcheck((2, 3), faults=["nothing"], max_cases=2)
    (result,) = matrix.results
    assert result.survived
    assert not matrix.passed
    assert result.missed == ("tp=2 bfloat16", "tp=3 bfloat16")
    assert (result.cases_needed, result.cases_median, result.caught_by) == (None, None, ())
    assert result.drift_missed == ("bfloat16",)
    assert [(tier.caught, tier.planted) for tier in matrix.tiers] == [(0, 2)] * 3


def test_a_fault_of_some_cases_says_how_many_it_took(monkeypatch):
    name = "model.norm.weight"

    def sometimes(decoder, tp):
        if float(full_weight(tp, decoder, name)[0]) < 0:
            reduce_with(decoder.layers[0].mlp.down_proj, lambda y: y)

    shows = [float(single_group(seed=seed).weight(name, 64)[0]) < 0 for seed in range(40)]
    first = next(seed for seed in range(40) if shows[seed : seed + 3] == [False, False, True])
    fault = Fault("sometimes", "a/b#1", "x", "structural", sometimes, drift=False, reason="rare")
    monkeypatch.setitem(FAULTS, "sometimes", fault)
    (result,) = selfcheck((2, 4), faults=["sometimes"], seed=first, casts=False).results
    assert not result.survived
    assert (result.cases_needed, result.cases_median) == (3, 3.0)
    assert result.drift == {"bfloat16": ()}, "drift is judged at the first case"
    missed = selfcheck((2,), faults=["sometimes"], seed=first, max_cases=2, casts=False).results[0]
    assert missed.missed == ("tp=2 bfloat16",)


def test_rates_count_faults_of_the_function_at_the_first_case():
    names = ["double_bias", "wrong_shard_dim", "bfloat16_wire", "norm_eps"]
    matrix = selfcheck((2, 4), ("bfloat16", "float32"), faults=names)
    exact, casts, drift = matrix.tiers
    assert (exact.caught, exact.planted) == (8, 8)
    assert exact.lower == pytest.approx(0.025 ** (1 / 8))
    assert (casts.caught, casts.planted) == (4, 4), "float32 casts leave a floor below both"
    assert drift.planted == 8
    assert 4 <= drift.caught < 8, "an epsilon is invisible to drift in bfloat16"
    wire = matrix.results[2]
    assert list(wire.drift) == ["float32"], "bfloat16 on the wire is no fault of bfloat16"


def test_an_idle_check_fails_the_matrix():
    result = FaultResult(
        fault="f",
        thread="a/b#1",
        expected="structural",
        caught_by=("structural",),
        first_stage="structural",
        cases_needed=1,
        cases_median=1.0,
        missed=(),
        tp_sizes=(2,),
        drift={"bfloat16": (2,)},
        drift_missed=(),
        casts=(),
        reason=None,
    )
    assert FaultMatrix((result,), (), ()).passed
    assert not FaultMatrix((result,), (), ("tiling",)).passed
    assert not FaultMatrix((replace(result, drift_missed=("bfloat16",)),), (), ()).passed


def test_an_unknown_fault_is_named():
    with pytest.raises(SubjectError, match="fault='nope', but should be one of double_bias"):
        selfcheck(faults=["nope"])


@pytest.mark.parametrize("tp_sizes", [(), (1, 2)])
def test_degrees_without_a_fault_are_refused(tp_sizes):
    with pytest.raises(TPCheckError, match="but should name degrees of at least 2"):
        selfcheck(tp_sizes, faults=["double_bias"])


@pytest.mark.parametrize("tp_size", [4, 8])
def test_what_goes_round_in_as_many_calls_as_there_are_ranks_is_seen(tp_size: int) -> None:
    [result] = selfcheck((tp_size,), faults=["summed_by_arrival"], casts=False).results
    assert result.caught_by == ("repeatability",)
