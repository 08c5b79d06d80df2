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
from tpcheck.render.text import WIDTH, printable, render_finding

Row = Mapping[str, Any]

COLUMNS = (
    "tp",
    "on the wire",
    "TP=1\nin eps",
    "TP=N\nin eps",
    "ratio (predicted)\n[95 %]",
    "flips\n(margin)",
    "KL\nmean",
    "65504 /\nlargest",
    "verdict",
)
NOT_VALID = "prediction not valid here"


def render_drift(report: Report) -> str:
    """Return the report as lines of text, the verdict on the first."""
    drift = report.drift or {"rows": [], "findings": []}
    blocks = [f"{headline(report)}\n{subject_line(report)}\n{count_line(report)}"]
    for dtype in dict.fromkeys(row["dtype"] for row in drift["rows"]):
        rows = [row for row in drift["rows"] if row["dtype"] == dtype]
        blocks.append("\n".join([_title(dtype, rows), *_table(rows), *_remarks(rows)]))
        blocks.append(_sentences([one for one in drift["findings"] if one["dtype"] == dtype]))
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
        number(row["tp1_epsilons"]),
        number(row["epsilons"]),
        _ratio(row),
        f"{number(row['flips'])}{margin}",
        "" if row["kl_mean"] is None else f"{row['kl_mean']:.1e}",
        "" if row["float16_headroom"] is None else f"{row['float16_headroom']:.3g}",
        row["outcome"],
    )


def _ratio(row: Row) -> str:
    if row["ratio"] is None:
        return "overflow" if row["overflowed_outputs"] else ""
    predicted = "not valid" if row["prediction_reason"] else f"{row['predicted']:.2f}"
    interval = row["interval"]
    between = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    return f"{row['ratio']:.2f} ({predicted}){between}"


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
