"""The checks of numbers: each a pure function from evidence to one Check, with its reason.

Requirement: two signals that are never mixed (structural: is it the same function; drift: how far
did rounding move it) and beside them the tolerance that people ask for. Each check has a fault that
only it, or a named other, catches; `tpcheck selfcheck` plants them. What a failed check means is
verdict.py's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from tpcheck.comparison import (
    compare,
    describe_region,
    error_count,
    mask_difference,
    pooled_rms,
    scientific,
    sliced_relative_rms,
    worst_comparison,
)
from tpcheck.conduct import rank_agreement, repeatability, schedule, tiling
from tpcheck.errors import SubjectError
from tpcheck.evidence import Evidence
from tpcheck.execution import AGAIN
from tpcheck.numerics.drift import floored, ratio_limit
from tpcheck.numerics.tolerance import STRUCTURAL_LIMIT, derived_tolerance, structural_limit
from tpcheck.numerics.ulp import eps
from tpcheck.records import FAIL, PASS, SKIPPED, Check, Comparison
from tpcheck.trace import Trace

_UNCAST = (1e-7, 1e-7)
"""What float64's own rounding may move a channel and a token by, each in its own units: that much
only where it is a billionth of what it is a sum of. Masks, which make all else look small, are no
terms of that sum."""

_BLIND = 1e-4
"""The bug that may not hide: where rounding moves float64 itself by more, nothing was compared."""


def structural(evidence: Evidence) -> Check:
    """TP=N against TP=1 in float64: the same function, up to the noise of its own casts.

    Where these may hide a bug, once more without them.
    """
    if evidence.oracle is None or not evidence.exact:
        return Check(
            SKIPPED,
            "the subject is declared float64=False: a bug below the drift limit would not show",
        )
    floor = evidence.floor
    limit = structural_limit(floor.relative_rms)
    facts: dict[str, Any] = {"dtype": floor.tier, "limit": limit, "source": floor.source}
    exact, oracle = evidence.exact_pair
    try:
        compared = _compare_all(exact, oracle)
    except SubjectError as error:
        return Check(FAIL, str(error), facts)
    if not any(output.numel() for output in oracle.outputs.values()):
        return Check(SKIPPED, "the output is empty at TP=1: nothing to compare", facts)
    if not any(bool(output.isfinite().any()) for output in oracle.outputs.values()):
        return Check(SKIPPED, "TP=1 in float64 is not finite anywhere: nothing to compare", facts)
    limits = {key: structural_limit(floor.of(key)) for key in compared}
    where, worst = worst_comparison(compared, limits)
    limit = limits[where]
    facts |= {"limit": limit, "smallest_bug": limit}
    facts |= {"relative_rms": worst.relative_rms, "worst_input": where}
    if worst.mask_mismatches:
        return Check(FAIL, f"{where}: {_mask_reason(exact, oracle, where)}", facts)
    if worst.relative_rms > limit:
        reason = (
            f"{where}: relative_rms={worst.relative_rms:.3g}, but should be at most {limit:.3g};"
            f" worst at {list(worst.index)}:"
            f" {worst.worst_actual:.6g} for {worst.worst_expected:.6g}"
        )
        return Check(FAIL, reason, facts)
    hidden = _hidden_in_slices(evidence)
    if hidden:
        return Check(FAIL, hidden, facts)
    if lost := _lost_in_the_oracle(evidence):
        return Check(SKIPPED, lost, facts)
    limit = structural_limit(floor.relative_rms)
    wide = eps(floor.tier) <= eps("float32") and evidence.lifted is None
    if wide and limit > _BLIND and worst.relative_rms > STRUCTURAL_LIMIT:
        reason = f"{floor.source}: what is smaller than {limit:.3g} could not be told from rounding"
        return Check(SKIPPED, reason, facts)
    if evidence.lifted is None:
        return Check(PASS, "", facts)
    lifted = structural(evidence.lifted)
    if lifted.outcome == SKIPPED:
        return lifted
    source = f"{lifted.facts['source']} but those that were lifted: {floor.source}"
    facts = {**lifted.facts, "source": source, "with_casts": facts}
    if lifted.outcome != FAIL:
        return Check(PASS, "", facts)
    return Check(FAIL, f"with its own casts lifted, {lifted.reason}", facts)


def _hidden_in_slices(evidence: Evidence) -> str:
    """Say which small channels or tokens are off by more than their casts explain."""
    exact, oracle = evidence.exact_pair
    least = _UNCAST if evidence.floor.tier == "float64" else (0.0, 0.0)
    for key, measured in (evidence.floor.sliced or {"A": _UNCAST}).items():
        noise = [max(both) for both in zip(measured, least, strict=True)]
        actual, expected = exact.outputs[key], oracle.outputs[key]
        found = sliced_relative_rms(actual, expected)
        for name, value, response in zip(("channel", "token"), found, noise, strict=True):
            limit = structural_limit(response)
            if value > limit:
                return (
                    f"{key}: relative_rms={value:.3g} in units of each {name}, but should be at"
                    f" most {limit:.3g}: larger ones hide it in the whole"
                )
    return ""


def drift(evidence: Evidence) -> Check:
    """The deployed dtype against the oracle, as a ratio to TP=1's own error."""
    facts: dict[str, Any] = {
        "expected": evidence.expected,
        "expected_source": evidence.expected_source,
    }
    if evidence.quantization_error is not None:
        facts["quantization_error"] = evidence.quantization_error
    if evidence.routing_flips or evidence.routing_pinned:
        facts |= {
            "routing": "pinned to the reference" if evidence.routing_pinned else "free",
            "routing_flips": evidence.routing_flips,
            "routing_margin": evidence.routing_margin,
        }
    actual, reference = evidence.deployed[0].outputs, _reference(evidence)
    keys = [key for key in _common(actual, reference) if key not in evidence.flipped]
    pairs = [(actual[key], reference[key]) for key in keys]
    if any(got.shape != want.shape for got, want in pairs):
        return Check(SKIPPED, "TP=N and TP=1 return different shapes", facts)
    if pairs and not any(_rounds(got) for got, _ in pairs):
        return Check(SKIPPED, f"the output is {pairs[0][0].dtype}: it does not round", facts)
    if lost := _lost_in_the_oracle(evidence):
        return Check(SKIPPED, lost, facts)
    overflow = _overflow(evidence)
    error, magnitude, count = pooled_rms(pairs)
    facts |= {"overflow": True} if overflow else {}
    if count == 0 and overflow:
        return Check(FAIL, overflow, facts)
    if count == 0:
        return Check(SKIPPED, "no element is finite in both: nothing to compare", facts)
    step = eps(evidence.dtype)
    base_error = _base_error(evidence, magnitude)
    at_1 = floored(base_error, magnitude, step)
    ratio = error / at_1 if at_1 else (0.0 if error == 0 else math.inf)
    limit = ratio_limit(evidence.expected, _error_count(evidence))
    facts |= {
        "ratio": ratio,
        "limit": limit,
        "epsilons": error / (step * magnitude) if magnitude else None,
        "tp1_epsilons": base_error / (step * magnitude) if magnitude else None,
        "smallest_bug": limit * at_1 / magnitude if magnitude else None,
        "oracle": evidence.oracle_dtype if evidence.oracle is not None else "TP=1 itself",
    }
    if overflow:
        return Check(FAIL, overflow, facts)
    if base_error >= magnitude > 0:
        reason = (
            f"TP=1's own error is {base_error / magnitude:.3g} x its output: in {evidence.dtype} it"
            f" is not the model that it is in {evidence.oracle_dtype}, so there is nothing to hold"
            " TP=N to (draw weights in one dtype and cast them, or take them from tp.weight)"
        )
        return Check(SKIPPED, reason, facts)
    if ratio > limit:
        reason = (
            f"error is {ratio:.3g} x that of TP=1, but should be at most {limit:.3g}:"
            f" this reduction explains {evidence.expected:.3g} ({evidence.expected_source})"
        )
        return Check(FAIL, reason, facts)
    return Check(PASS, "", facts)


