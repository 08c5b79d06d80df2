"""Which reduction summed a row-parallel layer, told from its outputs alone.

Requirement: an engine's configuration says what should have summed; its outputs say what did. The
ranks' exact partials are known, so every hypothesis can be run on them: under the true one most
outputs come out bit for bit, and where local products round otherwise, within an ulp or two.

[Same Outputs] Two hypotheses that round these partials alike cannot be told apart by anybody: they
are one finding, named together. At two ranks that is ring, tree and wide. Nor can two that differ
in fewer outputs than local products tip, because they differ where a rounding was close: orders of
float32 adds whose total nearly cancels.
[Tipped] The partials are stirred by as much as local products in float32 err, and the outputs that
a hypothesis then gives otherwise are counted: that many it may miss and be true all the same.
Partials that float32 holds exactly are what the ranks sent, and are left as they are.
[None of These] Probabilities are beside the other hypotheses only, so one of them always leads. A
finding explains the outputs where it misses hardly more of them than may be tipped; where the
leading one does not, `describe` says so and names nothing. A class that is not among the hypotheses
may still round like one of them in all but a few outputs, orders of float16 adds under bfloat16
outputs above all: what was not tried cannot be ruled out.
[Float32 Outputs] are rounded by the local products as much as by the sum, so that exact partials
tell the wire and not the order: there, and in float64, hand in the partials that the ranks sent.

Shape legend: R ranks, N outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpcheck.numerics.low_precision import LOW_PRECISION, carried_as
from tpcheck.numerics.named_orders import ORDERS, sum_in_order

MISS = 0.05
"""How often an output misses the emulation of its true class, for the likelihood; more often than
local products in float32 make it (measured: benchmarks/results/identification.json)."""

FARTHEST = 16
"""Misses count as at most this many ulp: a bug in one element must not choose the class."""

ALIKE = 1e-3
"""Hypotheses whose emulations differ in a smaller share of the outputs are one finding."""

LOCAL_ERROR = 2.0**-21
"""Rms error of local products in float32, in units of their rms: measured 2^-21.6 to 2^-23.4 for
512 to 4,096 terms, with an outlier among them or none."""

BUGS = 0.01
"""Outputs that may be missed for reasons of their own, besides twice those that are tipped."""

CONFIDENT = 0.99
"""A name is given to the findings that together are this probable: one, unless it was close."""

_WIRES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """`wire`: what partials are rounded to before they are summed. `kind`: how they are summed."""

    wire: str
    kind: str

    def __str__(self) -> str:
        return f"{self.kind} in {self.wire}"


@dataclass(frozen=True, slots=True)
class Likelihood:
    """One finding: hypotheses that these outputs cannot tell apart, and how they fare.

    `reproduced` and `tipped` are shares of the outputs: those that come out bit for bit, and those
    that local products may change. `probability` is beside the other findings, all as likely
    beforehand.
    """

    hypotheses: tuple[Hypothesis, ...]
    reproduced: float
    tipped: float
    log_likelihood: float
    probability: float

    @property
    def explains(self) -> bool:
        """Whether outputs are missed no more often than a true class may miss them."""
        return 1 - self.reproduced <= BUGS + 2 * self.tipped

    def __str__(self) -> str:
        return " = ".join(map(str, self.hypotheses))


def hypotheses(dtype: str) -> tuple[Hypothesis, ...]:
    """Return what is tried for outputs of a dtype: wires, orders, and the engines' other wires.

    `fp32_wire` is of terms that the layer has rounded to its dtype, `ring in float32` of terms that
    it has not.

    Source: numerics/named_orders.py, and the dtypes that engines take for them.
    """
    wires = _WIRES if dtype in _WIRES else (*_WIRES, dtype)
    plain = [Hypothesis(wire, kind) for wire in wires for kind in ORDERS]
    named = getattr(torch, dtype)
    other = [kind for kind in LOW_PRECISION if carried_as(kind, named) == kind]
    other += ["fp32_wire"] if named.itemsize < torch.float32.itemsize else []
    return tuple(plain + [Hypothesis(dtype, kind) for kind in other])


def emulate(partials_RN: Tensor, hypothesis: Hypothesis, dtype: torch.dtype) -> Tensor:
    """Return the outputs [N] that a hypothesis makes of exact partials, in `dtype`.

    Partials are rounded to `dtype` first, which the layer computes in, except where the wire is
    wider: then a kernel hands its accumulator on unrounded.

    Source: numerics/reduction.py, bit for bit; numerics/named_orders.py.
    """
    wire: torch.dtype = getattr(torch, hypothesis.wire)
    if wire.itemsize <= dtype.itemsize:
        partials_RN = partials_RN.to(dtype)
    return sum_in_order(list(partials_RN.to(wire)), hypothesis.kind).to(dtype)


def identify(
    actual_N: Tensor, partials_RN: Tensor, tried: Sequence[Hypothesis] = ()
) -> tuple[Likelihood, ...]:
    """Return the findings, the most probable first; `describe` puts them into words.

    Args:
        actual_N: what the layer gave, in the dtype it gave it: all of one all-reduce, whose chunks
            are cut from the whole tensor; any shape.
        partials_RN: every rank's exact term, or the one that it sent, float64, [R, ...].
        tried: by default `hypotheses` of the dtype.

    Raises:
        ValueError: there is no output, the dtype is no float, or the partials are of other outputs.

    Source: a mixture of exact hits and misses that fall off by one half per ulp; constants above.
        500 blind draws: benchmarks/results/identification.json.
    """
    dtype = actual_N.dtype
    if partials_RN.shape[1:] != actual_N.shape or not actual_N.numel():
        shapes = f"partials have shape={list(partials_RN.shape)}"
        raise ValueError(f"{shapes}, but should be [ranks, *{list(actual_N.shape)}], not empty")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}, but should be a float: integers have no rounding to read")
    actual_N, partials_RN = actual_N.reshape(-1), partials_RN.reshape(len(partials_RN), -1)
    names = tuple(tried) or hypotheses(str(dtype).removeprefix("torch."))
    stirred_RN = _stirred(partials_RN) if dtype != torch.float64 else partials_RN
    groups: list[_Group] = []
    for hypothesis in names:
        emulated = emulate(partials_RN, hypothesis, dtype)
        alike = (one for one in groups if _differ(one.outputs, emulated) < ALIKE)
        group = next(alike, None)
        if group is not None:
            group.members.append(hypothesis)
            continue
        tipped = _differ(emulated, emulate(stirred_RN, hypothesis, dtype))
        score = _log_likelihood(actual_N, emulated)
        groups.append(_Group([hypothesis], emulated, tipped, score))
    best, *others = sorted(groups, key=lambda one: -one.score)
    close = [one for one in others if _differ(best.outputs, one.outputs) < best.tipped]
    best.members.extend(hypothesis for one in close for hypothesis in one.members)
    groups = [best, *(one for one in others if one not in close)]
    total = sum(math.exp(one.score - best.score) for one in groups)
    return tuple(
        Likelihood(
            tuple(one.members),
            1 - _differ(actual_N, one.outputs),
            one.tipped,
            one.score,
            math.exp(one.score - best.score) / total,
        )
        for one in groups
    )


def describe(findings: Sequence[Likelihood]) -> str:
    """Return what findings, the most probable first, allow to say: a class, a few, or none.

    Source: [None of These]; CONFIDENT.
    """
    first = findings[0]
    if not first.explains:
        nearest = f"the nearest, {first}, reproduces {first.reproduced:.1%} of the outputs"
        return f"none of the {sum(len(one.hypotheses) for one in findings)} tried: {nearest}"
    close: list[Likelihood] = []
    for finding in findings:
        close.append(finding)
        if sum(one.probability for one in close) >= CONFIDENT:
            break
    if len(close) == 1:
        return str(first)
    return " or ".join(f"{one} ({one.probability:.0%})" for one in close)


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    members: list[Hypothesis]
    outputs: Tensor
    tipped: float
    score: float


def _stirred(partials_RN: Tensor) -> Tensor:
    """Return partials as other local products might have made them; see [Tipped]."""
    if bool(_same(partials_RN, partials_RN.float()).all()):
        return partials_RN
    generator = torch.Generator().manual_seed(0)
    noise_RN = torch.randn(partials_RN.shape, generator=generator, dtype=torch.float64)
    finite_RN = partials_RN.masked_fill(~partials_RN.isfinite(), 0.0)
    rms_R1 = finite_RN.square().mean(1, keepdim=True).sqrt()
    return partials_RN + noise_RN.to(partials_RN.device) * rms_R1 * LOCAL_ERROR


def _log_likelihood(actual: Tensor, emulated: Tensor) -> float:
    finite = actual.isfinite() & emulated.isfinite()
    same = _same(actual, emulated)
    away = _ulps_apart(actual, emulated)
    away = torch.where(finite, away, torch.full_like(away, FARTHEST)).clamp(1, FARTHEST)
    misses = math.log(MISS / 2) - (away - 1) * math.log(2) - math.log(2)
    return float(torch.where(same, torch.full_like(away, math.log1p(-MISS)), misses).sum())


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _differ(a: Tensor, b: Tensor) -> float:
    """Return the share of outputs that are not the same."""
    return float((~_same(a, b)).double().mean())


def _ulps_apart(actual: Tensor, emulated: Tensor) -> Tensor:
    exact = emulated.double()
    info = torch.finfo(actual.dtype)
    exponent = torch.frexp(exact.abs().clamp_min(float(info.tiny))).exponent - 1
    return (actual.double() - exact).abs() / (info.eps * torch.exp2(exponent.double()))
