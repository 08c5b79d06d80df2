"""Explanations of a case's numbers: each is a run that is made only when a check asks for it.

Requirement: no alarm rests on what has another reason. Before one is raised, the noise floor of
hard casts is measured, ties of routing are pinned to the reference, and drift is held against more
runs and against what this case's own partials explain.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace

from tpcheck.case_runs import CaseRuns
from tpcheck.checks import drift, drifts, structural
from tpcheck.comparison import relative
from tpcheck.evidence import (
    Evidence,
    NoiseFloor,
    distance,
    noise_floor,
    routing_flips,
    with_outputs,
)
from tpcheck.execution import Task
from tpcheck.groups.jobs import JobFailed
from tpcheck.inputs import input_order, more_inputs
from tpcheck.numerics.drift import floored
from tpcheck.numerics.tolerance import structural_limit
from tpcheck.numerics.ulp import eps
from tpcheck.records import FAIL
from tpcheck.trace import Trace

_ROUNDINGS = 8
"""Repetitions that round anew: nine independent errors where there was one."""
_OTHER_WEIGHTS = " with other weights "
"""Between an input's name and the number of the weights that its output was made with."""
_OTHER_CODES = 5
"""Weights an ulp apart that a difference is tried with where values are quantized; most of them
decide. Where one case in twenty has a value between two codes, three of five do in one of 900."""
_TIE = 1e-9
"""A choice between values closer than this (relative) is a tie that float64 rounding may break."""


def explained(
    runs: CaseRuns, evidence: Evidence, reduction: str
) -> tuple[Evidence, tuple[str, ...]]:
    """Return the evidence with whatever its checks need explained, and notes on what was done.

    Args:
        reduction: the kind of sum over ranks that drift is expected of.
    """
    evidence = _with_full_outputs(runs, evidence)
    evidence = _with_every_length_watched(runs, evidence)
    evidence = _with_noise_floor(runs, evidence)
    evidence, notes = _with_ties_pinned(runs, evidence)
    evidence, more = _with_other_codes(runs, evidence)
    evidence, wire = _with_casts_lifted(runs, evidence)
    evidence, beside = _with_drift_measured_again(runs, evidence)
    evidence = _with_expected_drift(runs, evidence, reduction)
    return evidence, (*notes, *more, *wire, *beside, *_coarser_casts(evidence))


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


def _with_full_outputs(runs: CaseRuns, evidence: Evidence) -> Evidence:
    """Where ranks disagree, run again with every rank's output, to say where."""
    for name, traces in (("exact", evidence.exact), ("deployed", evidence.deployed)):
        keys = traces[0].digests if traces else {}
        if all(len({t.digests.get(key) for t in traces}) == 1 for key in keys):
            continue
        if runs.subject.options.logits == "rank0":
            continue
        order = input_order(runs.inputs, evidence.tp_size)
        task = runs.exact_task(order) if name == "exact" else runs.deployed_task(order)
        again = runs.run(replace(task, every_output=True), evidence.tp_size)
        merged = [
            replace(old, outputs=new.outputs) if new.digests == old.digests else old
            for old, new in zip(traces, again, strict=True)
        ]
        evidence = replace(evidence, **{name: merged})  # type: ignore[arg-type]
    return evidence


def _with_every_length_watched(runs: CaseRuns, evidence: Evidence) -> Evidence:
    """Code may cast, or choose, at some lengths only: one token, say, where others go otherwise."""
    oracle, order = evidence.oracle, input_order(runs.inputs, evidence.tp_size)
    if oracle is None or not all(trace.extras["quiet"] for trace in (oracle, *evidence.exact)):
        return evidence
    seen = {order[0], "A"}
    watched = replace(evidence, oracle=_only(oracle, seen))
    if structural(evidence).outcome != FAIL or structural(watched).outcome == FAIL:
        return evidence
    runs.watch_every_length()
    exact = runs.run(runs.exact_task(order), evidence.tp_size)
    return replace(evidence, oracle=runs.oracle, exact=exact)


def _only(trace: Trace, inputs: Collection[str]) -> Trace:
    outputs = {key: output for key, output in trace.outputs.items() if key in inputs}
    return replace(trace, outputs=outputs)


def _with_noise_floor(runs: CaseRuns, evidence: Evidence) -> Evidence:
    """Hard casts bound what a float64 run can see: measure at TP=1, at TP=N only if needed."""
    oracle = evidence.oracle
    if oracle is None or not evidence.exact:
        return evidence
    casts = [*oracle.casts, *(cast for trace in evidence.exact for cast in trace.casts)]
    if not casts:
        return evidence
    moved = []
    if oracle.casts:
        moved.append((runs.noisy_alone, oracle))
        evidence = replace(evidence, floor=noise_floor(casts, moved, codes=bool(runs.codes)))
        if structural(evidence).outcome != FAIL:
            return evidence
    still = evidence.exact[0]
    if runs.pinned:  # else choices that a fault flips would raise the limit it is held to
        still = runs.run(replace(runs.noisy_task, perturb_seed=None), evidence.tp_size)[0]
    sent = {
        key: set().union(*(trace.extras["sent"].get(key, ()) for trace in evidence.exact))
        for key in runs.noisy_task.order
    }
    noisy = runs.run(replace(runs.noisy_task, sent=sent), evidence.tp_size)[0]
    moved.append((noisy, still))
    return replace(evidence, floor=noise_floor(casts, moved, codes=bool(runs.codes)))


