"""Drift of subjects that call torch.distributed themselves: their sums are seen, noised, carried.

Subjects that sum through TPGroup and through torch.distributed are the same function of the same
weights, so their numbers must be the same too. Real Gloo ranks throughout.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import tpcheck
from tests.models import make_model
from tpcheck.execution import Task
from tpcheck.groups.jobs import Job
from tpcheck.groups.pool import get_pool
from tpcheck.observation.planting import SURVEY, Plant
from tpcheck.subjects import make_ref

SUBJECTS = Path(__file__).parents[1] / "drifting_subjects.py"
Json = dict[str, Any]

pytestmark = pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning")


@cache
def drifted(subject: str, **options: Any) -> tpcheck.Report:
    name = subject if ":" in subject else f"{SUBJECTS}:{subject}"
    wires = options.pop("wires", ("float32", "int8_wire"))
    return tpcheck.drift(name, (4,), backend="gloo", dtypes=("bfloat16",), wires=wires, **options)


def rows(report: tpcheck.Report) -> dict[str, Json]:
    assert report.drift is not None
    return {row["reduction"]: row for row in report.drift["rows"]}


def reduction(report: tpcheck.Report) -> Json:
    assert report.drift is not None
    (found,) = (one for one in report.drift["findings"] if one["about"] == "reduction")
    return dict(found)


@pytest.mark.parametrize(
    "subject",
    [
        "own_calls",
        "own_async_calls",
        "own_functional_calls",
        "own_scattered_calls",
        "own_reduce_and_broadcast",
        "own_pieces_with_the_operand",
    ],
)
def test_own_sums_have_the_numbers_of_the_same_sums_through_tpgroup(subject: str) -> None:
    own, through_group = rows(drifted(subject)), rows(drifted("plain"))
    assert set(own) == set(through_group) == {"bfloat16", "float32", "int8_wire"}
    for name, row in own.items():
        expected = through_group[name]
        assert row["prediction_reason"] == "", name
        assert row["ratio"] == pytest.approx(expected["ratio"], rel=1e-6), name
        # other draws of the same noise
        assert row["predicted"] == pytest.approx(expected["predicted"], rel=0.03), name
        assert row["float16_headroom"] == pytest.approx(expected["float16_headroom"]), name


def test_own_sums_name_their_reduction() -> None:
    for subject in ("own_calls", "own_functional_calls", "own_scattered_calls"):
        found = reduction(drifted(subject))
        assert found["identified"] == ["ring in bfloat16"], subject
        assert (found["raised"], found["excess"]) == ("", pytest.approx(1, rel=0.02)), subject


def test_own_sums_raise_an_alarm_where_a_wide_accumulator_was_declared() -> None:
    found = reduction(drifted("own_calls", declared="wide", wires=("float32",)))
    assert found["identified"] == ["ring in bfloat16"]
    assert found["raised"] == "wider"


def test_groups_of_some_of_the_ranks_are_predicted_too() -> None:
    report = drifted("own_groups")
    for name, row in rows(report).items():
        assert row["prediction_reason"] == "", name
        assert row["ratio"] == pytest.approx(row["predicted"], rel=0.15), name
        assert row["predicted"] > 1.1, name
    assert "reduction" not in {one["about"] for one in (report.drift or {})["findings"]}


def test_sums_whose_terms_are_not_seen_give_a_reason_and_no_number() -> None:
    found = rows(drifted("own_coalesced_calls"))
    reason = "the subject calls allreduce_coalesced_ of torch.distributed, whose terms are not seen"
    assert found["bfloat16"]["prediction_reason"] == reason
    assert found["bfloat16"]["predicted"] is None
    assert found["bfloat16"]["ratio"] > 1
    assert found["float32"]["reason"] == found["int8_wire"]["reason"] == reason


def test_cancelling_partials_of_own_sums_are_no_drift() -> None:
    """32 x TP=1's error, all of it what this reduction must cost."""
    name = f"{SUBJECTS}:own_cancelling"
    report = tpcheck.run(name, (4,), backend="gloo", dtypes=("bfloat16",))
    assert report.outcome == "PASS", report.verdicts[0].reasons
    facts = report.verdicts[0].checks["drift"].facts
    assert facts["ratio"] > 10
    assert facts["expected"] == pytest.approx(facts["ratio"], rel=0.15)
    assert "injected into float64" in facts["expected_source"]


def test_drift_that_rests_on_sums_whose_terms_are_not_seen_says_so() -> None:
    name = f"{SUBJECTS}:own_cancelling_coalesced"
    report = tpcheck.run(name, (4,), backend="gloo", dtypes=("bfloat16",))
    assert report.outcome == "DRIFT"
    missing = "not in it: what allreduce_coalesced_ of torch.distributed rounds"
    assert missing in report.verdicts[0].checks["drift"].reason


@pytest.mark.parametrize(
    "subject", ["tests.subjects.own_process_group:build", "tests.subjects.dtensor:local_logits"]
)
def test_clean_subjects_with_own_calls_are_predicted(subject: str) -> None:
    report = drifted(subject)
    assert report.outcome == "PASS"
    for name, row in rows(report).items():
        assert row["prediction_reason"] == "", name
        assert row["ratio"] == pytest.approx(row["predicted"], rel=0.15), name
    assert reduction(report)["identified"] == ["ring in bfloat16"]


def test_a_transformers_directory_is_predicted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12}
    report = drifted(f"hf:{make_model(tmp_path / 'model', 'llama_biases', **heads)}")
    assert report.outcome == "PASS"
    found = rows(report)
    for name, row in found.items():
        assert row["prediction_reason"] == "", name
        assert row["ratio"] == pytest.approx(row["predicted"], rel=0.15), name
    assert found["int8_wire"]["ratio"] > 1.5 * found["bfloat16"]["ratio"]
    assert reduction(report)["identified"] == ["ring in bfloat16"]


@pytest.mark.parametrize(
    ("subject", "op"),
    [("own_scattered_calls", "reduce_scatter"), ("own_async_calls", "all_reduce")],
)
def test_a_fault_in_the_result_of_an_own_sum_reaches_the_subject(subject: str, op: str) -> None:
    """Gloo writes a reduce-scatter's output when its handle is waited for, which subjects do."""
    ids = torch.randint(0, 131, (2, 16), generator=torch.Generator().manual_seed(0))
    ref = make_ref(f"{SUBJECTS}:{subject}")
    task = Task(ref, 0, "float64", "bfloat16", {"A": (ids,)}, ("A",))
    plants = [SURVEY, Plant("doubled", 0), Plant("skipped", 0)]
    job = Job("tpcheck.execution:execute_planted", (task, plants), 2, 60.0)
    (result,) = get_pool("gloo", 4).run([job])
    assert result.failure is None, result.failure
    clean, doubled, skipped = result.replies[0]
    assert clean.extras["survey"].collectives[0].op == op
    for changed in (doubled, skipped):
        assert not torch.allclose(changed.outputs["A"], clean.outputs["A"], rtol=1e-3, atol=1e-3)
