"""Every check as a pure function of evidence: what fails it, what does not, and what it says."""

import math
from dataclasses import replace

import pytest
import torch

from tests.judging import at, calls, evidence, failed, ranks, trace, values, without_oracle
from tpcheck.checks import CHECKS, allclose, decode, drift, run_checks, structural
from tpcheck.comparison import error_count
from tpcheck.conduct import rank_agreement, repeatability, schedule, tiling
from tpcheck.evidence import NoiseFloor
from tpcheck.execution import AGAIN
from tpcheck.numerics.tolerance import users_tolerance
from tpcheck.placement import Replicate, Shard, Slices
from tpcheck.records import CHECK_NAMES
from tpcheck.trace import Collective

torch.set_num_threads(1)
inf, nan = math.inf, math.nan


def with_element(x: torch.Tensor, value: float, index=(0, 0)) -> torch.Tensor:
    changed = x.clone()
    changed[index] = value
    return changed


def test_clean_evidence_passes_or_skips_every_check():
    checks = run_checks(evidence())
    assert tuple(checks) == CHECK_NAMES
    assert set(CHECKS) | {"plan"} == set(CHECK_NAMES)
    assert not failed(checks)


# structural


@pytest.mark.parametrize("scale", [1e-15, 9e-13])
def test_structural_passes_what_float64_explains(scale):
    check = structural(evidence(exact=values(4, 64) * (1 + scale)))
    assert check.outcome == "PASS"
    assert check.facts["limit"] == 1e-12
    assert check.facts["relative_rms"] == pytest.approx(scale, rel=0.2)


def test_structural_fails_the_smallest_bug_ever_planted():
    check = structural(evidence(exact=values(4, 64) * (1 + 2e-6)))
    assert check.outcome == "FAIL"
    assert check.reason.startswith("A: relative_rms=2e-06, but should be at most 1e-12; worst at [")
    assert check.facts["dtype"] == "float64"


def test_structural_takes_the_measured_floor_with_its_tier_and_source():
    floor = NoiseFloor(relative_rms=1e-7, tier="float32", source="half an ulp of float32")
    check = structural(evidence(exact=values(4, 64) * (1 + 5e-7), floor=floor))
    assert check.outcome == "PASS"
    assert (check.facts["dtype"], check.facts["source"]) == ("float32", floor.source)
    assert check.facts["smallest_bug"] == check.facts["limit"] == pytest.approx(8e-7)
    assert structural(evidence(exact=values(4, 64) * (1 + 1e-6), floor=floor)).outcome == "FAIL"


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_structural_fails_on_one_element_that_is_finite_on_one_side_only(value):
    check = structural(evidence(exact=with_element(values(4, 64), value, (1, 3))))
    assert check.outcome == "FAIL"
    assert "1 elements" in check.reason
    assert "[1, 3]" in check.reason


def test_structural_fails_on_the_other_infinity_and_says_where():
    oracle = with_element(values(4, 64), inf, (2, 5))
    check = structural(evidence(exact=with_element(oracle, -inf, (2, 5)), oracle=oracle))
    assert check.outcome == "FAIL"
    assert "[2, 5]" in check.reason


def test_structural_passes_the_same_mask_on_both_sides():
    oracle = with_element(values(4, 64), -inf)
    assert structural(evidence(oracle=oracle)).outcome == "PASS"


def test_structural_has_nothing_to_compare_when_tp1_is_nan_everywhere():
    check = structural(evidence(oracle=torch.full((4, 64), nan).double()))
    assert check.outcome == "SKIPPED"
    assert check.reason == "TP=1 in float64 is not finite anywhere: nothing to compare"


def test_structural_says_that_an_output_is_empty():
    check = structural(evidence(exact=torch.empty(0, 64), oracle=torch.empty(0, 64).double()))
    assert check.outcome == "SKIPPED"
    assert check.reason == "the output is empty at TP=1: nothing to compare"


def test_structural_fails_on_another_shape():
    check = structural(evidence(exact=values(4, 65)))
    assert check.outcome == "FAIL"
    assert check.reason == "A: shape=[4, 65], but should be [4, 64] as at TP=1"


def test_structural_names_the_worst_input():
    outputs = {"t1": values(1, 64), "A": values(4, 64)}
    wrong = outputs | {"t1": outputs["t1"] * 1.5, "A": outputs["A"] * 1.1}
    found = evidence(oracle=None, exact=None)
    found = replace(found, oracle=trace(0, outputs), exact=ranks(wrong))
    check = structural(found)
    assert check.facts["worst_input"] == "t1"
    assert check.reason.startswith("t1: ")


