"""What every rendering of a report says, in its order; the other files decide only how it looks.

Requirement: text, HTML, Markdown and JUnit never disagree. The verdict comes first, then one row
per verdict, then each failing verdict with its reasons in execution order, its numbers, the first
divergence, one command that repeats it and one thing to do. Numbers a check did not give are blank,
never zero. Pure functions of a Report.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpcheck.records import (
    BEFORE_IT,
    CHECK_NAMES,
    FAIL,
    OUTCOMES,
    PASS,
    SKIPPED,
    Check,
    Report,
    Verdict,
)

COLUMNS = (
    "case",
    "tp",
    "dtype",
    "outcome",
    "structural\n/ limit",
    "drift\n(expected) / limit",
    "atol\nneeded",
    "failed",
)
MAX_ROWS = 24
MAX_SHOWN = 3
"""Long lists: three and a count."""

MEANING = {
    "WRONG": "WRONG: not the same function",
    "ERROR": "ERROR: the ranks did not run the same program to its end",
    "DRIFT": "DRIFT: same function, rounded more than expected or allowed",
    "ILLEGAL": "ILLEGAL: a degree that was asked for is refused",
    "INCONCLUSIVE": "INCONCLUSIVE: nothing was compared that could decide",
    "PASS": "PASS",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One failing verdict, ready to be laid out. `facts` are (name, text) pairs to be aligned."""

    verdict: Verdict
    title: str
    reasons: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    repro: str
    next: str


def number(value: Any) -> str:
    """Write a number with as many digits as a reader can use; blank for None.

    Example:
        >>> number(0.24), number(1e-12), number(31.0), number(None)
        ('0.24', '1e-12', '31', '')
    """
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def at_least(value: Any) -> str:
    """Write a bound so that who types it back is not below it: rounded up to three digits.

    Example:
        >>> at_least(0.06121), at_least(0.61), at_least(None)
        ('0.0615', '0.61', '')
    """
    text = number(value)
    rounded_down = isinstance(value, float) and float(text) < value
    return number(value * 1.005) if rounded_down else text


