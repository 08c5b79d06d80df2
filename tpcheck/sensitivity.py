"""What would this PASS have caught? Faults planted in the user's own subject, and judged alike.

Requirement: a check that cannot fail proves nothing, and whether it can depends on the subject: a
dead branch or a zero bias hides any bug in it. So every weight and every collective of one case is
broken through the seam, at one degree, and the same checks say whether they notice. The largest
degree that passed is taken, because there one rank's share of a sum, and so its bug, is smallest.

[No Fault] A change that moves no logit beyond rounding broke nothing that input A reads: a piece of
a weight that this rank never reads, pieces that are summed anyway. It does not count, except for a
site's probe (a weight perturbed everywhere, one partial scaled): where even that moves nothing, any
bug is hidden, and the site is named in `blind_to`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpcheck.checks import CHECKS
from tpcheck.comparison import relative
from tpcheck.evidence import distance
from tpcheck.execution import Task
from tpcheck.groups.jobs import Job, JobFailed, Ranks
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.inputs import make_inputs
from tpcheck.investigation import Investigation
from tpcheck.judging import subject_of
from tpcheck.numerics.ulp import eps
from tpcheck.observation.planting import SURVEY, CollectiveSite, Plant, Survey
from tpcheck.records import FAIL, PASS, SKIPPED, Report, Verdict
from tpcheck.run_plan import RunPlan
from tpcheck.spec import Case
from tpcheck.trace import Trace

Progress = Callable[[int, int, str], None]

MAX_PLANTED = 200
"""More are left out evenly, a site's probe last: a large model has thousands of sites."""
MAX_BISECTED = 12
"""Reductions, spread evenly, for which the smallest scale bug is searched: six runs each."""
SMALLEST_EXPONENT = 52
"""1 + 2^-53 is 1 in float64."""

_ROUNDING = 4.0
"""How many times the run's own distance from TP=1 (another order of sums) may move a logit."""
_PER_JOB = 16
_JOB_BYTES = 1 << 26

_DECIDING = {
    "exact": ("structural", "rank_agreement", "schedule"),
    "deployed": ("drift", "rank_agreement", "schedule"),
}
"""The run that is planted in -> the checks that see it; the first has to pass without a fault."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A plant and the name of its site. `probe`: it shows whether the site is seen at all."""

    plant: Plant
    site: str
    probe: bool = False


@dataclass(frozen=True, slots=True)
class Effect:
    """What a fault did. `moved`: some logit moved by more than rounding does."""

    caught: bool
    moved: bool


class _Unmeasured(Exception):
    """Why nothing can be said about sensitivity."""


def with_sensitivity(
    report: Report, plan: RunPlan, ranks: Ranks, progress: Progress | None = None
) -> Report:
    """Return the report with what its checks catch of faults planted in its subject.

    One case, one dtype and one degree are taken, input A at its full length. Where no verdict
    passed the check that has to notice, or the subject cannot be run again, a note says so.
    """
    try:
        verdict = _chosen(report)
        experiment = _experiment(plan, ranks, verdict)
        measured = _measured(experiment, progress or (lambda done, total, what: None))
        notes = _notes(experiment.surveys)
    except _Unmeasured as reason:
        return replace(report, notes=(*report.notes, f"sensitivity was not measured: {reason}"))
    where = {"case_id": verdict.case_id, "tp_size": verdict.tp_size, "dtype": verdict.dtype}
    return replace(report, sensitivity=measured | where, notes=(*report.notes, *notes))


def _notes(surveys: Sequence[Survey]) -> tuple[str, ...]:
    if any(survey.weights for survey in surveys):
        return ()
    return ("sensitivity: the subject reads its own weights, so only collectives were broken",)


