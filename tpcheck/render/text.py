"""A report for a terminal: the verdict first, at most 110 columns, plain characters.

Requirement: the first line alone answers; a failing run can be understood, and repeated by paste,
from the text alone. Control characters that a subject put into a name or an exception are shown as
escapes, so that a report cannot rewrite the terminal it is printed on.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tabulate import tabulate

from tpcheck.records import PASS, Report
from tpcheck.render.content import (
    COLUMNS,
    MAX_ROWS,
    MAX_SHOWN,
    Finding,
    count_line,
    findings,
    footnotes,
    headline,
    rows,
    sensitivity_line,
    shortened,
    split_reasons,
    subject_line,
)
from tpcheck.render.stacks import shown_stack, told_once

WIDTH = 110
MAX_RANK_LINES = 20
"""An ERROR is understood from what every rank did, so it shows more than three reasons."""


def render_text(report: Report) -> str:
    """Return the report as lines of text, the verdict on the first."""
    failing = findings(report)
    blocks = [_head(report), _table(report)]
    blocks += [render_finding(finding) for finding in failing[:MAX_SHOWN]]
    if len(failing) > MAX_SHOWN:
        rest = len(failing) - MAX_SHOWN
        blocks.append(f"... and {rest} more that {'is' if rest == 1 else 'are'} not PASS")
    blocks.append(_aligned(footnotes(report), indent=""))
    return "\n\n".join(block for block in blocks if block)


def render_finding(finding: Finding) -> str:
    """Return one failing verdict: reasons in execution order, aligned facts, repro and next."""
    lines = [printable(finding.title)]
    limit = MAX_RANK_LINES if finding.verdict.outcome == "ERROR" else MAX_SHOWN
    of_checks, remarks = split_reasons(finding)
    for reason in [*shortened(told_once(of_checks), "reason", limit), *remarks]:
        lines += _reason(reason)
    if finding.facts:
        lines.append(_aligned(finding.facts, indent="  "))
    # a command is never wrapped: it is there to be pasted
    lines += [f"  repro: {printable(finding.repro)}"] if finding.repro else []
    lines += _wrapped(printable(finding.next), "  next:  ", "         ")
    if finding.verdict.script:
        # neither is a script, nor is it indented
        lines += ["  the same with torch alone:", "", printable(finding.verdict.script).rstrip()]
    return "\n".join(lines)


def printable(text: str) -> str:
    """Return the text with control characters as escapes; newlines and tabs stay.

    Example:
        >>> printable("a\\x1b[2Jb")
        'a\\\\x1b[2Jb'
    """
    keep = "\n\t"
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )


def _head(report: Report) -> str:
    head, what = printable(headline(report)), printable(subject_line(report))
    one_line = f"{head}  {what}"
    plain = report.outcome == PASS and report.path.same_as_deployed
    lines = [one_line] if plain and len(one_line) <= WIDTH else [head, what]
    caught = sensitivity_line(report)
    more = _wrapped(printable(caught), "", "  ") if caught else []
    return "\n".join([lines[0], *more, *lines[1:], count_line(report)])


def _table(report: Report) -> str:
    shown = rows(report)
    if not shown:
        return ""
    kept = shown[:MAX_ROWS] if len(shown) > MAX_ROWS else shown
    columns = [i for i, _ in enumerate(COLUMNS) if any(row[i] for row in kept)]
    table = tabulate(
        [[_fitted(row[i]) for i in columns] for row in kept],
        headers=[COLUMNS[i] for i in columns],
        tablefmt="simple",
        disable_numparse=True,
    )
    rest = len(shown) - len(kept)
    lines = [line.rstrip() for line in table.splitlines()]
    return "\n".join([*lines, *([f"... and {rest} more rows"] if rest else [])])


def _fitted(cell: str, width: int = 24) -> str:
    cell = printable(cell).replace("\n", " ")
    return cell if len(cell) <= width else cell[: width - 3] + "..."


def _reason(reason: str) -> list[str]:
    """Wrap the first line; what follows (a stack, aligned facts) keeps its own lines."""
    first, _, detail = printable(reason).rstrip().partition("\n")
    rest = shown_stack(textwrap.dedent(detail).splitlines())
    return _wrapped(first, "  ", "    ") + [f"    {line}".rstrip() for line in rest]


def _aligned(pairs: Sequence[tuple[str, str]], indent: str) -> str:
    width = max((len(name) for name, _ in pairs), default=0)
    lines: list[str] = []
    for name, text in pairs:
        flat = " ".join(printable(text).split())
        hanging = " " * (len(indent) + width + 2)
        lines += _wrapped(flat, f"{indent}{name:<{width}}  ", hanging)
    return "\n".join(lines)


def _wrapped(text: str, first: str, following: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [first.rstrip()]