def test_structural_looks_at_b_but_not_at_the_repeated_a():
    oracle = trace(0, {"A": values(4, 4), "B": values(4, 4), AGAIN: values(4, 4)})
    leaked = ranks({"A": values(4, 4), "B": values(4, 4), AGAIN: values(4, 4) * 2})
    assert structural(replace(evidence(), oracle=oracle, exact=leaked)).outcome == "PASS"
    other = ranks({"A": values(4, 4), "B": values(4, 4) * 2})
    assert structural(replace(evidence(), oracle=oracle, exact=other)).outcome == "FAIL"


def test_structural_says_what_float64_false_costs():
    check = structural(without_oracle())
    assert check.outcome == "SKIPPED"
    assert "float64=False: a bug below the drift limit would not show" in check.reason


# drift


def test_drift_is_the_ratio_of_errors():
    oracle = values(4, 64)
    found = evidence(
        oracle=oracle, base=(oracle + 1e-2).bfloat16(), deployed=(oracle + 2e-2).bfloat16()
    )
    check = drift(found)
    assert check.outcome == "PASS"
    assert check.facts["ratio"] == pytest.approx(2.0, rel=0.1)
    assert check.facts["limit"] == 3.0
    assert check.facts["oracle"] == "float64"


def test_drift_fails_beyond_what_the_reduction_explains():
    oracle = values(4, 64)
    found = evidence(
        oracle=oracle, base=(oracle + 1e-2).bfloat16(), deployed=(oracle + 5e-2).bfloat16()
    )
    check = drift(found)
    assert check.outcome == "FAIL"
    assert check.reason == (
        f"error is {check.facts['ratio']:.3g} x that of TP=1, but should be at most 3:"
        " this reduction explains 1 (a ring)"
    )
    explained = replace(found, expected=4.0)
    assert drift(explained).outcome == "PASS"
    assert drift(explained).facts["limit"] == 6.0


def test_no_error_at_tp1_is_lifted_to_a_floor():
    oracle = torch.arange(256).reshape(4, 64).double()  # exact in bfloat16
    exact = drift(evidence(oracle=oracle, base=oracle.bfloat16(), deployed=oracle.bfloat16()))
    assert (exact.outcome, exact.facts["ratio"]) == ("PASS", 0)
    deployed = oracle.bfloat16()
    deployed[3, 3] += 1
    one_off = drift(evidence(oracle=oracle, base=oracle.bfloat16(), deployed=deployed))
    assert one_off.outcome == "PASS"
    assert 0 < one_off.facts["ratio"] < 3


@pytest.mark.parametrize("base", [0.0, 1.0])
def test_a_model_of_zeros_has_no_ratio_that_is_not_a_number(base):
    zeros = torch.zeros(4, 4)
    check = drift(evidence(oracle=zeros.double(), base=zeros + base, deployed=zeros))
    assert check.outcome == "PASS"
    assert check.facts["ratio"] == 0
    assert check.facts["epsilons"] is None
    check = drift(evidence(oracle=zeros.double(), base=zeros, deployed=zeros + 1))
    assert check.outcome == "FAIL"


def test_overflow_in_the_deployed_dtype_is_drift_and_says_where():
    oracle = values(4, 64)
    deployed = with_element(oracle.half(), inf, (1, 2))
    check = drift(evidence(oracle=oracle, deployed=deployed, dtype="float16"))
    assert check.outcome == "FAIL"
    assert check.reason == (
        "A: 1 elements are not finite in float16 but are in float64, at [1, 2]: overflow"
        " (TP=1 in float16 has 0)"
    )


def test_overflow_everywhere_is_still_overflow():
    deployed = torch.full((4, 64), nan).half()
    check = drift(evidence(deployed=deployed, dtype="float16"))
    assert check.outcome == "FAIL"
    assert "256 elements are not finite in float16" in check.reason


def test_drift_has_nothing_to_compare_where_nothing_is_finite():
    nothing = torch.full((4, 64), nan)
    check = drift(evidence(oracle=nothing.double(), base=nothing, deployed=nothing))
    assert check.outcome == "SKIPPED"


def test_drift_does_not_judge_outputs_of_another_shape_or_of_integers():
    assert drift(evidence(deployed=values(4, 65).bfloat16())).outcome == "SKIPPED"
    ids = torch.ones(4, 4, dtype=torch.int64)
    assert drift(evidence(oracle=ids, base=ids, deployed=ids)).outcome == "SKIPPED"


