"""The result of `tpcheck selfcheck` for a terminal: survivors first, then which check caught what.

Requirement: a check that has gone blind cannot be overlooked, so the first line counts survivors
and idle checks and names them; rates stand with their bounds; and every fault shows the check that
has to catch it, and what drift alone would have seen. A function of the JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

COLUMNS = ("fault", "thread", "caught by", "first stage", "cases")
"""Before one column of drift alone per dtype, and the reason where that misses something."""


def render_selfcheck(matrix: Mapping[str, Any]) -> str:
    """Return the verdict on the first line, the rates, and one row per fault, survivors first."""
    planted = [fault for fault in matrix["faults"] if fault["tp_sizes"]]
    faults = sorted(planted, key=lambda fault: not fault["survived"])
    left = [f"  {one['fault']}: {one['reason']}" for one in matrix["faults"] if not one["tp_sizes"]]
    dtypes = list(dict.fromkeys(dtype for fault in faults for dtype in fault["drift"]))
    headers = (*COLUMNS, *(f"drift in {dtype}" for dtype in dtypes), "why drift alone misses it")
    rows = [_row(fault, dtypes) for fault in faults]
    table = tabulate(rows, headers=headers, disable_numparse=True)
    lines = [_head(faults, matrix["idle_checks"]), "", *map(_tier, matrix["tiers"]), *left, ""]
    return "\n".join([*lines, *(line.rstrip() for line in table.splitlines())])


def _head(faults: Sequence[Mapping[str, Any]], idle: Sequence[str]) -> str:
    survivors = [fault["fault"] for fault in faults if fault["survived"]]
    said = [f"{len(faults) - len(survivors)} of {len(faults)} planted faults are caught"]
    said += [f"survived: {', '.join(survivors)}"] if survivors else []
    said += [f"no fault is caught by: {', '.join(idle)}"] if idle else []
    return f"{'PASS' if len(said) == 1 else 'FAIL'}: {'; '.join(said)}"


def _tier(tier: Mapping[str, Any]) -> str:
    counts = f"{tier['caught']} of {tier['planted']}"
    bounds = f"{_percent(tier['lower'])} to {_percent(tier['upper'])}"
    return f"  {tier['name']:<27} {counts:>13} at the first case, 95 % within {bounds}"


def _row(fault: Mapping[str, Any], dtypes: Sequence[str]) -> tuple[str, ...]:
    everywhere = list(fault["tp_sizes"])
    drift = [_degrees(fault["drift"].get(dtype), everywhere) for dtype in dtypes]
    told = any(one != "all" for one in drift if one)
    return (
        fault["fault"],
        fault["thread"],
        _caught(fault),
        fault["first_stage"],
        _cases(fault),
        *drift,
        (fault["reason"] or "") if told else "",
    )


def _caught(fault: Mapping[str, Any]) -> str:
    problems = []
    if fault["missed"]:
        problems.append(f"missed at {', '.join(fault['missed'])}")
    if fault["drift_missed"]:
        problems.append(f"drift missed it in {', '.join(fault['drift_missed'])}")
    expected = str(fault["expected"])
    return f"{expected}: SURVIVED, {'; '.join(problems)}" if problems else expected


def _cases(fault: Mapping[str, Any]) -> str:
    worst, middle = fault["cases_needed"], fault["cases_median"]
    if worst is None:
        return "-"
    return str(worst) if worst == middle else f"{middle:g}, at most {worst}"


def _degrees(seen: Sequence[int] | None, everywhere: Sequence[int]) -> str:
    if seen is None:
        return ""
    if list(seen) == list(everywhere):
        return "all"
    return f"tp {', '.join(map(str, seen))}" if seen else "none"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
