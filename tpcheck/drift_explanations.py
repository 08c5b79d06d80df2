"""What explains a case's drift: more runs beside it, and the rounding that its own sums cost.

Requirement: no alarm rests on a few errors, on a value that lay between two codes, or on what this
case's own partials explain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from tpcheck.case_runs import CaseRuns
from tpcheck.checks import drift, drifts, structural
from tpcheck.comparison import relative
from tpcheck.evidence import Evidence, distance, with_outputs
from tpcheck.execution import Task
from tpcheck.inputs import input_order, more_inputs
from tpcheck.numerics.drift import floored
from tpcheck.numerics.ulp import eps
from tpcheck.records import FAIL

_ROUNDINGS = 8
"""Repetitions that round anew: nine independent errors where there was one."""
_OTHER_WEIGHTS = " with other weights "
"""Between an input's name and the number of the weights that its output was made with."""


def explain_drift(
    runs: CaseRuns, evidence: Evidence, reduction: str
) -> tuple[Evidence, tuple[str, ...]]:
    """Return the evidence with whatever `drift` needs explained, and notes on what was done.

    Args:
        reduction: the kind of sum over ranks that drift is expected of.
    """
    evidence, notes = _with_drift_measured_again(runs, evidence)
    evidence = _with_expected_drift(runs, evidence, reduction)
    return evidence, (*notes, *_coarser_casts(evidence))


def _with_drift_measured_again(
    runs: CaseRuns, evidence: Evidence
) -> tuple[Evidence, tuple[str, ...]]:
    if structural(evidence).outcome == FAIL:  # then no alarm rests on drift
        return evidence, ()
    again = _measured_again(runs, evidence)
    while drifts(drift(evidence)) and (more := next(again, None)) is not None:
        evidence = more
    if not runs.codes or not drifts(drift(evidence)):
        return evidence, ()
    return without_flipped(evidence)


def without_flipped(evidence: Evidence) -> tuple[Evidence, tuple[str, ...]]:
    """Where values are quantized, leave out the weights at which one fell to the other code.

    The last bit decides it, so that weights an ulp apart seldom have another; more rounding than
    the reduction explains shows at all of them. So those that drift are left out if they are few.
    """
    named = {key: key.partition(_OTHER_WEIGHTS)[2] for key in evidence.deployed[0].outputs}
    weights = list(dict.fromkeys(named.values()))
    alone = {one: frozenset(key for key, other in named.items() if other != one) for one in weights}
    drifted = [one for one in weights if drifts(drift(replace(evidence, flipped=alone[one])))]
    if len(drifted) >= len(weights) / 2:
        return evidence, ()
    flipped = frozenset(key for key, one in named.items() if one in drifted)
    note = (
        f"codes: at {len(drifted)} of {len(weights)} weights an ulp apart a value fell to another"
        " code in TP=N; drift leaves them out"
    )
    return replace(evidence, flipped=flipped), (note,)


def _with_expected_drift(runs: CaseRuns, evidence: Evidence, reduction: str) -> Evidence:
    if drifts(drift(evidence)) and evidence.oracle is not None:
        equal = {c.target for c in evidence.oracle.casts if eps(c.target) == eps(runs.dtype)}
        evidence = _with_base_of_casts(runs, evidence, equal) if equal else evidence
    if not drifts(drift(evidence)) or not evidence.exact:
        return evidence
    coarse = {
        cast.target
        for trace in evidence.exact
        for cast in trace.casts
        if eps(cast.target) > eps(runs.dtype)
    }
    if coarse or (not runs.codes and any(trace.extras["codes"] for trace in evidence.exact)):
        return _with_base_of_casts(runs, evidence, coarse)
    order = tuple(dict.fromkeys(input_order(runs.inputs, evidence.tp_size)))
    task = replace(
        runs.exact_task(order),
        noise_dtype=runs.dtype,
        noise_kind=reduction,
        pinned=runs.pinned,
        decode=False,
        watch=False,
        own_calls=any(trace.extras["own_calls"] for trace in (*evidence.exact, *evidence.deployed)),
    )
    noisy = runs.run(task, evidence.tp_size)[0]
    still = evidence.exact[0]
    if runs.pinned:  # else choices that a fault flips would count as rounding
        still = runs.run(replace(task, noise_dtype=""), evidence.tp_size)[0]
    response, _, _ = distance(noisy, still)
    oracle = evidence.oracle
    assert oracle is not None
    error, magnitude, _ = distance(evidence.base, oracle)
    own = error if evidence.base_error is None else evidence.base_error
    at_1 = floored(own, magnitude, eps(runs.dtype))
    if not at_1:
        return evidence
    expected = math.sqrt(1 + (response / at_1) ** 2)
    source = "the rounding of this case's own partials, injected into float64"
    if expected <= evidence.expected:
        expected, source = evidence.expected, evidence.expected_source
    if missed := noisy.extras["missed"]:
        source += f"; not in it: what {', '.join(missed)} of torch.distributed rounds"
    return replace(evidence, expected=expected, expected_source=source)


