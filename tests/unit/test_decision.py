"""What is not proven refuses: from a report that proves everything, any single change refuses.

Evidence: one change per refusal, each with its reason and its command; every command is parsed by
the real command line; and a property over every piece of evidence, removed or replaced by anything.
"""

import pickle
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st

import tpcheck
from tests.gate_reports import NOW, POLICY, report_json, verdict
from tpcheck.cli import app
from tpcheck.deployment_gate.decision import Decision, Refusal, decide
from tpcheck.deployment_gate.gating import as_report, decision_json, refusal_text
from tpcheck.deployment_gate.policy import BACKENDS, parse_policy
from tpcheck.deployment_gate.requirement import Requirement
from tpcheck.errors import GateRefused, TPCheckError
from tpcheck.plugin.summary import Record, combined_report
from tpcheck.render.text import render_text
from tpcheck.report import to_json, write_report

Json = dict[str, Any]
Change = Callable[[Json], object]

EVERYTHING = (
    "tpcheck drift models.py:build --tp 2,4 --backend nccl --dtype bfloat16 --dtype float16"
    " --cases 2 --sensitivity --json REPORT.json"
)
ONE_CASE = "models.py:build --tp 2 --backend nccl --dtype bfloat16 --case s0-b2-t16"


def decided(report: Json, **policy: Any) -> Decision:
    asked = {key: value for key, value in {**POLICY, **policy}.items() if value is not None}
    return decide(as_report(report), parse_policy(asked), NOW)


def changed(change: Change) -> Json:
    report = report_json()
    change(report)
    return report


def first(report: Json) -> Json:
    found: Json = report["verdicts"][0]
    return found


def check(report: Json, name: str) -> Json:
    found: Json = first(report)["checks"][name]
    return found


def flips(report: Json) -> Json:
    found: Json = check(report, "drift")["profile"]["reductions"][0]["scores"]["flips"]
    return found


def scores(report: Json) -> Json:
    found: Json = check(report, "drift")["profile"]["reductions"][0]["scores"]
    return found


def fail(name: str, outcome: str, **facts: Any) -> Change:
    """Let one check of the first verdict fail, and the report say so consistently."""

    def change(report: Json) -> None:
        first(report)["checks"][name] |= {"outcome": "FAIL", "reason": "too far", **facts}
        first(report).update(outcome=outcome, reasons=[f"{name}: too far"])
        report["outcome"] = outcome

    return change


def skip(name: str) -> Change:
    return lambda report: first(report)["checks"].update(
        {name: {"outcome": "SKIPPED", "reason": "it could not be run"}}
    )


def without(name: str) -> Change:
    return lambda report: first(report)["checks"].pop(name)


def put(where: Callable[[Json], Json], **values: Any) -> Change:
    return lambda report: where(report).update(values)


def test_a_report_that_proves_everything_is_allowed() -> None:
    decision = decided(report_json())
    assert decision.refusals == ()
    assert decision.allowed
    assert decision.notes == ()
    asked = {one.key for one in decision.requirements}
    assert {key.partition(".")[0] for key in asked} == {
        *("report", "backends", "min_cases", "allow", "require", "subject", "engines", "match"),
        *("max_drift_ratio", "max_epsilons", "max_required_atol", "max_argmax_flip_margin"),
        *("require_deployed_path", "min_sensitivity", "max_age_days"),
    }


HERE = "tp=2 bfloat16 on nccl, case s0-b2-t16: "