def test_without_an_oracle_drift_is_held_against_tp1_itself():
    base = values(4, 64).bfloat16()
    near = (base.double() * (1 + 2**-8)).bfloat16()
    found = without_oracle(base=base, deployed=near, base_error=0.01, expected=1.7)
    check = drift(found)
    assert check.outcome == "PASS"
    assert check.facts["oracle"] == "TP=1 itself"
    assert check.facts["smallest_bug"] > 0
    far = without_oracle(base=base, deployed=base * 2, base_error=0.01, expected=1.7)
    assert drift(far).outcome == "FAIL"


def test_routing_is_reported_beside_drift():
    check = drift(evidence(routing_flips=3, routing_margin=0.01, routing_pinned=True))
    assert check.facts["routing"] == "pinned to the reference"
    assert (check.facts["routing_flips"], check.facts["routing_margin"]) == (3, 0.01)


# allclose


def test_the_derived_tolerance_passes_clean_runs_and_does_not_decide():
    check = allclose(evidence())
    assert check.outcome == "PASS"
    assert check.facts["decides"] is False
    assert check.facts["source"].startswith("derived: ")
    assert 0 < check.facts["required_atol"] <= check.facts["atol"]


def test_a_users_tolerance_gates_and_says_what_would_have_passed():
    check = allclose(evidence(tolerance=users_tolerance(1e-6, None, None)))
    assert check.outcome == "FAIL"
    assert check.facts["decides"] is True
    needed = check.facts["required_atol"]
    assert allclose(evidence(tolerance=users_tolerance(needed, None, None))).outcome == "PASS"
    assert check.facts["tp1_error"] > 0


def test_zero_tolerance_is_a_tolerance():
    same = values(4, 4).bfloat16()
    zero = users_tolerance(0.0, 0.0, None)
    oracle = same.double()
    clean = evidence(oracle=oracle, base=same, deployed=same, tolerance=zero)
    assert allclose(clean).outcome == "PASS"
    other = evidence(oracle=oracle, base=same, deployed=with_element(same, 1.0), tolerance=zero)
    assert allclose(other).outcome == "FAIL"


def test_allclose_fails_on_a_mask_that_no_tolerance_covers():
    base = values(4, 64).bfloat16()
    found = evidence(
        base=base, deployed=with_element(base, nan), tolerance=users_tolerance(9.0, None, None)
    )
    check = allclose(found)
    assert check.outcome == "FAIL"
    assert check.facts.get("required_atol") is None
    assert "none" in check.reason


def test_allclose_fails_on_another_shape():
    check = allclose(evidence(deployed=values(4, 65).bfloat16()))
    assert check.outcome == "FAIL"
    assert "shape=[4, 65], but should be [4, 64]" in check.reason


# rank_agreement, repeatability, schedule


def test_ranks_that_return_other_bits_are_named_with_the_place():
    mine = values(4, 4)
    other = with_element(mine, 1e-300, (2, 1))
    traces = [*ranks({"A": mine}, 3), replace(trace(0, {"A": other}), rank=3)]
    traces = [replace(t, outputs={"A": other if t.rank == 3 else mine}) for t in traces]
    check = rank_agreement(_exact(traces))
    assert check.outcome == "FAIL"
    assert check.reason == "A: rank 3 returned other bits than the rest, first at [2, 1]"


def _exact(traces):
    return replace(evidence(tp_size=len(traces)), exact=traces)


def test_disagreement_in_the_deployed_dtype_counts_too():
    found = evidence()
    odd = at(found.deployed, 1, digests={"A": "other"})
    assert rank_agreement(replace(found, deployed=odd)).outcome == "FAIL"


def test_ranks_that_may_return_nothing_are_not_compared():
    found = evidence(logits="rank0")
    odd = at(found.deployed, 1, digests={})
    assert rank_agreement(replace(found, deployed=odd)).outcome == "SKIPPED"


def test_a_second_a_with_other_bits_is_a_leak_even_on_a_rank_whose_output_is_not_kept():
    leak = ranks({"A": values(2, 2)})
    leak = at(leak, 1, digests={"A": "one", AGAIN: "another"})
    check = repeatability(_exact(leak))
    assert check.outcome == "FAIL"
    assert check.reason.startswith("rank 1: the same input gave other bits after another input")


