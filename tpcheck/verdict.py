"""judge(...) -> Verdict: the only place where an outcome is decided.

Requirement: the contract's table from check to verdict, and nothing else. Structural evidence says
WRONG, rounding says DRIFT, a derived tolerance never decides alone, nothing compared is
INCONCLUSIVE and never PASS.
"""

from __future__ import annotations

from collections.abc import Mapping

from tpcheck.comparison import scientific
from tpcheck.errors import IllegalDegreeError
from tpcheck.records import FAIL, OUTCOME_OF, PASS, SKIPPED, Check, FirstDivergence, Verdict, worst
from tpcheck.spec import Case
from tpcheck.trace import RankFailure


def judge(
    case: Case,
    tp_size: int,
    dtype: str,
    checks: Mapping[str, Check],
    *,
    repro: str,
    first_divergence: FirstDivergence | None = None,
    notes: tuple[str, ...] = (),
) -> Verdict:
    """Decide the outcome of one (case, degree, dtype) from its checks."""
    failed = [name for name, check in checks.items() if _decides(name, check)]
    outcome = worst([OUTCOME_OF[name] for name in failed]) if failed else "PASS"
    if not failed and not _compared(checks):
        outcome = "INCONCLUSIVE"
    reasons = tuple(f"{name}: {checks[name].reason}" for name in failed)
    if outcome == "INCONCLUSIVE" and not failed:
        reasons = tuple(
            f"{name}: {checks[name].reason}" for name in ("structural", "drift") if name in checks
        )
    if outcome == "DRIFT":
        reasons = (_drift_headline(checks, failed), *reasons)
    return Verdict(
        case_id=case.id,
        tp_size=tp_size,
        dtype=dtype,
        outcome=outcome,
        checks=checks,
        reasons=(*reasons, *notes),
        first_divergence=first_divergence,
        repro=repro,
    )


def judge_failure(
    case: Case, tp_size: int, dtype: str, failure: RankFailure, *, repro: str
) -> Verdict:
    """Decide what a job without a result means: a refused degree is ILLEGAL, the rest ERROR."""
    if isinstance(failure.exception, IllegalDegreeError):
        return refused(case, tp_size, dtype, str(failure.exception), repro=repro)
    lines = [failure.message]
    lines += [f"rank {rank} in flight: {text}" for rank, text in sorted(failure.in_flight.items())]
    if failure.traceback:
        lines.append(failure.traceback.rstrip())
    lines += [
        f"rank {rank} stack:\n{text.rstrip()}"
        for rank, text in sorted(failure.stacks.items())
        if text.rstrip() != failure.traceback.rstrip()  # the raised rank's, which stands above
    ]
    nothing = Check(SKIPPED, "the run did not finish")
    rank = {} if failure.rank is None else {"rank": failure.rank}
    stopped = Check(FAIL, failure.message, {"kind": failure.kind, **rank})
    checks = {"plan": Check(PASS), "structural": nothing, "drift": nothing, "schedule": stopped}
    return Verdict(case.id, tp_size, dtype, "ERROR", checks, tuple(lines), None, repro)


def refused(case: Case, tp_size: int, dtype: str, message: str, *, repro: str) -> Verdict:
    """Decide a degree that the plan or the subject refuses although it was asked for."""
    nothing = Check(SKIPPED, "the degree was refused before anything ran")
    checks = {"plan": Check(FAIL, message), "structural": nothing, "drift": nothing}
    return Verdict(case.id, tp_size, dtype, "ILLEGAL", checks, (f"plan: {message}",), None, repro)


def accepted_illegal(case: Case, tp_size: int, dtype: str, message: str, *, repro: str) -> Verdict:
    """Decide a generated illegal degree that the subject ran as if it were legal."""
    check = Check(FAIL, f"the subject accepted a degree that its plan refuses: {message}")
    return Verdict(
        case.id, tp_size, dtype, "WRONG", {"plan": check}, (f"plan: {check.reason}",), None, repro
    )


def refused_as_planned(
    case: Case, tp_size: int, dtype: str, message: str, *, repro: str
) -> Verdict:
    """Decide a generated illegal degree that was refused: that is what the plan check wants."""
    checks = {"plan": Check(PASS, "", {"refused": message})}
    return Verdict(case.id, tp_size, dtype, "PASS", checks, (), None, repro)


def _decides(name: str, check: Check) -> bool:
    if check.outcome != FAIL:
        return False
    return name != "allclose" or bool(check.facts.get("decides"))


def _compared(checks: Mapping[str, Check]) -> bool:
    return any(
        name in checks and checks[name].outcome != SKIPPED for name in ("structural", "drift")
    )


def _drift_headline(checks: Mapping[str, Check], failed: list[str]) -> str:
    """Say first what DRIFT means: the same function, and how the user's number relates to it."""
    proven = checks["structural"].outcome == PASS
    lead = "same function" if proven else "no structural difference was seen"
    if "drift" in failed and checks["drift"].facts.get("overflow"):
        return f"{lead}; overflows in the deployed dtype"
    if failed == ["bits"]:
        return f"{lead}; rounded otherwise than recorded"
    if "allclose" not in failed:
        return f"{lead}; rounded more than this reduction explains"
    facts = checks["allclose"].facts
    floor, needed = facts.get("tp1_error", 0.0), facts.get("tp1_required_atol", 0.0)
    atol, rtol = scientific(facts["atol"]), scientific(facts["rtol"])
    numbers = atol if atol == rtol else f"atol={atol}, rtol={rtol}"
    below = "is below this dtype's floor" if facts["atol"] < needed else "is exceeded"
    required = facts.get("required_atol")
    smallest = "none" if required is None else f"atol={scientific(required, up=True)}"
    return (
        f"{lead}; your tolerance {numbers} {below}"
        f" (TP=1 itself is {scientific(floor)} from float64); smallest that passes: {smallest}"
    )
