"""decide(report, policy, now) -> Decision: every requirement of a policy, met or not, and why.

Requirement: what is not proven refuses: missing, skipped, inconclusive, older, of another degree,
dtype, backend or path. Each refusal is one sentence that names the value, and the command that
would settle it. A pure function: it reads no file and no clock, and it recomputes no outcome; it
asks only whether the report says, without contradicting itself, what the policy wants to hear.

[Other Degrees] What a policy does not ask for does not decide: 2 ranks are proven by 2 ranks, and a
degree that is illegal, broken or drifting elsewhere is shown as a note. WRONG is the exception: a
report that shows the subject to be another function at any degree refuses all of it. That is the
safe side, because one bug is seldom a matter of one degree; who knows better makes a report of the
asked degrees alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from tpcheck.deployment_gate.cells import cell_requirements, is_refusal_as_planned
from tpcheck.deployment_gate.commands import Commands
from tpcheck.deployment_gate.consistency import contradictions
from tpcheck.deployment_gate.policy import Policy, policy_digest
from tpcheck.deployment_gate.requirement import Refusal, Requirement, one_line
from tpcheck.deployment_gate.surroundings import surroundings_requirements
from tpcheck.records import PASS, Report, Verdict


@dataclass(frozen=True, slots=True)
class Decision:
    """What came of holding a report against a policy.

    `requirements` are all that were looked at, in order; `notes` what decided nothing and should be
    known. `decided` is the moment, as given; `policy` the digest of what was asked.
    """

    subject: str
    requirements: tuple[Requirement, ...]
    notes: tuple[str, ...]
    policy: str
    decided: datetime

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Every reason to refuse, each once, in order."""
        found = [Refusal(one.reason, one.settle) for one in self.requirements if not one.met]
        return tuple(dict.fromkeys(found))

    @property
    def allowed(self) -> bool:
        """Whether everything asked for was looked at and is met."""
        return bool(self.requirements) and all(one.met for one in self.requirements)


def decide(
    report: Report, policy: Policy, now: datetime, *, report_path: str = "REPORT.json"
) -> Decision:
    """Hold a report against a policy.

    Args:
        report: as `read_report` returns it.
        policy: what has to be proven.
        now: the moment of the decision, with its time zone.
        report_path: where the commands that settle a refusal write their report.

    Raises:
        ValueError: `now` has no time zone.
    """
    if now.tzinfo is None:
        raise ValueError(f"now={now}, but should have a time zone")
    commands = Commands(report, policy, report_path)
    requirements = [
        _consistent(report, commands),
        *_backends(report, policy, commands),
        *cell_requirements(report, policy, commands),
        _nowhere_wrong(report, policy, commands),
        *surroundings_requirements(report, policy, commands, now),
    ]
    return Decision(
        subject=one_line(report.subject),
        requirements=tuple(requirements),
        notes=tuple(map(one_line, _notes(report, policy))),
        policy=policy_digest(policy),
        decided=now,
    )


def _consistent(report: Report, commands: Commands) -> Requirement:
    found = contradictions(report)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return Requirement(
        key="report",
        asked="no contradiction",
        found=found[0] if found else "none",
        met=not found,
        reason=f"the report contradicts itself: {found[0]}{more}" if found else "",
        settle=commands.everything() if found else "",
    )


def _backends(report: Report, policy: Policy, commands: Commands) -> Iterator[Requirement]:
    here = report.path.backend
    for backend in policy.backends:
        met = backend == here
        yield Requirement(
            key="backends",
            where=backend,
            asked=f"evidence from {backend}",
            found=f"evidence from {here}",
            met=met,
            reason=""
            if met
            else f"backend {backend}: nothing is proven, because this report ran on {here}, and"
            " evidence from one backend never counts for another",
            settle="" if met else commands.everything(backend),
        )


def _nowhere_wrong(report: Report, policy: Policy, commands: Commands) -> Requirement:
    wrong = [one for one in _elsewhere(report, policy) if one.outcome == "WRONG"]
    places = sorted({f"tp={one.tp_size} {one.dtype}" for one in wrong})
    return Requirement(
        key="report",
        asked="WRONG nowhere",
        found=f"WRONG at {', '.join(places)}" if wrong else "nowhere else",
        met=not wrong,
        reason=f"{', '.join(places)}: WRONG, in case {wrong[0].case_id}; the policy does not ask"
        " for it, but what is another function there is not proven elsewhere either"
        if wrong
        else "",
        settle=commands.case(wrong[0]) if wrong else "",
    )


def _notes(report: Report, policy: Policy) -> Iterator[str]:
    found: dict[str, list[Verdict]] = {}
    for verdict in _elsewhere(report, policy):
        if verdict.outcome not in (PASS, "WRONG"):
            where = f"tp={verdict.tp_size} {verdict.dtype}: {verdict.outcome}"
            found.setdefault(where, []).append(verdict)
    for where, verdicts in found.items():
        more = f" and {len(verdicts) - 1} more" if len(verdicts) > 1 else ""
        yield f"{where}, in case {verdicts[0].case_id}{more}; the policy does not ask for it"
    if any(is_refusal_as_planned(verdict) for verdict in report.verdicts):
        yield "generated cases that were refused as planned prove nothing and are not counted"


def _elsewhere(report: Report, policy: Policy) -> list[Verdict]:
    """Return the verdicts that the policy does not ask for."""
    return [
        verdict
        for verdict in report.verdicts
        if report.path.backend not in policy.backends
        or verdict.tp_size not in policy.tp
        or verdict.dtype not in policy.dtypes
    ]
