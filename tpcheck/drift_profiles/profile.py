"""profile(evidence) -> dict: how far one case drifts at one degree, in one deployed dtype.

Requirement: "differences are normal" becomes numbers. A pure function of traces: TP=1 and TP=N in
the deployed dtype, TP=N with its sums carried in other dtypes, and the float64 oracle. It judges
nothing: a number that cannot be had is None, and a `<name>_reason` beside it says why.

[Epsilons] An error "in epsilons" is its size over eps of the deployed dtype times rms(oracle), so
that dtypes and models can be laid side by side; `relative_rms` is the same without eps.
[Prediction] In float64, every sum is given the rounding that this wire leaves of this case's own
partials (observation/injection.py); the output's response and TP=1's own error, which are
independent, add up. It speaks of rounding to nearest alone: not of a model that casts coarser than
its dtype, nor of one whose routing flips; and where the measured ratio is further than AGREES from
it, as far as these tokens can tell, something else is going on: `prediction not valid here`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tpcheck.drift_profiles.numbers import (
    closeness,
    difference_of,
    error_of,
    laid_out,
    positions_of,
    rms_of,
    sequences_of,
)
from tpcheck.drift_profiles.scores import scores, sequence_drift
from tpcheck.numerics.drift import expected_ratio, floored, ratio_limit
from tpcheck.numerics.low_precision import LOW_PRECISION
from tpcheck.numerics.spread import Interval, ratio_interval
from tpcheck.numerics.tolerance import PRESETS, Tolerance, derived_tolerance
from tpcheck.numerics.ulp import eps
from tpcheck.observation.wire import Seen
from tpcheck.trace import Trace

Json = dict[str, Any]

AGREES = 1.15
"""The factor within which the injected rounding holds on clean models: tests/unit/
test_injection.py."""

FLOAT16_MAX = 65504.0
_MAX_BINS = 64
"""Positions are pooled into at most so many bins."""


@dataclass(frozen=True, slots=True)
class Carried:
    """TP=N with its sums carried in one dtype; `reason` says why there is no trace.

    response: rms by which the float64 output moves under this wire's injected rounding; None where
    it was not injected. seen: every rank's, of the deployed dtype's run.
    """

    reduction: str
    deployed: bool = False
    trace: Trace | None = None
    seen: Sequence[Seen] = ()
    response: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class DriftEvidence:
    """What was run for one (case, degree, dtype); traces are rank 0's.

    not_valid: why predictions cannot hold here; empty where they may. kind: how the ranks sum.
    ids: input id -> token ids, for a subject that returns logits over `vocab_size` tokens.
    """

    dtype: str
    tp_size: int
    base: Trace
    carried: Sequence[Carried]
    oracle: Trace | None = None
    oracle_dtype: str = "float64"
    kind: str = "ring"
    not_valid: str = ""
    vocab_size: int = 0
    ids: Mapping[str, Tensor] = field(default_factory=dict)


def profile(evidence: DriftEvidence) -> Json:
    """Return the numbers of one (case, degree, dtype).

    Returns:
        `oracle`: the reference's dtype, or None: then whatever is "against the oracle" is None.
        `inputs`, `outputs` (elements compared).
        `tp1`: TP=1's own error, as `error` below.
        `reductions`: one entry per dtype on the wire, the deployed one first:
            `reduction`, `deployed`; where it could not be had, `reason` and nothing else;
            `error`: against the oracle, over elements finite on all sides: `epsilons` and
                `relative_rms`, and of |error| in epsilons `max`, `p50`, `p90`, `p99`, `p99_9`;
            `ratio`: TP=N's error over TP=1's, which is at least 0.15 epsilons; None where outputs
                overflow; `interval`: [low, high] of it with 95 % confidence, over sequences;
                `limit`: what is explained, `within`: whether it is below;
            `over_deployed`: its error over that of the deployed reduction, `over_deployed_interval`
                of it, from the same sequences; None for the deployed one;
            `prediction`: `ratio`, `valid`, `reason`; `bare_layer`: the law's closed form;
            `difference`: TP=N - TP=1: `rms`, `max` (in the output's own unit), `ulp`: a list of
                [up to so many ulp of TP=1's value, how many elements];
            `range`: `sums`, `operands` (dtype -> how many sums), `largest_partial`, `largest_at`,
                `largest_sum`, `headroom` (the wire's largest number over the largest partial or
                sum), `float16_headroom` (65504 over it), `overflowed_sums` (elements),
                `overflowed_outputs` (not finite, although the oracle is);
            `allclose`: against TP=1, at the seed values and at the derived tolerance: `source`,
                `atol`, `rtol`, `passes`, `mismatches`, `required_atol` (at that rtol) and
                `required_both` (one number for atol and rtol);
            `by_position`: `from`, `to`, `tp1_epsilons`, `epsilons`, for outputs [B, T, V];
            `by_rank`: the same by `rank`, over its shard of the vocabulary;
            `scores`, `sequences`, `decode`: see scores.py; the last is `sequences` through
                prefill and single steps.
    """
    judge = _Judge(evidence)
    first = next((one for one in evidence.carried if one.trace is not None), None)
    rows = [judge.row(one, first) for one in evidence.carried]
    return {
        "oracle": evidence.oracle_dtype if evidence.oracle is not None else None,
        "inputs": judge.keys,
        "outputs": judge.wanted.numel(),
        "tp1": judge.own_error(),
        "reductions": rows,
    }


class _Judge:
    """TP=1 and the oracle, laid out once as [tokens, V] for every reduction held against them."""

    def __init__(self, evidence: DriftEvidence) -> None:
        self._evidence = evidence
        self.keys = [key for key in evidence.base.outputs if key != "decode"]
        self._base = laid_out(evidence.base, self.keys)
        self._sequence = sequences_of(evidence.base, self.keys, evidence.ids)
        oracle = evidence.oracle
        self.wanted = self._base if oracle is None else laid_out(oracle, self.keys)
        self._known = oracle is not None
        self._finite = self._base.isfinite() & self.wanted.isfinite()
        self._step = eps(evidence.dtype)

    def own_error(self) -> Json | None:
        """Return TP=1's error against the oracle; None where there is no oracle."""
        if not self._known:
            return None
        return error_of(self._base, self.wanted, self._finite, self._step)

    def row(self, one: Carried, first: Carried | None) -> Json:
        """Return the entry of one reduction; `first` is what is deployed."""
        named = {"reduction": one.reduction, "deployed": one.deployed}
        if one.trace is None:
            return {**named, "reason": one.reason}
        actual = laid_out(one.trace, self.keys)
        finite = self._finite & actual.isfinite()
        lost = int((~actual.isfinite() & self.wanted.isfinite()).sum())
        known = self._known
        return {
            **named,
            "error": error_of(actual, self.wanted, finite, self._step) if known else None,
            **self._ratio(one, actual, finite, lost),
            **self._over_deployed(one, first, actual),
            "difference": difference_of(actual, self._base, finite, self._evidence.dtype),
            "range": {**_range(one, self._evidence), "overflowed_outputs": lost},
            "allclose": self._allclose(one, actual),
            "by_position": self._by_position(actual, finite) if known else None,
            **self._scores(one.trace, actual, finite),
        }

    def _ratio(self, one: Carried, actual: Tensor, finite: Tensor, lost: int) -> Json:
        law = expected_ratio(self._evidence.tp_size, _kind(one, self._evidence))
        if not self._known or lost or not finite.any():
            reason = "no oracle: TP=1's own error is not known" if not self._known else ""
            reason = reason or f"overflow: {lost} outputs are not finite where the oracle is"
            return {
                "ratio": None,
                "ratio_reason": reason,
                "interval": None,
                "limit": None,
                "within": False if lost else None,
                "prediction": _prediction(None, False, reason, law),
            }
        e_1 = self._squares(self._base, finite)
        e_n = self._squares(actual, finite)
        at_1, floor = self._tp1(finite)
        error = math.sqrt(float(e_n.sum()) / int(finite.sum()))
        ratio = error / at_1 if at_1 else 0.0
        least = floor**2 * finite.sum(1).double()
        interval = self._interval(e_n, e_1, least) if at_1 else None
        prediction = self._prediction(one, at_1, ratio, interval, law)
        explained = max(law, prediction["ratio"] or 0.0)
        limit = ratio_limit(explained)
        return {
            "ratio": ratio,
            "interval": None if interval is None else [interval.low, interval.high],
            "limit": limit,
            "within": ratio <= limit,
            "prediction": prediction,
        }

    def _prediction(
        self, one: Carried, at_1: float, ratio: float, interval: Interval | None, law: float
    ) -> Json:
        if self._evidence.not_valid:
            return _prediction(None, False, self._evidence.not_valid, law)
        if one.response is None or not at_1:
            return _prediction(None, False, "no rounding was injected", law)
        predicted = math.sqrt(1 + (one.response / at_1) ** 2)
        low, high = (ratio, ratio) if interval is None else (interval.low, interval.high)
        if low > AGREES * predicted or high < predicted / AGREES:
            return _prediction(predicted, False, f"measured is {ratio / predicted:.3g} x it", law)
        return _prediction(predicted, True, "", law)

    def _over_deployed(self, one: Carried, first: Carried | None, actual: Tensor) -> Json:
        none = {"over_deployed": None, "over_deployed_interval": None}
        if not self._known or first is None or first.trace is None or first is one:
            return none
        deployed = laid_out(first.trace, self.keys)
        if bool(((~actual.isfinite() | ~deployed.isfinite()) & self.wanted.isfinite()).any()):
            return {**none, "over_deployed_reason": "overflow in one of the two"}
        finite = self._finite & actual.isfinite() & deployed.isfinite()
        mine, theirs = self._squares(actual, finite), self._squares(deployed, finite)
        if not theirs.sum():
            return {**none, "over_deployed_reason": "the deployed reduction leaves no error"}
        interval = self._interval(mine, theirs)
        return {
            "over_deployed": math.sqrt(float(mine.sum() / theirs.sum())),
            "over_deployed_interval": None if interval is None else [interval.low, interval.high],
        }

    def _interval(self, *squares: Tensor) -> Interval | None:
        """Return where the ratio of two errors lies; tokens of one sequence go together."""
        count = int(self._sequence[-1]) + 1
        zeros = squares[0].new_zeros(count)
        actual, expected, *least = (zeros.index_add(0, self._sequence, x) for x in squares)
        return ratio_interval(actual, expected, least_B=least[0] if least else None)

    def _squares(self, actual: Tensor, finite: Tensor) -> Tensor:
        """Return each token's sum of squared errors."""
        return torch.where(finite, actual - self.wanted, 0.0).square().sum(1)

    def _tp1(self, finite: Tensor) -> tuple[float, float]:
        """Return TP=1's rms error, raised to its floor, and that floor."""
        count = max(1, int(finite.sum()))
        error = math.sqrt(float(self._squares(self._base, finite).sum()) / count)
        size = math.sqrt(float(torch.where(finite, self.wanted, 0.0).square().sum()) / count)
        return floored(error, size, self._step), floored(0.0, size, self._step)

    def _allclose(self, one: Carried, actual: Tensor) -> list[Json]:
        rtol, atol = PRESETS["seed-1e-2"]
        tried = [Tolerance(rtol, atol, "preset seed-1e-2")]
        if self._known:
            at_1, _ = self._tp1(self._finite)
            law = expected_ratio(self._evidence.tp_size, _kind(one, self._evidence))
            tried.append(derived_tolerance(at_1, ratio_limit(law), actual.numel()))
        return [closeness(actual, self._base, tolerance) for tolerance in tried]

    def _by_position(self, actual: Tensor, finite: Tensor) -> list[Json] | None:
        outputs = self._evidence.base.outputs
        if any(outputs[key].ndim != 3 for key in self.keys):
            return None
        positions = torch.cat([positions_of(outputs[key]) for key in self.keys])
        longest = int(positions.max()) + 1
        edges = torch.linspace(0, longest, min(longest, _MAX_BINS) + 1).round().long().tolist()
        rows = []
        for start, stop in pairwise(edges):
            here = ((positions >= start) & (positions < stop)).unsqueeze(1) & finite
            rows.append({"from": start, "to": stop, **self._part(actual, here)})
        return rows

    def _by_rank(self, actual: Tensor, finite: Tensor) -> list[Json]:
        width = -(-actual.shape[1] // self._evidence.tp_size)
        columns = torch.arange(actual.shape[1]) // width
        ranks = [rank for rank in range(self._evidence.tp_size) if bool((columns == rank).any())]
        return [
            {"rank": rank, **self._part(actual, (columns == rank).unsqueeze(0) & finite)}
            for rank in ranks
        ]

    def _part(self, actual: Tensor, here: Tensor) -> Json:
        """Return both errors over a part, in epsilons of the whole output's rms."""
        count = max(1, int(here.sum()))
        size = self._step * rms_of(self.wanted, self._finite)
        found = [
            math.sqrt(float(self._squares(x, here).sum()) / count) for x in (self._base, actual)
        ]
        at_1, at_n = (x / size if size else None for x in found)
        return {"tp1_epsilons": at_1, "epsilons": at_n}

    def _scores(self, trace: Trace, actual: Tensor, finite: Tensor) -> Json:
        evidence = self._evidence
        if not evidence.vocab_size or actual.shape[1] < evidence.vocab_size:
            why = "the subject returns no logits over a vocabulary"
            kinds = ("by_rank", "scores", "sequences", "decode")
            return dict.fromkeys(kinds) | {f"{name}_reason": why for name in kinds}
        oracle = None if evidence.oracle is None else evidence.oracle.outputs
        base = {key: evidence.base.outputs[key] for key in self.keys}
        ids = {key: evidence.ids[key] for key in self.keys if key in evidence.ids}
        found: Json = {
            "by_rank": self._by_rank(actual, finite) if self._known else None,
            "scores": scores(trace.outputs, base, oracle),
            "sequences": sequence_drift(trace.outputs, base, oracle, ids),
            **_through_steps(evidence, trace),
        }
        return found


def _through_steps(evidence: DriftEvidence, trace: Trace) -> Json:
    """Return the drift of A's score through prefill and single steps, where that was run."""
    oracle = None if evidence.oracle is None else evidence.oracle.outputs
    runs = (trace.outputs, evidence.base.outputs, *([] if oracle is None else [oracle]))
    if not all("decode" in outputs for outputs in runs) or "A" not in evidence.ids:
        return {"decode": None, "decode_reason": "not run: no prefill and step, or not deployed"}
    actual, base, *_ = ({"A": outputs["decode"]} for outputs in runs)
    want = None if oracle is None else {"A": oracle["decode"]}
    return {"decode": sequence_drift(actual, base, want, {"A": evidence.ids["A"]})}


def _kind(one: Carried, evidence: DriftEvidence) -> str:
    """Return the law's name for a reduction: a wider wire rounds the total once."""
    if one.deployed:
        return evidence.kind
    if one.reduction in LOW_PRECISION:
        return one.reduction
    return "wide" if eps(one.reduction) < eps(evidence.dtype) else evidence.kind


def _prediction(ratio: float | None, valid: bool, reason: str, law: float) -> Json:
    return {"ratio": ratio, "valid": valid, "reason": reason, "bare_layer": law}


def _range(one: Carried, evidence: DriftEvidence) -> Json:
    """Return how large the summed values are, against what the wire can hold."""
    operands: dict[str, int] = {}
    for name, count in one.seen[0].dtypes.items() if one.seen else ():
        operands[name] = count
    largest = max(one.seen, key=lambda seen: seen.largest_partial, default=Seen())
    top = max(largest.largest_partial, *(seen.largest_sum for seen in one.seen), 0.0)
    wire = one.reduction if hasattr(torch, one.reduction) else ""
    held = float(torch.finfo(getattr(torch, wire)).max) if wire else FLOAT16_MAX
    return {
        "sums": sum(operands.values()),
        "operands": operands,
        "largest_partial": largest.largest_partial if operands else None,
        "largest_at": largest.largest_at,
        "largest_sum": max((seen.largest_sum for seen in one.seen), default=None),
        "headroom": held / top if top and one.reduction != "fp8_wire" else None,
        "float16_headroom": FLOAT16_MAX / top if top else None,
        "overflowed_sums": max((seen.overflowed for seen in one.seen), default=0),
    }