def test_the_same_bits_again_repeat():
    assert repeatability(_exact(ranks({"A": values(2), AGAIN: values(2)}))).outcome == "PASS"


def test_nothing_run_twice_is_skipped():
    assert repeatability(evidence()).outcome == "SKIPPED"


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (calls("all_reduce"), "A: rank 0 called #1 all_gather([2, 4] float64, sum), rank 1 called"),
        (calls("all_reduce", "broadcast"), "rank 1 called #1 broadcast([2, 4] float64, sum)"),
        (calls("all_reduce", "all_gather", shape=(2, 3)), "all_reduce([2, 3] float64, sum)"),
        (calls("all_reduce", "all_gather", "barrier"), "rank 0 called nothing more"),
        ((), "rank 1 called nothing more"),
    ],
)
def test_another_schedule_is_named_call_against_call(other, reason):
    traces = [
        trace(0, collectives={"A": calls("all_reduce", "all_gather")}),
        trace(1, collectives={"A": other}),
    ]
    check = schedule(_exact(traces))
    assert check.outcome == "FAIL"
    assert reason in check.reason


def test_the_same_schedule_passes_and_is_counted():
    mine = {"A": calls("all_reduce", "all_reduce", "all_gather")}
    found = evidence(deployed=None)
    found = replace(found, deployed=[replace(t, collectives=mine) for t in found.deployed])
    check = schedule(found)
    assert check.outcome == "PASS"
    assert check.facts["per_forward"] == {"all_gather": 1, "all_reduce": 2}


def test_torch_distributed_may_gather_uneven_operands_but_not_reduce_them():
    def own(op, size):
        return Collective(0, op, (size,), "float32", "torch.distributed")

    for op, outcome in (("allgather", "PASS"), ("allreduce", "FAIL"), ("send", "PASS")):
        traces = [
            trace(0, collectives={"A": (own(op, 3),)}),
            trace(1, collectives={"A": (own(op, 2),)}),
        ]
        assert schedule(_exact(traces)).outcome == outcome, op


# tiling


def _shards(at_1, *at_n):
    found = evidence(tp_size=len(at_n))
    base = replace(found.base, extras={"shards": at_1})
    deployed = [
        replace(t, extras={"shards": shards})
        for t, shards in zip(found.deployed, at_n, strict=True)
    ]
    return replace(found, base=base, deployed=deployed)


W = values(6, 4)
FULL = {"w": (W, Replicate())}


def test_shards_that_tile_with_tp1s_values_pass():
    check = tiling(_shards(FULL, {"w": (W[:4], Shard(0))}, {"w": (W[4:], Shard(0))}))
    assert check.outcome == "PASS"
    assert check.facts == {"tensors": 1, "compared_with_tp1": 1}


@pytest.mark.parametrize(
    ("second", "phrase"),
    [
        ({"w": (W[3:], Shard(1))}, "w: "),
        ({"w": (W[3:] * 2, Shard(0))}, "w: rank 1"),
        ({"w": (W[4:], Shard(0))}, "w: "),
        ({}, "w: rank 1 expose no shard of it"),
    ],
)
def test_shards_that_do_not_tile_fail(second, phrase):
    check = tiling(_shards(FULL, {"w": (W[:3], Shard(0))}, second))
    assert check.outcome == "FAIL"
    assert phrase in check.reason


def test_padding_lies_outside_every_slice():
    padded = torch.cat([W[4:], torch.full((2, 4), nan).double()])
    first = {"w": (W[:4], Slices([(slice(0, 4), slice(0, 4))]))}
    last = {"w": (padded, Slices([(slice(0, 2), slice(4, 6))]))}
    assert tiling(_shards(FULL, first, last)).outcome == "PASS"
    wrong = {"w": (padded, Slices([(slice(1, 3), slice(4, 6))]))}
    assert tiling(_shards(FULL, first, wrong)).outcome == "FAIL"


def test_copies_have_to_be_equal():
    assert tiling(_shards(FULL, FULL, FULL)).outcome == "PASS"
    other = {"w": (with_element(W, 9.0), Replicate())}
    assert tiling(_shards(FULL, FULL, other)).outcome == "FAIL"