def _measured_again(runs: CaseRuns, evidence: Evidence) -> Iterator[Evidence]:
    """Yield the evidence with more and more runs beside it, before an alarm rests on a few.

    Other inputs first. Where one token carries the error (a norm of few channels), as many of
    them as one likes are still that one token: then weights that are an ulp apart, because
    they round anew.
    """
    inputs = more_inputs(runs.subject, runs.case)
    task = replace(runs.task, inputs=inputs, order=tuple(inputs))
    evidence = _with_runs(runs, evidence, task, "")
    yield evidence
    order = tuple(dict.fromkeys(input_order(runs.inputs, evidence.tp_size)))
    for seed in range(1, _ROUNDINGS + 1):
        task = replace(runs.task, order=order, other_weights=seed)
        evidence = _with_runs(runs, evidence, task, f"{_OTHER_WEIGHTS}{seed}")
    yield evidence


def _with_runs(runs: CaseRuns, evidence: Evidence, task: Task, suffix: str) -> Evidence:
    if evidence.oracle is not None:
        wide = runs.run(replace(task, dtype=runs.oracle_dtype, watch=True), 1)[0]
        pinned = wide.extras["choices"]
        task = replace(task, watch=bool(pinned), pinned=pinned)
        evidence = replace(evidence, oracle=with_outputs(evidence.oracle, wide, suffix))
    base, deployed = runs.run(task, 1)[0], runs.run(task, evidence.tp_size)[0]
    first, *others = evidence.deployed
    return replace(
        evidence,
        base=with_outputs(evidence.base, base, suffix),
        deployed=[with_outputs(first, deployed, suffix), *others],
    )


def _with_base_of_casts(runs: CaseRuns, evidence: Evidence, targets: set[str]) -> Evidence:
    """Where TP=1 itself casts to a dtype that holds no more than the deployed one, count that.

    The oracle makes the same cast, so both agree and e1 would be 0: half of a float32 engine that
    runs in float32. What only TP=N casts to explains nothing.
    """
    oracle = evidence.oracle
    if oracle is None or not targets <= {cast.target for cast in oracle.casts}:
        return evidence
    error, magnitude, _ = distance(evidence.base, oracle)
    moved, size, _ = distance(runs.noisy_alone, oracle)
    return replace(evidence, base_error=max(error, relative(moved, size) * magnitude))


def _coarser_casts(evidence: Evidence) -> tuple[str, ...]:
    """Say what TP=N alone rounds to that is coarser than the deployed dtype: one sum of many may
    hide in the drift of the whole."""
    if evidence.oracle is None:
        return ()
    known = {cast.target for cast in evidence.oracle.casts}
    found = {
        cast.target: cast.fqn
        for trace in reversed(evidence.exact)
        for cast in reversed(trace.casts)
        if cast.target not in known and eps(cast.target) > eps(evidence.dtype)
    }
    return tuple(
        f"casts: TP=N alone rounds to {target}{f' in {fqn}' if fqn else ''}, which is coarser than"
        f" {evidence.dtype}"
        for target, fqn in found.items()
    )
