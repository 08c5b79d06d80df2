"""Where a failed check first shows: which runs it takes to say, and the module that they name.

Requirement: a failure that float64 sees is located in float64, where nothing but the bug differs;
one that only the deployed dtype shows is located there, against TP=1's own error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tpcheck.checks import structural
from tpcheck.errors import SubjectError
from tpcheck.evidence import Evidence
from tpcheck.execution import Task
from tpcheck.groups.jobs import JobFailed
from tpcheck.localization import locate
from tpcheck.numerics.drift import ratio_limit
from tpcheck.numerics.tolerance import structural_limit
from tpcheck.numerics.ulp import eps
from tpcheck.reconciliation import relative_rms
from tpcheck.records import FAIL, Check, FirstDivergence
from tpcheck.trace import Trace

_NOT_IN_A_MODULE = (
    "localization: no traced module gives anything else than at TP=1, as far as that can be told:"
    " look at what forward does beside its modules"
)
_NOTHING_TO_TRACE = (
    "localization: TP=1 has neither modules nor collectives of tp to hold TP=N's against: return an"
    " nn.Module, or declare forward.trace_points"
)
Run = Callable[[Task, int], Sequence[Trace]]
"""Runs a task on so many ranks."""


def first_divergence(
    task: Task,
    run: Run,
    evidence: Evidence,
    checks: Mapping[str, Check],
    oracle_dtype: str,
) -> tuple[FirstDivergence | None, tuple[str, ...]]:
    """Return the first module that leaves its reference, if any, and notes on the search.

    Args:
        task: of the deployed dtype; `until` is the last module to trace.
    """
    failed = {name for name, check in checks.items() if check.outcome == FAIL}
    exact = bool({"structural", "decode", "rank_agreement"} & failed) and bool(evidence.exact)
    if evidence.lifted is not None and structural(evidence.lifted).outcome == FAIL:
        task, evidence = replace(task, lift=evidence.lift), evidence.lifted  # all else is alike
    if any(trace.extras["own_calls"] for trace in (*evidence.exact, *evidence.deployed)):
        task = replace(task, own_calls=True)  # whose term is off is read off the sums
    if not exact and not (failed & {"drift", "rank_agreement"} or task.until):
        return None, ()
    try:
        where = _input_to_trace(evidence, checks)
        if exact or (task.until and not failed):
            found, notes = _in_float64(task, run, evidence, where)
            return found, notes if failed else ()
        return _in_deployed_dtype(task, run, evidence, oracle_dtype), ()
    except JobFailed as error:
        if task.until and isinstance(error.failure.exception, SubjectError):
            raise  # the user asked for a module that is not there
        return None, (f"localization stopped: {error}",)


def _input_to_trace(evidence: Evidence, checks: Mapping[str, Check]) -> str:
    """Return the input to look at: A if it fails too, for one token may be a shard, or copies."""
    worst = str(checks["structural"].facts.get("worst_input", "A"))
    if worst == "A" or evidence.oracle is None or not evidence.exact:
        return worst
    got, want = evidence.exact[0].outputs.get("A"), evidence.oracle.outputs.get("A")
    limit = structural_limit(evidence.floor.relative_rms)
    return worst if want is None or relative_rms(got, want) <= limit else "A"


def _in_float64(
    task: Task, run: Run, evidence: Evidence, input_id: str
) -> tuple[FirstDivergence | None, tuple[str, ...]]:
    """Return the first module that leaves its reference, and notes on what does not."""
    task = replace(task, dtype="float64", trace=input_id)
    reference = run(task, 1)[0]
    replay = {
        fqn: record.input
        for fqn, record in reference.extras["points"].items()
        if record.in_placement is not None and record.input is not None and not task.lift
    }
    try:
        traces = run(replace(task, replay=replay), evidence.tp_size)
    except JobFailed:  # a module that cannot run alone; then the forward has to do
        traces = run(task, evidence.tp_size)
    found = locate(reference, traces, limit=structural_limit(evidence.floor.relative_rms))
    if reference.extras["points"]:
        return found, () if found else (_NOT_IN_A_MODULE,)
    return found, _of_calls(reference, traces, found=found is not None)


def _of_calls(reference: Trace, traces: Sequence[Trace], *, found: bool) -> tuple[str, ...]:
    """Say what is to be said of a subject without modules: its collectives stand in for them."""
    calls = list(reference.extras["calls"])
    lacking = [name for name in calls if any(name not in t.extras["calls"] for t in traces)]
    if lacking:
        return (f"localization: TP=1 calls {lacking[0]}, TP={len(traces)} does not",)
    if found:
        return ()
    if not calls:
        return (_NOTHING_TO_TRACE,)
    return (
        "localization: every collective gives what it does at TP=1: look at what comes after the"
        f" last, {calls[-1]}",
    )


def _in_deployed_dtype(
    task: Task, run: Run, evidence: Evidence, oracle_dtype: str
) -> FirstDivergence | None:
    task = replace(task, trace="A")
    base = run(task, 1)[0]
    reference = run(replace(task, dtype=oracle_dtype or task.dtype), 1)[0]
    traces = run(task, evidence.tp_size)
    return locate(
        reference,
        traces,
        limit=eps(task.dtype),
        base=base,
        ratio_limit=ratio_limit(evidence.expected),
    )
