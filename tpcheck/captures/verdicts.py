"""Findings about one tensor as a verdict of a report, in the words that users read.

Requirement: one place decides what a finding comes to. A capture holds no case to judge, so the
table is that of the contract for what can be seen in files:

| check | asks | when it fails |
|---|---|---|
| capture | recorded on both sides, in files that can be read, in one shape and dtype? | WRONG; a file that cannot be read ERROR |
| tiling | do the ranks' pieces make up the logical tensor? | WRONG; a tie INCONCLUSIVE |
| rank_agreement | do copies have equal bits? | WRONG |
| allclose | within the tolerance? | DRIFT; NaN or Inf elsewhere, or integers that differ, WRONG |
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpcheck.captures.measuring import Measure
from tpcheck.captures.tolerances import Limit
from tpcheck.records import FAIL, PASS, SKIPPED, Check, FirstDivergence, Verdict, worst

NOTHING = "no element was compared"


def verdict(
    name: str,
    tp_size: int,
    dtype: str,
    checks: Mapping[str, Check],
    *,
    outcomes: Mapping[str, str],
    repro: str,
    first: FirstDivergence | None = None,
) -> Verdict:
    """Return the verdict of one tensor; `outcomes` says what each failed check comes to."""
    failed = [check for check, found in checks.items() if found.outcome == FAIL]
    outcome = worst([outcomes.get(check, "WRONG") for check in failed]) if failed else PASS
    reasons = tuple(f"{check}: {checks[check].reason}" for check in failed)
    return Verdict(name, tp_size, dtype, outcome, checks, reasons, first, repro if failed else "")


def problem_verdict(
    name: str, tp_size: int, reason: str, *, repro: str, dtype: str = "", outcome: str = "ERROR"
) -> Verdict:
    """Return the verdict of a tensor, or a file, of which nothing can be compared."""
    checks = {"capture": Check(FAIL, reason), "allclose": Check(SKIPPED, NOTHING)}
    return verdict(name, tp_size, dtype, checks, outcomes={"capture": outcome}, repro=repro)


def allclose_check(
    measure: Measure,
    limit: Limit,
    *,
    integers: bool,
    relative_rms: float,
    blame: str,
    facts: Mapping[str, Any],
) -> Check:
    """Return whether a tensor is within its limit, with every number a reader may want.

    Args:
        measure: of the whole tensor.
        limit: what it was held to.
        integers: its numbers were never rounded, and no tolerance speaks of them.
        relative_rms: of the whole, or of the worst copy.
        blame: which ranks, in words.
        facts: more of them.
    """
    found = measure.comparison
    hopeless = found.mask_mismatches or (integers and found.mismatches)  # whatever is tolerated
    numbers = {
        "atol": limit.atol or 0.0,
        "rtol": limit.rtol or 0.0,
        "required_atol": None if hopeless else found.required_atol,
        "required_rtol": None if hopeless else measure.required_rtol,
        "required_ulp": None if hopeless else measure.max_ulp,
        "relative_rms": relative_rms,
        "limit": limit.text,
        "source": limit.source,
        "decides": True,
        "count": measure.elements,
        "finite": found.count,
        "mismatches": found.mismatches,
        "differing_bits": measure.differing,
        "mask_mismatches": found.mask_mismatches,
        "worst_error": found.worst_error,
        "worst_ulp": found.worst_ulp,
        "index": list(found.index),
        "actual": _json_number(found.worst_actual),
        "expected": _json_number(found.worst_expected),
        **facts,
    }
    too_far = limit.relative_rms is not None and relative_rms > limit.relative_rms
    if not found.mismatches and not too_far:
        return Check(PASS, "", numbers)
    return Check(FAIL, _reason(measure, limit, integers, relative_rms, blame), numbers)


def _reason(measure: Measure, limit: Limit, integers: bool, relative_rms: float, blame: str) -> str:
    found = measure.comparison
    if not found.mismatches:
        assert limit.relative_rms is not None
        return (
            f"relative rms={relative_rms:.3g}, but should be at most {limit.relative_rms:g}"
            f" ({limit.source}){blame}"
        )
    if found.mask_mismatches:
        what = f"are off, {found.mask_mismatches} of them NaN or Inf on one side only"
    elif limit.bits:
        what = "differ" if integers else "have other bits"
    else:
        what = f"are off by more than {limit.text}"
    source = "" if integers else f" ({limit.source})"
    lines = [f"{found.mismatches} of {measure.elements} elements {what}{source}{blame}"]
    actual, expected = _shown(found.worst_actual), _shown(found.worst_expected)
    at = f"worst at {list(found.index)}: actual={actual}, but should be {expected}"
    if found.worst_error == 0 and not found.mask_mismatches and not integers:
        at += " (the sign of zero, or a NaN's bits)"
    elif found.worst_error and not integers:
        at += f", {found.worst_ulp:.4g} ulp"
    lines.append(at)
    return "\n".join(lines)


def _shown(value: float) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _json_number(value: float) -> float | str:
    """A NaN or Inf that was recorded is a value, not a number that got lost."""
    return value if value == value and abs(value) != float("inf") else str(value)
