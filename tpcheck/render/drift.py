"""The result of `tpcheck drift` for a terminal: the verdict, a table per dtype, and what it means.

Requirement: the first line is the verdict of `run`; then one row per degree and dtype on the wire,
then sentences that name their evidence; a reader who wants more has the JSON. A number that is not
known is blank, a prediction that does not hold says so and why. A function of the report alone.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from tpcheck.records import Report
from tpcheck.render.content import (
    MAX_SHOWN,
    count_line,
    findings,
    footnotes,
    headline,
    number,
    subject_line,
)
from tpcheck.render.fallback import render_fallback
from tpcheck.render.text import WIDTH, printable, render_finding
from tpcheck.render.width import render_width

Row = Mapping[str, Any]

COLUMNS = (
    "tp",
    "on the wire",
    "error in eps\nTP=1, TP=N",
    "ratio (predicted)\n[95 %]",
    "flips\n(margin)",
    "KL\nmean",
    "65504 /\nlargest",
    "verdict",
)
_LARGE = 100
"""Ratios from here on are written with three digits."""

NOT_VALID = "prediction not valid here"


def render_drift(report: Report) -> str:
    """Return the report as lines of text, the verdict on the first."""
    drift = report.drift or {"rows": [], "findings": []}
    blocks = [f"{headline(report)}\n{subject_line(report)}\n{count_line(report)}"]
    for dtype in dict.fromkeys(row["dtype"] for row in drift["rows"]):
        rows = [row for row in drift["rows"] if row["dtype"] == dtype]
        blocks.append("\n".join([_title(dtype, rows), *_table(rows), *_remarks(rows)]))
        blocks.append(_sentences([one for one in drift["findings"] if one["dtype"] == dtype]))
    blocks.append(render_fallback(drift.get("fallback", ())))
    blocks += [render_width(one) for one in drift.get("width", ())]
    failing = findings(report)
    blocks += [render_finding(one) for one in failing[:MAX_SHOWN]]
    blocks += [f"... and {len(failing) - MAX_SHOWN} more not PASS"] * (len(failing) > MAX_SHOWN)
    blocks.append(_footnotes(report))
    return "\n\n".join(printable(block) for block in blocks if block)


def _title(dtype: str, rows: Sequence[Row]) -> str:
    own = next(row for row in rows if row["deployed"])
    cases = f"{own['cases']} cases, " if own["cases"] > 1 else ""
    over = f"{cases}{own['tokens']} tokens" if own.get("tokens") else f"{cases}all outputs"
    return f"{dtype}, {over}; * as it is deployed"


def _table(rows: Sequence[Row]) -> list[str]:
    cells = [_cells(row) for row in rows if "reason" not in row]
    columns = [i for i, _ in enumerate(COLUMNS) if any(row[i] for row in cells)]
    degree = ""
    shown = []
    for row in cells:
        first = "" if row[0] == degree else row[0]
        degree = row[0]
        shown.append([first, *(row[i] for i in columns if i > 0)])
    table = tabulate(
        shown, headers=[COLUMNS[i] for i in columns], tablefmt="simple", disable_numparse=True
    )
    return [line.rstrip() for line in table.splitlines()]


def _cells(row: Row) -> tuple[str, ...]:
    margin = f" ({number(row['flip_margin'])})" if row["flips"] else ""
    return (
        str(row["tp_size"]),
        f"{row['reduction']}{' *' if row['deployed'] else ''}",
        ", ".join(filter(None, map(number, (row["tp1_epsilons"], row["epsilons"])))),
        _ratio(row),
        f"{number(row['flips'])}{margin}",
        "" if row["kl_mean"] is None else f"{row['kl_mean']:.1e}",
        _times(row["float16_headroom"]),
        row["outcome"],
    )


def _times(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if 10 <= value < 1e6 else f"{value:.2g}"


def _ratio(row: Row) -> str:
    if row["ratio"] is None:
        return "overflow" if row["overflowed_outputs"] else ""
    predicted = "not valid" if row["prediction_reason"] else _brief(row["predicted"])
    return f"{_brief(row['ratio'])} ({predicted}){_interval(row)}"


def _interval(row: Row) -> str:
    """Write an interval by its ends, of a large ratio by how far they are away at most."""
    if not row["interval"]:
        return ""
    low, high = row["interval"]
    if row["ratio"] < _LARGE:
        return f" [{low:.2f}, {high:.2f}]"
    apart = max(high - row["ratio"], row["ratio"] - low) / row["ratio"]
    return f" ±{100 * apart:.0f} %"


def _brief(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < _LARGE else f"{ratio:.3g}"


def _remarks(rows: Sequence[Row]) -> list[str]:
    """Say once why predictions do not hold, and why a wire could not be tried."""
    invalid: dict[str, list[str]] = {}
    missing: dict[str, list[str]] = {}
    for row in rows:
        name = f"{row['reduction']} at tp {row['tp_size']}"
        if "reason" in row:
            missing.setdefault(row["reason"], []).append(row["reduction"])
        elif row["prediction_reason"] and row["ratio"] is not None:
            invalid.setdefault(row["prediction_reason"], []).append(name)
    lines = []
    for reason, names in invalid.items():
        lines += _wrapped(f"{NOT_VALID}: {reason} ({_listed(names)})")
    for reason, names in missing.items():
        lines += _wrapped(f"no number for {', '.join(dict.fromkeys(names))}: {reason}")
    return lines


def _sentences(found: Sequence[Mapping[str, Any]]) -> str:
    """Say each finding once, with the degrees it holds at, in the order of the findings."""
    said: dict[tuple[str, str], list[str]] = {}
    for one in found:
        said.setdefault((one["about"], one["text"]), []).append(str(one["tp_size"]))
    order = list(dict.fromkeys(about for about, _ in said))
    lines = []
    for (_, text), degrees in sorted(said.items(), key=lambda one: order.index(one[0][0])):
        lines += _wrapped(f"tp {', '.join(degrees)}: {text}")
    return "\n".join(lines)


def _footnotes(report: Report) -> str:
    notes = footnotes(report)
    width = max(len(name) for name, _ in notes)
    lines = []
    for name, text in notes:
        lines += _wrapped(f"{name:<{width}}  {' '.join(text.split())}", " " * (width + 2))
    return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - MAX_SHOWN
    return ", ".join(names[:MAX_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _wrapped(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
