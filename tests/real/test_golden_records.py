"""The records in golden/ hold: what they were made of is the same function, at every degree."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpcheck.golden.command import golden_verify
from tpcheck.golden.listing import listing

FOLDER = Path(__file__).parents[2] / "golden"
MAX_BYTES = 200_000


def test_every_record_is_sound_and_small() -> None:
    found = listing(FOLDER, None)
    assert found["outcome"] == "OK", found
    assert {row["subject"] for row in found["records"]} == {
        "builtin:llama-tiny",
        "builtin:qwen3-tiny",
    }
    for path in FOLDER.iterdir():
        assert path.stat().st_size <= MAX_BYTES, path


@pytest.mark.parametrize("subject", ["builtin:llama-tiny", "builtin:qwen3-tiny"])
def test_builtin_subjects_are_what_was_recorded(subject: str) -> None:
    report = golden_verify(subject, FOLDER, (1, 2), backend="sim")
    assert report.outcome == "PASS", report.verdicts
    assert len(report.verdicts) == 2


def test_a_planted_fault_is_not_what_was_recorded() -> None:
    report = golden_verify("builtin:llama-tiny+gate_up_contiguous", FOLDER, (1, 2), backend="sim")
    assert [verdict.outcome for verdict in report.verdicts] == ["PASS", "WRONG"]
    assert all(verdict.checks["record"].outcome == "PASS" for verdict in report.verdicts)