def test_no_shards_no_tiling():
    assert tiling(evidence()).reason == "the subject exposes no shards"


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ((1, 1), ""),
        ((0, 1), ""),  # rank 0 has other experts, or is sent what rank 1 reads
        ((0, 0), "no rank consumes the named weights up, but TP=1 does"),
        ((1, 2), "named weight up: consumed 2 times on rank 1, but should be 1 as at TP=1"),
    ],
)
def test_named_weights_are_consumed_by_some_rank_and_no_oftener_than_at_tp1(counts, reason):
    found = _shards(FULL, FULL, FULL)
    base = replace(found.base, extras=found.base.extras | {"consumed": {"up": 1, "inv_freq": 0}})
    deployed = [
        replace(t, extras=t.extras | {"consumed": {"up": counts[t.rank]}})
        for t in found.deployed[:2]
    ]
    check = tiling(replace(found, base=base, deployed=deployed))
    assert (check.outcome, check.reason) == ("FAIL" if reason else "PASS", reason)


# decode


def _decoded(at_1=1.0, at_n=1.0):
    oracle = values(2, 8, 4)
    found = evidence(oracle=oracle)
    outputs = [{"A": oracle, "decode": oracle * factor} for factor in (at_1, at_n)]
    return replace(found, oracle=trace(0, outputs[0]), exact=ranks(outputs[1]))


def test_decode_that_equals_prefill_passes():
    assert decode(_decoded()).outcome == "PASS"


@pytest.mark.parametrize(("at_1", "at_n", "degree"), [(1 + 1e-6, 1, 1), (1, 1 + 1e-6, 2)])
def test_decode_names_the_degree_that_differs(at_1, at_n, degree):
    check = decode(_decoded(at_1, at_n))
    assert check.outcome == "FAIL"
    assert check.reason.startswith(f"TP={degree}: logits differ from a whole forward")


def test_decode_with_fewer_logits_is_compared_with_the_last_positions():
    found = _decoded()
    short = ranks({"A": found.oracle.outputs["A"], "decode": found.oracle.outputs["A"][:, 3:]})
    assert decode(replace(found, exact=short)).outcome == "PASS"


def test_nan_in_decode_fails():
    found = _decoded()
    broken = with_element(found.oracle.outputs["A"], nan, (0, 5, 1))
    check = decode(replace(found, exact=ranks({"A": broken, "decode": broken})))
    assert check.outcome == "FAIL"
    assert "1 of them NaN or inf" in check.reason


def test_no_decode_no_check():
    assert decode(evidence()).outcome == "SKIPPED"
    assert decode(without_oracle()).outcome == "SKIPPED"


@pytest.mark.parametrize(
    ("device", "repeats", "outcome"),
    [("cuda:0", False, "SKIPPED"), ("cuda:0", True, "FAIL"), ("cpu", False, "FAIL")],
)
def test_only_a_gpu_may_not_repeat_and_only_what_tp1_does_not_repeat(device, repeats, outcome):
    first, again = values(4, 64), values(4, 64, seed=1)
    facts = {"device": device}
    moved = ranks({"A": first, AGAIN: again}, facts=facts)
    alone = trace(0, {"A": first, AGAIN: first if repeats else again}, facts=facts)
    check = repeatability(replace(evidence(), base=alone, deployed=moved))
    assert check.outcome == outcome


def test_errors_whose_fourth_power_is_beyond_all_floats_are_counted():
    oracle = values(4, 64)
    base = oracle * (1 + values(4, 64, seed=1) / 1000)
    counts = [error_count([(base * scale, oracle * scale)]) for scale in (1.0, 1e100, 1e-100)]
    assert counts[0] == pytest.approx(counts[1]) == pytest.approx(counts[2])
    assert 64 < counts[0] < 256
    assert error_count([(oracle, oracle)]) == 256


@pytest.mark.parametrize(
    ("pattern", "value", "outcome"),
    [
        ("filter", -math.inf, "PASS"),  # the smallest that was kept
        ("filter", math.inf, "FAIL"),
        ("larger", -math.inf, "FAIL"),  # others below it were kept
        ("padding", -math.inf, "FAIL"),  # the same columns at every token
    ],
)
def test_only_what_a_filter_may_leave_out_is_no_overflow(pattern, value, outcome):
    oracle = values(4, 64).sort(-1).values
    for row in range(4):
        oracle[row, : 8 if pattern == "padding" else 8 + row] = -math.inf
    found = evidence(oracle=oracle)
    first = 8 if pattern == "padding" else 8 + 2
    place = first + 5 if pattern == "larger" else first
    deployed = found.deployed[0].outputs["A"].clone()
    deployed[2, place] = value
    assert drift(evidence(oracle=oracle, deployed=deployed)).outcome == outcome
