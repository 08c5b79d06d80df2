"""Rows over cases, the sentences that they carry, and the text: from profiles made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tpcheck.drift_profiles.summary import summary
from tpcheck.numerics.named_orders import ORDERS
from tpcheck.records import Path, Report, Verdict
from tpcheck.render.drift import render_drift
from tpcheck.render.drift_content import NOT_VALID
from tpcheck.render.text import WIDTH

Json = dict[str, Any]


def entry(reduction: str, epsilons: float, **fields: Any) -> Json:
    """Return a profile's entry of a reduction whose TP=1 is off by 1 eps."""
    made: Json = {
        "reduction": reduction,
        "deployed": reduction == "bfloat16",
        "error": {"epsilons": epsilons, "relative_rms": epsilons / 128},
        "ratio": epsilons,
        "interval": [epsilons * 0.9, epsilons * 1.1],
        "within": epsilons <= 3,
        "over_deployed": None,
        "over_deployed_interval": None,
        "prediction": {"ratio": epsilons, "valid": True, "reason": ""},
        "range": {"overflowed_outputs": 0, "largest_partial": 4.0, "float16_headroom": 16376.0},
        "allclose": [{"required_both": 0.02}],
        "scores": {
            "tokens": 64,
            "flips": {"count": 2, "first": [{"tp1_margin": 0.25}, {"tp1_margin": 0.5}]},
            "kl_mean": 1e-4,
            "kl_max": 1e-2,
        },
    }
    return made | fields


def profile(*entries: Json, tp1: float | None = 1.0, **fields: Any) -> Json:
    return {"tp1": {"epsilons": tp1}, "reductions": list(entries), **fields}


def summed(*profiles: Json, outcome: str = "PASS", tp_size: int = 4) -> Json:
    return summary([(tp_size, "bfloat16", outcome, one) for one in profiles])


def about(found: Json, name: str) -> Json | None:
    return next((one for one in found["findings"] if one["about"] == name), None)


def test_a_row_pools_cases_by_their_squares() -> None:
    found = summed(*(profile(entry("bfloat16", size)) for size in (1.0, 2.0, 3.0)))
    (row,) = found["rows"]
    assert row["epsilons"] == pytest.approx(math.sqrt(14 / 3))
    assert row["ratio"] == pytest.approx(math.sqrt(14 / 3))
    assert 0.0 < row["interval"][0] < row["ratio"] < row["interval"][1]
    assert (row["cases"], row["tokens"], row["flips"], row["flip_margin"]) == (3, 192, 6, 0.5)
    assert row["interval_over"] == "cases"


def test_one_case_keeps_its_interval_over_sequences() -> None:
    (row,) = summed(profile(entry("bfloat16", 1.5)))["rows"]
    assert row["interval_over"] == "sequences"
    assert row["interval"] == pytest.approx([1.35, 1.65])


def test_an_exact_tp1_counts_as_its_floor_in_every_case() -> None:
    (row,) = summed(*[profile(entry("bfloat16", 1.5), tp1=0.0)] * 2)["rows"]
    assert row["ratio"] == pytest.approx(10.0)


def test_the_worst_verdict_stands_for_what_is_deployed() -> None:
    cases = [
        (4, "bfloat16", outcome, profile(entry("bfloat16", 1.0))) for outcome in ("PASS", "DRIFT")
    ]
    assert summary(cases)["rows"][0]["outcome"] == "DRIFT"


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({}, "explained"),
        ({"within": False}, "above"),
        ({"within": None}, "unknown"),
        (
            {
                "range": {"overflowed_outputs": 3, "largest_partial": 9e4, "float16_headroom": 0.7},
                "ratio": None,
                "ratio_reason": "overflow: 3",
            },
            "overflow",
        ),
    ],
)
def test_other_wires_say_what_the_drift_check_would(fields: Json, outcome: str) -> None:
    found = summed(profile(entry("bfloat16", 1.2), entry("float16", 1.1, **fields)))
    assert found["rows"][1]["outcome"] == outcome


def test_one_case_that_overflows_leaves_no_ratio() -> None:
    lost = {"range": {"overflowed_outputs": 3, "largest_partial": 9e4, "float16_headroom": 0.7}}
    over = entry("float16", 1.0, ratio=None, ratio_reason="overflow: 3 outputs", **lost)
    cases = [profile(entry("bfloat16", 1.2), one) for one in (entry("float16", 1.1), over)]
    found = summed(*cases)
    row = found["rows"][1]
    assert (row["ratio"], row["ratio_reason"]) == (None, "overflow: 3 outputs")
    better = about(found, "float16_or_bfloat16")
    assert better is not None
    assert better["better"] == "bfloat16"
    assert "float16 overflows, 3 outputs are not finite (largest |partial| 9e+04" in better["text"]


@pytest.mark.parametrize(("interval", "better"), [([0.8, 0.95], "float16"), ([0.8, 1.02], None)])
def test_the_same_tokens_decide_which_dtype_is_better(interval: Any, better: str | None) -> None:
    other = entry("float16", 1.05, over_deployed=0.9, over_deployed_interval=interval)
    found = about(summed(profile(entry("bfloat16", 1.2), other)), "float16_or_bfloat16")
    assert found is not None
    assert found["better"] == better
    assert ("no measured difference" in found["text"]) is (better is None)


