"""A sequential test: is a row-parallel layer's error what its declared reduction must cost?

Requirement: a switch from a wide accumulator to per-hop rounding costs a factor of 1.33 at four
ranks, and no tolerance on logits sees it. Outputs are many and their roundings nearly independent,
so a test that adds them up sees it within some hundred of them, case by case, at a false-alarm rate
that holds however often one looks.

[Betting] The declared class is emulated on the case's own exact partials, and the squares of two
sets of errors, the actual and the emulated, are compared: their ratio is bet on being that of
errors drawn k times wider (or narrower). While errors are what was declared, or up to TOLERATED
off, the wealth of normal errors cannot be expected to grow, so the chance that it ever exceeds
1 / rate is at most the rate (Ville's inequality): there is no last look to correct for. How large
one emulation came out by chance is in the ratio's distribution, so it holds for a single output
too. Roundings have hardly heavier tails than the normal (kurtosis 2.2 to 3.3, measured), and no
class is off by all that is tolerated.
[Weights] Errors are divided by the general law first, so that large outputs do not drown the rest.
The law alone serves for planning.
[Same Bits] Where the actual sum is the emulation bit for bit the ratio is 1 and nothing can be
raised: the rate is about another order, another kernel, another rounding of the local products.

Shape legend: R ranks, N outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tpcheck.numerics.reduction import reduce_sum, sum_steps
from tpcheck.numerics.roundoff import node_square, rounding_square

WIDER, NARROWER = 1.15, 0.87
"""What is bet on. A bet on k gains from errors sqrt(k) wider than tolerated, 13 % wider than
declared at 1.15: above what an emulation is off by (3 %), below the least excess to find (20 %)."""

TOLERATED = 1.05
"""Errors up to this factor off are as declared: one class's orders differ by up to 3 %."""

FLOOR = 1e-4
"""Added to every square: a hundredth of the law's rms, what local products and float32 accumulators
may leave of terms that cancel exactly. One of them twice another is no finding."""

RATE = 1e-6
"""The chance that a layer as declared ever raises an alarm: 1 in 100 over 10,000 runs."""

JUDGED = ("ring", "tree", "wide", "fp32_wire")
"""Kinds that the law covers. A wire in blocks errs by its block's largest value: numerics/
low_precision.py says how far, and numerics/identification.py whether it was that wire."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What a class leaves in one case: exact outputs, the law's rms and the emulated errors, [N].

    Outputs of sigma 0 or NaN are not judged: nothing is rounded there, or the class overflows.
    """

    exact: Tensor
    sigma: Tensor
    errors: Tensor


@dataclass(frozen=True, slots=True)
class Wealth:
    """What two bets came to after `count` outputs, as logarithms.

    `squares` and `expected` are the sums of (error / sigma)^2, actual and emulated, each with its
    FLOOR.
    """

    count: int = 0
    squares: float = 0.0
    expected: float = 0.0
    wider: float = 0.0
    narrower: float = 0.0

    def after(self, actual_N: Tensor, declared: Declared) -> Wealth:
        """Return the wealth after one more case; a case of which nothing is judged changes nothing.

        An infinity or NaN where the declared class has none is an alarm by itself, and stays one.

        Args:
            actual_N: what the layer gave, in the dtype it gave it; any shape. A repeated token's
                outputs are evidence once: leave the copies out here and in `declare`.
            declared: of the same case, from `declare`.

        Raises:
            ValueError: there are not as many outputs as declared ones.
        """
        actual = actual_N.reshape(-1).double()
        if actual.shape != declared.exact.shape:
            wanted = declared.exact.numel()
            raise ValueError(f"actual has {actual.numel()} outputs, but should have {wanted}")
        held = declared.sigma > 0  # NaN is not
        sigma = declared.sigma[held]
        count = sigma.numel()
        expected = float((declared.errors[held] / sigma).square().sum()) + FLOOR * count
        squares = float(((actual - declared.exact)[held] / sigma).square().sum()) + FLOOR * count
        if not count:
            return self
        if not math.isfinite(squares):
            return Wealth(self.count + count, math.inf, self.expected, math.inf, -math.inf)
        return Wealth(
            self.count + count,
            self.squares + squares,
            self.expected + expected,
            self.wider + count * _bet(squares / expected / TOLERATED**2, WIDER),
            self.narrower + count * _bet(squares / expected * TOLERATED**2, NARROWER),
        )

    @property
    def excess(self) -> float:
        """Rms error in units of the declared one; 1 where nothing was seen."""
        return math.sqrt(self.squares / self.expected) if self.expected else _unseen(self.squares)

    def alarm(self, rate: float = RATE) -> str:
        """Return "wider" or "narrower" where the declared reduction is refuted, else ""."""
        limit = math.log(2 / rate)  # two bets share the rate
        if self.wider > limit:
            return "wider"
        return "narrower" if self.narrower > limit else ""


def outputs_needed(excess: float, rate: float = RATE) -> float:
    """Return how many outputs an error `excess` times the declared takes to raise an alarm.

    An expectation over many outputs, as independent as those of one bare layer; infinite where the
    bets do not gain.

    Source: [Betting]; measured beside it: benchmarks/results/reduction_alarm.json.
    """
    limit, squares = math.log(2 / rate), excess**2
    gain = max(_bet(squares / TOLERATED**2, WIDER), _bet(squares * TOLERATED**2, NARROWER))
    return limit / gain if gain > 0 else math.inf


