"""Recording and verifying: other code on the same weights is different, what is missing fails."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tpcheck
from tests.golden_records import forged, kept_in, logits, made, put
from tests.models import make_model
from tpcheck.errors import SubjectError, TPCheckError
from tpcheck.golden.command import golden_record, golden_verify
from tpcheck.golden.keeping import keep
from tpcheck.golden.listing import listing
from tpcheck.golden.store import scan
from tpcheck.records import Report
from tpcheck.render.text import render_text
from tpcheck.report import from_json, to_json

SIM: dict[str, Any] = {"backend": "sim"}
CHANGES: dict[str, Any] = {"how": "", "scale": 1.0}


@pytest.fixture(autouse=True)
def _as_recorded() -> Iterator[None]:
    CHANGES.update(how="", scale=1.0)
    yield
    CHANGES.update(how="", scale=1.0)


@tpcheck.subject(vocab_size=32, seq_len=5)
def build(tp: tpcheck.TPGroup) -> Any:
    how = CHANGES["how"]
    embed = tp.weight("embed", 32, 16)
    up = tp.weight("up", 32, 16, std=0.5 * CHANGES["scale"]).chunk(tp.size, 0)[tp.rank]
    down = tp.weight("down", 16, 32).chunk(tp.size, 1)[tp.rank]

    def forward(input_ids: torch.Tensor) -> torch.Tensor:
        x = embed[input_ids]
        hidden = x @ up.T
        hidden = torch.nn.functional.silu(hidden) if how == "silu" else hidden.relu()
        partial = hidden @ down.T
        if how == "no all-reduce":
            y = partial * (tp.size if tp.size > 1 else 1)
        else:
            y = tp.all_reduce(partial)
        logits = (x + y) @ embed.T
        if how == "one logit":
            logits[-1, -1, 7] *= 1 + 2**-30
        if how == "swapped":
            logits[..., [3, 4]] = logits[..., [4, 3]]
        if how == "longer":
            logits = torch.nn.functional.pad(logits, (0, 1))
        if how == "nan":
            logits = logits * float("nan")
        if how == "masked":
            logits[..., 0] = -float("inf")
        if how == "ulp" and logits.dtype != torch.float64:
            logits = torch.nextafter(logits, torch.full_like(logits, 1e9))
        return logits

    return forward


def record(folder: Path, **options: Any) -> dict[str, Any]:
    return golden_record(build, folder, **SIM | options)


def verify(folder: Path, tp_sizes: tuple[int, ...] = (1,), **options: Any) -> Report:
    report = golden_verify(build, folder, tp_sizes, **SIM | options)
    assert from_json(json.loads(json.dumps(to_json(report)))).outcome == report.outcome
    return report


def failed(report: Report) -> set[str]:
    return {
        name
        for verdict in report.verdicts
        for name, check in verdict.checks.items()
        if check.outcome == "FAIL"
    }


@pytest.mark.parametrize("full", [False, True], ids=["small", "full"])
def test_what_was_recorded_verifies_at_every_degree(tmp_path: Path, full: bool) -> None:
    found = record(tmp_path, full=full, dtypes=("bfloat16", "float16", "float32"))
    assert found["outcome"] == "RECORDED"
    assert [row["state"] for row in found["records"]] == ["written"] * 3
    report = verify(tmp_path, (1, 2, 4))
    assert report.outcome == "PASS"
    assert len(report.verdicts) == 9
    assert {v.checks["bits"].outcome for v in report.verdicts if v.tp_size == 1} == {"PASS"}
    assert all(v.checks["structural"].outcome == "PASS" for v in report.verdicts)


@pytest.mark.parametrize("full", [False, True], ids=["small", "full"])
@pytest.mark.parametrize(
    ("how", "outcome", "check"),
    [
        ("silu", "WRONG", "structural"),
        ("one logit", "WRONG", "structural"),
        ("swapped", "WRONG", "structural"),
        ("longer", "WRONG", "structural"),
        ("nan", "WRONG", "structural"),
        ("masked", "WRONG", "structural"),
        ("ulp", "DRIFT", "bits"),
    ],
)
def test_other_code_on_the_same_weights_is_different(
    tmp_path: Path, full: bool, how: str, outcome: str, check: str
) -> None:
    record(tmp_path, full=full)
    CHANGES["how"] = how
    report = verify(tmp_path)
    assert report.outcome == outcome
    assert check in failed(report)
    again = record(tmp_path, full=full) if how != "nan" else {"outcome": "DIFFERENT"}
    assert again["outcome"] == "DIFFERENT"  # and left as it was
    CHANGES["how"] = ""
    assert verify(tmp_path).outcome == "PASS"


def test_a_degree_is_held_to_the_record(tmp_path: Path) -> None:
    record(tmp_path)
    CHANGES["how"] = "no all-reduce"
    report = verify(tmp_path, (1, 2))
    assert [verdict.outcome for verdict in report.verdicts] == ["PASS", "WRONG"]


def test_other_weights_are_no_record_and_the_weight_is_named(tmp_path: Path) -> None:
    record(tmp_path)
    CHANGES["scale"] = 1.5
    report = verify(tmp_path)
    assert report.outcome == "INCONCLUSIVE"
    (reason,) = report.verdicts[0].reasons
    assert "weights: up is another (1 of 3)" in reason
    assert record(tmp_path)["records"][0]["state"] == "different"
    assert record(tmp_path, update=True)["records"][0]["state"] == "replaced"
    assert verify(tmp_path).outcome == "PASS"
    assert len(list(tmp_path.iterdir())) == 2  # the old record is gone


def test_a_missing_record_is_never_a_pass(tmp_path: Path) -> None:
    empty = verify(tmp_path / "nowhere")
    assert (empty.outcome, failed(empty)) == ("INCONCLUSIVE", {"record"})
    assert "next:  put back what was recorded; or, if the change" in render_text(empty)
    record(tmp_path, cases=2)
    gone = next(path for path in tmp_path.glob("*.s1-*.json"))
    whole = gone.read_bytes()
    gone.unlink()
    report = verify(tmp_path)  # its sibling names it
    assert [verdict.outcome for verdict in report.verdicts] == ["PASS", "INCONCLUSIVE"]
    assert report.outcome == "INCONCLUSIVE"
    gone.write_bytes(whole)
    assert verify(tmp_path).outcome == "PASS"
    assert verify(tmp_path, cases=3).outcome == "INCONCLUSIVE"
    assert verify(tmp_path, dtypes=("float16",)).outcome == "INCONCLUSIVE"
    assert verify(tmp_path, seq_len=4).outcome == "INCONCLUSIVE"


def test_a_directory_spelled_otherwise_misses_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model", "llama")
    monkeypatch.chdir(tmp_path)
    golden_record("ref:model", "golden", cases=2, **SIM)
    report = golden_verify(f"ref:{tmp_path}/model", "golden", **SIM)
    assert [one.outcome for one in report.verdicts] == ["PASS", "PASS"]
    assert any(note.startswith("no record is called ref:/") for note in report.notes)
    next(Path("golden").glob("*.s1-*.json")).unlink()
    assert golden_verify(f"ref:{tmp_path}/model", "golden", **SIM).outcome == "INCONCLUSIVE"


def test_records_do_not_lie_among_the_weights_of_a_model(tmp_path: Path) -> None:
    make_model(tmp_path, "llama")
    before = sorted(tmp_path.iterdir())
    message = f"{tmp_path}: holds config.json, but should be a folder for records alone"
    with pytest.raises(TPCheckError, match=re.escape(message)):
        golden_record(f"ref:{tmp_path}", tmp_path, **SIM)
    assert sorted(tmp_path.iterdir()) == before


def test_a_broken_record_is_never_a_pass_and_is_named(tmp_path: Path) -> None:
    record(tmp_path)
    manifest, data = next(tmp_path.glob("*.json")), next(tmp_path.glob("*.safetensors"))
    for path, change in (
        (manifest, lambda b: b.replace(b'"repeats": true', b'"repeats": false')),
        (manifest, lambda b: b[: len(b) // 2]),
        (manifest, lambda b: b""),
        (data, lambda b: b[:-1]),
        (data, lambda b: b[:-1] + bytes([b[-1] ^ 1])),
    ):
        whole = path.read_bytes()
        path.write_bytes(change(whole))
        report = verify(tmp_path)
        assert report.outcome == "INCONCLUSIVE"
        assert failed(report) == {"record"}
        assert path.name in report.verdicts[0].reasons[0]
        assert listing(tmp_path, None)["outcome"] == "BROKEN"
        path.write_bytes(whole)
    data.unlink()
    assert "is missing" in verify(tmp_path).verdicts[0].reasons[0]


def test_recording_again_writes_nothing_and_never_verifies(tmp_path: Path) -> None:
    record(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = record(tmp_path)
    assert [row["state"] for row in again["records"]] == ["unchanged"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert again["outcome"] == "RECORDED"  # not PASS


def test_a_record_that_is_there_names_what_is_recorded_beside_it_later(tmp_path: Path) -> None:
    record(tmp_path)
    assert [row["state"] for row in record(tmp_path, cases=2)["records"]] == [
        "unchanged",
        "written",
    ]
    next(tmp_path.glob("*.s1-*.json")).unlink()
    assert verify(tmp_path).outcome == "INCONCLUSIVE"


def test_an_update_leaves_one_record(tmp_path: Path) -> None:
    record(tmp_path)
    for full, reason in ((True, "is no full record"), (False, "is no small record")):
        refused = record(tmp_path, full=full)
        assert reason in refused["records"][0]["reason"]
        assert record(tmp_path, full=full, update=True)["records"][0]["state"] == "replaced"
        assert [entry.state for entry in scan(tmp_path)] == ["ok"]
        assert verify(tmp_path).outcome == "PASS"


def test_a_subject_whose_name_comes_to_the_same_file_overwrites_nothing(tmp_path: Path) -> None:
    golden, data = made(subject="some/row.py:build")
    kept_in(tmp_path, golden, data)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    same, _ = made(subject="some-row.py:build")
    assert same.file == golden.file
    assert keep(tmp_path, same, data, update=False)["state"] == "unchanged"
    other, other_data = made(subject="some-row.py:build", oracle=logits(1))
    assert keep(tmp_path, other, other_data, update=False)["state"] == "different"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_logits_from_another_environment_say_so(tmp_path: Path) -> None:
    threads = [{"torch": "2.13.0", "subject": {"threads_per_rank": count}} for count in (1, 2)]
    kept_in(tmp_path, *made(environment=threads[0]))
    other, data = made(oracle=logits(1), environment=threads[1])
    reason = keep(tmp_path, other, data, update=False)["reason"]
    where = "made in another environment (threads_per_rank 2, recorded 1); tpcheck golden verify"
    assert f"the same weights, config and inputs {where}" in reason


def test_an_update_over_a_manifest_that_cannot_be_read_leaves_nothing_of_it(tmp_path: Path) -> None:
    record(tmp_path)
    for path in tmp_path.iterdir():  # of another address, and cut off
        stem, _, rest = path.name.partition(".bfloat16.")
        path.rename(tmp_path / f"{stem}.bfloat16.{'0' * 12}{rest[12:]}")
    next(tmp_path.glob("*.json")).write_bytes(b"")
    assert record(tmp_path)["records"][0]["state"] == "different"
    assert record(tmp_path, update=True)["records"][0]["state"] == "replaced"
    assert listing(tmp_path, None)["outcome"] == "OK"
    assert len(list(tmp_path.iterdir())) == 2


def test_another_environment_is_held_to_the_function_and_not_to_bits(tmp_path: Path) -> None:
    record(tmp_path, full=True)
    (entry,) = scan(tmp_path)
    assert entry.golden is not None
    around = dict(entry.golden.environment) | {"cpu": "another"}
    put(tmp_path, entry.file, forged(entry.golden, environment=around))
    CHANGES["how"] = "ulp"
    report = verify(tmp_path)
    assert report.outcome == "PASS"
    bits = report.verdicts[0].checks["bits"]
    assert bits.outcome == "SKIPPED"
    assert "recorded another" in bits.reason
    CHANGES["how"] = "silu"
    assert verify(tmp_path).outcome == "WRONG"


def test_subjects_of_every_kind_are_recorded(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "subjects"
    for name, attr in (
        ("named_weights", "build"),
        ("rank0_logits", "build"),
        ("half_only", "build"),
    ):
        subject = f"{folder / name}.py:{attr}"
        found = golden_record(subject, tmp_path, **SIM)
        assert found["outcome"] == "RECORDED", name
        report = golden_verify(subject, tmp_path, (1, 2), **SIM)
        assert report.outcome == "PASS", (name, report.verdicts)


def test_the_weights_of_a_fault_are_those_of_the_record(tmp_path: Path) -> None:
    golden_record("builtin:llama-tiny", tmp_path, seq_len=4, **SIM)
    report = golden_verify(FAULT, tmp_path, (1, 2), seq_len=4, **SIM)
    assert report.outcome == "WRONG"
    assert all(v.checks["record"].outcome == "PASS" for v in report.verdicts)


FAULT = "builtin:llama-tiny+wrong_kv_head"


def test_what_cannot_be_recorded_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    CHANGES["how"] = "nan"
    with pytest.raises(SubjectError, match="TP=1 returns no finite number"):
        record(tmp_path)
    with pytest.raises(TPCheckError, match="there is no fault"):
        golden_record("builtin:llama-tiny+nonsense", tmp_path, **SIM)
    with pytest.raises(TPCheckError, match="dtype='int8'"):
        record(tmp_path, dtypes=("int8",))
    assert list(tmp_path.iterdir()) == []


def test_two_recorders_at_once_leave_a_good_folder(tmp_path: Path) -> None:
    import subprocess

    command = [sys.executable, "-m", "tpcheck", "golden", "record", "builtin:llama-tiny"]
    command += [str(tmp_path), "--backend", "sim", "--cases", "3", "--seq-len", "4", "--quiet"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate()[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    found = listing(tmp_path, None)
    assert (found["outcome"], len(found["records"]), found["temporary"]) == ("OK", 3, 0)
    assert len(list(tmp_path.iterdir())) == 6
