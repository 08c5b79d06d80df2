"""What a drift report is asked for besides: what each fallback buys, and what width costs.

Requirement: both are measured on the ranks that gave the verdicts and on the profile's inputs, for
what was found to be the same function: the price of another function is of no use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tpcheck.case_runs import CaseRuns
from tpcheck.drift_profiles.runs import MORE_INPUTS
from tpcheck.errors import TPCheckError
from tpcheck.execution import Task
from tpcheck.fallback.levels import parse_levels
from tpcheck.fallback.measuring import fallback_effects
from tpcheck.groups.jobs import JobFailed, Ranks
from tpcheck.inputs import more_inputs
from tpcheck.judging import subject_of
from tpcheck.records import PASS, Verdict
from tpcheck.run_plan import RunPlan
from tpcheck.spec import Case
from tpcheck.width_cost import width_cost

Json = dict[str, Any]


def parse_remedies(fallback: str | Sequence[str], backend: str, *, width: bool) -> tuple[str, ...]:
    """Return the levels asked for, before a rank runs.

    Raises:
        TPCheckError: a level is unknown, or width is asked of simulated ranks.
    """
    if width and backend == "sim":
        raise TPCheckError(
            "--width: backend=sim, but should be gloo or nccl: simulated ranks take turns in one"
            " thread, so their times say nothing"
        )
    return parse_levels(fallback) if fallback else ()


def remedies(
    plan: RunPlan, ranks: Ranks, verdicts: Sequence[Verdict], levels: Sequence[str], *, width: bool
) -> Json:
    """Return what was asked for.

    Returns:
        `fallback`, where levels are given: per verdict and level `tp_size`, `dtype`, `case_id` and
            the fields of fallback.measuring.Effect. `width`, if asked for: per dtype the fields of
            width_cost.WidthCost, on the first case.
    """
    sound = [one for one in verdicts if one.outcome in (PASS, "DRIFT") and one.tp_size > 1]
    found: Json = {}
    if levels:
        found["fallback"] = [row for one in sound for row in _effects(plan, ranks, one, levels)]
    if width:
        found["width"] = [
            _width(plan, ranks, [one for one in sound if one.dtype == dtype])
            for dtype in dict.fromkeys(one.dtype for one in sound)
        ]
    return found


def _effects(plan: RunPlan, ranks: Ranks, verdict: Verdict, levels: Sequence[str]) -> list[Json]:
    head = {"tp_size": verdict.tp_size, "dtype": verdict.dtype, "case_id": verdict.case_id}
    runs = _runs(plan, ranks, verdict)
    options = runs.subject.options
    try:
        effects = fallback_effects(
            ranks,
            _task(runs),
            verdict.tp_size,
            levels,
            oracle_dtype=runs.oracle_dtype,
            token_ids=options.inputs is None,
            timeout_s=plan.settings.timeout_s,
        )
    except JobFailed as error:
        raise TPCheckError(f"fallback at tp={verdict.tp_size}: a rank failed: {error}") from error
    return [head | effect.to_json() for effect in effects]


def _width(plan: RunPlan, ranks: Ranks, verdicts: Sequence[Verdict]) -> Json:
    first = verdicts[0]
    degrees = [one.tp_size for one in verdicts if one.case_id == first.case_id]
    task = _task(_runs(plan, ranks, first))
    try:
        return width_cost(ranks, task, degrees, timeout_s=plan.settings.timeout_s).to_json()
    except JobFailed as error:
        raise TPCheckError(f"width: a rank failed: {error}") from error


def _runs(plan: RunPlan, ranks: Ranks, verdict: Verdict) -> CaseRuns:
    case = Case.parse(verdict.case_id)
    subject = subject_of(plan, case)
    timeout_s = plan.settings.timeout_s
    return CaseRuns(ranks, plan.ref, subject, case, verdict.dtype, plan.tp_sizes, timeout_s)


def _task(runs: CaseRuns) -> Task:
    more = dict(list(more_inputs(runs.subject, runs.case).items())[:MORE_INPUTS])
    return replace(runs.task, inputs={"A": runs.inputs["A"], "B": runs.inputs["B"], **more})
