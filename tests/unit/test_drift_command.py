"""tpcheck drift on the command line: what it prints, writes and returns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tpcheck
from tpcheck.render.drift import render_drift
from tpcheck.report import read_report

SUBJECTS = Path(__file__).parents[1] / "drifting_subjects.py"
SMALL = ("--backend", "sim", "--tp", "2", "--dtype", "bfloat16", "--wire", "float32")


def drift(subject: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tpcheck", "drift", subject, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_clean_subject_is_exit_0_with_a_table_and_json(tmp_path: Path) -> None:
    path = tmp_path / "drift.json"
    done = drift(f"{SUBJECTS}:plain", *SMALL, "--json", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("PASS (structure); deployed path not exercised: nccl\n")
    assert "      float32  " in done.stdout
    report = read_report(path)
    assert report.drift is not None
    assert [row["reduction"] for row in report.drift["rows"]] == ["bfloat16", "float32"]
    assert report.verdicts[0].checks["drift"].facts["profile"]["tp1"]["epsilons"] > 0


def test_quiet_is_the_first_line_and_a_dash_is_json_alone() -> None:
    quiet = drift(f"{SUBJECTS}:plain", *SMALL, "--quiet")
    assert quiet.stdout == "PASS (structure); deployed path not exercised: nccl\n"
    written = drift(f"{SUBJECTS}:plain", *SMALL, "--json", "-")
    assert json.loads(written.stdout)["drift"]["rows"][0]["deployed"] is True


def test_a_planted_drift_is_exit_1() -> None:
    arguments = ("--backend", "sim", "--tp", "4", "--dtype", "float16", "--wire", "float32")
    done = drift("builtin:llama-tiny+bfloat16_wire", *arguments)
    assert done.returncode == 1
    assert done.stdout.startswith("DRIFT: same function; rounded more than this reduction explains")
    assert "show ring in bfloat16: ALARM" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--wire", "float8"), "error: wire='float8', but should be one of bfloat16, float32"),
        (("--declared", "star"), "--declared"),
        (("--tp", "x"), "error: --tp='x', but should be whole numbers"),
        (("--json", "none/x.json"), "error: none/x.json: cannot be written"),
    ],
)
def test_a_usage_error_is_exit_2_and_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = drift(f"{SUBJECTS}:plain", "--backend", "sim", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_a_refused_degree_is_illegal_and_has_no_row() -> None:
    options = {"backend": "sim", "dtypes": ("bfloat16",), "wires": ("float32",)}
    report = tpcheck.drift("builtin:llama-tiny", (2, 3), **options)  # type: ignore[arg-type]
    assert [verdict.outcome for verdict in report.verdicts] == ["PASS", "ILLEGAL"]
    assert report.drift is not None
    assert {row["tp_size"] for row in report.drift["rows"]} == {2}
    facts = report.verdicts[1].checks["drift"].facts
    assert facts["profile"] is None
    assert "refused" in facts["profile_reason"]


def test_verdicts_are_those_of_run() -> None:
    options = {"backend": "sim", "dtypes": ("bfloat16",)}
    ran = tpcheck.run("builtin:llama-tiny", (2,), **options)  # type: ignore[arg-type]
    drifted = tpcheck.drift(
        "builtin:llama-tiny",
        (2,),
        wires=("float32",),
        **options,  # type: ignore[arg-type]
    )
    for one, other in zip(ran.verdicts, drifted.verdicts, strict=True):
        assert one.outcome == other.outcome
        assert list(one.checks) == list(other.checks)
        for name, check in one.checks.items():
            facts = dict(other.checks[name].facts)
            facts.pop("profile", None)
            assert (facts, other.checks[name].outcome) == (dict(check.facts), check.outcome)


def test_generated_cases_are_profiled_too() -> None:
    from hypothesis import strategies as st

    from tpcheck.reference.decoder import build_decoder
    from tpcheck.spec import ModelSpec

    spec = ModelSpec(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
    )

    @tpcheck.subject(specs=st.just(spec), seq_len=8)
    def build(tp, spec):  # type: ignore[no-untyped-def]
        return build_decoder(spec, tp)

    report = tpcheck.drift(
        build, (2,), backend="sim", dtypes=("bfloat16",), wires=("float32",), cases=2, confirm=False
    )
    assert report.outcome == "PASS"
    assert report.drift is not None
    assert report.drift["rows"][0]["cases"] == len(report.verdicts) >= 1


@pytest.mark.parametrize("name", ["gptq-small", "nvfp4-small"])
def test_a_quantized_subject_that_sums_as_declared_raises_no_alarm(name: str) -> None:
    """Its weights are dequantized into the deployed dtype: TP=1 rounds more too."""
    report = tpcheck.drift(
        f"builtin:{name}", (2,), backend="sim", dtypes=("bfloat16",), wires=("float32",)
    )
    assert report.outcome == "PASS"
    assert report.drift is not None
    (found,) = (one for one in report.drift["findings"] if one["about"] == "reduction")
    assert found["raised"] == ""
    assert "(by the terms that were sent: TP=1 itself rounds more there)" in found["text"]
    assert "ring in bfloat16" in found["identified"][0]


def test_a_drift_report_may_say_what_its_checks_would_have_caught() -> None:
    found = tpcheck.drift(
        f"{SUBJECTS}:plain", (2,), backend="sim", dtypes=("bfloat16",), wires=("float32",)
    )
    assert found.sensitivity is None
    asked = tpcheck.drift(
        f"{SUBJECTS}:plain",
        (2,),
        backend="sim",
        dtypes=("bfloat16",),
        wires=("float32",),
        sensitivity=True,
    )
    assert asked.sensitivity is not None
    assert asked.sensitivity["caught"] > 0
    assert "would have caught" in render_drift(asked).splitlines()[1]
    assert "would have caught" not in render_drift(found)
    assert asked.drift is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_depth_is_held_to_the_routing_that_the_outputs_are_held_to(dtype: str) -> None:
    """At this seed a token's experts are a near tie; free routing made ratios of 0.06 and 150."""
    report = tpcheck.drift("builtin:gpt-oss-tiny", (4,), backend="sim", dtypes=(dtype,), seed=1)
    points = report.verdicts[0].checks["drift"].facts["profile"]["depth"]["points"]
    assert len(points) == 2
    assert all(0.5 < point["ratio"] < 2 for point in points)