def _with_ties_pinned(runs: CaseRuns, evidence: Evidence) -> tuple[Evidence, tuple[str, ...]]:
    if evidence.oracle is None or not evidence.exact or not runs.pinned:
        return evidence, ()
    if structural(evidence).outcome != FAIL:
        return evidence, ()
    flips, margin = routing_flips(evidence.exact[0].extras["choices"], runs.pinned)
    if not flips or margin > max(_TIE, structural_limit(evidence.floor.relative_rms)):
        return evidence, ()
    order = input_order(runs.inputs, evidence.tp_size)
    task = replace(runs.exact_task(order), pinned=runs.pinned)
    note = f"routing: {flips} ties (margin {margin:.2g}) were pinned to the reference"
    return replace(evidence, exact=runs.run(task, evidence.tp_size)), (note,)


def _with_casts_lifted(runs: CaseRuns, evidence: Evidence) -> tuple[Evidence, tuple[str, ...]]:
    """Where the subject's own casts set a coarse floor, run once more without them, if that runs.

    A quantizer is part of the function and is no such cast. One that only TP=N has, for what it
    sends, is: what is left without it stands in for the rest.
    """
    if evidence.oracle is None or not evidence.exact:
        return evidence, ()
    failed = structural(evidence).outcome == FAIL
    sends_codes = (
        not runs.codes
        and any(trace.extras["codes"] for trace in evidence.exact)
        and not any(trace.extras["kept"] for trace in evidence.exact)
    )
    if failed and not sends_codes:
        return evidence, ()
    if not failed and eps(evidence.floor.tier) <= eps("float32"):
        return evidence, ()
    lifted = _lifted(runs, evidence, codes=sends_codes)
    runs.start_clock()
    if lifted is None:
        return evidence, ()
    if not failed:
        return replace(evidence, lifted=lifted), ()
    if structural(lifted).outcome == FAIL:
        return evidence, ()
    note = "codes: what TP=N alone quantizes is what it sends; structural compared it unquantized"
    assert lifted.oracle is not None
    pair = (lifted.exact[0], lifted.oracle)
    return replace(evidence, elsewhere=pair, floor=lifted.floor), (note,)


def _lifted(runs: CaseRuns, evidence: Evidence, *, codes: bool) -> Evidence | None:
    """Return what TP=1 and TP=N give without their own casts; None where either cannot run so."""
    lifted = runs.lifted
    if lifted is None:
        return None
    lifted.start_clock()
    task = lifted.exact_task(input_order(runs.inputs, evidence.tp_size))
    task = replace(task, pinned=lifted.pinned, lift_codes=codes)
    try:
        exact = lifted.run(task, evidence.tp_size)
        apart = replace(
            evidence, oracle=lifted.oracle, exact=exact, floor=NoiseFloor(), elsewhere=None
        )
        return _with_other_codes(lifted, _with_noise_floor(lifted, apart))[0]
    except JobFailed:
        return None


def _with_other_codes(runs: CaseRuns, evidence: Evidence) -> tuple[Evidence, tuple[str, ...]]:
    """Where values are quantized, one between two codes may fall to either side by its last bit.

    Weights an ulp apart put other values there, if any; a bug stays. So a difference that goes away
    with most of them was such a value.
    """
    if evidence.oracle is None or not evidence.exact or not runs.codes:
        return evidence, ()
    if structural(evidence).outcome != FAIL:
        return evidence, ()
    order = input_order(runs.inputs, evidence.tp_size)
    agreed: list[Evidence] = []
    for tried in range(_OTHER_CODES):
        task = replace(runs.exact_task(order), other_weights=tried + 1)
        alone = runs.run(task, 1)[0]
        exact = runs.run(replace(task, pinned=alone.extras["choices"]), evidence.tp_size)
        other = replace(evidence, elsewhere=(exact[0], alone))
        agreed += [other] if structural(other).outcome != FAIL else []
        if len(agreed) > _OTHER_CODES // 2:
            where = ", ".join(dict.fromkeys(fqn or "forward" for fqn, _, _ in runs.codes[:3]))
            note = f"codes: a value in {where} lay between two codes; weights an ulp apart agree"
            return agreed[0], (note,)
        if tried + 1 - len(agreed) > _OTHER_CODES // 2:
            break
    return evidence, ()


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