def _chosen(report: Report) -> Verdict:
    judged = [v for v in report.verdicts if v.tp_size > 1 and _passed(v)]
    if not judged:
        raise _Unmeasured("no verdict above tp=1 passed the check that a fault would have to fail")
    first = judged[0]
    alike = [v for v in judged if (v.case_id, v.dtype) == (first.case_id, first.dtype)]
    return max(alike, key=lambda verdict: verdict.tp_size)


def _passed(verdict: Verdict) -> bool:
    """Whether the first check of numbers that was not skipped passed."""
    checks = [verdict.checks[name] for name in ("structural", "drift") if name in verdict.checks]
    return [check.outcome for check in checks if check.outcome != SKIPPED][:1] == [PASS]


def _experiment(plan: RunPlan, ranks: Ranks, verdict: Verdict) -> _Experiment:
    """Return the experiment in simulation where the subject can run there: it is much faster."""
    if ranks.label == "gloo" and plan.ref.kind != "hf":
        try:
            return _Experiment(plan, SimulatedRanks(), verdict)
        except (JobFailed, _Unmeasured):
            pass  # it needs a process group, or shares state between ranks
    try:
        return _Experiment(plan, ranks, verdict)
    except JobFailed as error:
        raise _Unmeasured(f"the subject failed without a fault: {error}") from error