def drifts(check: Check) -> bool:
    """Whether a drift check failed by its ratio; one that overflows has none to explain."""
    ratio, limit = check.facts.get("ratio"), check.facts.get("limit")
    return check.outcome == FAIL and ratio is not None and ratio > limit


def allclose(evidence: Evidence) -> Check:
    """TP=N against TP=1 in the deployed dtype; a user's tolerance decides, a derived one not."""
    compared_traces = (evidence.deployed[0], evidence.base)
    reference = _reference(evidence)
    base_error, magnitude, _ = pooled_rms(
        [
            (evidence.base.outputs[key], reference[key])
            for key in _common(evidence.base.outputs, reference)
        ]
    )
    if evidence.base_error is not None:
        base_error = evidence.base_error
    at_1 = floored(base_error, magnitude, eps(evidence.dtype))
    count = sum(t.numel() for t in evidence.base.outputs.values())
    tolerance = evidence.tolerance or derived_tolerance(at_1, ratio_limit(evidence.expected), count)
    facts: dict[str, Any] = {
        "atol": tolerance.atol,
        "rtol": tolerance.rtol,
        "source": tolerance.source,
        "decides": tolerance.decides,
    }
    try:
        own = _compare_all(evidence.base, evidence.oracle or evidence.base, rtol=tolerance.rtol)
        facts["tp1_error"] = max((c.worst_error for c in own.values()), default=0.0)
        facts["tp1_required_atol"] = max((c.required_atol for c in own.values()), default=0.0)
        compared = _compare_all(*compared_traces, rtol=tolerance.rtol, atol=tolerance.atol)
    except SubjectError as error:
        return Check(FAIL, str(error), facts)
    where, worst = max(
        compared.items(), key=lambda item: (item[1].mask_mismatches, item[1].required_atol)
    )
    masks = sum(c.mask_mismatches for c in compared.values())
    facts["required_atol"] = None if masks else worst.required_atol
    if not worst.required_atol and not any(
        t.isfinite().any() for t in evidence.base.outputs.values()
    ):
        return Check(SKIPPED, "no output of TP=1 is finite, so nothing was compared", facts)
    if worst.required_atol <= tolerance.atol and not masks:
        return Check(PASS, "", facts)
    smallest = scientific(worst.required_atol, up=True)
    if masks:
        smallest = f"none, because {masks} are finite on one side only"
    mismatched = sum(c.mismatches for c in compared.values())
    reason = (
        f"{where}: {mismatched} of {count} elements outside atol={tolerance.atol:.3g},"
        f" rtol={tolerance.rtol:.3g} ({tolerance.source}); smallest atol that passes:"
        f" {smallest}; worst at {list(worst.index)}: {worst.worst_actual:.6g}"
        f" for {worst.worst_expected:.6g}, {worst.worst_ulp:.3g} ulp"
    )
    return Check(FAIL, reason, facts)


