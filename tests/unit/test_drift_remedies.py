"""`tpcheck drift --fallback` and `--width`: what is asked for is in the report and in its text."""

import pytest

import tpcheck
from tpcheck.drift_profiles.remedies import parse_remedies
from tpcheck.errors import SubjectError, TPCheckError
from tpcheck.render.drift import render_drift
from tpcheck.report import from_json, to_json

QUICK = {"backend": "sim", "dtypes": ("float16",), "wires": ("float32",)}


@pytest.fixture(scope="module")
def report():
    return tpcheck.drift("builtin:llama-tiny", (2, 4), fallback="head,full", **QUICK)


def test_each_level_is_measured_at_each_degree(report):
    rows = report.drift["fallback"]
    keys = [(row["tp_size"], row["dtype"], row["level"]) for row in rows]
    assert keys == [(size, "float16", level) for size in (2, 4) for level in ("head", "full")]
    assert {row["case_id"] for row in rows} == {report.verdicts[0].case_id}
    for row in rows[1::2]:
        assert row["same_bits_as_tp1"]
        assert row["ratio_after"] == 1.0


def test_the_ratio_before_is_that_of_the_profile(report):
    for size in (2, 4):
        deployed = [row for row in report.drift["rows"] if row["deployed"]]
        profiled = next(row["ratio"] for row in deployed if row["tp_size"] == size)
        rows = [row for row in report.drift["fallback"] if row["tp_size"] == size]
        assert rows[0]["ratio_before"] == pytest.approx(profiled, rel=1e-6)


def test_the_report_keeps_and_shows_it(report):
    again = from_json(to_json(report))
    assert again.drift["fallback"] == report.drift["fallback"]
    text = render_drift(again)
    assert "what scoring at TP=1 buys, and costs; times of one forward, on sim on cpu" in text
    assert text.count(" full ") == 2


def test_what_is_not_the_same_function_has_no_price():
    subject = "builtin:llama-tiny+double_bias"
    report = tpcheck.drift(subject, (2,), fallback="full", **QUICK)
    assert report.outcome == "WRONG"
    assert report.drift["fallback"] == []


def test_nothing_is_measured_that_was_not_asked_for():
    report = tpcheck.drift("builtin:llama-tiny", (2,), **QUICK)
    assert not {"fallback", "width"} & set(report.drift)


def test_what_cannot_be_measured_is_refused_before_a_rank_runs():
    with pytest.raises(SubjectError, match="fallback='best', but should be one of head, rowwise"):
        tpcheck.drift("builtin:llama-tiny", (2,), fallback="best", **QUICK)
    with pytest.raises(TPCheckError, match="--width: backend=sim, but should be gloo or nccl"):
        tpcheck.drift("builtin:llama-tiny", (2,), width=True, **QUICK)
    assert parse_remedies("", "gloo", width=True) == ()
    assert parse_remedies(["full"], "sim", width=False) == ("full",)