class _Experiment:
    """One subject at one degree: plants faults and says what the checks make of them."""

    def __init__(self, plan: RunPlan, ranks: Ranks, verdict: Verdict) -> None:
        subject, case = subject_of(plan, Case.parse(verdict.case_id)), Case.parse(verdict.case_id)
        subject = replace(subject, options=replace(subject.options, sweep=False))
        self.ranks = ranks
        self._size, self._timeout_s = verdict.tp_size, plan.settings.timeout_s
        settings = replace(plan.settings, tp_sizes=(self._size,), until="")
        dtype = verdict.dtype
        investigation = Investigation(ranks, plan.ref, subject, case, dtype, settings)
        evidence, _ = investigation.evidence(self._size)
        self._evidence = evidence.lifted or evidence  # what sees smaller faults
        self._field = "exact" if self._evidence.exact else "deployed"
        task = Task(
            subject=plan.ref,
            seed=case.seed,
            dtype="float64" if self._evidence.exact else dtype,
            weight_dtype=dtype,
            inputs=make_inputs(subject, case, ()),
            order=("A",),
            spec=case.spec,
            lift=evidence.lift,
        )
        oracle = self._evidence.oracle
        if oracle is not None and not self._evidence.exact:
            task = replace(task, pinned=oracle.extras["choices"])  # as the run was judged
        self._task = task
        [self._clean] = self._run([SURVEY], replace(task, watch=True))
        self._checks = self._checks_that_pass()
        self._rounding = self._rounding_without_a_fault()

    @property
    def surveys(self) -> list[Survey]:
        """Return what every rank offers to plant faults in."""
        return [trace.extras["survey"] for trace in self._clean]

    @property
    def computed_in(self) -> str:
        """Return the dtype in which faults are looked for."""
        return self._task.dtype

    def effects(self, plants: Sequence[Plant]) -> list[Effect]:
        """Return what each of the plants did."""
        try:
            return [self._effect(traces) for traces in self._run(plants, self._task)]
        except JobFailed as error:
            if error.failure.kind == "environment":
                raise _Unmeasured(str(error)) from error
            if len(plants) == 1:  # a rank that raised, died or hung: that is noticed
                return [Effect(caught=True, moved=True)]
        return [effect for plant in plants for effect in self.effects([plant])]

    @property
    def at_once(self) -> int:
        """How many plants go into one job: every one sends back rank 0's logits."""
        return max(1, min(_PER_JOB, _JOB_BYTES // max(1, self._clean[0].outputs["A"].nbytes)))

    def _effect(self, traces: Sequence[Trace]) -> Effect:
        evidence = replace(self._evidence, **{self._field: traces})  # type: ignore[arg-type]
        caught = any(CHECKS[name](evidence).outcome == FAIL for name in self._checks)
        if traces[0].outputs["A"].shape != self._clean[0].outputs["A"].shape:
            return Effect(caught, moved=True)
        error, size, _ = distance(traces[0], self._clean[0])
        return Effect(caught, moved=relative(error, size) > self._rounding)

    def _checks_that_pass(self) -> tuple[str, ...]:
        evidence = replace(self._evidence, **{self._field: self._clean})  # type: ignore[arg-type]
        results = {name: CHECKS[name](evidence) for name in _DECIDING[self._field]}
        name, first = next(iter(results.items()))
        if first.outcome != PASS:
            raise _Unmeasured(f"{name} does not pass without a fault: {first.reason}")
        return tuple(name for name, check in results.items() if check.outcome == PASS)

    def _rounding_without_a_fault(self) -> float:
        error, size, _ = distance(self._clean[0], self._evidence.oracle or self._evidence.base)
        floor = self._evidence.floor.relative_rms
        return _ROUNDING * max(relative(error, size), floor, eps(self.computed_in))

    def _run(self, plants: Sequence[Plant], task: Task) -> list[Sequence[Trace]]:
        """Return every rank's trace for each of the plants."""
        seconds = self._timeout_s * len(plants)
        job = Job("tpcheck.execution:execute_planted", (task, tuple(plants)), self._size, seconds)
        [result] = self.ranks.run([job])
        if result.failure is not None:
            raise JobFailed(result.failure)
        return list(zip(*result.replies, strict=True))


def _measured(experiment: _Experiment, progress: Progress) -> dict[str, Any]:
    found = [*weight_faults(experiment.surveys), *collective_faults(experiment.surveys)]
    faults = spread(found)
    effects = _all_effects(experiment, faults, progress)
    counted = [
        (fault, effect)
        for fault, effect in zip(faults, effects, strict=True)
        if effect.caught or effect.moved or fault.probe
    ]
    if not counted:
        raise _Unmeasured("no weight and no collective passes through tpcheck's hands")
    scale = _smallest_scale(experiment, faults, effects)
    reason = {} if scale else {"smallest_scale_bug_reason": "no scaled partial of a sum was caught"}
    return {
        "caught": sum(effect.caught for _, effect in counted),
        "planted": len(counted),
        "blind_to": blind_to([fault for fault, effect in counted if not effect.caught]),
        "smallest_scale_bug": scale,
        **reason,
        "without_effect": len(faults) - len(counted),
        "left_out": len(found) - len(faults),
        "computed_in": experiment.computed_in,
        "backend": experiment.ranks.label,
    }


def blind_to(missed: Sequence[Fault]) -> list[str]:
    """Name what was missed: a site whose probe was, else the site and what was done there."""
    blind = [fault.site for fault in missed if fault.probe]
    partly = [fault for fault in missed if fault.site not in blind]
    return blind + [f"{fault.site}: {fault.plant.describe()}" for fault in partly]


def weight_faults(surveys: Sequence[Survey]) -> list[Fault]:
    """Return the faults of every weight, each on one of the ranks that ask for it."""
    shapes = {name: shape for survey in surveys for name, shape in survey.weights.items()}
    faults = []
    for position, (name, shape) in enumerate(shapes.items()):
        faults.append(Fault(Plant("perturbed", name), name, probe=True))
        holders = [rank for rank, survey in enumerate(surveys) if name in survey.weights]
        rank = holders[position % len(holders)]
        for dim in range(min(len(shape), 2)):
            if shape[dim] > 1:
                faults.append(Fault(Plant("exchanged", name, rank, dim), name))
            faults.append(Fault(Plant("zeroed", name, rank, dim), name))
    return faults


def collective_faults(surveys: Sequence[Survey]) -> list[Fault]:
    """Return the faults of every reduction and gather of the forward.

    None where ranks make different calls: planting in one would break the schedule.
    """
    schedules = {tuple((c.op, c.detail) for c in survey.collectives) for survey in surveys}
    if len(schedules) > 1:
        return []
    counts: Counter[str] = Counter()
    faults = []
    for calls in zip(*(survey.collectives for survey in surveys), strict=True):
        site: CollectiveSite = calls[0]
        counts[site.op] += 1
        name = f"{site.op} #{counts[site.op]}" + (f" ({site.fqn})" if site.fqn else "")
        magnitudes = [call.magnitude for call in calls]
        heaviest = magnitudes.index(max(magnitudes))  # a rank may have nothing to add here
        for kind in _kinds(site):
            probe = kind == "scaled"
            faults.append(Fault(Plant(kind, site.position, heaviest), name, probe))
    return faults


def _kinds(site: CollectiveSite) -> tuple[str, ...]:
    """Return what can be planted; a maximum taken twice, or of a larger shift, is no fault."""
    scaled = ("scaled",) if site.floating else ()
    if site.op == "all_gather":
        return (*scaled, "swapped")
    if site.op not in ("all_reduce", "reduce_scatter"):
        return ()
    kind = "sum" if site.detail.startswith("dim=") else site.detail
    return {
        "sum": (*scaled, "missing", "skipped", "doubled"),
        "avg": (*scaled, "missing", "skipped"),
    }.get(kind, ("skipped",))


def spread(faults: Sequence[Fault], limit: int = MAX_PLANTED) -> list[Fault]:
    """Return at most `limit` of the faults, in order, spread evenly; probes before all others."""
    probes = _evenly([i for i, fault in enumerate(faults) if fault.probe], limit)
    others = [i for i, fault in enumerate(faults) if not fault.probe]
    kept = {*probes, *_evenly(others, limit - len(probes))}
    return [fault for i, fault in enumerate(faults) if i in kept]


def _evenly(items: Sequence[int], limit: int) -> list[int]:
    count = min(len(items), limit)
    return [items[i * len(items) // count] for i in range(count)]


def _all_effects(
    experiment: _Experiment, faults: Sequence[Fault], progress: Progress
) -> list[Effect]:
    effects: list[Effect] = []
    plants = [fault.plant for fault in faults]
    for start in range(0, len(plants), experiment.at_once):
        progress(start, len(plants), f"planting faults: {faults[start].site}")
        effects += experiment.effects(plants[start : start + experiment.at_once])
    progress(len(plants), len(plants), "planting faults: how small a scale is caught")
    return effects


def _smallest_scale(
    experiment: _Experiment, faults: Sequence[Fault], effects: Sequence[Effect]
) -> str | None:
    """Return the 2^-k that is caught in every reduction looked at, by bisection of k in each.

    Reductions that nothing is seen of are named in `blind_to`, and left out here.
    """
    low: dict[Plant, int] = {}
    high: dict[Plant, int] = {}
    for fault, effect in zip(faults, effects, strict=True):
        if fault.plant.kind == "scaled" and not fault.site.startswith("all_gather"):
            at = fault.plant.exponent
            low[fault.plant], high[fault.plant] = (
                (at, SMALLEST_EXPONENT + 1) if effect.caught else (-1, at)
            )
    plants = list(low)
    plants = [plants[i] for i in _evenly(range(len(plants)), MAX_BISECTED)]
    while wide := [plant for plant in plants if high[plant] - low[plant] > 1]:
        tried = [replace(plant, exponent=(low[plant] + high[plant]) // 2) for plant in wide]
        found: list[Effect] = []
        for start in range(0, len(tried), experiment.at_once):
            found += experiment.effects(tried[start : start + experiment.at_once])
        for plant, attempt, effect in zip(wide, tried, found, strict=True):
            (low if effect.caught else high)[plant] = attempt.exponent
    seen = [low[plant] for plant in plants if low[plant] >= 0]
    return f"2^-{min(seen)}" if seen else None