def counted(count: int, what: str) -> str:
    """Write a number of things.

    Example:
        >>> counted(1, "verdict"), counted(2, "verdict")
        ('1 verdict', '2 verdicts')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


def headline(report: Report) -> str:
    """Say the outcome in one sentence, and what it does not speak for."""
    text = MEANING[report.outcome]
    if report.outcome == "DRIFT":
        # judge says first what it means here: how a user's tolerance relates to the dtype's floor
        first = next(verdict for verdict in report.verdicts if verdict.outcome == "DRIFT")
        text = f"DRIFT: {first.reasons[0].splitlines()[0]}" if first.reasons else text
    if report.path.same_as_deployed or not report.verdicts:
        return text
    scope = f" ({_scope(report)})" if report.outcome == PASS else ""
    # "backend gloo, not nccl" -> "nccl": the headline names what was not run
    missing = [re.sub(r"^.*, not ", "", text) for text in report.path.differences]
    named = f": {_listed(missing)}" if missing else ""
    return f"{text}{scope}; deployed path not exercised{named}"


def _scope(report: Report) -> str:
    """Say what a pass rests on: rounding alone, where no verdict has compared the structure."""
    found = [v.checks["structural"].outcome for v in report.verdicts if "structural" in v.checks]
    return "drift only" if found and set(found) == {SKIPPED} else "structure"


def subject_line(report: Report) -> str:
    """Name what was run: `models.py:build  tp 2, 4, 8 · bfloat16 · gloo`."""
    degrees = sorted({verdict.tp_size for verdict in report.verdicts})
    dtypes = dict.fromkeys(verdict.dtype for verdict in report.verdicts)
    parts = [f"tp {', '.join(map(str, degrees))}", ", ".join(dtypes), report.path.backend]
    return f"{report.subject}  {' · '.join(parts if report.verdicts else parts[2:])}"


def count_line(report: Report) -> str:
    """Count the verdicts by outcome, worst first: `3 verdicts: 1 WRONG, 2 PASS`."""
    counts = Counter(verdict.outcome for verdict in report.verdicts)
    by_outcome = ", ".join(f"{counts[name]} {name}" for name in OUTCOMES if counts[name])
    total = len(report.verdicts)
    return f"{counted(total, 'verdict')}{': ' if total else ''}{by_outcome}"


def sensitivity_line(report: Report) -> str:
    """Say what a PASS would have caught: `would have caught 41/42; blind to: layers.1.mlp.bias`.

    Nothing where it was not measured, or where there is no PASS to weigh.
    """
    facts = report.sensitivity
    if facts is None or report.outcome != PASS:
        return ""
    text = f"would have caught {facts.get('caught')}/{facts.get('planted')}"
    blind = [str(name) for name in facts.get("blind_to") or ()]
    return f"{text}; blind to: {_listed(blind)}" if blind else text


def rows(report: Report) -> list[tuple[str, ...]]:
    """Return one row of COLUMNS per verdict.

    When there are more than MAX_ROWS, the worst come first, and those that pass share one row per
    degree and dtype, which shows the largest of each of their numbers.
    """
    groups: dict[tuple[Any, ...], list[Verdict]] = {}
    fold = len(report.verdicts) > MAX_ROWS
    for verdict in worst_first(report.verdicts) if fold else report.verdicts:
        folded = fold and verdict.outcome == PASS
        case = "" if folded else verdict.case_id
        groups.setdefault((case, verdict.tp_size, verdict.dtype), []).append(verdict)
    return [_row(group) for group in groups.values()]


def findings(report: Report) -> list[Finding]:
    """Return every verdict that is not PASS, the worst outcome first, else in execution order."""
    return [
        _finding(verdict) for verdict in worst_first(report.verdicts) if verdict.outcome != PASS
    ]


def worst_first(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts by outcome, the worst first, else in execution order."""
    return sorted(verdicts, key=lambda verdict: OUTCOMES.index(verdict.outcome))


def footnotes(report: Report) -> list[tuple[str, str]]:
    """Return what a reader needs to weigh the verdicts, as (name, text) pairs."""
    notes = [("remark", text) for text in _remarks(report.verdicts)]
    notes += [("skipped", text) for text in _skipped(report.verdicts)]
    calls = ", ".join(f"{count} {op}" for op, count in report.path.collectives.items())
    others = Counter(_carried_by(verdict, report) for verdict in report.verdicts)
    del others[report.path.backend]
    by = [f"{counted(count, 'verdict')} by {name}" for name, count in others.items()]
    carried = " · ".join(filter(None, [report.path.backend, calls, *by]))
    if carried:
        notes.append(("path", carried))
    if report.path.differences and not report.path.same_as_deployed:
        notes.append(("not deployed", "; ".join(report.path.differences)))
    notes += [("quantization", text) for text in _quantization(report.verdicts)]
    if report.sensitivity is not None:
        notes.append(("sensitivity", _sensitivity(report.sensitivity)))
    stood_on = {name: report.environment.get(name) for name in ("torch", "python", "device")}
    around = [f"{name} {value}" for name, value in stood_on.items() if value]
    notes.append(("ran on", " · ".join([*around, f"tpcheck {report.tpcheck}"])))
    return notes + [("note", text) for text in report.notes]


def _carried_by(verdict: Verdict, report: Report) -> str:
    plan = verdict.checks.get("plan")
    return str(plan.facts.get("backend", report.path.backend) if plan else report.path.backend)


def shortened(items: Sequence[str], what: str, limit: int = MAX_SHOWN) -> list[str]:
    """Return the first items and a line that counts the rest."""
    rest = len(items) - limit
    more = [f"... and {rest} more {what}{'' if rest == 1 else 's'}"] if rest > 0 else []
    return [*items[:limit], *more]


