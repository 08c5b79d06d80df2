"""The result of `tpcheck diff` for a terminal and as a page: what differs first, and where.

Requirement: the first line alone answers, and names the first tensor that differs with its rank;
then a row per tensor, every failing one before those that agree; then failing tensors in the order
of comparison, each with the numbers a user would type next. A function of the report alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tabulate import tabulate

from tpcheck.records import FAIL, PASS, Report, Verdict
from tpcheck.render.content import MAX_ROWS, MAX_SHOWN, Finding, at_least, counted, findings, number
from tpcheck.render.text import printable, render_finding

COLUMNS = (
    "tensor",
    "ranks hold",
    "dtype",
    "outcome",
    "off / elements",
    "worst\nerror",
    "ulp",
    "relative\nrms",
    "atol\nneeded",
    "rank",
)
_NAME_WIDTH = 34
_ON_A_PAGE = ("dtype", "relative\nrms")
"""Columns that a terminal of 110 has no room for; failing tensors say them below."""

_NOT_IN_A_LINE = ("decides", "layout", "blamed_rank")
"""Facts that a line of `--jsonl` has under another name, or that are the same in all."""

_FACTS = ("required_atol", "required_rtol", "required_ulp", "relative_rms")
_FACT_NAMES = {
    "required_atol": "atol",
    "required_rtol": "rtol",
    "required_ulp": "max_ulp",
    "relative_rms": "relative_rms",
}


def render_diff(report: Report) -> str:
    """Return the report as lines of text, the answer on the first."""
    failing = _findings(report)
    blocks = [f"{headline(report)}\n{subject_line(report)}\n{count_line(report)}", _table(report)]
    blocks += [render_finding(one) for one in failing[:MAX_SHOWN]]
    if len(failing) > MAX_SHOWN:
        rest = len(failing) - MAX_SHOWN
        blocks.append(f"... and {rest} more that {'is' if rest == 1 else 'are'} not PASS")
    blocks.append("\n".join(f"{name:<9} {text}" for name, text in notes(report)))
    return "\n\n".join(printable(block) for block in blocks if block)


def render_diff_html(report: Report) -> str:
    """Return the whole page."""
    from tpcheck.render.pages import MAX_FINDINGS, MAX_VERDICT_ROWS, page

    failing, table = _findings(report), _rows(report, MAX_VERDICT_ROWS, width=200)
    around = [(str(name), str(value)) for name, value in report.environment.items()]
    return page(
        "run.html.j2",
        outcome=report.outcome,
        subject=report.subject,
        headline=headline(report),
        subject_line=subject_line(report),
        count_line=count_line(report),
        caught="",
        columns=COLUMNS,
        outcome_at=COLUMNS.index("outcome"),
        verdicts=table,
        rows_left_out=max(0, len(report.verdicts) - MAX_VERDICT_ROWS),
        failing=[render_finding(one) for one in failing[:MAX_FINDINGS]],
        failing_left_out=max(0, len(failing) - MAX_FINDINGS),
        notes=notes(report) + around,
    )


def headline(report: Report) -> str:
    """Say how many tensors differ, and which is the first."""
    total = len(report.verdicts)
    off = sum(verdict.outcome != PASS for verdict in report.verdicts)
    if not off:
        return f"PASS: {_tensors(total)} {'agrees' if total == 1 else 'agree'}"
    what = f"{off} of {_tensors(total)} {'does' if off == 1 else 'do'} not agree"
    first = next((v.first_divergence for v in report.verdicts if v.first_divergence), None)
    if first is None:
        leading = next(verdict for verdict in report.verdicts if verdict.outcome != PASS)
        reason = leading.reasons[0].splitlines()[0] if leading.reasons else ""
        name, reason = _one_line(leading.case_id), reason.partition(": ")[2]
        return f"{report.outcome}: {what}; first {name}: {reason}"
    rank = f", rank {first.rank}" if first.rank is not None else ""
    index = f", at {first.index}" if first.index else ""
    return f"{report.outcome}: {what}; first {_one_line(first.fqn)}{rank}{index}"


def subject_line(report: Report) -> str:
    """Name both captures and the degree."""
    degrees = sorted({verdict.tp_size for verdict in report.verdicts})
    return f"{report.subject}  tp {', '.join(map(str, degrees))} · recorded files, nothing was run"


def count_line(report: Report) -> str:
    """Count tensors by how well they agree: bit for bit, within their tolerance, not at all."""
    passing = [verdict for verdict in report.verdicts if verdict.outcome == PASS]
    loose = sum(bool(_facts(verdict).get("differing_bits")) for verdict in passing)
    off = len(report.verdicts) - len(passing)
    parts = {"bit for bit": len(passing) - loose, "within their tolerance": loose, "not": off}
    listed = ", ".join(f"{count} {name}" for name, count in parts.items() if count)
    return f"{_tensors(len(report.verdicts))}: {listed or 'none'}"


def notes(report: Report) -> list[tuple[str, str]]:
    """Return what a reader needs besides, as (name, text) pairs."""
    found = []
    needed = _needed(report.verdicts)
    if needed:
        found.append(("smallest", f"tolerance for all values, one of: {needed}"))
    chosen: dict[str, int] = {}
    for verdict in report.verdicts:
        tiling = verdict.checks.get("tiling")
        facts = tiling.facts if tiling else {}
        if str(facts.get("layout_source", "")).startswith("chosen"):
            text = f"{facts.get('layout')} {facts['layout_source']}"
            chosen[text] = chosen.get(text, 0) + 1
    found += [
        ("layout", f"{text} (in {counted(count, 'tensor')})") for text, count in chosen.items()
    ]
    stood_on = [f"{name} {report.environment.get(name)}" for name in ("torch", "python")]
    found.append(("ran on", " · ".join([*stood_on, f"tpcheck {report.tpcheck}"])))
    return found + [("note", text) for text in report.notes]


def jsonl_record(verdict: Verdict) -> dict[str, Any]:
    """Return one tensor's verdict as a flat object, for a line of `--jsonl`."""
    facts = _facts(verdict)
    tiling = verdict.checks.get("tiling")
    layout = facts.get("layout") or (tiling.facts.get("layout") if tiling else None)
    first = verdict.first_divergence
    return {
        "tensor": verdict.case_id,
        "outcome": verdict.outcome,
        "dtype": verdict.dtype,
        "tp_size": verdict.tp_size,
        "failed": [name for name, check in verdict.checks.items() if check.outcome == FAIL],
        "reasons": list(verdict.reasons),
        "layout": layout,
        "first_divergence": first is not None,
        "rank": first.rank if first is not None else facts.get("blamed_rank"),
        "region": first.index if first is not None else "",
        **{name: value for name, value in facts.items() if name not in _NOT_IN_A_LINE},
    }


