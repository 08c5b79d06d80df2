"""What `tpcheck golden record` and `golden list` print: the outcome first, then one row a record.

Requirement: recording reads as recording, never as a pass; what is broken or different stands on
the first line with a count and below with its name and reason. Functions of the JSON.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from tpcheck.render.content import counted

Record = Mapping[str, Any]

_KEPT = {True: "all", False: "small", None: ""}


def render_recording(found: Record) -> str:
    """Return what was recorded; the first line says that nothing was verified."""
    rows: Sequence[Record] = found["records"]
    counts = Counter(row["state"] for row in rows)
    said = ", ".join(f"{count} {state}" for state, count in counts.items())
    lines = [f"{found['outcome']}: {said} in {found['directory']}; nothing was verified"]
    columns = ("case", "dtype", "state", "data", "TP=1 off by", "file")
    table = [
        (
            row["case"],
            row["dtype"],
            row["state"],
            _size(row["bytes"]),
            "" if row["tp1_epsilons"] is None else f"{row['tp1_epsilons']:.3g} eps",
            row["file"],
        )
        for row in rows
    ]
    lines += ["", *_table(table, columns)]
    lines += _problems(rows, "reason")
    odd = [row["file"] for row in rows if not row["repeats"]]
    if odd:
        lines += ["", f"note: TP=1 did not repeat its own bits, so they are not compared: {odd[0]}"]
    return "\n".join(lines)


def render_listing(found: Record) -> str:
    """Return the records of a folder, the broken ones explained below."""
    rows: Sequence[Record] = found["records"]
    if not rows:
        return f"{found['outcome']}: there is no record in {found['directory']}"
    bad = sum(row["state"] != "ok" for row in rows)
    head = f"{found['outcome']}: {counted(len(rows), 'record')} in {found['directory']}"
    head += f", {bad} of them no good" if bad else ""
    columns = ("subject", "case", "dtype", "state", "kept", "data", "torch", "created")
    table = [
        (
            row.get("subject", row["file"]),
            _short(row.get("case", "")),
            row.get("dtype", ""),
            row["state"],
            _KEPT[row.get("full")],
            _size(row.get("bytes")),
            row.get("torch") or "",
            row.get("created", ""),
        )
        for row in rows
    ]
    lines = [head, "", *_table(table, columns), *_problems(rows, "problem")]
    if found["temporary"]:
        files = counted(found["temporary"], "file")
        lines += ["", f"note: not read, left by a killed recorder: {files}"]
    return "\n".join(lines)


def _table(rows: Sequence[tuple[str, ...]], headers: Sequence[str]) -> list[str]:
    table = tabulate([[*map(_printable, row)] for row in rows], headers, disable_numparse=True)
    return [line.rstrip() for line in table.splitlines()]


def _problems(rows: Sequence[Record], name: str) -> list[str]:
    said = [
        _printable(f"  {row['state']}: {_subject_of(row)}{row[name]}") for row in rows if row[name]
    ]
    return ["", *said] if said else []


def _subject_of(row: Record) -> str:
    if row.get("file"):
        said = str(row.get("reason") or row.get("problem"))
        return "" if said.startswith(row["file"].removesuffix(".json")) else f"{row['file']}: "
    return f"{row.get('subject')} {row.get('case')} {row.get('dtype')}: "


def _size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 1000:.1f} kB" if count < 10**6 else f"{count / 10**6:.1f} MB"


def _short(case_id: str) -> str:
    return case_id if len(case_id) <= 24 else f"{case_id[:21]}..."


def _printable(text: str) -> str:
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
