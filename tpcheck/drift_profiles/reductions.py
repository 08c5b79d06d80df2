"""The part of a drift profile that names reductions: which one each row-parallel layer shows.

Requirement: where the ranks' terms are known, the reduction can be named, held against the declared
one, and a rank that counts wrongly found. An alarm speaks of what TP=N does and TP=1 does not.

[Terms Judged] A layer's outputs are held against its exact terms, so that what a rank does to its
own counts. Where TP=1 by itself rounds more than its output (layers.py, [TP=1 As Control]),
they say little of the sum: there the terms that the ranks sent are taken. Where those were not seen
TP=1's own errors are allowed besides, and only what is wider than both together is an alarm.

Shape legend: R ranks, N outputs of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tpcheck.drift_profiles.layers import RowParallel
from tpcheck.numerics.alarm import JUDGED, TOLERATED, Declared, Wealth, declare
from tpcheck.numerics.identification import Hypothesis, Likelihood, describe, identify
from tpcheck.numerics.regression import rank_factors

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Judged:
    """A layer's outputs [N], the terms [R, N] they are held against, and what comes of that.

    declared: what the declared reduction leaves; None with a `reason` where that is not known.
    at_most: whether that is a bound only, below which nothing is told.
    """

    layer: RowParallel
    actual: Tensor
    terms: Tensor
    by: str
    findings: tuple[Likelihood, ...]
    declared: Declared | None
    reason: str
    at_most: bool

    def after(self, wealth: Wealth) -> Wealth:
        """Return the wealth after bets on this layer."""
        if self.declared is None:
            return wealth
        after = wealth.after(self.actual, self.declared)
        return replace(after, narrower=wealth.narrower) if self.at_most else after


def layers_json(
    layers: Sequence[RowParallel], declared: str, dtype: str, *, terms: str = "exact"
) -> Json:
    """Return which reduction each row-parallel layer's outputs show, and all of them together.

    Args:
        declared: the kind of reduction that the engine says it uses, in the deployed dtype.
        terms: "exact", or "sent" where layers are sums that were seen (`observed_sums`).

    Returns:
        `declared`; `terms`; `reduction`, of all layers together, and `layers`, a list with `fqn`
        each. Both have `outputs`; `identified`, a sentence; `findings`, the three most probable:
        `hypotheses`, `probability`, `reproduced`, `tipped`, `explains`; and `alarm`: `raised`
        ("wider", "narrower" or ""), `count`, `excess` (rms error over the declared one) and the
        bets' logarithms with their sums, None with a reason where nothing can be said. Layers also
        have `terms`, "exact" or "sent", and `tp1_excess` (see [Terms Judged]); `term_energy`, each
        rank's share, `rank_z`, by how many standard errors each rank's term is not counted once,
        and `scaled_rank`: `rank`, `factor`, `z` and `significant` of the rank whose term is counted
        most wrongly; None where nothing can be said.
    """
    judged = [_judge(layer, declared, dtype, terms) for layer in layers]
    wealth, reason = Wealth(), ""
    for one in judged:
        wealth = one.after(wealth)
        reason = reason or one.reason
    known = any(one.declared is not None for one in judged)
    pooled = _identified(_together(judged), sum(one.actual.numel() for one in judged))
    pooled |= {"alarm": _alarm(wealth)} if known else {"alarm": None, "alarm_reason": reason}
    entries = [_entry(one) for one in judged]
    return {"declared": declared, "terms": terms, "reduction": pooled, "layers": entries}


def _judge(layer: RowParallel, declared: str, dtype: str, by: str) -> _Judged:
    blurred = layer.tp1_excess > TOLERATED
    at_most = blurred and layer.sent is None
    terms = layer.terms
    if blurred and layer.sent is not None:
        terms, by = layer.sent, "sent"
    actual_N, terms_RN = layer.actual.flatten(), terms.flatten(1)
    reason, expected = f"the law covers {', '.join(JUDGED)}, not {declared}", None
    if declared in JUDGED:
        reason, expected = "", declare(terms_RN, declared, getattr(torch, dtype))
    if at_most and expected is not None and layer.tp1_errors is not None:
        own_N = layer.tp1_errors.flatten().nan_to_num(0.0, 0.0, 0.0)
        expected = replace(expected, errors=expected.errors.hypot(own_N))
    findings = identify(actual_N, terms_RN)
    return _Judged(layer, actual_N, terms_RN, by, findings, expected, reason, at_most)


def _entry(one: _Judged) -> Json:
    alarm: Json = {"alarm": None, "alarm_reason": one.reason}
    if one.declared is not None:
        alarm = {"alarm": _alarm(one.after(Wealth()))}
    return {
        "fqn": one.layer.fqn,
        **_identified(one.findings, one.actual.numel()),
        **alarm,
        "terms": one.by,
        "tp1_excess": one.layer.tp1_excess,
        **_counted(one.layer),
    }


def _counted(layer: RowParallel) -> Json:
    """Return how the sum counts each rank's exact term."""
    exact_RN = layer.terms.flatten(1)
    factors = rank_factors(exact_RN, layer.actual.double().flatten() - exact_RN.sum(0))
    energy = exact_RN.square().sum(1)
    found: Json = {"term_energy": (energy / energy.sum()).tolist() if energy.any() else None}
    if factors is None:
        return found | {"scaled_rank": None, "rank_z": None}
    most = max(factors, key=lambda one: abs(one.z))
    scaled = {"rank": most.rank, "factor": most.factor, "z": most.z}
    scaled["significant"] = most.significant
    return found | {"scaled_rank": scaled, "rank_z": [one.z for one in factors]}


