"""Explanations of a case's numbers: each is a run that is made only when a check asks for it.

Requirement: no alarm rests on what has another reason, and no bug hides in what has one. Before an
alarm is raised, the noise floor of hard casts is measured and ties of routing are pinned to the
reference; where that floor is coarse, the casts are lifted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from tpcheck.case_runs import CaseRuns
from tpcheck.checks import structural
from tpcheck.drift_explanations import explain_drift
from tpcheck.evidence import Evidence, NoiseFloor, last_bits_floor, noise_floor, routing_flips
from tpcheck.groups.jobs import JobFailed
from tpcheck.inputs import input_order
from tpcheck.numerics.tolerance import NOISE_FACTOR, STRUCTURAL_LIMIT, structural_limit
from tpcheck.numerics.ulp import eps
from tpcheck.records import FAIL, Check
from tpcheck.trace import Trace

_OTHER_CODES = 5
"""Weights an ulp apart that a difference is tried with where values are quantized; most of them
decide. Where one case in twenty has a value between two codes, three of five do in one of 900."""
_MOST_ROUNDINGS = 10.0
"""Where TP=1's output moves by more eps of its narrowest cast than this, it is built again. A look
costs a run, and no verdict rests on the number."""
_DRAWS, _FAR = 4, 1e3
"""How often last bits are moved where a model may make that much of them: in a chaotic one a draw
is off by its own size and more. Not where the difference is further off than any draw is."""
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
    notes: tuple[str, ...] = ()
    if not _is_plain(evidence):
        evidence, notes = _structure_explained(runs, evidence)
    evidence, more = explain_drift(runs, evidence, reduction)
    return evidence, (*notes, *more)


def _is_plain(evidence: Evidence) -> bool:
    """Whether nothing casts, is quantized or differs: most cases, for which that is asked once."""
    traces = [trace for trace in (evidence.oracle, *evidence.exact) if trace is not None]
    quiet = not any(trace.casts or trace.extras["codes"] for trace in traces)
    return quiet and structural(evidence).outcome != FAIL


def _structure_explained(runs: CaseRuns, evidence: Evidence) -> tuple[Evidence, tuple[str, ...]]:
    """Return the evidence with whatever `structural` needs explained, and notes."""
    evidence = _with_every_length_watched(runs, evidence)
    evidence = _with_noise_floor(runs, evidence)
    evidence = _with_another_build(runs, evidence)
    evidence = _with_last_bits(runs, evidence)
    evidence, notes = _with_ties_pinned(runs, evidence)
    evidence, more = _with_other_codes(runs, evidence)
    evidence, wire = _with_casts_lifted(runs, evidence)
    return evidence, (*notes, *more, *wire)


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
    watched = replace(evidence, oracle=_only(oracle, ("A", "t1")))
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
    noisy = runs.run(replace(runs.noisy_task, sent=_sent(evidence)), evidence.tp_size)[0]
    moved.append((noisy, still))
    return replace(evidence, floor=noise_floor(casts, moved, codes=bool(runs.codes)))


def _with_another_build(runs: CaseRuns, evidence: Evidence) -> Evidence:
    """What build(tp) leaves behind (a cached module, rounded to another dtype), the next one finds.

    Then TP=N differs by more than its own code, or TP=1 moves by more than its casts do. So where
    either is the case, TP=1 is built again, and has to give the same bits.
    """
    if evidence.oracle is None or not evidence.exact:
        return evidence
    moved = evidence.floor.relative_rms > _MOST_ROUNDINGS * eps(evidence.floor.tier)
    if not moved and structural(evidence).outcome != FAIL:
        return evidence
    return replace(evidence, rebuilt=runs.rebuilt)


def _with_last_bits(runs: CaseRuns, evidence: Evidence) -> Evidence:
    """An ill-conditioned model makes much of float64's own rounding: how much, TP=1 says.

    Not where it casts, whose floor is far above, or quantizes, where a last bit is a quantum.
    """
    if evidence.oracle is None or not evidence.exact or runs.codes:
        return evidence
    if evidence.floor.tier != "float64" or structural(evidence).outcome != FAIL:
        return evidence
    for count in range(1, _DRAWS + 1):
        floor = last_bits_floor(runs.unsteady(count), evidence.oracle)
        found = structural(explained := replace(evidence, floor=floor))
        if found.outcome != FAIL:
            return explained
        if found.facts.get("relative_rms", math.inf) > _FAR * found.facts["limit"]:
            break
    return evidence


def _with_ties_pinned(runs: CaseRuns, evidence: Evidence) -> tuple[Evidence, tuple[str, ...]]:
    if evidence.oracle is None or not evidence.exact or not runs.pinned:
        return evidence, ()
    if structural(evidence).outcome != FAIL:
        return evidence, ()
    if not any(routing_flips(trace.extras["choices"], runs.pinned)[0] for trace in evidence.exact):
        return evidence, ()
    order = input_order(runs.inputs, evidence.tp_size)
    exact = runs.run(replace(runs.exact_task(order), pinned=runs.pinned), evidence.tp_size)
    # A tie that flips changes what later choices are made of. Pinned, each is made of what the
    # reference made it of, and every one that would still flip, on any rank, has to be a tie.
    left = [routing_flips(trace.extras["choices"], runs.pinned) for trace in exact]
    margin = max(widest for _, widest in left)
    if margin > max(_TIE, structural_limit(evidence.floor.relative_rms)):
        return evidence, ()
    flips = max(count for count, _ in left)
    note = f"routing: {flips} ties (margin {margin:.2g}) were pinned to the reference"
    return replace(evidence, exact=exact), (note,)


def _with_casts_lifted(runs: CaseRuns, evidence: Evidence) -> tuple[Evidence, tuple[str, ...]]:
    """Where the subject's own casts set a coarse floor, run once more without them, if that runs.

    A quantizer is part of the function and is no such cast. One that only TP=N has, for what it
    sends, is: what is left without it stands in for the rest.
    """
    if evidence.oracle is None or not evidence.exact:
        return evidence, ()
    found = structural(evidence)
    failed = found.outcome == FAIL
    sent = _sent_by_tp_n_alone(evidence, failed=failed)
    stands_in = any(sent.values()) or (failed and _as_constants_round(found, evidence))
    if not stands_in and not _may_hide_a_bug(found, evidence, codes=bool(runs.codes)):
        return evidence, ()
    lifted = _lifted(runs, evidence, sent)
    runs.start_clock()
    if isinstance(lifted, JobFailed):
        return evidence, _hidden(evidence, lifted)
    if not failed or not stands_in or structural(lifted).outcome == FAIL:
        return replace(evidence, lifted=lifted), ()
    assert lifted.oracle is not None
    pair = lifted.elsewhere or (lifted.exact[0], lifted.oracle)
    note = "codes: what TP=N alone quantizes is what it sends; structural compared it unquantized"
    if not any(sent.values()):
        note = "constants: with its own float32 constants in float64, TP=N is TP=1"
    return replace(evidence, elsewhere=pair, floor=lifted.floor), (note,)


def _as_constants_round(found: Check, evidence: Evidence) -> bool:
    """Whether a difference is so small that a float32 constant, which no cast shows, may be it."""
    differs = found.facts.get("relative_rms", math.inf)
    return evidence.floor.tier == "float64" and differs <= NOISE_FACTOR * eps("float32")


def _may_hide_a_bug(found: Check, evidence: Evidence, *, codes: bool) -> bool:
    """Whether a bug, or where it begins, may lie in the noise of casts.

    float32, and quantizers, round to the same bits unless something differs: where next to nothing
    does, they hide nothing. 16 bits are coarse enough to swallow what is worth seeing.
    """
    if eps(evidence.floor.tier) > eps("float32") and not codes:
        return True
    differs = found.facts.get("relative_rms", 0.0) > STRUCTURAL_LIMIT
    return evidence.floor.tier != "float64" and differs


def _sent(evidence: Evidence) -> dict[str, Collection[int]]:
    """Return which casts are a reduction's, by input: on any rank, for all do the same."""
    keys = {key for trace in evidence.exact for key in trace.extras["sent"]}
    return {
        key: set().union(*(trace.extras["sent"].get(key, ()) for trace in evidence.exact))
        for key in keys
    }