def alarm(**fields: float) -> Json:
    made = {"count": 1000, "squares": 1800.0, "expected": 1000.0, "wider": 10.0, "narrower": -20.0}
    return {"alarm": {**made, **fields, "raised": "", "excess": 0.0}}


def layers(kind: str, **fields: float) -> Json:
    finding = {"hypotheses": [f"{kind} in bfloat16"], "reproduced": 1.0, "probability": 1.0}
    reduction = {"identified": f"{kind} in bfloat16", "findings": [finding], **alarm(**fields)}
    return {"rows": {"declared": "wide", "layers": [{}, {}], "reduction": reduction}}


def test_bets_of_several_cases_are_added_up() -> None:
    one = about(summed(profile(entry("bfloat16", 1.0), **layers("ring"))), "reduction")
    assert one is not None
    assert one["raised"] == ""
    assert "no alarm" in one["text"]
    cases = [profile(entry("bfloat16", 1.0), **layers("ring"))] * 2
    two = about(summed(*cases), "reduction")
    assert two is not None
    assert two["raised"] == "wider"  # twice 10 is above the logarithm of 2 million
    assert two["excess"] == pytest.approx(math.sqrt(1.8))
    assert two["count"] == 2000
    assert two["text"].startswith("2 row-parallel layers show ring in bfloat16: ALARM")


def test_a_sum_that_rounds_less_than_declared_is_no_alarm() -> None:
    """Code that sums in float32 is no worse than the ring that nobody said it was."""
    less = {"squares": 500.0, "wider": -20.0, "narrower": 20.0}
    found = about(summed(profile(entry("bfloat16", 1.0), **layers("wide", **less))), "reduction")
    assert found is not None
    assert found["raised"] == "narrower"
    assert "ALARM" not in found["text"]
    assert "not as declared, errors are only 0.707 x" in found["text"]


def test_cases_that_show_other_reductions_are_told_apart() -> None:
    cases = [profile(entry("bfloat16", 1.0), **layers(kind)) for kind in ("ring", "tree")]
    found = about(summed(*cases), "reduction")
    assert found is not None
    assert found["identified"] == ["ring in bfloat16", "tree in bfloat16"]


def test_zeros_and_exact_wires_are_pooled_too() -> None:
    """An output of zeros has no epsilons; a wire that leaves no error is 0 x the deployed one."""
    nothing = {"epsilons": None, "relative_rms": None}
    zeros = entry("bfloat16", 0.0, error=nothing)
    (row,) = summed(*[profile(zeros, tp1=None)] * 2)["rows"]
    assert (row["ratio"], row["epsilons"]) == (0.0, None)
    exact = entry("float32", 0.0, over_deployed=0.0)
    _, row = summed(*[profile(entry("bfloat16", 2.0), exact)] * 2)["rows"]
    assert (row["over_deployed"], row["over_deployed_interval"]) == (0.0, [0.0, 0.0])


def test_a_difference_that_no_digit_shows_recommends_nothing() -> None:
    other = entry("float16", 1.001, over_deployed=0.999, over_deployed_interval=[0.998, 0.9995])
    wide = entry("float32", 1.001, over_deployed=0.999, over_deployed_interval=[0.998, 0.9995])
    found = summed(profile(entry("bfloat16", 1.002), other, wide))
    better, float32 = about(found, "float16_or_bfloat16"), about(found, "float32_wire")
    assert better is not None
    assert float32 is not None
    assert better["better"] is None
    assert "no measured difference" in better["text"]
    assert "no measured difference" in float32["text"]


def reduction_text(*findings: tuple[str, float], declared: str = "ring", **fields: Any) -> str:
    """Return the sentence on findings as drift_profiles/reductions.py gives them."""
    named = [
        {"hypotheses": names.split(" = "), "probability": share, "explains": True}
        for names, share in findings
    ]
    said = [f"{names} ({share:.0%})" for names, share in findings if len(findings) > 1]
    identified = " or ".join(said) or findings[0][0]
    reduction = {"identified": identified, "findings": named, **alarm(wider=0.0)}
    rows = {"declared": declared, "layers": [{}], "reduction": reduction, **fields}
    found = about(summed(profile(entry("bfloat16", 1.0), rows=rows)), "reduction")
    assert found is not None
    return str(found["text"])


def test_one_layer_or_sum_is_not_several() -> None:
    assert reduction_text(("ring in bfloat16", 1.0)).startswith("1 row-parallel layer shows ring")
    text = reduction_text(("ring in bfloat16", 1.0), terms="sent", layers=[{"terms": "sent"}])
    assert text.startswith("1 sum over ranks shows ring")