def split_reasons(finding: Finding) -> tuple[list[str], list[str]]:
    """Return what checks say, and the remarks that follow: those are never cut off."""
    reasons = finding.reasons
    of_checks = [i for i, text in enumerate(reasons) if text.partition(":")[0] in CHECK_NAMES]
    last = max(of_checks, default=len(reasons) - 1) + 1
    return list(reasons[:last]), list(reasons[last:])


def _row(group: list[Verdict]) -> tuple[str, ...]:
    first = group[0]
    failed = [name for name, check in first.checks.items() if _decides(name, check)]
    structural = _largest(group, "structural", "relative_rms")
    drift = _largest(group, "drift", "ratio")
    atol = _largest(group, "allclose", "required_atol")
    return (
        first.case_id if len(group) == 1 else f"{len(group)} cases",
        str(first.tp_size),
        first.dtype,
        first.outcome,
        _against(structural, "relative_rms", "limit"),
        _against(drift, "ratio", "limit", "expected"),
        at_least(atol.facts.get("required_atol")) if atol else "",
        ", ".join(failed[:2]) + (f" +{len(failed) - 2}" if len(failed) > 2 else ""),
    )


def _decides(name: str, check: Check) -> bool:
    # an allclose at the derived tolerance decides nothing: its number alone is shown
    return check.outcome == FAIL and (name != "allclose" or bool(check.facts.get("decides")))


def _largest(group: list[Verdict], name: str, key: str) -> Check | None:
    checks = [verdict.checks[name] for verdict in group if name in verdict.checks]
    return max(checks, key=lambda check: _size(check.facts.get(key)), default=None)


def _size(value: Any) -> float:
    return value if isinstance(value, int | float) else -1.0


def _against(check: Check | None, key: str, limit: str, expected: str = "") -> str:
    """Write `1.2e-15 / 1e-12`, or with what was expected `31 (1.8) / 3`."""
    if check is None:
        return ""
    if key not in check.facts:
        return {SKIPPED: "skipped", FAIL: "failed"}.get(check.outcome, "")
    value = number(check.facts[key]) or "not finite"
    wanted = f" ({number(check.facts[expected])})" if expected in check.facts else ""
    bound = f" / {number(check.facts[limit])}" if limit in check.facts else ""
    return f"{value}{wanted}{bound}"


def _finding(verdict: Verdict) -> Finding:
    failed = {name: check for name, check in verdict.checks.items() if check.outcome == FAIL}
    reasons = verdict.reasons or tuple(
        f"{name}: {check.reason}" for name, check in verdict.checks.items() if check.reason
    )
    facts = [(name, _fact_line(name, check)) for name, check in failed.items() if check.facts]
    if verdict.first_divergence is not None:
        facts.insert(0, ("first", _divergence(verdict)))
    return Finding(
        verdict=verdict,
        title=f"{verdict.outcome}  {verdict.case_id} tp={verdict.tp_size} {verdict.dtype}",
        reasons=reasons,
        facts=tuple((name, text) for name, text in facts if text)[:6],
        repro=verdict.repro,
        next=_next(verdict, failed),
    )


def _fact_line(name: str, check: Check) -> str:
    shown = [
        f"{fact.replace('_', ' ')} {_written(fact, check.facts[fact])}"
        for fact in _FACTS.get(name, check.facts)
        if _is_plain(check.facts.get(fact, ()))
    ]
    dtype = f" in {check.facts['dtype']}" if check.facts.get("dtype") else ""
    source = check.facts.get("source") or check.facts.get("expected_source")
    return f"{', '.join(shown)}{dtype}{f' ({source})' if source else ''}"


def _written(fact: str, value: Any) -> str:
    return (at_least(value) if fact == "required_atol" else number(value)) or "not finite"


