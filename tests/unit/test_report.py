"""Reports survive the trip through JSON, and nothing inconsistent is read.

Evidence: the contract's own example, generated reports, and one damaged report per rule.
"""

import copy
import errno
import json
import math
import os
import pathlib
import stat
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.errors import TPCheckError
from tpcheck.files import assert_writable, read_bounded, write_text
from tpcheck.records import OUTCOMES, Check, FirstDivergence, Path, Report, Verdict
from tpcheck.report import from_json, read_report, to_json, write_report

TOP_KEYS = {
    "schema",
    "outcome",
    "subject",
    "tpcheck",
    "environment",
    "path",
    "sensitivity",
    "notes",
    "verdicts",
}
VERDICT_KEYS = {
    "case_id",
    "tp_size",
    "dtype",
    "outcome",
    "checks",
    "reasons",
    "first_divergence",
    "repro",
}


def make_verdict(outcome: str = "WRONG", tp_size: int = 4, **changes: Any) -> Verdict:
    fields: dict[str, Any] = {
        "case_id": "s7-b2-t16",
        "tp_size": tp_size,
        "dtype": "bfloat16",
        "outcome": outcome,
        "checks": {
            "structural": Check("FAIL", "too far", {"relative_rms": 0.24, "limit": 1e-12}),
            "plan": Check("PASS"),
            "tiling": Check("SKIPPED", "the subject exposes no shards"),
        },
        "reasons": ("structural: too far",),
        "first_divergence": FirstDivergence("layers.0.mlp", 3, "[0, 5, 32:64]", 16.0),
        "repro": "tpcheck run models.py:build --tp 4",
    }
    if outcome == "PASS":
        fields |= {"checks": {"plan": Check("PASS")}, "reasons": (), "first_divergence": None}
    return Verdict(**{**fields, **changes})


def make_report(*verdicts: Verdict, **changes: Any) -> Report:
    fields: dict[str, Any] = {
        "subject": "models.py:build",
        "verdicts": verdicts or (make_verdict(),),
        "environment": {"torch": "2.13.0", "tf32": False},
        "path": Path("gloo", {"all_reduce": 4}, False, ("backend gloo, not nccl",)),
        "tpcheck": "0.1.0",
    }
    return Report(**{**fields, **changes})


def test_keys_are_the_contracts() -> None:
    value = to_json(make_report())
    assert set(value) == TOP_KEYS
    assert value["schema"] == "tpcheck.report/1"
    assert set(value["path"]) == {"backend", "collectives", "same_as_deployed", "differences"}
    [verdict] = value["verdicts"]
    assert set(verdict) == VERDICT_KEYS
    assert list(verdict["checks"]) == ["plan", "structural", "tiling"]
    assert verdict["checks"]["structural"] == {
        "outcome": "FAIL",
        "relative_rms": 0.24,
        "limit": 1e-12,
        "reason": "too far",
    }
    assert verdict["checks"]["plan"] == {"outcome": "PASS"}
    assert verdict["first_divergence"]["index"] == "[0, 5, 32:64]"
    assert value["sensitivity"] is None