REFUSALS: dict[str, tuple[Change, str, str]] = {
    "a degree is missing": (
        lambda r: r.update(verdicts=[v for v in r["verdicts"] if v["tp_size"] != 2]),
        "tp=2 bfloat16 on nccl: not proven: the report has no verdict there",
        EVERYTHING,
    ),
    "a dtype is missing": (
        lambda r: r.update(verdicts=[v for v in r["verdicts"] if v["dtype"] != "float16"]),
        "tp=2 float16 on nccl: not proven: the report has no verdict there",
        EVERYTHING,
    ),
    "a case is missing": (
        lambda r: r["verdicts"].pop(0),
        "tp=2 bfloat16 on nccl: 1 case, but should be at least 2",
        EVERYTHING,
    ),
    "nothing was run": (
        lambda r: r.update(verdicts=[], outcome="INCONCLUSIVE"),
        "tp=2 bfloat16 on nccl: not proven: the report has no verdict there",
        EVERYTHING,
    ),
    "structural fails": (
        fail("structural", "WRONG", relative_rms=0.2),
        HERE + "outcome is WRONG: structural: too far",
        f"tpcheck run {ONE_CASE}",
    ),
    "a required check fails": (
        fail("rank_agreement", "WRONG"),
        HERE + "the required check rank_agreement is FAIL: too far",
        f"tpcheck run {ONE_CASE}",
    ),
    "a check that is not required fails": (
        fail("tiling", "WRONG"),
        HERE + "outcome is WRONG: tiling: too far",
        f"tpcheck run {ONE_CASE}",
    ),
    "a rank died": (
        fail("schedule", "ERROR"),
        HERE + "outcome is ERROR: schedule: too far",
        f"tpcheck run {ONE_CASE}",
    ),
    "the degree is illegal": (
        fail("plan", "ILLEGAL"),
        HERE + "outcome is ILLEGAL: plan: too far",
        f"tpcheck run {ONE_CASE}",
    ),
    "drift is more than explained": (
        fail("drift", "DRIFT", ratio=31.0),
        HERE + "outcome is DRIFT: drift: too far",
        f"tpcheck run {ONE_CASE}",
    ),
    "a required check is skipped": (
        skip("structural"),
        HERE + "the required check structural is SKIPPED: it could not be run",
        f"tpcheck run {ONE_CASE}",
    ),
    "a skipped check has a number all the same": (
        put(lambda r: check(r, "drift"), outcome="SKIPPED", reason="it does not round"),
        HERE + "drift.ratio is not known: drift is SKIPPED: it does not round",
        f"tpcheck drift {ONE_CASE}",
    ),
    "a required check is missing": (
        without("repeatability"),
        HERE + "the required check repeatability is missing",
        EVERYTHING,
    ),
    "nothing was compared": (
        lambda r: (
            skip("structural")(r),
            skip("drift")(r),
            first(r).update(outcome="INCONCLUSIVE"),
            r.update(outcome="INCONCLUSIVE"),
        ),
        HERE + "outcome is INCONCLUSIVE",
        f"tpcheck run {ONE_CASE}",
    ),
    "the ratio is above the policy's": (
        put(lambda r: check(r, "drift"), ratio=3.5, limit=4.0),
        HERE + "drift.ratio=3.5, but should be at most 3",
        f"tpcheck drift {ONE_CASE}",
    ),
    "the ratio is just above the policy's": (
        put(lambda r: check(r, "drift"), ratio=3.0000000001, limit=4.0),
        HERE + "drift.ratio=3.0000000001, but should be at most 3",
        f"tpcheck drift {ONE_CASE}",
    ),
    "the ratio is missing": (
        lambda r: check(r, "drift").pop("ratio"),
        HERE + "drift.ratio is missing, but should be at most 3",
        EVERYTHING,
    ),
    "the error in epsilons is null": (
        put(lambda r: check(r, "drift"), epsilons=None, epsilons_reason="was Infinity"),
        HERE + "drift.epsilons=null (was Infinity), but should be a number of at most 2",
        EVERYTHING,
    ),
    "the error in epsilons is above the policy's": (
        put(lambda r: check(r, "drift"), epsilons=2.5),
        HERE + "drift.epsilons=2.5, but should be at most 2",
        f"tpcheck drift {ONE_CASE}",
    ),
    "a larger atol would be needed": (
        put(lambda r: check(r, "allclose"), required_atol=0.06),
        HERE + "allclose.required_atol=0.06, but should be at most 0.05",
        f"tpcheck drift {ONE_CASE}",
    ),
    "allclose was held with a relative part": (
        put(lambda r: check(r, "allclose"), rtol=10.0),
        HERE + "allclose.rtol=10, but should be at most 0",
        EVERYTHING,
    ),
    "allclose is missing": (
        without("allclose"),
        HERE + "allclose.required_atol is missing, but should be at most 0.05",
        EVERYTHING,
    ),
    "there is no profile": (
        put(lambda r: check(r, "drift"), profile=None, profile_reason="a run for it failed"),
        HERE + "drift.profile is missing, so no argmax flip is known: a run for it failed",
        EVERYTHING,
    ),
    "no reduction is the deployed one": (
        lambda r: check(r, "drift")["profile"]["reductions"].pop(0),
        HERE + "drift.profile.reductions has 0 that are deployed, but should have one",
        EVERYTHING,
    ),
    "two reductions are the deployed one": (
        lambda r: check(r, "drift")["profile"]["reductions"][1].update(deployed=True),
        HERE + "drift.profile.reductions has 2 that are deployed, but should have one",
        EVERYTHING,
    ),
    "the subject has no scores": (
        lambda r: check(r, "drift")["profile"]["reductions"][0].update(
            scores=None, scores_reason="the subject returns no logits"
        ),
        HERE + "drift.profile has no scores, so no argmax flip is known: the subject returns no"
        " logits",
        EVERYTHING,
    ),
    "no token was scored": (
        put(scores, tokens=0),
        HERE + "drift.profile.scores.tokens=0, but should be at least 1",
        EVERYTHING,
    ),
    "tokens were left out": (
        put(scores, tokens_not_finite=3),
        HERE + "drift.profile.scores.tokens_not_finite=3, but should be 0: whether those tokens"
        " flip is not known",
        EVERYTHING,
    ),
    "a flip at a larger margin": (
        lambda r: flips(r)["first"][0].update(tp1_margin=0.06),
        HERE + "1 argmax flip at a margin of up to 0.06, but should be at most 0.05",
        f"tpcheck drift {ONE_CASE}",
    ),
    "a flip that is not listed, at a larger margin": (
        put(flips, count=40, largest_margin=0.25),
        HERE + "40 argmax flips at a margin of up to 0.25, but should be at most 0.05",
        f"tpcheck drift {ONE_CASE}",
    ),
    "flips that are not listed": (
        put(flips, count=40, largest_margin=None),
        HERE + "drift.profile.scores.flips lists 1 of 40 flips, but should have the largest"
        " margin of all",
        EVERYTHING,
    ),
    "a flip without a margin": (
        put(flips, first=[{"input": "A"}]),
        HERE + "drift.profile.scores.flips has 1 flips and 0 margins in a list of 1, but should"
        " have a margin each",
        EVERYTHING,
    ),
    "more margins than flips": (
        put(flips, count=0),
        HERE + "drift.profile.scores.flips has 0 flips and 1 margins in a list of 1, but should"
        " have a margin each",
        EVERYTHING,
    ),
    "flips are not there": (
        lambda r: scores(r).pop("flips"),
        HERE + "drift.profile.scores.flips=null, but should say which tokens flip",
        EVERYTHING,
    ),
    "flips are not counted": (
        lambda r: flips(r).pop("count"),
        HERE + "drift.profile.scores.flips has count=null and a list of the first, but should have"
        " both",
        EVERYTHING,
    ),
    "the deployed path was not exercised": (
        put(lambda r: r["path"], same_as_deployed=False, differences=["reduction tree, emulated"]),
        "the deployed path was not exercised: reduction tree, emulated",
        EVERYTHING,
    ),
    "the path differs and nobody says how": (
        put(lambda r: r["path"], same_as_deployed=False),
        "the deployed path was not exercised: the report does not say how it differs",
        EVERYTHING,
    ),
    "sensitivity was not measured": (
        lambda r: r.update(sensitivity=None),
        "sensitivity: was not measured",
        EVERYTHING,
    ),
    "sensitivity could not be measured": (
        lambda r: r.update(sensitivity=None, notes=["sensitivity was not measured: no site"]),
        "sensitivity was not measured: no site",
        EVERYTHING,
    ),
    "too few faults are caught": (
        put(lambda r: r["sensitivity"], caught=110, blind_to=["a", "b", "c", "d", "e"]),
        "sensitivity: 110 of 116 planted faults were caught, but should be at least 0.95 of them;"
        " blind to a, b, c and 2 more",
        EVERYTHING,
    ),
    "no fault was planted": (
        put(lambda r: r["sensitivity"], caught=0, planted=0),
        "sensitivity: caught=0, planted=0, but should be whole numbers, planted at least caught"
        " and 1",
        EVERYTHING,
    ),
    "more faults are caught than planted": (
        put(lambda r: r["sensitivity"], caught=117),
        "sensitivity: caught=117, planted=116, but should be whole numbers, planted at least"
        " caught and 1",
        EVERYTHING,
    ),
    "sensitivity was measured on another backend": (
        put(lambda r: r["sensitivity"], backend="sim"),
        "sensitivity: was measured on 'sim', but should be on nccl as the verdicts",
        EVERYTHING,
    ),
    "sensitivity was measured elsewhere": (
        put(lambda r: r["sensitivity"], tp_size=8),
        "sensitivity: was measured in 's0-b2-t16', 8, 'bfloat16', but should be in a verdict of"
        " this report",
        EVERYTHING,
    ),
    "sensitivity was measured in what is no case": (
        put(lambda r: r["sensitivity"], case_id=[]),
        "sensitivity: was measured in [], 4, 'bfloat16', but should be in a verdict of this report",
        EVERYTHING,
    ),
    "the report is too old": (
        put(lambda r: r, created="2026-02-05T12:00:00Z"),
        "age: the report is 33.0 days old, but should be at most 30",
        EVERYTHING,
    ),
    "the report has no date": (
        lambda r: r.pop("created"),
        "age: the report does not say when it was made",
        EVERYTHING,
    ),
    "the date cannot be read": (
        put(lambda r: r, created="yesterday"),
        "age: created='yesterday', but should be a time with its zone like 2026-01-31T12:00:00Z",
        EVERYTHING,
    ),
    "the date has no zone": (
        put(lambda r: r, created="2026-03-09T12:00:00"),
        "age: created='2026-03-09T12:00:00', but should be a time with its zone like"
        " 2026-01-31T12:00:00Z",
        EVERYTHING,
    ),
    "the report is from the future": (
        put(lambda r: r, created="2026-03-10T12:05:01Z"),
        "age: created='2026-03-10T12:05:01Z' is in the future",
        EVERYTHING,
    ),
    "the environment differs": (
        put(lambda r: r["environment"], torch="2.12.1"),
        "environment.torch='2.12.1', but should be '2.13.0'",
        EVERYTHING,
    ),
    "a field of the environment is missing": (
        lambda r: r["environment"].pop("variables"),
        "environment.variables.NCCL_ALGO is missing, but should be 'Ring'",
        EVERYTHING,
    ),
    "a field of the environment is null": (
        put(lambda r: r["environment"], torch=None),
        "environment.torch is null, but should be '2.13.0'",
        EVERYTHING,
    ),
    "another engine": (
        put(lambda r: r["engine"], name="sglang"),
        "engine is sglang==0.11.0, but should be vllm",
        EVERYTHING,
    ),
    "no engine": (
        lambda r: r.pop("engine"),
        "engine: the report does not say which engine carried it, but should be vllm",
        EVERYTHING,
    ),
    "another subject": (
        put(lambda r: r, subject="other.py:build"),
        "this report is about other.py:build, not models.py:build",
        EVERYTHING,
    ),
    "WRONG at a degree that is not asked for": (
        lambda r: (
            r["verdicts"].insert(0, verdict(tp_size=8)),
            fail("structural", "WRONG", relative_rms=0.2)(r),
        ),
        "tp=8 bfloat16: WRONG, in case s0-b2-t16; the policy does not ask for it, but what is"
        " another function there is not proven elsewhere either",
        "tpcheck run models.py:build --tp 8 --backend nccl --dtype bfloat16 --case s0-b2-t16",
    ),
    "PASS with a number above its own limit": (
        put(lambda r: check(r, "structural"), relative_rms=0.24),
        "the report contradicts itself: s0-b2-t16 tp=2 bfloat16: check structural is PASS, but"
        " relative_rms=0.24 is above 1e-12",
        EVERYTHING,
    ),
    "PASS with a number that is null": (
        put(lambda r: check(r, "structural"), relative_rms=None),
        "the report contradicts itself: s0-b2-t16 tp=2 bfloat16: check structural is PASS, but"
        " relative_rms=null, which is no size",
        EVERYTHING,
    ),
    "PASS with a limit that is null": (
        put(lambda r: check(r, "structural"), limit=None),
        "the report contradicts itself: s0-b2-t16 tp=2 bfloat16: check structural is PASS, but"
        " limit=null",
        EVERYTHING,
    ),
    "PASS with a negative number": (
        put(lambda r: check(r, "structural"), relative_rms=-1.0),
        "relative_rms=-1, which is no size",
        EVERYTHING,
    ),
    "PASS that overflows": (
        put(lambda r: check(r, "drift"), overflow=True),
        "check drift is PASS, but overflows",
        EVERYTHING,
    ),
    "allclose PASS above its atol": (
        put(lambda r: check(r, "allclose"), atol=0.01),
        "check allclose is PASS, but required_atol=0.0171 is above 0.01",
        EVERYTHING,
    ),
    "PASS although the user's tolerance fails": (
        put(lambda r: check(r, "allclose"), outcome="FAIL", reason="too far", source="user"),
        "outcome is PASS, but its checks come to DRIFT",
        EVERYTHING,
    ),
    "PASS although nothing was compared": (
        lambda r: (skip("structural")(r), skip("drift")(r)),
        "outcome is PASS, but its checks come to INCONCLUSIVE",
        EVERYTHING,
    ),
    "an outcome that its checks do not come to": (
        fail("structural", "ILLEGAL", relative_rms=0.2),
        "outcome is ILLEGAL, but its checks come to WRONG",
        EVERYTHING,
    ),
    "a failed check that nobody knows": (
        lambda r: (
            first(r)["checks"].update(entropy={"outcome": "FAIL", "reason": "x"}),
            first(r).update(outcome="DRIFT"),
            r.update(outcome="DRIFT"),
        ),
        "check entropy is FAIL, and this tpcheck does not know what it means",
        EVERYTHING,
    ),
    "a deployed path that differs": (
        put(lambda r: r["path"], differences=["backend gloo, not nccl"]),
        "the path is the deployed one, but differs from it: backend gloo, not nccl",
        EVERYTHING,
    ),
    "another backend in the environment": (
        put(lambda r: r["environment"], backend="sim"),
        "path.backend='nccl', but environment.backend='sim'",
        EVERYTHING,
    ),
    "tensors on the CPU under nccl": (
        put(lambda r: r["environment"], device="cpu"),
        "path.backend='nccl', but environment.device='cpu'",
        EVERYTHING,
    ),
    "another backend in the engine's arguments": (
        put(lambda r: r["engine"], arguments={"backend": "gloo"}),
        "path.backend='nccl', but engine.arguments.backend='gloo'",
        EVERYTHING,
    ),
    "another tpcheck in the environment": (
        put(lambda r: r["environment"], tpcheck="0.0.9"),
        "tpcheck='0.1.0', but environment.tpcheck='0.0.9'",
        EVERYTHING,
    ),
    "a deployed path with an emulated reduction": (
        put(lambda r: r, reduction={"kind": "ring", "basis": "emulated"}),
        "the path is the deployed one, but its reduction was emulated",
        EVERYTHING,
    ),
    "calls that are negative": (
        put(lambda r: r["path"], collectives={"all_reduce": -1}),
        "path.collectives.all_reduce=-1, but should be at least 0",
        EVERYTHING,
    ),
    "a degree below 1": (
        lambda r: r["verdicts"].append(verdict("s9-b2-t16", 0)),
        "s9-b2-t16 tp=0 bfloat16: the degree should be at least 1",
        EVERYTHING,
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_one_change_refuses_with_its_reason_and_its_command(name: str) -> None:
    change, reason, settle = REFUSALS[name]
    decision = decided(changed(change))
    assert not decision.allowed
    assert any(one.reason.endswith(reason) and one.settle == settle for one in decision.refusals), (
        decision.refusals
    )


@pytest.mark.parametrize("name", REFUSALS)
def test_every_command_is_one_that_the_command_line_takes(name: str) -> None:
    for refusal in decided(changed(REFUSALS[name][0])).refusals:
        assert_parses(refusal.settle)


def assert_parses(line: str) -> None:
    program, verb, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    assert program == "tpcheck"
    command.make_context(verb, arguments)


@pytest.mark.parametrize("here", BACKENDS)
@pytest.mark.parametrize("asked", BACKENDS)
def test_evidence_from_one_backend_never_counts_for_another(here: str, asked: str) -> None:
    report = report_json()
    report["environment"]["backend"] = report["path"]["backend"] = here
    report["sensitivity"]["backend"] = report["engine"]["arguments"]["backend"] = here
    report["path"]["same_as_deployed"] = False
    decision = decided(report, backends=[asked], require_deployed_path=False)
    assert decision.allowed is (here == asked)
    if here != asked:
        assert decision.refusals[0].reason.startswith(
            f"backend {asked}: nothing is proven, because this report ran on {here}"
        )


def test_every_backend_asked_for_has_to_be_proven() -> None:
    decision = decided(report_json(), backends=["nccl", "gloo"])
    [refusal] = decision.refusals
    assert refusal.reason.startswith("backend gloo: nothing is proven")
    assert "--backend gloo" in refusal.settle


@pytest.mark.parametrize("backend", ["sim", "nccl-loopback"])
def test_what_is_never_deployed_cannot_be_the_deployed_path(backend: str) -> None:
    report = report_json()
    report["environment"]["backend"] = report["path"]["backend"] = backend
    report["sensitivity"]["backend"] = report["engine"]["arguments"]["backend"] = backend
    decision = decided(report, backends=[backend])
    [refusal] = decision.refusals
    assert f"{backend} is no path that is deployed" in refusal.reason


def test_sensitivity_for_gloo_may_be_measured_in_simulation_as_run_does() -> None:
    report = report_json()
    report["environment"]["backend"] = report["path"]["backend"] = "gloo"
    report["engine"]["arguments"]["backend"] = "gloo"
    report["sensitivity"]["backend"] = "sim"
    report["path"]["same_as_deployed"] = False
    asked = {"backends": ["gloo"], "require_deployed_path": False}
    assert decided(report, **asked).allowed
    report["sensitivity"]["backend"] = "nccl"
    assert not decided(report, **asked).allowed


def test_a_path_that_no_report_from_gloo_can_exercise_is_settled_in_the_policy() -> None:
    report = report_json()
    report["environment"]["backend"] = report["path"]["backend"] = "gloo"
    report["engine"]["arguments"]["backend"] = report["sensitivity"]["backend"] = "gloo"
    report["path"] |= {"same_as_deployed": False, "differences": ["backend gloo, not nccl"]}
    [refusal] = decided(report, backends=["gloo"]).refusals
    assert refusal.reason == "the deployed path was not exercised: backend gloo, not nccl"
    assert refusal.settle.startswith("in the policy, require_deployed_path = false, if that is")


def test_allow_lets_drift_through_only_where_no_required_check_failed() -> None:
    drifted = changed(fail("drift", "DRIFT", ratio=2.9, limit=2.5))
    assert not decided(drifted, require=["structural"]).allowed
    assert decided(drifted, require=["structural"], allow=["DRIFT"]).allowed
    [refusal] = decided(drifted, allow=["DRIFT"]).refusals
    assert refusal.reason.endswith("(`allow` lets DRIFT through, but `require` names drift)")


def test_a_wrong_verdict_renamed_to_drift_is_a_contradiction() -> None:
    renamed = changed(fail("structural", "DRIFT", relative_rms=0.2))
    decision = decided(renamed, require=["drift"], allow=["DRIFT"])
    assert "outcome is DRIFT, but its checks come to WRONG" in decision.refusals[0].reason


@pytest.mark.parametrize("outcome", ["ERROR", "DRIFT", "ILLEGAL"])
def test_a_degree_that_is_not_asked_for_is_a_note(outcome: str) -> None:
    report = report_json()
    report["verdicts"].insert(0, verdict(tp_size=8))
    fail({"ERROR": "schedule", "DRIFT": "drift", "ILLEGAL": "plan"}[outcome], outcome)(report)
    decision = decided(report)
    assert decision.allowed
    assert decision.notes == (
        f"tp=8 bfloat16: {outcome}, in case s0-b2-t16; the policy does not ask for it",
    )


def test_one_case_that_fails_is_not_outvoted() -> None:
    report = report_json()
    report["verdicts"] += [verdict(f"s{i}-b2-t16") for i in range(2, 30)]
    assert decided(report).allowed
    report["verdicts"][-1]["checks"]["drift"]["ratio"] = 2.999
    assert decided(report).allowed
    report["verdicts"][-1]["checks"]["drift"] |= {"ratio": 3.001, "limit": 5.0}
    [refusal] = decided(report).refusals
    assert refusal.reason.startswith("tp=2 bfloat16 on nccl, case s29-b2-t16: drift.ratio=3.001")


def test_a_case_that_stands_twice_counts_once() -> None:
    report = as_report(report_json())
    once = [one for one in report.verdicts if one.case_id == "s0-b2-t16"]
    decision = decide(replace(report, verdicts=(*once, *once)), parse_policy(POLICY), NOW)
    assert decision.refusals[0].reason == (
        "tp=2 bfloat16 on nccl: 1 case, but should be at least 2"
    )


@pytest.mark.parametrize(
    "names",
    [
        ("tests/a.py::test_x s0-b2-t16", "tests/b.py::test_y s0-b2-t16"),
        ("tests/a.py::test_x s0-b2-t16", "tests/a.py::test_x s0-b2-t16 #2"),
        ("tests/a.py::test_x[a b] s0-b2-t16", "s0-b2-t16"),
        ('a.py::test s0-b2-t16+{"activation":"a b"}', 's0-b2-t16+{"activation":"a b"}'),
    ],
)
def test_a_case_that_two_tests_ran_is_one_case(names: tuple[str, str]) -> None:
    report = report_json()
    for one in report["verdicts"]:
        one["case_id"] = names[one["case_id"].startswith("s1")]
    report["sensitivity"]["case_id"] = names[0]
    alone = decided(report, min_cases=1)
    assert alone.allowed
    assert {one.found for one in alone.requirements if one.key == "require"} == {"so in 1 case"}
    [*_, refusal] = decided(report).refusals
    assert refusal.reason.endswith(": 1 case, but should be at least 2")


@pytest.mark.parametrize("subject", [None, "pytest, 2 subjects"])
def test_a_degree_that_one_of_several_subjects_proves_is_not_proven(subject: str | None) -> None:
    two = [
        Record(name, report=as_report({**report_json(), "subject": name, "verdicts": [found]}))
        for name, found in {
            "a.py:build": verdict(tp_size=2),
            "b.py:build": verdict(tp_size=4),
        }.items()
    ]
    asked = {"min_cases": 1, "dtypes": ["bfloat16"], "max_age_days": None, "engines": None}
    together = decided(to_json(combined_report(two)), subject=subject, min_sensitivity=0, **asked)
    [refusal] = together.refusals
    assert refusal.reason == (
        "this report is about several subjects (pytest, 2 subjects): a degree that one of them"
        " proves is not proven for the others"
    )
    assert refusal.settle.startswith("a report of each subject alone: pytest --tp-report ")


def test_the_case_of_a_test_is_settled_by_its_own_name() -> None:
    report = report_json()
    for one in report["verdicts"]:
        one["case_id"] = f"tests/a.py::test_x {one['case_id']}"
    report["sensitivity"]["case_id"] = f"tests/a.py::test_x {report['sensitivity']['case_id']}"
    check(report, "drift")["epsilons"] = 9.0
    [refusal] = decided(report).refusals
    assert refusal.reason.startswith("tp=2 bfloat16 on nccl, case tests/a.py::test_x s0-b2-t16: ")
    assert refusal.settle == f"tpcheck drift {ONE_CASE}"


def refused_as_planned(case_id: str) -> Json:
    plan = {"outcome": "PASS", "refused": "num_attention_heads=6 at tp_size=4"}
    return {**verdict(case_id), "checks": {"plan": plan}}


def test_a_generated_case_refused_as_planned_proves_nothing_and_refuses_nothing() -> None:
    report = report_json()
    report["verdicts"].append(refused_as_planned('s7-b2-t16+{"vocab_size":11}'))
    decision = decided(report)
    assert decision.allowed
    assert decision.notes
    assert not decided(report, min_cases=3).allowed
    # without a spec of its own there is no plan that such a case could have kept to
    report["verdicts"].append(refused_as_planned("s8-b2-t16"))
    assert not decided(report).allowed


@pytest.mark.parametrize(
    ("created", "allowed"),
    [
        ("2026-02-08T12:00:00Z", True),
        ("2026-02-08T11:59:59Z", False),
        ("2026-03-10T12:05:00Z", True),
        ("2026-03-10T12:05:01Z", False),
        ("2026-03-10T14:00:00+02:00", True),
        ("0001-01-01T00:00:00+23:59", False),
        ("9999-12-31T23:59:59-23:59", False),
        ("2026-03-09", False),
        ("", False),
        ("2026-03-09T12:00:00Z ", False),
    ],
)
def test_age_is_counted_to_the_second_with_five_minutes_for_clocks(
    created: str, allowed: bool
) -> None:
    assert decided(changed(put(lambda r: r, created=created))).allowed is allowed


def test_a_moment_without_a_zone_is_no_moment() -> None:
    with pytest.raises(ValueError, match="should have a time zone"):
        decide(as_report(report_json()), parse_policy(POLICY), datetime(2026, 3, 10))


def test_the_moment_may_be_in_any_zone() -> None:
    there = NOW.astimezone(timezone(timedelta(hours=9)))
    assert decide(as_report(report_json()), parse_policy(POLICY), there).allowed


@pytest.mark.parametrize(
    ("wanted", "found", "allowed"),
    [
        ("2.13.0", "2.13.0", True),
        ("2.13.0", "2.13.0+cpu", False),
        (True, True, True),
        (True, 1, False),
        (1, True, False),
        (1, 1.0, True),
        (False, 0, False),
        (False, None, False),
        ([1, 2], [1, 2], True),
        ([1, 2], [1, 2, 3], False),
        ([1], [True], False),
        ("1", 1, False),
    ],
)
def test_a_field_matches_by_value_and_kind(wanted: Any, found: Any, allowed: bool) -> None:
    report = changed(put(lambda r: r["environment"], field=found))
    assert decided(report, match={"field": wanted}).allowed is allowed


def test_nested_fields_are_found_by_dotted_path_or_by_table() -> None:
    for match in ({"variables.NCCL_ALGO": "Ring"}, {"variables": {"NCCL_ALGO": "Ring"}}):
        assert decided(report_json(), match=match).allowed
    dotted = changed(put(lambda r: r["environment"], **{"a.b": {"c.d": 1}}))
    assert decided(dotted, match={"a.b.c.d": 1}).allowed
    assert not decided(dotted, match={"a.b.c": 1}).allowed
    assert not decided(dotted, match={"a.b.c.d.e": 1}).allowed


def test_an_engine_may_be_asked_for_by_version() -> None:
    assert decided(report_json(), engines=["vllm==0.11.0"]).allowed
    assert not decided(report_json(), engines=["vllm==0.11.1"]).allowed
    assert decided(report_json(), engines=["sglang", "vllm"]).allowed


def test_min_sensitivity_0_asks_for_no_measurement() -> None:
    report = changed(lambda r: r.update(sensitivity=None))
    decision = decided(report, min_sensitivity=0)
    assert decision.allowed
    assert "--sensitivity" not in decided(report, min_sensitivity=0, tp=[16]).refusals[0].settle


def test_a_derived_tolerance_never_decides() -> None:
    report = changed(
        put(lambda r: check(r, "allclose"), outcome="FAIL", reason="x", source="derived: 20 x e1")
    )
    assert decided(report).allowed
    assert not decided(report, require=["allclose"]).allowed


def test_huge_numbers_are_compared_and_not_overflowed() -> None:
    report = changed(put(lambda r: r["sensitivity"], caught=10**300, planted=10**300))
    assert decided(report).allowed
    report["sensitivity"]["planted"] = 2 * 10**300
    assert not decided(report).allowed
    check(report, "drift").update(ratio=10**300)
    assert any("drift.ratio=1000" in one.reason for one in decided(report).refusals)
    flips(report)["first"][0]["tp1_margin"] = 10**300
    assert any("margin of up to 1000" in one.reason for one in decided(report).refusals)


def hostile(subject: str) -> Json:
    return {**report_json(), "subject": subject, "outcome": "INCONCLUSIVE", "verdicts": []}


@pytest.mark.parametrize(
    "subject",
    [
        "models.py:build; rm -rf /",
        "models.py:build$(id)",
        "--help",
        "a\nb.py:build",
        "\x1b[2Jm.py:b",
        "hf:/models/with space",
        "<lambda>",
        "tests.x:make.<locals>.build",
        "__main__:build",
        "",
        "ref:it's",
    ],
)
def test_a_command_is_one_line_that_runs_nothing_but_tpcheck(subject: str) -> None:
    for refusal in decided(hostile(subject), subject=None).refusals:
        assert refusal.settle.isprintable()
        assert refusal.reason.isprintable()
        if refusal.settle.startswith("tpcheck."):
            compile(refusal.settle, "settle", "eval")
            continue
        assert_parses(refusal.settle)
        assert shlex.split(refusal.settle)[2] == subject


def test_a_closure_is_settled_in_python() -> None:
    [line] = {one.settle for one in decided(hostile("x:f.<locals>.build"), subject=None).refusals}
    assert line == (
        "tpcheck.report.write_report(tpcheck.drift(build, (2, 4), backend='nccl',"
        " dtypes=('bfloat16', 'float16'), cases=2, sensitivity=True), 'REPORT.json')"
    )


def test_loopback_is_settled_with_all_ranks_on_one_gpu() -> None:
    [refusal] = decided(report_json(), backends=["nccl", "nccl-loopback"]).refusals
    assert "--backend nccl --ranks-per-gpu 4" in refusal.settle
    assert_parses(refusal.settle)


# --- the property: whatever is taken away or replaced, it refuses ---------------------------------


def required(report: Json) -> Iterator[tuple[tuple[Any, ...], Callable[[Any], bool]]]:
    """Yield the path of every piece of evidence that POLICY needs, and what else it would take."""

    def only(value: Any) -> Callable[[Any], bool]:
        return lambda other: type(other) is type(value) and other == value

    def up_to(limit: float) -> Callable[[Any], bool]:
        return lambda v: (
            isinstance(v, int | float) and v is not True and v is not False and (0 <= v <= limit)
        )

    for i, one in enumerate(report["verdicts"]):
        here = ("verdicts", i)
        for name in ("tp_size", "dtype", "outcome"):
            yield (*here, name), only(one[name])
        for name in POLICY["require"]:
            yield (*here, "checks", name), only(one["checks"][name])
            yield (*here, "checks", name, "outcome"), only("PASS")
        drift = (*here, "checks", "drift")
        yield (*drift, "ratio"), up_to(3.0)
        yield (*drift, "epsilons"), up_to(2.0)
        yield (*here, "checks", "allclose", "required_atol"), up_to(0.05)
        yield (*here, "checks", "allclose", "rtol"), up_to(0)
        scores = (*drift, "profile", "reductions", 0, "scores")
        yield (*drift, "profile"), only(one["checks"]["drift"]["profile"])
        yield scores, only(one["checks"]["drift"]["profile"]["reductions"][0]["scores"])
        yield (*scores, "tokens"), lambda v: isinstance(v, int) and v >= 1 and v is not True
        yield (*scores, "tokens_not_finite"), up_to(0)
        yield (*scores, "flips", "count"), lambda v: isinstance(v, int) and v >= 1 and v is not True
        yield (*scores, "flips", "first", 0, "tp1_margin"), up_to(0.05)
    yield ("path", "backend"), only("nccl")
    yield ("path", "same_as_deployed"), only(True)
    yield ("sensitivity",), only(report["sensitivity"])
    yield ("sensitivity", "caught"), lambda v: type(v) is int and 111 <= v <= 116
    yield ("sensitivity", "planted"), lambda v: type(v) is int and 116 <= v <= 122
    yield ("environment", "torch"), only("2.13.0")
    yield ("environment", "variables", "NCCL_ALGO"), only("Ring")
    yield ("engine",), only(report["engine"])
    yield ("engine", "name"), only("vllm")
    yield ("subject",), only("models.py:build")
    yield ("created",), only(report["created"])
    yield ("schema",), only(report["schema"])


REQUIRED = list(required(report_json()))

ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(
        ["PASS", "FAIL", "SKIPPED", "WRONG", "DRIFT", "gloo", "sim", "nccl ", 10**400]
    )
    | st.text(max_size=6)
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.sampled_from(["outcome", "count", "x"]), st.text(max_size=4), max_size=2)
)


