"""What a folder of golden records holds, as data for `tpcheck golden list`. Torch-free.

Requirement: what is broken, missing or left behind cannot be overlooked, and is named; a folder in
which nothing is fails, because nothing could be verified against it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tpcheck.errors import TPCheckError
from tpcheck.golden.records import Golden, slug
from tpcheck.golden.store import Entry, missing, scan

Json = dict[str, Any]

LISTING = "tpcheck.golden_listing/1"


def listing(folder: Path, subject: str | None) -> Json:
    """Return every record of a folder with its state, and whether all is well.

    Returns:
        `{"schema", "directory", "subject", "outcome", "records", "temporary"}`: `outcome` is OK or
        BROKEN; each record has `file`, `state` (ok, corrupt, unknown schema, missing data,
        missing, leftover), `subject`, `case`, `dtype`, `bytes`, `full`, `created`, `tpcheck`,
        `torch` and `problem`. `temporary` counts what a killed recorder left and nobody reads.

    Raises:
        TPCheckError: there is no such folder, or it cannot be listed.
    """
    if not folder.is_dir():
        raise TPCheckError(f"{folder}: is no folder, but should be one with golden records")
    entries = scan(folder)
    kept = [entry for entry in entries if entry.state != "temporary" and _is_asked(entry, subject)]
    rows = [_row(entry) for entry in kept]
    subjects = dict.fromkeys(e.golden.subject for e in kept if e.golden is not None)
    for name in subjects:
        for case_id, dtype in missing(entries, name):
            rows.append(_missing_row(name, case_id, dtype))
    fine = bool(rows) and all(row["state"] == "ok" for row in rows)
    return {
        "schema": LISTING,
        "directory": str(folder),
        "subject": subject,
        "outcome": "OK" if fine else "BROKEN",
        "records": rows,
        "temporary": sum(entry.state == "temporary" for entry in entries),
    }


def _is_asked(entry: Entry, subject: str | None) -> bool:
    if subject is None:
        return True
    if entry.golden is not None:
        return entry.golden.subject == subject
    return entry.file.startswith(f"{slug(subject)}.")


def _row(entry: Entry) -> Json:
    golden = entry.golden
    of_it: Json = {} if golden is None else _of(golden)
    return {"file": entry.file, "state": entry.state, "problem": entry.problem} | of_it


def _of(golden: Golden) -> Json:
    return {
        "subject": golden.subject,
        "case": golden.case_id,
        "dtype": golden.identity.key.dtype,
        "address": golden.address,
        "bytes": golden.data.bytes,
        "full": golden.full,
        "created": golden.created,
        "tpcheck": golden.identity.key.tpcheck,
        "torch": golden.environment.get("torch"),
    }


def _missing_row(subject: str, case_id: str, dtype: str) -> Json:
    problem = "is not there, but other records name it as made with them"
    named = {"subject": subject, "case": case_id, "dtype": dtype}
    return {"file": "", "state": "missing", "problem": problem} | named
