"""What `tpcheck golden` prints, in full: what was recorded, what a folder holds, what is missing."""

# ruff: noqa: E501 - text as it is printed

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tests.golden_records import WEIGHTS, kept_in, logits, made
from tests.judging import evidence
from tpcheck import environment
from tpcheck.errors import TPCheckError
from tpcheck.golden.finding import find_record
from tpcheck.golden.judging import bits, checks_against
from tpcheck.golden.listing import listing
from tpcheck.golden.store import prepare, read_data, read_manifest, scan
from tpcheck.golden.tensors import unpack
from tpcheck.render.golden import render_listing, render_recording

NAME = "m-py-build.s0-b2-t3.bfloat16.181dd614729e"
DATA = f"{NAME}.a687f63def54.safetensors"


def row(**changes: Any) -> dict[str, Any]:
    return {
        "file": "m-py-build.s0-b2-t3.bfloat16.0123456789ab.json",
        "case": "s0-b2-t3",
        "dtype": "bfloat16",
        "address": "0" * 64,
        "state": "written",
        "bytes": 56012,
        "tp1_epsilons": 0.9871,
        "repeats": True,
        "reason": "",
    } | changes


def test_what_was_recorded() -> None:
    rows = [row(), row(case="s1-b2-t3", state="unchanged", tp1_epsilons=None, repeats=False)]
    found = {"outcome": "RECORDED", "directory": "golden", "records": rows}
    assert (
        render_recording(found)
        == dedent("""\
        RECORDED: 1 written, 1 unchanged in golden; nothing was verified

        case      dtype     state      data     TP=1 off by    file
        --------  --------  ---------  -------  -------------  ----------------------------------------------
        s0-b2-t3  bfloat16  written    56.0 kB  0.987 eps      m-py-build.s0-b2-t3.bfloat16.0123456789ab.json
        s1-b2-t3  bfloat16  unchanged  56.0 kB                 m-py-build.s0-b2-t3.bfloat16.0123456789ab.json

        note: TP=1 did not repeat its own bits, so they are not compared: m-py-build.s0-b2-t3.bfloat16.0123456789ab.json""")
    )


def test_a_record_that_says_something_else_is_left_alone() -> None:
    file = "m-py-build.s0-b2-t3.bfloat16.0123456789ab.json"
    reason = f"{file} holds other logits for the same weights, config and inputs;"
    rows = [row(state="different", bytes=1_234_567, reason=reason)]
    found = {"outcome": "DIFFERENT", "directory": "golden", "records": rows}
    assert (
        render_recording(found)
        == dedent("""\
        DIFFERENT: 1 different in golden; nothing was verified

        case      dtype     state      data    TP=1 off by    file
        --------  --------  ---------  ------  -------------  ----------------------------------------------
        s0-b2-t3  bfloat16  different  1.2 MB  0.987 eps      m-py-build.s0-b2-t3.bfloat16.0123456789ab.json

          different: m-py-build.s0-b2-t3.bfloat16.0123456789ab.json holds other logits for the same weights, config and inputs;""")
    )


def test_what_a_folder_holds(tmp_path: Path) -> None:
    both = (("s0-b2-t3", "bfloat16"), ("s1-b2-t3", "bfloat16"))
    golden, data = made(together=both)
    kept_in(tmp_path, golden, data)
    text = render_listing(listing(tmp_path, None))
    assert (
        shown(text, tmp_path)
        == dedent("""\
        BROKEN: 2 records in golden, 1 of them no good

        subject     case      dtype     state    kept    data    torch    created
        ----------  --------  --------  -------  ------  ------  -------  --------------------
        m.py:build  s0-b2-t3  bfloat16  ok       small   3.1 kB  2.13.0   2026-01-31T12:00:00Z
        m.py:build  s1-b2-t3  bfloat16  missing

          missing: m.py:build s1-b2-t3 bfloat16: is not there, but other records name it as made with them""")
    )
    other, other_data = made(case_id="s1-b2-t3", together=both)
    kept_in(tmp_path, other, other_data)
    assert shown(render_listing(listing(tmp_path, None)), tmp_path) == dedent("""\
        OK: 2 records in golden

        subject     case      dtype     state    kept    data    torch    created
        ----------  --------  --------  -------  ------  ------  -------  --------------------
        m.py:build  s0-b2-t3  bfloat16  ok       small   3.1 kB  2.13.0   2026-01-31T12:00:00Z
        m.py:build  s1-b2-t3  bfloat16  ok       small   3.1 kB  2.13.0   2026-01-31T12:00:00Z""")
    (tmp_path / golden.data.file).write_bytes(data[:-1])
    (tmp_path / f".{golden.file}.{'0' * 32}.tmp").write_bytes(b"")
    text = render_listing(listing(tmp_path, None))
    assert shown(text, tmp_path) == dedent("""\
        BROKEN: 2 records in golden, 1 of them no good

        subject     case      dtype     state    kept    data    torch    created
        ----------  --------  --------  -------  ------  ------  -------  --------------------
        m.py:build  s0-b2-t3  bfloat16  corrupt  small   3.1 kB  2.13.0   2026-01-31T12:00:00Z
        m.py:build  s1-b2-t3  bfloat16  ok       small   3.1 kB  2.13.0   2026-01-31T12:00:00Z

          corrupt: m-py-build.s0-b2-t3.bfloat16.181dd614729e.a687f63def54.safetensors: has 3143 bytes, but should have 3144: it was cut off

        note: not read, left by a killed recorder: 1 file""")
    assert (
        render_listing(listing(tmp_path, "x.py:f")) == f"BROKEN: there is no record in {tmp_path}"
    )