def allowed(report: Json) -> bool:
    try:
        return decided(report).allowed
    except TPCheckError:
        return False


def at(report: Json, path: tuple[Any, ...]) -> Any:
    found: Any = report
    for key in path:
        found = found[key]
    return found


@given(st.sampled_from(REQUIRED), st.just("removed") | ANYTHING)
def test_evidence_that_is_removed_or_replaced_refuses(
    piece: tuple[tuple[Any, ...], Callable[[Any], bool]], value: Any
) -> None:
    path, still_enough = piece
    report = report_json()
    holder = at(report, path[:-1])
    if value == "removed":
        del holder[path[-1]]
    elif still_enough(value):
        return
    else:
        holder[path[-1]] = value
    assert not allowed(report)


@pytest.mark.parametrize(
    "piece",
    [piece for piece in REQUIRED if piece[0][:1] != ("verdicts",) or piece[0][1] in (0, 7)],
    ids=lambda piece: ".".join(map(str, piece[0])),
)
def test_each_piece_of_evidence_is_needed(
    piece: tuple[tuple[Any, ...], Callable[[Any], bool]],
) -> None:
    report = report_json()
    del at(report, piece[0][:-1])[piece[0][-1]]
    assert not allowed(report)
    report = report_json()
    at(report, piece[0][:-1])[piece[0][-1]] = None
    assert not allowed(report)