def test_what_is_written_is_read_again(tmp_path: Any) -> None:
    report = make_report(make_verdict(script="import torch\n"), make_verdict("PASS", 2))
    write_report(report, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == from_json(to_json(report))
    assert to_json(read_report(tmp_path / "report.json")) == to_json(report)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


finite_or_not = st.floats(allow_nan=True, allow_infinity=True)
facts = st.dictionaries(
    st.sampled_from(["ratio", "limit", "per_forward", "x"]),
    st.one_of(finite_or_not, st.text(), st.booleans(), st.lists(finite_or_not, max_size=2)),
)
verdicts = st.builds(
    Verdict,
    case_id=st.text(max_size=5),
    tp_size=st.integers(1, 4),
    dtype=st.sampled_from(["bfloat16", "float16"]),
    outcome=st.sampled_from(OUTCOMES),
    checks=st.dictionaries(
        st.sampled_from(["plan", "drift", "new"]),
        st.one_of(
            st.builds(Check, st.just("PASS"), st.just(""), facts),
            st.builds(Check, st.just("SKIPPED"), st.just("why"), facts),
        ),
    ),
    reasons=st.lists(st.text(), max_size=2).map(tuple),
    repro=st.text(max_size=5),
)
reports = st.builds(
    make_report,
    verdicts=st.lists(
        verdicts, max_size=3, unique_by=lambda v: (v.case_id, v.tp_size, v.dtype)
    ).map(tuple),
    environment=facts,
)


@given(reports)
def test_any_report_is_strict_json_and_survives(report: Report) -> None:
    value = to_json(report)
    text = json.dumps(value, allow_nan=False)
    assert to_json(from_json(json.loads(text))) == value
    assert from_json(value).outcome == report.outcome


@pytest.mark.parametrize(
    ("number", "word"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")]
)
def test_a_number_json_cannot_hold_is_null_and_a_reason(number: float, word: str) -> None:
    check = Check("FAIL", "why", {"ratio": number, "ratios": [1.0, number]})
    value = to_json(make_report(make_verdict(checks={"drift": check})))
    got = value["verdicts"][0]["checks"]["drift"]
    assert got["ratio"] is None
    assert got["ratios"] == [1.0, None]
    assert got["ratio_reason"] == got["ratios_reason"] == f"was {word}, which JSON cannot hold"


def test_a_fact_of_a_foreign_type_is_text_and_the_run_is_not_lost() -> None:
    value = to_json(make_report(environment={"dtype": complex(1, 2), 3: {"nested": {1}}}))
    assert value["environment"] == {"dtype": "(1+2j)", "3": {"nested": "{1}"}}


DAMAGE = {
    "schema": "report.schema='tpcheck.report/2', but should be 'tpcheck.report/1'",
    "outcome": "report.outcome='PASS', but should be 'WRONG', the worst of its verdicts",
    "verdict": "report.verdicts[0].outcome='FINE', but should be one of WRONG, ERROR, DRIFT,"
    " ILLEGAL, INCONCLUSIVE, PASS",
    "hidden": "report.verdicts[0].outcome='PASS', but should be no PASS, because its check"
    " structural failed",
    "decides": "report.verdicts[0].outcome='PASS', but should be no PASS, because its check"
    " allclose failed",
    "bool": "report.verdicts[0].tp_size=True, but should be a whole number",
    "missing": "report.verdicts[0].case_id is missing, but should be text",
    "check": "report.verdicts[0].checks.plan.outcome='OK', but should be one of PASS, FAIL,"
    " SKIPPED",
    "reason": "report.verdicts[0].checks.tiling.reason='', but should be a sentence, because the"
    " check is SKIPPED",
    "path": "report.path.same_as_deployed='no', but should be true or false",
    "twice": "report.verdicts[1]='s7-b2-t16, tp_size=4, bfloat16', but should be there once (it is"
    " report.verdicts[0])",
    "list": "report.verdicts[0].reasons[0]=3, but should be text",
}


def damaged(name: str) -> Any:
    value = copy.deepcopy(to_json(make_report()))
    verdict = value["verdicts"][0]
    if name == "schema":
        value["schema"] = "tpcheck.report/2"
    elif name == "outcome":
        value["outcome"] = "PASS"
    elif name == "verdict":
        verdict["outcome"] = "FINE"
    elif name in ("hidden", "decides"):
        value["outcome"] = verdict["outcome"] = "PASS"
        if name == "decides":
            verdict["checks"] = {"allclose": {"outcome": "FAIL", "reason": "x", "decides": True}}
    elif name == "bool":
        verdict["tp_size"] = True
    elif name == "missing":
        del verdict["case_id"]
    elif name == "check":
        verdict["checks"]["plan"]["outcome"] = "OK"
    elif name == "reason":
        del verdict["checks"]["tiling"]["reason"]
    elif name == "path":
        value["path"]["same_as_deployed"] = "no"
    elif name == "twice":
        value["verdicts"].append(copy.deepcopy(verdict))
    elif name == "list":
        verdict["reasons"] = [3]
    return value


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_report_is_refused_by_json_path(name: str) -> None:
    with pytest.raises(TPCheckError) as caught:
        from_json(damaged(name))
    assert str(caught.value) == DAMAGE[name]


def test_unknown_keys_are_allowed_because_adding_is_free() -> None:
    value = to_json(make_report())
    value["new"] = value["verdicts"][0]["new"] = 1
    assert from_json(value) == from_json(to_json(make_report()))


def test_a_derived_allclose_may_fail_in_a_pass() -> None:
    check = Check("FAIL", "outside", {"source": "derived"})
    report = make_report(make_verdict("PASS", checks={"allclose": check}))
    assert from_json(to_json(report)).outcome == "PASS"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "is not JSON"),
        ('{"a": NaN}', "NaN is not allowed"),
        ('{"a": 1e999}', "1e999 is beyond what a float can hold"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice in one object"),
        ("[]", "is not a tpcheck report: report=[], but should be an object"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_file_that_is_no_report_is_one_clear_error(
    tmp_path: Any, text: str, message: str
) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(TPCheckError, match=r"x\.json: ") as caught:
        read_report(tmp_path / "x.json")
    assert message in str(caught.value)


def test_a_missing_file_is_one_clear_error(tmp_path: Any) -> None:
    with pytest.raises(TPCheckError, match=r"none\.json: cannot be read: No such file"):
        read_report(tmp_path / "none.json")


def test_bytes_that_are_no_text_are_one_clear_error(tmp_path: Any) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(TPCheckError, match="is not JSON"):
        read_report(tmp_path / "x.json")


def test_a_failed_write_leaves_the_old_file_and_no_spare(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.json"
    write_text("old", target)

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TPCheckError, match="cannot be written: No space left on device"):
        write_report(make_report(), target)
    assert target.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_and_the_mode_of_the_file_stay(tmp_path: Any) -> None:
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    write_text("old", target)
    target.chmod(0o640)
    link.symlink_to(target)
    write_text("new", link)
    assert link.is_symlink()
    assert target.read_text() == "new\n"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_file_that_is_a_mount_is_written_to(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.json"
    write_text("a longer old text", target)
    number = target.stat().st_ino

    def busy(*_: Any) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(pathlib.Path, "replace", busy)
    write_text("new", target)
    assert target.read_text() == "new\n"
    assert target.stat().st_ino == number
    assert list(tmp_path.iterdir()) == [target]


def test_the_name_of_a_check_stays_on_one_line() -> None:
    value = to_json(make_report(verdicts=(make_report().verdicts[0],)))
    value["verdicts"][0] |= {"outcome": "PASS"}
    value["verdicts"][0]["checks"] = {"a\nb": {"outcome": "FAIL", "reason": "x"}}
    with pytest.raises(TPCheckError) as caught:
        from_json(value | {"outcome": "PASS"})
    assert str(caught.value) == (
        "report.verdicts[0].outcome='PASS', but should be no PASS, because its check 'a\\nb' failed"
    )


def test_a_device_is_written_to_and_not_replaced() -> None:
    write_text("x", os.devnull)
    assert_writable(os.devnull)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_pipe_is_written_to(tmp_path: Any) -> None:
    code = "from tpcheck.files import *; p = '/dev/stdout'; assert_writable(p); write_text('x', p)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert done.stdout == b"x\n"


def test_a_name_with_a_zero_byte_is_one_clear_error() -> None:
    for use in (assert_writable, read_report, lambda path: write_text("x", path)):
        with pytest.raises(TPCheckError, match=r"'a\\x00b': cannot be (read|written): "):
            use("a\0b")


def test_a_folder_that_is_read_leaves_no_file_open(tmp_path: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(TPCheckError, match="cannot be read: Is a directory"):
            read_bounded(tmp_path, 10)
    assert len(os.listdir("/proc/self/fd")) == before


def test_unwritable_places_are_found_before_anything_is_written(tmp_path: Any) -> None:
    for path in (tmp_path, tmp_path / "none" / "x.json", tmp_path / ("x" * 300)):
        with pytest.raises(TPCheckError, match="cannot be written: "):
            assert_writable(path)
    assert_writable(tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_lone_surrogates_are_written_as_escapes(tmp_path: Any) -> None:
    report = make_report(subject="bad\udc80.py:build")
    write_report(report, tmp_path / "x.json")
    assert read_report(tmp_path / "x.json").subject == "bad\udc80.py:build"


RUN_KEYS = {
    "model": {"directory": "/m", "config_sha256": "a" * 64, "weights_sha256": "b" * 64},
    "engine": {"name": "transformers", "version": "5.23.0", "arguments": {"tp_sizes": [2]}},
    "tested": [{"tp_size": 2, "dtype": "bfloat16", "batch": 2, "lengths": [1, 16]}],
    "reduction": {"kind": "ring", "basis": "assumed"},
}


def test_what_was_run_makes_the_trip_and_may_be_absent() -> None:
    value = to_json(make_report())
    assert not set(RUN_KEYS) & set(value)
    value |= copy.deepcopy(RUN_KEYS)
    report = from_json(value)
    assert to_json(report) == value
    assert report.tested == tuple(RUN_KEYS["tested"])
    value |= dict.fromkeys(RUN_KEYS)
    assert to_json(from_json(value)) == to_json(make_report())
    own = {**RUN_KEYS["engine"], "version": None}  # type: ignore[dict-item]
    assert from_json({**value, "engine": own}).engine == own


@pytest.mark.parametrize(
    ("key", "path", "value", "message"),
    [
        ("model", ("config_sha256",), "A" * 64, "report.model.config_sha256='AAA"),
        ("model", ("weights_sha256",), "b" * 63, "report.model.weights_sha256='bbb"),
        ("model", ("directory",), 7, "report.model.directory=7, but should be text"),
        ("model", ("files",), {"x": "y"}, "report.model.files.x='y'"),
        ("model", ("files",), {"x\n": "y"}, r"report.model.files.'x\\n'='y'"),
        ("engine", ("name",), None, "report.engine.name=None, but should be text"),
        ("engine", ("version",), 5, "report.engine.version=5, but should be text"),
        ("engine", ("arguments",), [], r"report.engine.arguments=\[\], but should be an object"),
        ("tested", (0, "tp_size"), 0, r"report.tested\[0\].tp_size=0, but should be at least 1"),
        ("tested", (0, "batch"), True, r"report.tested\[0\].batch=True"),
        ("tested", (0, "lengths", 1), 0, r"report.tested\[0\].lengths\[1\]=0"),
        ("tested", (0, "dtype"), 1, r"report.tested\[0\].dtype=1, but should be text"),
        ("reduction", ("kind",), 1, "report.reduction.kind=1, but should be text"),
        ("reduction", ("basis",), None, "report.reduction.basis=None, but should be text"),
    ],
)
def test_a_run_that_is_not_described_right_is_refused(
    key: str, path: tuple[Any, ...], value: Any, message: str
) -> None:
    report = to_json(make_report()) | copy.deepcopy(RUN_KEYS)
    inner: Any = report[key]
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(TPCheckError, match=message):
        from_json(report)
