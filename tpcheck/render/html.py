"""A report as one self-contained HTML page.

Requirement: every verdict has its row and every failing verdict is there in full, as far as a page
stays usable; what is left out is counted. pages.py says what every page guarantees.
"""

from __future__ import annotations

from typing import Any

from tpcheck.records import Report
from tpcheck.render.content import (
    COLUMNS,
    count_line,
    findings,
    footnotes,
    headline,
    rows,
    sensitivity_line,
    subject_line,
)
from tpcheck.render.pages import MAX_FINDINGS, MAX_VERDICT_ROWS, page
from tpcheck.render.text import render_finding


def render_html(report: Report) -> str:
    """Return the whole page: the verdict, the rows, the failing verdicts, what it stood on."""
    return page("run.html.j2", **common(report))


def common(report: Report) -> dict[str, Any]:
    """Return what the base template and the verdicts of every page are filled with."""
    failing, table = findings(report), rows(report)
    environment = [(str(name), _flat(value)) for name, value in report.environment.items()]
    return {
        "outcome": report.outcome,
        "subject": report.subject,
        "headline": headline(report),
        "subject_line": subject_line(report),
        "count_line": count_line(report),
        "caught": sensitivity_line(report),
        "columns": COLUMNS,
        "outcome_at": COLUMNS.index("outcome"),
        "verdicts": table[:MAX_VERDICT_ROWS],
        "rows_left_out": max(0, len(table) - MAX_VERDICT_ROWS),
        "failing": [render_finding(item) for item in failing[:MAX_FINDINGS]],
        "failing_left_out": max(0, len(failing) - MAX_FINDINGS),
        "notes": footnotes(report) + environment,
    }


def _flat(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{name}={one}" for name, one in value.items()) or "none"
