"""tpcheck drift on real Gloo ranks: what it says of clean models, wires and planted reductions."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import tpcheck
from tpcheck.render.drift import render_drift
from tpcheck.render.text import WIDTH
from tpcheck.report import from_json, to_json

SUBJECTS = Path(__file__).parents[1] / "drifting_subjects.py"
Json = dict[str, Any]


@cache
def drifted(subject: str, *dtypes: str, **options: Any) -> tpcheck.Report:
    name = subject if ":" in subject else f"{SUBJECTS}:{subject}"
    return tpcheck.drift(name, options.pop("tp", (4,)), backend="gloo", dtypes=dtypes, **options)


def rows(report: tpcheck.Report) -> dict[tuple[int, str, str], Json]:
    assert report.drift is not None
    return {(r["tp_size"], r["dtype"], r["reduction"]): r for r in report.drift["rows"]}


def finding(report: tpcheck.Report, about: str, **where: Any) -> Json:
    assert report.drift is not None
    found = [
        one
        for one in report.drift["findings"]
        if one["about"] == about and all(one[key] == value for key, value in where.items())
    ]
    assert len(found) == 1, found
    one: Json = found[0]
    return one


# -- a clean model


def llama() -> tpcheck.Report:
    return drifted("builtin:llama-tiny", "bfloat16", "float16", tp=(2, 4))


def test_every_prediction_of_a_clean_model_holds() -> None:
    report = llama()
    assert report.outcome == "PASS"
    found = rows(report)
    assert len(found) == 2 * 2 * 7
    for key, row in found.items():
        assert row["prediction_reason"] == "", key
        assert row["ratio"] == pytest.approx(row["predicted"], rel=0.15), key
        assert row["interval"][0] <= row["ratio"] <= row["interval"][1], key
        assert row["outcome"] == ("PASS" if row["deployed"] else "explained"), key


def test_what_a_wire_costs_follows_its_dtype() -> None:
    found = rows(llama())
    for tp_size in (2, 4):
        here = {
            name: row["ratio"]
            for (tp, dtype, name), row in found.items()
            if (tp, dtype) == (tp_size, "float16")
        }
        assert here["float32"] <= here["float16"] < here["bfloat16"] < here["int8_wire"]
        assert here["int8_wire"] < here["int6_wire"] < here["int4_wire"]


def test_the_reduction_of_gloo_is_named_and_raises_no_alarm() -> None:
    report = llama()
    for dtype in ("bfloat16", "float16"):
        assert finding(report, "reduction", tp_size=4, dtype=dtype)["identified"] == [
            f"ring in {dtype}"
        ]
        two = finding(report, "reduction", tp_size=2, dtype=dtype)
        assert f"ring in {dtype} = " in two["identified"][0]
        assert two["raised"] == ""


def test_drift_begins_at_the_first_row_parallel_layer() -> None:
    report = llama()
    for verdict in report.verdicts:
        depth = verdict.checks["drift"].facts["profile"]["depth"]
        assert depth["begins"] == "layers.0.self_attn.o_proj"
        assert [point["fqn"] for point in depth["points"]] == ["layers.0", "layers.1"]


def test_bfloat16_is_eight_times_as_far_off_as_float16_relative_to_the_output() -> None:
    assert finding(llama(), "dtypes", tp_size=4)["times"] == pytest.approx(8, rel=0.1)


def test_scores_drift_through_whole_forwards_and_through_steps() -> None:
    for verdict in llama().verdicts:
        own = verdict.checks["drift"].facts["profile"]["reductions"][0]
        assert own["sequences"]["lengths"] == own["decode"]["lengths"] == [1, 2, 4, 8, 15]
        assert own["sequences"]["mean"][-1] > 0
        assert own["decode"]["mean"][-1] > 0
        assert own["scores"]["tokens"] == 4 * 2 * 16


def test_the_report_is_json_and_comes_back_with_its_numbers() -> None:
    value = json.loads(json.dumps(to_json(llama()), allow_nan=False))
    back = from_json(value)
    assert to_json(back) == value
    assert back.drift is not None
    assert render_drift(back) == render_drift(llama())


def test_the_text_leads_with_the_verdict_and_fits_a_terminal() -> None:
    lines = render_drift(llama()).splitlines()
    assert lines[0].startswith("PASS (structure)")
    assert max(map(len, lines)) <= WIDTH
    assert sum(line.startswith(("bfloat16, ", "float16, ")) for line in lines) == 2
    assert sum(" * " in line for line in lines) >= 4


# -- which dtype on the wire


def test_float16_is_better_for_a_plain_model_and_eight_times_finer() -> None:
    report = drifted("plain", "float32")
    found = finding(report, "float16_or_bfloat16")
    assert found["better"] == "float16"
    assert found["times"] == pytest.approx(8, rel=0.1)
    assert "room in float16" in found["text"]


def test_bfloat16_is_better_where_massive_activations_overflow_float16() -> None:
    report = drifted("massive", "bfloat16", wires=("float16", "float32"))
    assert report.outcome == "PASS"
    found = rows(report)
    assert found[4, "bfloat16", "float16"]["outcome"] == "overflow"
    assert found[4, "bfloat16", "float16"]["overflowed_outputs"] > 0
    own = found[4, "bfloat16", "bfloat16"]
    assert own["overflowed_outputs"] == 0
    assert 1e5 < own["largest_partial"] < 1e6
    assert own["float16_headroom"] < 1
    better = finding(report, "float16_or_bfloat16")
    assert better["better"] == "bfloat16"
    assert "65504" in better["text"]


def test_float32_on_the_wire_is_measured_beside_what_is_deployed() -> None:
    report = drifted("massive", "bfloat16", wires=("float16", "float32"))
    found = finding(report, "float32_wire")
    assert 1 < found["ratio"] < found["instead"]


# -- planted reductions


def test_a_bfloat16_wire_under_float16_activations_is_named() -> None:
    report = drifted("builtin:llama-tiny+bfloat16_wire", "float16", tp=(2, 4), wires=("float32",))
    assert report.outcome == "DRIFT"
    four = finding(report, "reduction", tp_size=4)
    assert four["identified"] == ["ring in bfloat16"]
    assert four["raised"] == "wider"
    assert four["excess"] == pytest.approx(8, rel=0.1)
    two = finding(report, "reduction", tp_size=2)["identified"][0]
    assert all(name.endswith(" in bfloat16") for name in two.split(" = "))


def test_per_hop_rounding_is_named_where_a_wide_accumulator_was_declared() -> None:
    report = drifted("builtin:llama-tiny", "bfloat16", declared="wide", wires=("float32",))
    assert report.outcome == "PASS"  # the whole model dilutes it below any limit
    found = finding(report, "reduction")
    assert found["identified"] == ["ring in bfloat16"]
    assert found["raised"] == "wider"
    assert found["excess"] == pytest.approx(1.33, rel=0.05)
    assert "ALARM" in found["text"]


def test_sums_handed_on_in_bfloat16_raise_an_alarm_under_float32() -> None:
    report = drifted("builtin:llama-tiny+bfloat16_hops", "float32", tp=(2, 4))
    two = finding(report, "reduction", tp_size=2)
    assert all(name.endswith(" in bfloat16") for name in two["identified"][0].split(" = "))
    assert two["raised"] == "wider"
    four = finding(report, "reduction", tp_size=4)
    assert four["identified"] == ["rank order in bfloat16"]
    assert four["raised"] == "wider"


def test_a_scaled_rank_is_another_function_and_how_far_is_said_without_an_explanation() -> None:
    report = drifted("builtin:llama-tiny+scaled_rank", "bfloat16", tp=(2,), wires=("float32",))
    assert report.outcome == "WRONG"
    found = rows(report)
    assert set(found) == {(2, "bfloat16", "bfloat16")}  # no other wire: it would explain nothing
    own = found[2, "bfloat16", "bfloat16"]
    assert own["outcome"] == "WRONG"
    assert own["ratio"] > 1
    assert own["predicted"] is None
    assert "not the same function" in own["prediction_reason"]
    wrong = finding(report, "wrong", tp_size=2)
    assert wrong["ratio"] == own["ratio"]
    assert "not rounding" in wrong["text"]
    assert finding(report, "begins")["fqn"] == "layers.0.self_attn.o_proj"
    assert report.drift is not None
    about = {one["about"] for one in report.drift["findings"]}
    assert about == {"wrong", "begins"}  # neither a wire nor a tolerance is recommended
    assert "not rounding" in render_drift(report)


def test_a_missing_reduction_is_far_off_in_every_number() -> None:
    fault = "builtin:llama-tiny+missing_all_reduce"
    report = drifted(fault, "bfloat16", tp=(2,), wires=("float32",))
    assert report.outcome == "WRONG"
    profile = report.verdicts[0].checks["drift"].facts["profile"]
    (own,) = profile["reductions"]
    assert own["error"]["relative_rms"] > 0.05
    assert profile["rows"] is None
    assert "not the same function" in profile["rows_reason"]
    assert finding(report, "wrong")["ratio"] > 10


# -- what cannot be had


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        ("own_coalesced_calls", "the subject calls allreduce_coalesced_ of torch.distributed"),
        ("builtin:llama-tiny+bfloat16_hops", "layers.0.self_attn.o_proj sums its terms without"),
    ],
)
def test_sums_that_cannot_be_carried_otherwise_have_a_reason_and_no_number(
    subject: str, reason: str
) -> None:
    report = drifted(subject, "float16", tp=(2,), wires=("float32",))
    found = rows(report)
    assert reason in found[2, "float16", "float32"]["reason"]
    assert "epsilons" not in found[2, "float16", "float32"]
    assert found[2, "float16", "float16"]["ratio"] > 0
    assert f"no number for float32: {reason}" in " ".join(render_drift(report).split())


def test_a_layer_without_logits_has_errors_and_no_scores() -> None:
    report = drifted("layer", "bfloat16", wires=("float32",))
    own = rows(report)[4, "bfloat16", "bfloat16"]
    # a bare layer shows what a whole model dilutes
    assert own["ratio"] > rows(llama())[4, "bfloat16", "bfloat16"]["ratio"]
    assert own["ratio"] == pytest.approx(own["predicted"], rel=0.15)
    assert (own["flips"], own["kl_mean"]) == (None, None)
    assert "tokens" not in render_drift(report).splitlines()[4]


def test_without_a_float64_run_a_prediction_is_not_valid_and_says_so() -> None:
    report = drifted("narrow_only", "bfloat16", tp=(2,), wires=("float32",))
    row = rows(report)[2, "bfloat16", "bfloat16"]
    assert row["prediction_reason"] == "there is no float64 run"
    assert "prediction not valid here: there is no float64 run" in render_drift(report)


def test_several_cases_are_one_row_with_an_interval_over_them() -> None:
    report = drifted("plain", "bfloat16", tp=(2,), wires=("float32",), cases=3)
    row = rows(report)[2, "bfloat16", "bfloat16"]
    assert (row["cases"], row["interval_over"], row["tokens"]) == (3, "cases", 3 * 128)
    ratios = [
        verdict.checks["drift"].facts["profile"]["reductions"][0]["ratio"]
        for verdict in report.verdicts
    ]
    low, high = row["interval"]
    assert low <= row["ratio"] <= high
    assert min(ratios) <= row["ratio"] <= max(ratios)
    assert low < min(ratios), "three cases do not bound the next one"
    assert max(ratios) < high


# -- usage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wires": ("float8",)}, "wire='float8', but should be one of bfloat16, float32"),
        ({"wires": "float32"}, "wires='float32', but should be several"),
        ({"declared": "star"}, "declared='star', but should be one of ring, tree, wide"),
        ({"dtypes": ("int8",)}, "dtype='int8', but should be one of bfloat16, float16, float32"),
    ],
)
def test_a_wrong_option_names_its_value_and_the_right_ones(options: Json, message: str) -> None:
    with pytest.raises(tpcheck.TPCheckError, match=message):
        tpcheck.drift("builtin:llama-tiny", (2,), backend="sim", **options)