def declare(partials_RN: Tensor, kind: str, dtype: torch.dtype) -> Declared:
    """Return what a class leaves in the sum of these partials.

    A tree that pairs other neighbours is another reduction: where partials cancel in pairs it errs
    by a quarter more.

    Args:
        partials_RN: every rank's exact term, float64, [R, ...]. For float32 outputs, and float32
            wires whose total nearly cancels, the term that the rank sent: there local products
            round as much as the sum does.
        kind: one of JUDGED. `fp32_wire` hands on terms that were never rounded to `dtype`; where a
            layer rounds them and only then sends float32, that is `wide`.
        dtype: of the terms, the wire and the outputs.

    Raises:
        ValueError: the kind or dtype is not judged.

    Source: law_sigma; numerics/reduction.py. Measured: benchmarks/results/reduction_alarm.json.
    """
    kind = _judged(kind, dtype)
    terms_RN = partials_RN.reshape(len(partials_RN), -1)
    sigma_N = law_sigma(terms_RN, kind, dtype)
    carried = torch.float32 if kind == "fp32_wire" else dtype
    emulated_N = reduce_sum(list(terms_RN.to(carried)), kind).to(dtype).double()
    exact_N = terms_RN.sum(0)
    judged = emulated_N.isfinite() & exact_N.isfinite()
    return Declared(exact_N, sigma_N.masked_fill(~judged, math.nan), emulated_N - exact_N)


def law_sigma(partials_RN: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Return each output's rms error [N] by the general law; NaN where a term is not finite.

    A class rounds the ranks' terms (fp32_wire does not, nor is there anything to round in a term
    that `dtype` holds) and its nodes, independently. A term's error is uniform over the spacing s
    of numbers there: s^2 / 12. A node's operands stand on a grid of their own, s / 2^m at the
    finest, so its error is one of 2^m values: s^2 (1/12 + 1/6 / 4^m), and none where m = 0. Two
    numbers of one binade, m = 1, leave exactly 0 or s / 2. A ring may begin at any rank: what
    stands here is the mean over all beginnings.

    Args:
        partials_RN: every rank's exact term, float64.
        kind: one of JUDGED.
        dtype: of the terms, the wire and the outputs.

    Raises:
        ValueError: the kind or dtype is not judged.

    Source: the general law of numerics/drift.py; the variance of a uniform error on a grid, ties
        to even. Within 1 % of measured; up to 12 % high for trees of coherent partials, where a
        tie leaves an even number and the next sum has fewer ties, and 14 % low for terms that were
        never rounded and cancel in float16, where the local products show.
    """
    kind = _judged(kind, dtype)
    squares = torch.zeros_like(partials_RN[0])
    for term in partials_RN if kind != "fp32_wire" else []:
        squares += torch.where(term != term.to(dtype).double(), rounding_square(term, dtype), 0.0)
    if kind == "ring":
        squares += _ring_nodes(partials_RN, dtype)
    elif kind == "fp32_wire":
        total = partials_RN.sum(0)
        squares += torch.where(total != 0, rounding_square(total, dtype), 0.0)
        squares += law_sigma(partials_RN, "ring", torch.float32).square()
    else:
        for operands, node in sum_steps(list(partials_RN), kind):
            squares += node_square(torch.stack(operands), node, dtype)
    return squares.sqrt().masked_fill(~partials_RN.isfinite().all(0), math.nan)


def _ring_nodes(terms_RN: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mean, over the ranks at which it may begin, of what a ring's nodes leave."""
    squares = torch.zeros_like(terms_RN[0])
    for start in range(len(terms_RN)):
        inward_RN = terms_RN.flip(0).roll(start, 0)
        sums_RN = inward_RN.cumsum(0)
        operands = torch.stack([sums_RN[:-1], inward_RN[1:]])
        squares += node_square(operands, sums_RN[1:], dtype).sum(0)
    return squares / len(terms_RN)


def _bet(ratio: float, k: float) -> float:
    """Return one output's share of the logarithm of F(ratio / k^2) / F(ratio).

    F is the distribution of the ratio of two equally many squares: the chances of a ratio where
    errors are drawn k times wider, over those where they are not, whatever both were drawn from.

    Source: the density x^(n/2 - 1) / (1 + x)^n of Fisher's F with n and n degrees of freedom.
    """
    return math.log((1 + ratio) / (1 + ratio / k**2)) - math.log(k)


def _unseen(squares: float) -> float:
    return math.inf if squares else 1.0


def _judged(kind: str, dtype: torch.dtype) -> str:
    """Return the kind as the law knows it: in float32 layers a float32 wire is the ring."""
    if kind not in JUDGED:
        raise ValueError(f"kind={kind!r}, but should be one of {', '.join(JUDGED)}: the law's")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype={dtype}, but should be bfloat16, float16 or float32")
    return "ring" if kind == "fp32_wire" and dtype == torch.float32 else kind