def _together(judged: Sequence[_Judged]) -> tuple[Likelihood, ...]:
    """Return the findings of all layers together: what no layer tells apart is one."""
    outputs = sum(one.actual.numel() for one in judged)
    total = _log_likelihoods(judged)
    groups: dict[tuple[int, ...], list[Hypothesis]] = {}
    for hypothesis in total:
        key = tuple(_group_of(hypothesis, one.findings) for one in judged)
        groups.setdefault(key, []).append(hypothesis)
    best = max((total[members[0]] for members in groups.values()), default=0.0)
    scale = sum(math.exp(total[members[0]] - best) for members in groups.values())
    merged = []
    for key, members in groups.items():
        own = [(one.actual.numel(), one.findings[i]) for one, i in zip(judged, key, strict=True)]
        merged.append(
            Likelihood(
                tuple(members),
                sum(n * one.reproduced for n, one in own) / outputs,
                sum(n * one.tipped for n, one in own) / outputs,
                total[members[0]],
                math.exp(total[members[0]] - best) / scale,
            )
        )
    return tuple(sorted(merged, key=lambda one: -one.log_likelihood))


def _log_likelihoods(judged: Sequence[_Judged]) -> Mapping[Hypothesis, float]:
    total: dict[Hypothesis, float] = {}
    for one in judged:
        for finding in one.findings:
            for hypothesis in finding.hypotheses:
                total[hypothesis] = total.get(hypothesis, 0.0) + finding.log_likelihood
    return total


def _group_of(hypothesis: Hypothesis, findings: Sequence[Likelihood]) -> int:
    return next(i for i, one in enumerate(findings) if hypothesis in one.hypotheses)


def _identified(findings: Sequence[Likelihood], outputs: int) -> Json:
    return {
        "outputs": outputs,
        "identified": describe(findings),
        "findings": [
            {
                "hypotheses": [str(one) for one in finding.hypotheses],
                "probability": finding.probability,
                "reproduced": finding.reproduced,
                "tipped": finding.tipped,
                "explains": finding.explains,
            }
            for finding in findings[:3]
        ],
    }


def _alarm(wealth: Wealth) -> Json:
    return {
        "raised": wealth.alarm(),
        "count": wealth.count,
        "excess": wealth.excess,
        "squares": wealth.squares,
        "expected": wealth.expected,
        "wider": wealth.wider,
        "narrower": wealth.narrower,
    }
