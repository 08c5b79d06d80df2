"""One case at one degree: run it, judge it, and hold what only simulation saw against real ranks.

Requirement: a rank that raises, dies or hangs costs its own case; a refusal is judged by the plan,
where there is one; and a failure seen only in simulation counts when real processes show it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tpcheck.errors import BackendError, IllegalDegreeError, PlanError, SubjectError
from tpcheck.groups.jobs import JobFailed, Ranks
from tpcheck.groups.opening import open_ranks
from tpcheck.investigation import Findings, Investigation, Settings
from tpcheck.records import PASS, Check, Verdict
from tpcheck.run_plan import RunPlan, repro_line
from tpcheck.shard_plan import make_shard_plan
from tpcheck.spec import Case
from tpcheck.subjects import Subject, with_spec
from tpcheck.verdict import accepted_illegal, judge, judge_failure, refused, refused_as_planned

CONFIRM_UP_TO = 16
"""Largest degree whose simulated failure is confirmed on real ranks: more processes than that
cost minutes on a laptop."""


@dataclass(slots=True)
class Seen:
    """What runs left behind besides verdicts."""

    facts: dict[str, Any] = field(default_factory=dict)
    collectives: dict[str, int] = field(default_factory=dict)
    label: str = ""
    confirmed: int = 0


class Investigating(Protocol):
    """What finds out what a degree comes to."""

    def findings(self, tp_size: int) -> Findings:
        """Return every check at one degree."""
        ...


class CaseJudge:
    """Judges one case in one deployed dtype, at any number of degrees."""

    def __init__(
        self, plan: RunPlan, ranks: Ranks, case: Case, dtype: str, seen: Seen, settings: Settings
    ) -> None:
        self._plan = plan
        self._ranks = ranks
        self._case = case
        self.dtype = dtype
        self._seen = seen
        self._settings = settings
        self._subject = subject_of(plan, case)
        self._investigation = Investigation(ranks, plan.ref, self._subject, case, dtype, settings)
        self._findings_of: Investigating = self._investigation

    def judged_by(self, wrapped: Callable[[Investigation], Investigating]) -> CaseJudge:
        """Judge by the findings of what is made of this judge's investigation."""
        self._findings_of = wrapped(self._investigation)
        return self

    def verdict(self, tp_size: int) -> Verdict:
        """Return the verdict at one degree, from these ranks alone.

        Raises:
            TPCheckError: the subject breaks its own declaration: a usage error, not a verdict.
        """
        case, dtype = self._case, self.dtype
        repro = repro_line(self._plan, case, tp_size, dtype)
        illegal = _refusal(self._subject, tp_size)
        if illegal is not None and case.spec is None:
            return refused(case, tp_size, dtype, str(illegal), repro=repro)
        try:
            found = self._findings_of.findings(tp_size)
        except JobFailed as error:
            failure = error.failure
            if isinstance(failure.exception, (SubjectError, BackendError, PlanError)):
                raise failure.exception from None
            if illegal is not None and isinstance(failure.exception, IllegalDegreeError):
                return refused_as_planned(case, tp_size, dtype, str(illegal), repro=repro)
            if isinstance(failure.exception, IllegalDegreeError):
                refusal = self._with_accepted(failure.exception, tp_size)
                failure = replace(failure, exception=refusal)
            return judge_failure(case, tp_size, dtype, failure, repro=repro)
        if illegal is not None:
            return accepted_illegal(case, tp_size, dtype, str(illegal), repro=repro)
        self._remember(found)
        return judge(
            case,
            tp_size,
            dtype,
            found.checks,
            repro=repro,
            first_divergence=found.first_divergence,
            notes=found.notes,
        )

    def _with_accepted(self, refusal: IllegalDegreeError, tp_size: int) -> IllegalDegreeError:
        """Return a subject's refusal with the degrees that it takes."""
        if refusal.legal_tp_sizes:  # a plan's message, which names them
            return refusal
        legal = self._investigation.runs.accepted(tp_size)
        sizes = ", ".join(map(str, legal)) or "none was found"
        message = f"{refusal}\n  tp_size at which it builds: {sizes}"
        return IllegalDegreeError(message, legal_tp_sizes=legal)

    def confirmed(self, tp_size: int) -> Verdict:
        """Return the verdict at one degree; a simulated failure is held against real ranks."""
        verdict = self.verdict(tp_size)
        simulated = self._ranks.label == "sim" and self._settings.confirm
        if not simulated or verdict.outcome not in ("WRONG", "ERROR"):
            return verdict
        return self.against_real_ranks(verdict)

    def against_real_ranks(self, simulated: Verdict) -> Verdict:
        """Return a simulated verdict as real ranks confirm or correct it."""
        tp_size = simulated.tp_size
        if tp_size > CONFIRM_UP_TO or tp_size == 1:
            note = f"simulated only: tp={tp_size} was not confirmed on real ranks"
            return replace(simulated, reasons=(*simulated.reasons, note))
        settings = replace(self._settings, tp_sizes=(tp_size,))
        with open_ranks("gloo", self._real_world, None) as ranks:
            judge = CaseJudge(self._plan, ranks, self._case, self.dtype, Seen(), settings)
            real = judge.verdict(tp_size)
        self._seen.confirmed += 1
        if real.outcome == simulated.outcome:
            if real.outcome == PASS:
                return simulated
            return replace(simulated, reasons=(*simulated.reasons, "confirmed on gloo"))
        note = (
            f"{simulated.outcome} in simulation but {real.outcome} on gloo: the subject shares"
            " process state between ranks, so use --backend gloo"
        )
        if simulated.outcome == PASS:
            note = (
                f"PASS in simulation but {real.outcome} on gloo: real processes show what"
                " simulated ranks cannot"
            )
        # the report is of simulated ranks, and evidence from one backend never counts for another
        plan = real.checks.get("plan", Check(PASS))
        plan = replace(plan, facts={**plan.facts, "backend": "gloo"})
        return replace(real, checks={**real.checks, "plan": plan}, reasons=(*real.reasons, note))

    @property
    def _real_world(self) -> int:
        """The largest asked degree that is confirmed: one warm pool then serves all of them."""
        return max(size for size in (2, *self._plan.tp_sizes) if size <= CONFIRM_UP_TO)

    def _remember(self, found: Findings) -> None:
        self._seen.facts |= found.facts
        self._seen.collectives |= found.collectives


def subject_of(plan: RunPlan, case: Case) -> Subject:
    """Return the subject with the spec this case generates, for one that takes specs."""
    return plan.subject if case.spec is None else with_spec(plan.subject, case.spec)


def _refusal(subject: Subject, tp_size: int) -> IllegalDegreeError | None:
    if subject.options.spec is None:
        return None
    try:
        make_shard_plan(subject.options.spec, tp_size)
    except IllegalDegreeError as error:
        return error
    return None