def shown(text: str, folder: Path) -> str:
    return text.replace(str(folder), "golden")


def reason(folder: Path, **changes: Any) -> str:
    golden, _ = made(**changes)
    entries = scan(folder)
    found = find_record(folder, entries, "m.py:build", golden.named, golden.identity)
    assert (found.golden, found.kept) == (None, None)
    return shown(found.problem, folder)


MISSING = "there is no record of s0-b2-t3 bfloat16 in golden"
MAKE = "tpcheck golden record m.py:build golden makes one"


def replaced(changed: str) -> str:
    """Return what is said of a record of something else."""
    return (
        f"{MISSING} as the subject is now; {NAME}.json is of another: {changed}; {MAKE} in its"
        " place with --update"
    )


def test_why_there_is_no_record(tmp_path: Path) -> None:
    assert reason(tmp_path) == f"{MISSING}; {MAKE}"
    golden, data = made()
    kept_in(tmp_path, golden, data)
    other = WEIGHTS | {"head": "bfloat16 [11, 8] " + "e" * 64}
    assert reason(tmp_path, weights=other) == replaced("weights: head is another (1 of 2)")
    fewer = {"embed": WEIGHTS["embed"]}
    assert reason(tmp_path, weights=fewer) == replaced("weights: head is gone (1 of 2)")
    newer = replace(golden.identity, key=replace(golden.identity.key, tpcheck="0.2.0"))
    assert reason(tmp_path, identity=newer) == replaced("tpcheck 0.2.0, recorded by 0.1.0")


def test_why_a_record_is_not_to_be_trusted(tmp_path: Path) -> None:
    golden, data = made()
    kept_in(tmp_path, golden, data)
    path = tmp_path / golden.data.file
    path.write_bytes(data[:-7])
    assert reason(tmp_path) == f"{DATA}: has 3137 bytes, but should have 3144: it was cut off"
    path.write_bytes(data[:-1] + b"?")
    assert reason(tmp_path) == (
        f"{DATA}: SHA-256 is 5f8ffe07579a..., but should be a687f63def54...: it was edited or"
        " swapped"
    )
    path.unlink()
    assert reason(tmp_path) == f"{DATA}: is missing, but {NAME}.json names it"
    manifest = tmp_path / golden.file
    whole = manifest.read_text()
    manifest.write_text(whole.replace('"full": false', '"full": true'))
    assert reason(tmp_path) == (
        f"{NAME}.json is not to be trusted: golden.checksum is not that of the rest: the record"
        " was edited"
    )
    manifest.write_text(whole[:100])
    assert reason(tmp_path) == (
        f"{NAME}.json is not to be trusted: is not JSON, so it was cut off or edited: Expecting"
        " value: line 3 column 16 (char 97)"
    )


def test_what_differs_from_a_record(tmp_path: Path) -> None:
    golden, data = made(environment=environment.collect() | {"subject": {}})
    kept_in(tmp_path, golden, data)
    kept = unpack(read_data(tmp_path, golden), read_manifest(tmp_path / golden.file))
    moved = logits()
    moved[1, 2, 4] += 0.25
    narrow = moved.bfloat16()
    held = evidence(moved, moved, narrow, narrow, tp_size=1)
    checks = checks_against(held, golden, kept)
    assert checks["structural"].reason == (
        "A top: relative_rms=0.0437, but should be at most 1e-12; worst at [4, 0]: 2.24365 for"
        " 1.99365 (position, and which sum of its logits or top)"
    )
    assert checks["bits"].reason == (
        f"1 of 1 inputs, A first, have other bits than {NAME}.json, in the same environment: the"
        " code is another one"
    )
    older = replace(golden, environment=dict(golden.environment) | {"torch": "2.9.1"})
    version = environment.collect()["torch"]
    assert bits(held.base, older).reason == (
        f"another environment rounds otherwise: torch {version}, recorded 2.9.1"
    )
    wide = evidence(moved, moved, moved, moved, tp_size=1)
    assert checks_against(wide, golden, kept)["bits"].reason == (
        "A: dtype=float64, but should be bfloat16 as recorded"
    )
    longer = logits(shape=(2, 3, 12))
    assert (
        checks_against(evidence(longer, longer, longer, longer), golden, kept)["structural"].reason
        == "A: shape=[2, 3, 12], but should be [2, 3, 11] as recorded"
    )


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TPCheckError) as error:
        listing(tmp_path / "none", None)
    assert (
        shown(str(error.value), tmp_path)
        == "golden/none: is no folder, but should be one with golden records"
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(TPCheckError) as error:
        prepare(tmp_path / "file")
    assert shown(str(error.value), tmp_path) == "golden/file: cannot be made: File exists"