def _findings(report: Report) -> list[Finding]:
    """Return what is not PASS in the order of comparison, with what to do next."""
    places = {id(verdict): i for i, verdict in enumerate(report.verdicts)}
    found = sorted(findings(report), key=lambda one: places[id(one.verdict)])
    return [
        replace(one, title=_one_line(one.title), facts=tuple(_fact_lines(one)), next=_next(one))
        for one in found
    ]


def _one_line(name: str) -> str:
    """A name comes from a file: it must not look like a line of the report."""
    return name.replace("\n", "\\n")


def _fact_lines(finding: Finding) -> Iterator[tuple[str, str]]:
    verdict = finding.verdict
    yield from (pair for pair in finding.facts if pair[0] == "first")
    tiling = verdict.checks.get("tiling")
    if tiling is not None and tiling.facts:
        yield "layout", f"{tiling.facts.get('layout')}, {tiling.facts.get('layout_source')}"
    if verdict.checks["allclose"].outcome == FAIL:
        needed = _needed([verdict])
        if needed:
            yield "smallest", f"tolerance that passes, one of: {needed}"


def _next(finding: Finding) -> str:
    verdict = finding.verdict
    failed = {name for name, check in verdict.checks.items() if check.outcome == FAIL}
    tiling = verdict.checks.get("tiling")
    chosen = bool(tiling) and str(tiling.facts.get("layout_source", "")).startswith("chosen")  # type: ignore[union-attr]
    if verdict.outcome == "ERROR":
        return "record it again, or leave it out: nothing in it was compared"
    if "capture" in failed:
        return "record the same tensors, in the same dtype, on both sides"
    if "tiling" in failed:
        return "say how the ranks' tensors make up the whole one with --shard-map"
    facts = _facts(verdict)
    if facts.get("detail"):
        return "look at what that rank does there: rounding does not look like this"
    if "rank_agreement" in failed:
        return "look at what makes ranks differ, or say partial-sum in --shard-map if they should"
    if chosen and "allclose" in failed and str(facts.get("layout")).startswith("Shard"):
        return "if parts are fused or ranks stand in another order there, say so with --shard-map"
    if facts.get("mask_mismatches"):
        return "look at where NaN or Inf comes from: no tolerance covers it"
    if facts.get("required_atol") is None:
        return "look at what makes them differ: whole numbers and bools know no tolerance"
    return "give --tolerance, --atol or --oracle if that is only rounding"