def decode(evidence: Evidence) -> Check:
    """Prefill, then one token at a time: the logits of a whole forward, at every position."""
    if evidence.oracle is None or not evidence.exact:
        return Check(SKIPPED, "needs a float64 run")
    if "decode" not in evidence.exact[0].outputs:
        return Check(SKIPPED, "the subject has no prefill and step")
    limit = structural_limit(evidence.floor.relative_rms)
    exact, oracle = evidence.exact_pair
    want = oracle.outputs["A"]
    for degree, trace in ((1, oracle), (evidence.tp_size, exact)):
        got = trace.outputs.get("decode")
        if got is None:
            return Check(SKIPPED, f"the subject does not decode at TP={degree}")
        want_here = want if got.shape == want.shape else want[:, -got.shape[1] :]
        try:
            worst = compare(got, want_here)
        except SubjectError as error:
            return Check(FAIL, f"TP={degree}: {error}")
        if worst.mask_mismatches or worst.relative_rms > limit:
            masks = f" {worst.mask_mismatches} of them NaN or inf;" if worst.mask_mismatches else ""
            return Check(
                FAIL,
                f"TP={degree}: logits differ from a whole forward,{masks}"
                f" relative_rms={worst.relative_rms:.3g}, but should be at most {limit:.3g};"
                f" worst at {list(worst.index)}",
                {"relative_rms": worst.relative_rms, "limit": limit},
            )
    return Check(PASS, "", {"relative_rms": worst.relative_rms, "limit": limit})


CHECKS = {
    "structural": structural,
    "drift": drift,
    "allclose": allclose,
    "rank_agreement": rank_agreement,
    "repeatability": repeatability,
    "schedule": schedule,
    "tiling": tiling,
    "decode": decode,
}


def run_checks(evidence: Evidence) -> dict[str, Check]:
    """Return every check's result, in the order reports show them."""
    return {"plan": Check(PASS)} | {name: check(evidence) for name, check in CHECKS.items()}


def drift_alone(checks: Mapping[str, Check]) -> tuple[str, ...]:
    """Say how small a difference shows where rounding is all that could be judged."""
    smallest = checks["drift"].facts.get("smallest_bug")
    judged = checks["drift"].outcome != SKIPPED and checks["structural"].outcome == SKIPPED
    if not judged or smallest is None:
        return ()
    return (f"drift alone: what moves the output by less than {smallest:.2g} of it would not show",)


