"""The result of `tpcheck drift` for a terminal: the verdict, a table per dtype, and what it means.

Requirement: the first line is the verdict of `run`; then one row per degree and dtype on the wire,
then sentences that name their evidence; a reader who wants more has the JSON. What is said is that
of drift_content.py.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tabulate import tabulate

from tpcheck.records import Report
from tpcheck.render.content import (
    MAX_SHOWN,
    count_line,
    findings,
    footnotes,
    headline,
    sensitivity_line,
    subject_line,
)
from tpcheck.render.drift_content import (
    COLUMNS,
    Row,
    cells,
    columns_of,
    drift_content,
    remarks,
    title,
)
from tpcheck.render.fallback import render_fallback
from tpcheck.render.text import WIDTH, printable, render_finding
from tpcheck.render.width import render_width


def render_drift(report: Report) -> str:
    """Return the report as lines of text, the verdict on the first."""
    drift = drift_content(report)
    caught = sensitivity_line(report)
    head = [headline(report), *_lines([caught] * bool(caught))]
    blocks = ["\n".join([*head, subject_line(report), count_line(report)])]
    for dtype in drift.dtypes():
        rows = drift.rows_in(dtype)
        blocks.append("\n".join([title(dtype, rows), *_table(rows), *_lines(remarks(rows))]))
        blocks.append("\n".join(_lines(drift.sentences_in(dtype))))
    blocks.append(render_fallback(drift.fallback))
    blocks += [render_width(one) for one in drift.width]
    failing = findings(report)
    blocks += [render_finding(one) for one in failing[:MAX_SHOWN]]
    blocks += [f"... and {len(failing) - MAX_SHOWN} more not PASS"] * (len(failing) > MAX_SHOWN)
    blocks.append(_footnotes(report))
    return "\n\n".join(printable(block) for block in blocks if block)


def _table(rows: Sequence[Row]) -> list[str]:
    filled = [cells(row) for row in rows if "reason" not in row]
    columns = columns_of(filled)
    degree = ""
    shown = []
    for row in filled:
        first = "" if row[0] == degree else row[0]
        degree = row[0]
        shown.append([first, *(row[i] for i in columns if i > 0)])
    table = tabulate(
        shown, headers=[COLUMNS[i] for i in columns], tablefmt="simple", disable_numparse=True
    )
    return [line.rstrip() for line in table.splitlines()]


def _footnotes(report: Report) -> str:
    notes = footnotes(report)
    width = max(len(name) for name, _ in notes)
    lines = []
    for name, text in notes:
        lines += _wrapped(f"{name:<{width}}  {' '.join(text.split())}", " " * (width + 2))
    return "\n".join(lines)


def _lines(texts: Sequence[str]) -> list[str]:
    return [line for text in texts for line in _wrapped(text)]


def _wrapped(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