def _sent_by_tp_n_alone(evidence: Evidence, *, failed: bool) -> dict[str, Collection[int]]:
    """Return the quantizers, by input and place, that TP=N has for what it sends and TP=1 has not.

    Where nothing differs, one to a dtype that TP=1 quantizes to may be TP=1's under another name.
    Where something does, those that reach a collective are TP=N's own if it has so many more.
    """
    assert evidence.oracle is not None
    alone = evidence.oracle.extras["code_places"]
    found: dict[str, Collection[int]] = {}
    for key, sent in _sent(evidence).items():
        casts, reaching = evidence.exact[0].extras["code_places"].get(key, ([], set()))
        own = alone.get(key, ([], set()))[0]
        targets, more = {target for _, _, target in own}, Counter(casts) - Counter(own)
        often = Counter(casts[place] for place in reaching)
        if failed:
            surplus = {p for p in reaching if often[casts[p]] == more[casts[p]]}
            found[key] = {*sent, *surplus}
        else:
            found[key] = {p for p in sent if p < len(casts) and casts[p][2] not in targets}
    return found


def _hidden(evidence: Evidence, why: JobFailed) -> tuple[str, ...]:
    """Say what a PASS does not: how large a bug hides in casts to 16 bits that stayed."""
    if eps(evidence.floor.tier) <= eps("float32"):
        return ()
    limit = structural_limit(evidence.floor.relative_rms)
    said = str(why.failure.exception or why).splitlines()[0]
    return (
        f"structural: its own casts to {evidence.floor.tier} hide what is smaller than {limit:.3g}:"
        f" they could not be lifted ({said})",
    )


def _lifted(
    runs: CaseRuns, evidence: Evidence, codes: Mapping[str, Collection[int]]
) -> Evidence | JobFailed:
    """Return what TP=1 and TP=N give without their own casts; why not where either cannot run so.

    Without those of build, if they can: a cache made for bfloat16 rounds whatever is put into it.
    """
    whole = _lifted_so(runs.lifted, runs, evidence, codes)
    if not isinstance(whole, JobFailed):
        return whole
    return _lifted_so(runs.lifted_in_forward, runs, evidence, codes)


def _lifted_so(
    alone: CaseRuns | JobFailed,
    runs: CaseRuns,
    evidence: Evidence,
    codes: Mapping[str, Collection[int]],
) -> Evidence | JobFailed:
    if isinstance(alone, JobFailed):
        return alone
    lifted = alone.lifting(codes)
    lifted.start_clock()
    task = lifted.exact_task(input_order(runs.inputs, evidence.tp_size))
    task = replace(task, pinned=lifted.pinned, decode=False)
    try:
        exact = lifted.run(task, evidence.tp_size)
        apart = replace(
            evidence, oracle=lifted.oracle, exact=exact, floor=NoiseFloor(), elsewhere=None
        )
        apart = _with_last_bits(lifted, _with_noise_floor(lifted, apart))
        return _with_other_codes(lifted, apart)[0]
    except JobFailed as error:
        return error


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
