"""What a policy asks of every degree and dtype: cases, outcomes, checks, numbers.

Requirement: each (degree, dtype) stands for itself. Every verdict of it has to be let through, not
only as many as `min_cases` asks for: one case that fails is not outvoted by those that pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tpcheck.deployment_gate.case_ids import case_of
from tpcheck.deployment_gate.commands import Commands
from tpcheck.deployment_gate.flips import lack_of_flips
from tpcheck.deployment_gate.numbers import Lack, lack_of_size
from tpcheck.deployment_gate.policy import Policy
from tpcheck.deployment_gate.requirement import Requirement, counted
from tpcheck.records import FAIL, PASS, SKIPPED, Check, Report, Verdict

Problem = Callable[[Verdict], Lack | None]
"""Says what a verdict lacks; None where it lacks nothing."""

MAX_REASON = 300
"""Characters of a check's own reason that a refusal repeats."""


@dataclass(frozen=True, slots=True)
class _Question:
    """One thing asked of every verdict. `verb`: the command that shows what came of one."""

    key: str
    asked: str
    problem: Problem
    verb: str = "run"


def cell_requirements(report: Report, policy: Policy, commands: Commands) -> Iterator[Requirement]:
    """Yield what is asked of every degree and dtype on the report's backend."""
    backend = report.path.backend
    if backend not in policy.backends:
        return
    for dtype in policy.dtypes:
        for tp_size in policy.tp:
            here = [
                one
                for one in report.verdicts
                if (one.tp_size, one.dtype) == (tp_size, dtype) and not is_refusal_as_planned(one)
            ]
            where = f"tp={tp_size} {dtype} on {backend}"
            yield _cases(here, where, policy, commands)
            if any(_other_backend(backend)(one) for one in here):
                asked = _Question("backends", f"evidence from {backend}", _other_backend(backend))
                yield _answered(asked, here, where, commands)
            for question in _questions(policy) if here else ():
                yield _answered(question, here, where, commands)


def _other_backend(backend: str) -> Problem:
    def problem(verdict: Verdict) -> Lack | None:
        carried = verdict.checks.get("plan", Check(PASS)).facts.get("backend", backend)
        if carried == backend:
            return None
        return Lack(
            f"its verdict is of {carried}, and evidence counts for one backend only: run it there"
        )

    return problem


def is_refusal_as_planned(verdict: Verdict) -> bool:
    """Say whether a generated case was refused where its plan says so: it then proves nothing."""
    plan = verdict.checks.get("plan", Check(PASS))
    only = set(verdict.checks) == {"plan"} and isinstance(plan.facts.get("refused"), str)
    return only and "+{" in verdict.case_id and (verdict.outcome, plan.outcome) == (PASS, PASS)


def _cases(here: Sequence[Verdict], where: str, policy: Policy, commands: Commands) -> Requirement:
    found = _case_count(here)
    wanted = policy.min_cases
    met = found >= wanted
    return Requirement(
        key="tp" if not found else "min_cases",
        where=where,
        asked=counted(wanted, "case"),
        found=counted(found, "case"),
        met=met,
        reason=""
        if met
        else f"{where}: {counted(found, 'case')}, but should be at least {wanted}"
        if found
        else f"{where}: not proven: the report has no verdict there",
        settle="" if met else commands.everything(),
    )


def _case_count(verdicts: Sequence[Verdict]) -> int:
    return len({case_of(verdict.case_id) for verdict in verdicts})


def _questions(policy: Policy) -> Iterator[_Question]:
    through = " or ".join((PASS, *policy.allow))
    yield _Question("allow", f"outcome {through}", _outcome_problem(policy))
    for name in policy.require:
        yield _Question("require", f"check {name} PASS", _check_problem(name, policy))
    for key, check, fact in (
        ("max_drift_ratio", "drift", "ratio"),
        ("max_epsilons", "drift", "epsilons"),
        ("max_required_atol", "allclose", "required_atol"),
    ):
        limit: float | None = getattr(policy, key)
        if limit is not None:
            asked = f"{check}.{fact} at most {limit:g}"
            yield _Question(key, asked, _number_problem(check, fact, limit), "drift")
    if policy.max_required_atol is not None:
        # a relative part would carry what the absolute limit forbids
        yield _Question("max_required_atol", "allclose held with rtol=0", _lack_of_rtol)
    margin = policy.max_argmax_flip_margin
    if margin is not None:
        asked = f"no argmax flip at a margin above {margin:g}"
        yield _Question(
            "max_argmax_flip_margin", asked, lambda one: lack_of_flips(one, margin), "drift"
        )


def _answered(
    question: _Question, here: Sequence[Verdict], where: str, commands: Commands
) -> Requirement:
    lacking = [(one, lack) for one in here if (lack := question.problem(one)) is not None]
    if not lacking:
        found = f"so in {counted(_case_count(here), 'case')}"
        return Requirement(question.key, question.asked, found, met=True, where=where)
    first, lack = lacking[0]
    more = f" (and in {counted(len(lacking) - 1, 'more case')})" if len(lacking) > 1 else ""
    return Requirement(
        key=question.key,
        where=where,
        asked=question.asked,
        found=lack.text,
        met=False,
        reason=f"{where}, case {first.case_id}: {lack.text}{more}",
        # what is missing needs a new report; what is there and bad, a look at that one case
        settle=commands.everything() if lack.missing else commands.case(first, question.verb),
    )


def _outcome_problem(policy: Policy) -> Problem:
    def problem(verdict: Verdict) -> Lack | None:
        if verdict.outcome in (PASS, *policy.allow):
            return None
        reason = f": {_line(verdict.reasons[0])}" if verdict.reasons else ""
        return Lack(f"outcome is {verdict.outcome}{reason}")

    return problem


def _check_problem(name: str, policy: Policy) -> Problem:
    def problem(verdict: Verdict) -> Lack | None:
        check = verdict.checks.get(name)
        if check is None:
            return Lack(f"the required check {name} is missing", missing=True)
        if check.outcome == PASS:
            return None
        text = f"the required check {name} is {check.outcome}: {_line(check.reason)}"
        if verdict.outcome in policy.allow and check.outcome == FAIL:
            text += f" (`allow` lets {verdict.outcome} through, but `require` names {name})"
        return Lack(text)

    return problem


def _number_problem(name: str, fact: str, limit: float) -> Problem:
    def problem(verdict: Verdict) -> Lack | None:
        check = verdict.checks.get(name, Check(PASS))
        if check.outcome == SKIPPED:
            return Lack(f"{name}.{fact} is not known: {name} is SKIPPED: {_line(check.reason)}")
        return lack_of_size(check.facts, fact, where=name, limit=limit)

    return problem


def _lack_of_rtol(verdict: Verdict) -> Lack | None:
    facts = verdict.checks.get("allclose", Check(PASS)).facts
    found = lack_of_size(facts, "rtol", where="allclose", limit=0)
    return None if found is None else Lack(found.text, missing=True)


def _line(text: str) -> str:
    first = " ".join(text.split("\n", 1)[0].split())
    return first if len(first) <= MAX_REASON else first[: MAX_REASON - 3] + "..."