def _table(report: Report) -> str:
    kept = _rows(report, MAX_ROWS, width=_NAME_WIDTH)
    if not kept:
        return ""
    columns = [
        i
        for i, name in enumerate(COLUMNS)
        if name not in _ON_A_PAGE and any(row[i] for row in kept)
    ]
    table = tabulate(
        [[row[i] for i in columns] for row in kept],
        headers=[COLUMNS[i] for i in columns],
        tablefmt="simple",
        disable_numparse=True,
    )
    rest = len(report.verdicts) - len(kept)
    lines = [line.rstrip() for line in table.splitlines()]
    return "\n".join([*lines, *([f"... and {rest} more"] if rest else [])])


def _rows(report: Report, limit: int, *, width: int) -> list[tuple[str, ...]]:
    """Return a row per tensor in order; those that agree are the first to be left out."""
    shown: Sequence[Verdict] = report.verdicts
    if len(shown) > limit:
        off = [verdict for verdict in shown if verdict.outcome != PASS]
        shown = [*off, *(verdict for verdict in shown if verdict.outcome == PASS)][:limit]
    return [_row(verdict, width) for verdict in shown]


def _row(verdict: Verdict, width: int) -> tuple[str, ...]:
    facts, name = _facts(verdict), _one_line(printable(verdict.case_id))
    compared = "count" in facts
    ranks = facts.get("ranks") or ()
    first = verdict.first_divergence
    rank = first.rank if first is not None else facts.get("blamed_rank")
    return (
        name if len(name) <= width else f"...{name[3 - width :]}",
        str(facts.get("layout") or ""),
        verdict.dtype,
        verdict.outcome,
        f"{facts.get('mismatches', 0)} / {facts['count']}" if compared else "",
        "NaN/Inf" if facts.get("mask_mismatches") else number(facts.get("worst_error")),
        "" if facts.get("mask_mismatches") else number(facts.get("worst_ulp")),
        number(facts.get("relative_rms")),
        at_least(facts.get("required_atol")),
        ", ".join(map(str, ranks[:4])) or ("" if rank is None else str(rank)),
    )


def _needed(verdicts: Sequence[Verdict]) -> str:
    """Write the smallest tolerances, each alone, that let every value of these pass."""
    found: list[str] = []
    facts = [one for one in map(_facts, verdicts) if one.get("count")]
    if not facts or any(one.get("required_atol") is None for one in facts):
        return ""
    for key in _FACTS:
        values = [one.get(key) for one in facts]
        known = [value for value in values if isinstance(value, int | float)]
        if len(known) == len(values) and max(known) > 0:
            found.append(f"{_FACT_NAMES[key]}={at_least(float(max(known)))}")
    return ", ".join(found)


def _facts(verdict: Verdict) -> Mapping[str, Any]:
    check = verdict.checks.get("allclose")
    return check.facts if check is not None else {}


def _tensors(count: int) -> str:
    return f"{count} tensor{'' if count == 1 else 's'}"
