"""A report as Markdown, for a pull request comment or a CI summary.

Requirement: what a subject puts into a name cannot end the table, the fence or the comment it
stands in, nor mention or link anything.
"""

from __future__ import annotations

import re

from tpcheck.records import Report
from tpcheck.render.content import (
    COLUMNS,
    MAX_SHOWN,
    count_line,
    findings,
    footnotes,
    headline,
    rows,
    sensitivity_line,
    subject_line,
)
from tpcheck.render.text import printable, render_finding


def render_markdown(report: Report) -> str:
    """Return the verdict as a heading, the table, and the first failing verdicts in full."""
    blocks = [
        f"## {escaped(headline(report))}",
        f"{code(subject_line(report))}: {count_line(report)}",
        escaped(sensitivity_line(report)),
        _table(report),
    ]
    failing = findings(report)
    blocks += [fenced(render_finding(finding)) for finding in failing[:MAX_SHOWN]]
    if len(failing) > MAX_SHOWN:
        blocks.append(f"... and {len(failing) - MAX_SHOWN} more that are not PASS")
    notes = [f"- **{name}**: {escaped(text)}" for name, text in footnotes(report)]
    return "\n\n".join(filter(None, [*blocks, "\n".join(notes)])) + "\n"


def _table(report: Report) -> str:
    body = rows(report)
    if not body:
        return ""
    lines = [[column.replace("\n", " ") for column in COLUMNS], ["---"] * len(COLUMNS)]
    lines += [[escaped(cell) for cell in row] for row in body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Return one line of text that stands for itself in Markdown."""
    flat = " ".join(printable(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    # these start a mention or a link wherever it is posted; a zero-width space keeps them readable
    plain = re.sub(r"(@|:(?=//)|\bwww(?=\.))", "\\1\u200b", flat, flags=re.IGNORECASE)
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", plain)


def code(text: str) -> str:
    """Return one line of text as code, whatever ticks it holds."""
    flat = " ".join(printable(text).split())
    ticks = "`" * (_longest_run(flat) + 1)
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{ticks}{pad}{flat}{pad}{ticks}"


def fenced(text: str) -> str:
    """Return text as a block that no line of it can end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}text\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
