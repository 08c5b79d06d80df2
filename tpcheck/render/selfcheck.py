"""The result of `tpcheck selfcheck` for a terminal: survivors first, then which check caught what.

Requirement: a check that has gone blind cannot be overlooked, so the first line counts survivors
and names them, and every fault shows the check that has to catch it. A function of the JSON rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

COLUMNS = ("fault", "thread", "should be caught by", "caught by", "cases", "")


def render_selfcheck(faults: Sequence[Mapping[str, Any]]) -> str:
    """Return the verdict on the first line, one row per fault, and why survivors survived."""
    survivors = [fault for fault in faults if fault["survived"]]
    names = ", ".join(fault["fault"] for fault in survivors)
    caught = f"{len(faults) - len(survivors)} of {len(faults)} planted faults are caught"
    head = f"FAIL: {caught}; survived: {names}" if survivors else f"PASS: {caught}"
    rows = [_row(fault) for fault in sorted(faults, key=lambda fault: not fault["survived"])]
    table = tabulate(rows, headers=COLUMNS, disable_numparse=True)
    reasons = [f"{fault['fault']}: {fault['reason']}" for fault in survivors if fault["reason"]]
    lines = [line.rstrip() for line in table.splitlines()]
    return "\n".join([head, "", *lines, *([""] if reasons else []), *reasons])


def _row(fault: Mapping[str, Any]) -> tuple[str, ...]:
    # drift is asked of a fault besides the check that has to catch it, where rounding can show it
    expected = [fault["expected"], *(["drift"] if fault["drift_expected"] else [])]
    return (
        fault["fault"],
        fault["thread"],
        ", ".join(dict.fromkeys(expected)),
        ", ".join(fault["caught_by"]),
        str(fault["cases_needed"]),
        "SURVIVED" if fault["survived"] else "",
    )