def everywhere(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a report."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else items:
        yield from everywhere(item, (*path, key))


EVERYWHERE = list(everywhere({**report_json(), "verdicts": [verdict()]}))


@given(st.lists(st.tuples(st.sampled_from(EVERYWHERE), ANYTHING), min_size=1, max_size=3))
def test_no_value_anywhere_in_a_report_crashes_the_gate(
    edits: list[tuple[tuple[Any, ...], Any]],
) -> None:
    report = report_json()
    for path, value in sorted(edits, key=lambda edit: -len(edit[0])):
        at(report, path[:-1])[path[-1]] = value
    try:
        decision = decided(report)
    except TPCheckError as error:
        assert str(error).startswith("report")  # noqa: PT017
    else:
        assert all(one.reason.isprintable() for one in decision.refusals)


# --- what a decision is ---------------------------------------------------------------------------


def test_a_decision_that_looked_at_nothing_allows_nothing() -> None:
    assert not Decision("x", (), (), "", NOW).allowed


@pytest.mark.parametrize(
    ("met", "reason", "settle"),
    [(True, "x", ""), (True, "", "x"), (False, "x", ""), (False, "", "")],
)
def test_a_requirement_has_a_reason_and_a_command_unless_it_is_met(
    met: bool, reason: str, settle: str
) -> None:
    with pytest.raises(ValueError, match="unless it is met"):
        Requirement("key", "asked", "found", met, reason=reason, settle=settle)


def test_the_json_holds_every_requirement_and_repeats_what_refuses() -> None:
    report, policy = as_report(changed(REFUSALS["no engine"][0])), parse_policy(POLICY)
    decision = decide(report, policy, NOW)
    found = decision_json(decision, policy, report)
    assert found["outcome"] == "REFUSED"
    assert found["decided"] == "2026-03-10T12:00:00Z"
    assert len(found["requirements"]) == len(decision.requirements)
    [unmet] = [one for one in found["requirements"] if not one["met"]]
    assert found["refusals"] == [{"reason": unmet["reason"], "settle": unmet["settle"]}]
    assert unmet["key"] == "engines"
    allowed = decision_json(decide(as_report(report_json()), policy, NOW), policy, report)
    assert (allowed["outcome"], allowed["refusals"]) == ("ALLOWED", [])


# --- tpcheck.gate ---------------------------------------------------------------------------------


def current() -> Json:
    """Return the report as if made now: `gate` reads the clock."""
    return report_json() | {"created": datetime.now(UTC).isoformat()}


def test_gate_is_quiet_for_what_is_proven_in_every_form(tmp_path: Any) -> None:
    report = as_report(current())
    path = tmp_path / "report.json"
    write_report(report, path)
    for given_report in (report, current(), path, str(path)):
        for policy in (parse_policy(POLICY), POLICY, {"policy": POLICY}):
            tpcheck.gate(given_report, policy)


def test_gate_raises_with_every_reason_in_the_message_and_as_attributes() -> None:
    with pytest.raises(GateRefused) as refused:
        tpcheck.gate(report_json() | {"created": "2020-01-01T00:00:00Z"}, POLICY | {"tp": [2, 16]})
    found = refused.value.refusals
    assert len(found) == 3
    for one in found:
        assert isinstance(one, Refusal)
        assert f"- {one.reason}\n  settle: {one.settle}" in str(refused.value)
    again = pickle.loads(pickle.dumps(refused.value))
    assert (str(again), again.refusals) == (str(refused.value), found)


@pytest.mark.parametrize("value", [None, 3, [], b"x"])
def test_gate_names_what_is_neither_report_nor_policy(value: Any) -> None:
    with pytest.raises(TPCheckError, match="but should be a Report, a dict or the path"):
        tpcheck.gate(value, POLICY)
    with pytest.raises(TPCheckError, match="but should be a Policy, a dict or the path"):
        tpcheck.gate(report_json(), value)


@pytest.mark.parametrize(
    ("name", "value"), [("x", float("nan")), ("x", object()), ("environment", {1, 2})]
)
def test_gate_refuses_what_json_could_not_hold(name: str, value: Any) -> None:
    with pytest.raises(TPCheckError, match="report: cannot be stored as JSON"):
        tpcheck.gate(report_json() | {name: value}, POLICY)


def test_a_report_fresh_from_a_run_is_judged_as_it_would_be_stored() -> None:
    report = as_report(current())
    twice = replace(report, verdicts=(*report.verdicts, report.verdicts[0]))
    with pytest.raises(TPCheckError, match="but should be there once"):
        tpcheck.gate(twice, POLICY)


def test_the_text_counts_its_reasons() -> None:
    text = refusal_text(decided(changed(REFUSALS["no engine"][0])))
    assert text.startswith("REFUSED: models.py:build: 1 reason\n- engine: ")


def test_a_verdict_that_gloo_corrected_is_no_evidence_of_simulated_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "shared", set(), raising=False)  # by ranks in one process

    @tpcheck.subject(vocab_size=32, seq_len=4)
    def build(tp: tpcheck.TPGroup) -> Any:
        embed = tp.weight("embed", 32, 16)
        down = tp.weight("down", 16, 16).chunk(tp.size, 1)[tp.rank]
        ranks = vars(torch).setdefault("shared", set())
        ranks.add(tp.rank)

        def forward(ids: Any) -> Any:
            x = embed[ids]
            y = tp.all_reduce(x.chunk(tp.size, -1)[tp.rank] @ down.T)
            return (y * (len(ranks) if tp.size > 1 else 1)) @ embed.T

        return forward

    report = tpcheck.run(build, (2,), backend="sim")
    assert report.outcome == "PASS"
    assert report.verdicts[0].checks["plan"].facts["backend"] == "gloo"
    assert "1 verdict by gloo" in render_text(report)
    asked = {"tp": [2], "dtypes": ["bfloat16"], "backends": ["sim"], "require": ["structural"]}
    policy = {**asked, "require_deployed_path": False, "min_sensitivity": 0}
    with pytest.raises(tpcheck.GateRefused) as refused:
        tpcheck.gate(report, policy)
    [refusal] = refused.value.refusals
    assert "its verdict is of gloo" in refusal.reason
