"""The result of `tpcheck drift` for a terminal: the verdict, a table per dtype, and what it means.

Requirement: the first line is the verdict of `run`; then one row per degree and dtype on the wire,
then sentences that name their evidence; a reader who wants more has the JSON. What is said is that
of drift_content.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tpcheck.records import SKIPPED, Report
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
    DriftContent,
    Row,
    drift_content,
    filled_table,
    no_numbers,
    remarks,
    title,
)
from tpcheck.render.fallback import render_fallback
from tpcheck.render.lines import table, wrapped
from tpcheck.render.text import printable, render_finding
from tpcheck.render.width import render_width


def render_drift(report: Report) -> str:
    """Return the report as lines of text, the verdict on the first."""
    drift = drift_content(report)
    caught = sensitivity_line(report)
    head = [headline(report), *wrapped(caught)]
    blocks = ["\n".join([*head, subject_line(report), count_line(report)])]
    for dtype in drift.dtypes():
        rows = drift.rows_in(dtype)
        blocks.append("\n".join([title(dtype, rows), *_table(rows), *wrapped(*remarks(rows))]))
        blocks.append("\n".join(wrapped(*drift.sentences_in(dtype))))
    blocks.append("\n".join(wrapped(*_unmeasured(report, drift))))
    blocks.append(render_fallback(drift.fallback))
    blocks += [render_width(one) for one in drift.width]
    failing = findings(report)
    blocks += [render_finding(one) for one in failing[:MAX_SHOWN]]
    blocks += [f"... and {len(failing) - MAX_SHOWN} more not PASS"] * (len(failing) > MAX_SHOWN)
    blocks.append(_footnotes(report))
    return "\n\n".join(printable(block) for block in blocks if block)


def _unmeasured(report: Report, drift: DriftContent) -> list[str]:
    """Say which verdicts have no row, and why; a check that was skipped is told below."""
    of_report = zip(report.verdicts, drift.profiles, strict=True)
    told = tuple(
        one
        for verdict, one in of_report
        if "drift" in verdict.checks and verdict.checks["drift"].outcome != SKIPPED
    )
    missing = no_numbers(replace(drift, profiles=told))
    return [f"no drift was measured: {text}" for text in missing[:MAX_SHOWN]]


def _table(rows: Sequence[Row]) -> list[str]:
    """Return the table, each degree named once."""
    headers, filled = filled_table(rows)
    degree = ""
    shown = []
    for _, cells in filled:
        shown.append(["" if cells[0] == degree else cells[0], *cells[1:]])
        degree = cells[0]
    return table(shown, headers)


def _footnotes(report: Report) -> str:
    notes = footnotes(report)
    width = max(len(name) for name, _ in notes)
    lines = []
    for name, text in notes:
        lines += wrapped(f"{name:<{width}}  {' '.join(text.split())}", indent=" " * (width + 2))
    return "\n".join(lines)
