"""A drift report as Markdown, for the summary of a CI job.

Requirement: at most MAX_LINES lines, so that the summary is read; what is deployed, alarms and the
widest degree are never what is left out, and the rest is counted. Names cannot end a table, a fence
or a comment, nor mention or link anything (markdown.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from tpcheck.records import Report
from tpcheck.render import fallback, width
from tpcheck.render.content import (
    count_line,
    findings,
    footnotes,
    headline,
    sensitivity_line,
    subject_line,
)
from tpcheck.render.drift_content import (
    DriftContent,
    drift_content,
    filled_table,
    remarks,
    sentences,
    title,
)
from tpcheck.render.markdown import code, escaped, fenced
from tpcheck.render.text import render_finding

MAX_LINES = 100
MAX_ROWS = 12
"""Of one table."""

MAX_SENTENCES = 8
"""Findings of one dtype."""

MAX_TEXT = 300
"""Characters of one sentence or cell."""

_SHOWN_IN_FULL = 12
"""Lines of the first failing verdict."""


def render_drift_markdown(report: Report) -> str:
    """Return the verdict as a heading, then per dtype a table and what it means."""
    content = drift_content(report)
    blocks = [
        f"## {_brief(headline(report))}",
        f"{code(_cut(subject_line(report)))}: {count_line(report)}",
        _brief(sensitivity_line(report)),
        _failing(report),
    ]
    for dtype in content.dtypes():
        blocks += _dtype(content, dtype)
    blocks += _missing(content)
    blocks += _fallback(content)
    blocks += [
        f"- **{one['dtype']}**: {_brief(one['recommendation'])}" for one in content.width[:3]
    ]
    blocks += [_table(width.COLUMNS, width.degree_rows(one)) for one in content.width[:1]]
    notes = footnotes(report)
    lines = [f"- **{name}**: {_brief(text)}" for name, text in notes[:_SHOWN_IN_FULL]]
    text = "\n\n".join(filter(None, [*blocks, "\n".join(lines)]))
    return _bounded(text.splitlines())


def _dtype(content: DriftContent, dtype: str) -> list[str]:
    rows = content.rows_in(dtype)
    headers, filled = filled_table(rows)
    wires = list(dict.fromkeys(row["reduction"] for row, _ in filled))

    def matters(i: int) -> tuple[bool, int]:
        row = filled[i][0]
        return not row["deployed"], wires.index(row["reduction"])

    kept = sorted(sorted(range(len(filled)), key=matters)[:MAX_ROWS])
    first, left_out = _findings(content, dtype)
    said = [*first, *remarks(rows)]
    lines = [f"- {_brief(text)}" for text in said[:MAX_SENTENCES]]
    more = _more(max(0, len(said) - MAX_SENTENCES) + left_out, "findings")
    return [
        f"### {_brief(title(dtype, rows))}",
        _table(headers, [filled[i][1] for i in kept], len(filled)),
        "\n".join([*lines, *(f"- {text}" for text in more)]),
    ]


def _findings(content: DriftContent, dtype: str) -> tuple[list[str], int]:
    """Return alarms, then what was found at the widest degree, and how many are left out."""
    here = [one for one in content.findings if one["dtype"] == dtype]
    widest = max((one["tp_size"] for one in here), default=0)
    said = {one["text"] for one in here if one.get("raised") or one["tp_size"] == widest}
    kept = [one for one in here if one["text"] in said]
    alarms = [one for one in kept if one.get("raised")]
    calm = [one for one in kept if not one.get("raised")]
    return sentences(alarms) + sentences(calm), len(here) - len(kept)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], total: int = 0) -> str:
    if not rows:
        return ""
    lines = [[escaped(name) for name in headers], ["---"] * len(headers)]
    lines += [[_brief(cell) for cell in row] for row in rows[:MAX_ROWS]]
    more = _more(max(total, len(rows)) - MAX_ROWS, "rows")
    return "\n".join(
        [*(f"| {' | '.join(line)} |" for line in lines), *([""] if more else []), *more]
    )


def _missing(content: DriftContent) -> list[str]:
    reasons = dict.fromkeys(one.reason for one in content.profiles if one.profile is None)
    return [f"No drift was measured: {_brief(reason)}" for reason in list(reasons)[:3]]


def _fallback(content: DriftContent) -> list[str]:
    if not content.fallback:
        return []
    table = _table(fallback.COLUMNS, fallback.effect_rows(content.fallback))
    said = [_brief(text) for text in fallback.effect_remarks(content.fallback)[:3]]
    return [f"### {_brief(fallback.effect_title(content.fallback))}", table, *said]


def _failing(report: Report) -> str:
    failing = findings(report)
    if not failing:
        return ""
    lines = render_finding(failing[0]).splitlines()
    left = len(lines) - _SHOWN_IN_FULL
    shown = [line[:MAX_TEXT] for line in lines[:_SHOWN_IN_FULL]]
    shown += [f"... {left} more lines"] if left > 0 else []
    more = _more(len(failing) - 1, "that are not PASS")
    return "\n\n".join([fenced("\n".join(shown)), *more])


def _more(count: int, what: str) -> list[str]:
    return [f"and {count} more {what}: the JSON report has all"] if count > 0 else []


def _brief(text: str) -> str:
    return escaped(_cut(text))


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= MAX_TEXT else f"{flat[: MAX_TEXT - 3]}..."


def _bounded(lines: Sequence[str]) -> str:
    left = len(lines) - MAX_LINES
    if left <= 0:
        return "\n".join(lines) + "\n"
    kept = [*lines[: MAX_LINES - 2], "", f"... {left + 2} more lines: the JSON report has all"]
    return "\n".join(kept) + "\n"
