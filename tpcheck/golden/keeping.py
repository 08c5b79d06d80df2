"""Put a record that was just made into its folder, or leave what is there alone.

Requirement: recording never takes the place of verifying. A record that says the same stays as it
is; one that says something else stays too, and is named with what differs, unless an update was
asked for: then the new one is there whole before the old one goes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tpcheck.golden.finding import is_of, what_changed
from tpcheck.golden.making import record_differences
from tpcheck.golden.records import Golden
from tpcheck.golden.store import Entry, locked, scan, write

Json = dict[str, Any]

WRITTEN, REPLACED, UNCHANGED, DIFFERENT = "written", "replaced", "unchanged", "different"


def keep(folder: Path, golden: Golden, data: bytes, *, update: bool) -> Json:
    """Write a record unless one that says something else is there and no update is asked for."""
    with locked(folder):
        entries = scan(folder)
        # another spelling of the subject can come to the same file, which is not to be overwritten
        there = [
            e for e in entries if e.file == golden.file or is_of(e, golden.subject, golden.named)
        ]
        held = there[0].golden if len(there) == 1 and _says_the_same(there[0], golden) else None
        if held is not None:
            together = tuple(dict.fromkeys((*held.together, *golden.together)))
            if together != held.together:  # it says what else there should be now
                write(folder, replace(held, together=together), data)
            return _row(golden, UNCHANGED, "")
        if there and not update:
            return _row(golden, DIFFERENT, _difference(there[0], golden))
        write(folder, golden, data, instead_of=there)
    return _row(golden, REPLACED if there else WRITTEN, "")


def _says_the_same(entry: Entry, golden: Golden) -> bool:
    held = entry.golden
    if held is None or entry.state != "ok":
        return False
    return (held.address, held.data, held.logits) == (golden.address, golden.data, golden.logits)


def _difference(entry: Entry, golden: Golden) -> str:
    held = entry.golden
    if held is None or entry.state != "ok":
        return f"{entry.file}: {entry.problem}; --update replaces it"
    if held.address != golden.address:
        changed = what_changed(golden.identity, held.identity)
        return f"{entry.file} is of another subject: {changed}; --update replaces it"
    if held.full != golden.full and held.logits == golden.logits:
        now = "full" if golden.full else "small"
        return f"{entry.file} holds the same logits, but is no {now} record; --update replaces it"
    around = record_differences(golden, held)
    elsewhere = f" made in another environment ({'; '.join(around[:3])})" if around else ""
    return (
        f"{entry.file} holds other logits for the same weights, config and inputs{elsewhere};"
        " tpcheck golden verify says how far off, --update replaces it"
    )


def _row(golden: Golden, state: str, reason: str) -> Json:
    epsilons = [one.epsilons for one in golden.logits.values() if one.epsilons is not None]
    return {
        "file": golden.file,
        "case": golden.case_id,
        "dtype": golden.identity.key.dtype,
        "address": golden.address,
        "state": state,
        "bytes": golden.data.bytes,
        "tp1_epsilons": max(epsilons, default=None),
        "repeats": golden.repeats,
        "reason": reason,
    }