def _compare_all(
    actual: Trace, expected: Trace, *, rtol: float = 0.0, atol: float = 0.0
) -> dict[str, Comparison]:
    compared = {}
    for key in _common(actual.outputs, expected.outputs):
        try:
            compared[key] = compare(
                actual.outputs[key], expected.outputs[key], rtol=rtol, atol=atol
            )
        except SubjectError as error:
            raise SubjectError(f"{key}: {error}") from error
    return compared


def _common(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> list[str]:
    return [key for key in a if key in b and key not in (AGAIN, "decode")]


def _reference(evidence: Evidence) -> Mapping[str, torch.Tensor]:
    return (evidence.oracle or evidence.base).outputs


def _rounds(x: torch.Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _base_error(evidence: Evidence, magnitude: float) -> float:
    if evidence.base_error is not None:
        return evidence.base_error
    reference = _reference(evidence)
    outputs = evidence.base.outputs
    return pooled_rms([(outputs[key], reference[key]) for key in _common(outputs, reference)])[0]


def _error_count(evidence: Evidence) -> float:
    """Return how many independent errors TP=1's own error rests on; a bug cannot move it."""
    base, reference = evidence.base.outputs, _reference(evidence)
    pairs = [(base[key], reference[key]) for key in _common(base, reference)]
    return error_count([(got, want) for got, want in pairs if got.shape == want.shape])


def _mask_reason(actual: Trace, expected: Trace, key: str) -> str:
    got, want = actual.outputs[key], expected.outputs[key]
    bad = mask_difference(got, want)
    one_sided = bool((got.isfinite() != want.isfinite()).any())
    what = "finite on one side only" if one_sided else "not finite, but not the same"
    return (
        f"{int(bad.sum())} elements are {what}, at {describe_region(bad)}:"
        f" TP=N has {int(got.isnan().sum())} NaN and {int(got.isinf().sum())} inf,"
        f" TP=1 {int(want.isnan().sum())} and {int(want.isinf().sum())}"
    )


def _lost_in_the_oracle(evidence: Evidence) -> str:
    """Say where TP=1 is NaN in the wider dtype alone: there it is no oracle of anything."""
    base, reference = evidence.base.outputs, _reference(evidence)
    for key in _common(base, reference):
        if base[key].shape != reference[key].shape or not _rounds(reference[key]):
            continue
        lost = int((reference[key].isnan() & base[key].isfinite()).sum())
        if lost:
            return (
                f"{key}: TP=1 in {evidence.oracle_dtype} is NaN at {lost} of {base[key].numel()}"
                f" elements that are finite in {evidence.dtype}: no oracle of these (a mask"
                " of torch.finfo(tp.dtype).min in a float32 tensor is one, say)"
            )
    return ""


def _filters(reference: torch.Tensor) -> bool:
    """Whether other logits are -inf at other tokens: what is so at all of them is padding."""
    out = reference == -math.inf
    return out.ndim > 1 and bool((out != out.flatten(0, -2)[:1]).any())


def _left_out(actual: torch.Tensor, reference: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Return what a filter (top-k, top-p) may have left out by rounding: no more than it kept.

    Two values are in either order where they are no further apart than both may be off: TP=1's
    largest error, times what drift may be.
    """
    both = actual.isfinite() & reference.isfinite()
    kept = torch.where(both, reference, math.inf).amin(-1, keepdim=True)
    error = torch.where(base.isfinite() & reference.isfinite(), base.double() - reference, 0.0)
    off = ratio_limit(1.0) * float(error.abs().max())
    return (actual == -math.inf) & (reference <= kept + 2 * off)


def _overflow(evidence: Evidence) -> str:
    """Say what is not finite in the deployed dtype alone, and no filter left out."""
    actual, reference = evidence.deployed[0].outputs, _reference(evidence)
    for key in _common(actual, reference):
        bad = ~actual[key].isfinite() & reference[key].isfinite()
        if bad.any() and any(_filters(output) for output in reference.values()):
            bad &= ~_left_out(actual[key], reference[key], evidence.base.outputs[key])
        if bad.any():
            base = evidence.base.outputs[key]
            also = int((~base.isfinite() & reference[key].isfinite()).sum())
            return (
                f"{key}: {int(bad.sum())} elements are not finite in {evidence.dtype} but are in"
                f" {evidence.oracle_dtype}, at {describe_region(bad)}: overflow"
                f" (TP=1 in {evidence.dtype} has {also})"
            )
    return ""