def test_layers_judged_by_what_was_sent_say_so() -> None:
    layers = [{"terms": "sent", "tp1_excess": 1.5}, {"terms": "exact", "tp1_excess": 1.0}]
    text = reduction_text(("ring in bfloat16", 1.0), layers=layers)
    assert "2 row-parallel layers (1 of them by the terms that were sent: TP=1 itself" in text
    layers = [{"terms": "exact", "tp1_excess": 1.5}]
    text = reduction_text(("ring in bfloat16", 1.0), layers=layers)
    assert "1 row-parallel layer (with what TP=1 itself rounds there besides) shows" in text


def test_why_no_alarm_can_be_raised_is_said() -> None:
    said = {"alarm": None, "alarm_reason": "the law covers ring, not int8_wire"}
    finding = {"hypotheses": ["ring in bfloat16"], "probability": 1.0, "explains": True}
    reduction = {"identified": "ring in bfloat16", "findings": [finding], **said}
    text = reduction_text(("ring in bfloat16", 1.0), reduction=reduction)
    assert text.endswith(": no alarm can be raised, the law covers ring, not int8_wire")


def test_each_of_several_findings_is_one_phrase() -> None:
    first = " = ".join(f"{kind} in bfloat16" for kind in ORDERS)
    second = " = ".join(f"{kind} in float16" for kind in ORDERS)
    text = reduction_text((first, 0.985), (second, 0.015))
    assert "one of any order in bfloat16 (the same bits here) (98%) or one of any order in" in text
    assert " = " not in text


@pytest.mark.parametrize(
    ("name", "declared", "other"),
    [
        ("tree in bfloat16", "ring", True),
        ("ring in float16", "ring", True),
        ("wide in bfloat16", "fp32_wire", True),
        ("ascending ring in bfloat16", "ring", False),
        ("halving tree in bfloat16", "tree", False),
        ("wide in bfloat16 = fp32_wire in bfloat16", "fp32_wire", False),
    ],
)
def test_another_kind_than_the_declared_is_named_although_its_errors_are_as_large(
    name: str, declared: str, *, other: bool
) -> None:
    text = reduction_text((name, 1.0), declared=declared)
    assert (f", not the declared {declared}:" in text) is other


def test_where_values_are_lost_is_said_beside_where_drift_begins() -> None:
    points = [
        {"fqn": "layers.0", "ratio": 1.5, "not_finite": 0},
        {"fqn": "layers.1", "ratio": None, "not_finite": 7},
    ]
    depth = {"begins": "layers.0.o_proj", "points": points}
    found = about(summed(profile(entry("bfloat16", 1.0), depth=depth)), "begins")
    assert found is not None
    assert "after layers.1 values are not finite; the largest ratio is 1.5" in found["text"]


def test_the_tolerance_people_try_first_is_answered() -> None:
    found = about(summed(profile(entry("bfloat16", 1.0))), "allclose")
    assert found is not None
    assert (found["passes"], found["required_both"]) == (False, 0.02)
    assert "0.02 for both is needed" in found["text"]


def rendered(*entries: Json) -> str:
    verdict = Verdict("s0-b2-t8", 4, "bfloat16", "PASS", {})
    report = Report("x:y", (verdict,), {}, Path("gloo"), "0", drift=summed(profile(*entries)))
    return render_drift(report)


def test_a_prediction_that_does_not_hold_says_so_and_why() -> None:
    wrong = {"ratio": 1.0, "valid": False, "reason": "measured is 2 x it"}
    text = rendered(entry("bfloat16", 2.0, prediction=wrong))
    assert "2.00 (not valid) [1.80, 2.20]" in text
    assert f"{NOT_VALID}: measured is 2 x it (bfloat16 at tp 4)" in text


def test_a_wire_without_numbers_is_named_below_the_table() -> None:
    missing = {"reduction": "int8_wire", "deployed": False, "reason": "it sums alone"}
    text = rendered(entry("bfloat16", 2.0), missing)
    assert "no number for int8_wire: it sums alone" in text


def test_large_numbers_stay_within_a_terminal() -> None:
    text = rendered(*(entry(name, 123456.789) for name in ("bfloat16", "int4_wire")))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "1.23e+05 (1.23e+05) ±10 %" in text


def test_wrong_cases_are_a_row_of_their_own_and_recommend_nothing() -> None:
    """A bug's distance pooled with rounding would be neither."""
    cases = [
        (4, "bfloat16", "PASS", profile(entry("bfloat16", 1.2))),
        (4, "bfloat16", "WRONG", profile(entry("bfloat16", 40.0))),
    ]
    found = summary(cases)
    assert [(row["outcome"], row["ratio"], row["cases"]) for row in found["rows"]] == [
        ("PASS", pytest.approx(1.2), 1),
        ("WRONG", pytest.approx(40.0), 1),
    ]
    wrong = about(found, "wrong")
    assert wrong is not None
    assert "40 x TP=1's own error" in wrong["text"]
    assert "not rounding" in wrong["text"]


def test_dtypes_of_a_wrong_function_are_not_compared() -> None:
    cases = [
        (2, dtype, "WRONG", profile(entry(dtype, error, deployed=True)))
        for dtype, error in (("bfloat16", 8.0), ("float16", 64.0))
    ]
    assert about(summary(cases), "dtypes") is None