_FACTS = {
    "structural": ("relative_rms", "limit"),
    "drift": ("ratio", "expected", "limit", "epsilons"),
    "allclose": ("required_atol", "atol", "rtol"),
}
"""The numbers a reader weighs, in this order; the rest of a check's facts is in the JSON."""


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _divergence(verdict: Verdict) -> str:
    first = verdict.first_divergence
    assert first is not None
    parts = [first.fqn]
    parts += [f"rank {first.rank}"] if first.rank is not None else []
    parts += [f"at {first.index}"] if first.index else []
    parts += [f"{number(first.ulp)} ulp"] if first.ulp is not None else []
    parts += [first.detail] if first.detail else []
    return ", ".join(parts)


def _next(verdict: Verdict, failed: dict[str, Check]) -> str:
    first = verdict.first_divergence
    if verdict.outcome == "DRIFT" and "drift" not in failed and "allclose" in failed:
        needed = failed["allclose"].facts.get("required_atol")
        ask = f"allow --atol {at_least(needed)}, or " if needed is not None else ""
        return f"{ask}leave --atol and --rtol out: a derived tolerance never decides"
    if verdict.outcome in ("WRONG", "DRIFT") and first is not None:
        if BEFORE_IT in first.detail:
            return f"look at what gives {first.fqn} its input"
        where = f" on rank {first.rank}" if first.rank is not None else ""
        return f"compare {first.fqn}{where} with what TP=1 does there"
    if verdict.outcome == "INCONCLUSIVE" and "record" in failed:
        return "put back what was recorded; or, if the change is meant, record it and review that"
    return {
        "WRONG": f"look at what the subject does differently at tp={verdict.tp_size}",
        "DRIFT": "look for a reduction or a cast in a narrower dtype than the deployed one",
        "ERROR": "read the first reason: it names the rank, and what the others waited for",
        "ILLEGAL": f"leave {verdict.tp_size} out of --tp, or change the model's sizes",
        "INCONCLUSIVE": "read why the checks were skipped; without one of them nothing is proven",
    }[verdict.outcome]


def _remarks(verdicts: Iterable[Verdict]) -> list[str]:
    """Return what stands beside a PASS: those that are none say it among their reasons."""
    passing = [verdict for verdict in verdicts if verdict.outcome == PASS]
    counts = Counter(reason.partition("\n")[0] for verdict in passing for reason in verdict.reasons)
    return [f"{text} (in {counted(count, 'verdict')})" for text, count in counts.items()]


def _skipped(verdicts: Iterable[Verdict]) -> list[str]:
    counts: Counter[str] = Counter()
    for verdict in verdicts:
        for name, check in verdict.checks.items():
            if check.outcome == SKIPPED:
                counts[f"{name}: {check.reason.splitlines()[0]}"] += 1
    return [f"{text} (in {counted(count, 'verdict')})" for text, count in counts.items()]


def _quantization(verdicts: Iterable[Verdict]) -> list[str]:
    """Say how far quantization alone moved the logits, apart from what the ranks did."""
    checks = [verdict.checks["drift"] for verdict in verdicts if "drift" in verdict.checks]
    errors = [check.facts.get("quantization_error") for check in checks]
    known = sorted(error for error in errors if error is not None)
    if not known:
        return []
    span = " to ".join(dict.fromkeys((number(known[0]), number(known[-1]))))
    return [
        f"moved TP=1's logits by {span} of their size (unquantized against quantized, in float64):"
        " information; every verdict is against TP=1 quantized"
    ]


def _sensitivity(facts: Mapping[str, Any]) -> str:
    where = f" at tp={facts['tp_size']}" if "tp_size" in facts else ""
    parts = [f"caught {facts.get('caught')} of {facts.get('planted')} faults planted{where}"]
    scale = facts.get("smallest_scale_bug")
    parts += [f"one partial of a sum scaled by 1+{scale} is still caught"] if scale else []
    more = {"without_effect": "changed nothing", "left_out": "more could be planted"}
    parts += [f"{facts[key]} {text}" for key, text in more.items() if facts.get(key)]
    return "; ".join(parts)


def _listed(items: Sequence[str]) -> str:
    """Join items, three and a count."""
    rest = len(items) - MAX_SHOWN
    return ", ".join(items[:MAX_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
