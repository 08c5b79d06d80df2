"""Which rank's term a sum counts wrongly, read in the rounded outputs.

Requirement: one rank of eight scaled by 1 + 2^-10 leaves every ratio of errors as it was. The exact
terms are known, though, and roundings know nothing of them: regress the error onto the terms, and a
wrong factor stands out by as many standard errors as there are outputs to average over.

Shape legend: R ranks, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIGNIFICANT = 8.0
"""Standard errors from which a factor counts; clean reductions stay below 5 (measured:
tests/unit/test_regression.py)."""

_MOST_ALIKE = 1e6
"""Condition number from which terms are too much alike to say whose factor is wrong."""


@dataclass(frozen=True, slots=True)
class ScaledRank:
    """The sum counts this rank's term `factor` times; `z`: standard errors away from once."""

    rank: int
    factor: float
    z: float

    @property
    def significant(self) -> bool:
        """Whether chance is no explanation."""
        return abs(self.z) >= SIGNIFICANT


def most_scaled_rank(partials_RN: Tensor, errors_N: Tensor) -> ScaledRank | None:
    """Return the rank whose factor is the most standard errors away from 1, significant or not.

    None where nothing can be said; arguments, errors and source as of `rank_factors`.
    """
    factors = rank_factors(partials_RN, errors_N)
    return None if factors is None else max(factors, key=lambda one: abs(one.z))


def rank_factors(partials_RN: Tensor, errors_N: Tensor) -> tuple[ScaledRank, ...] | None:
    """Return how many times the sum counts each rank's term, and how sure that is.

    None where nothing can be said: a number that is not finite, no more than 2 R outputs, a rank
    without a term, or terms that are multiples of each other.

    Args:
        partials_RN: every rank's term, float64.
        errors_N: actual minus exact sum, float64.

    Raises:
        ValueError: the partials are of other outputs.

    Source: least squares; the standard errors of White 1980, Econometrica 48, each output's own
        residual: large outputs round more coarsely. Measured: tests/unit/test_regression.py.
    """
    size, count = partials_RN.shape
    if errors_N.shape != (count,):
        raise ValueError(f"errors have {errors_N.numel()} outputs, but should have {count}")
    if count <= 2 * size or not (partials_RN.isfinite().all() and errors_N.isfinite().all()):
        return None
    lengths = partials_RN.norm(dim=1)
    if bool((lengths == 0).any()):
        return None
    left_Nr, values_r, right_rR = torch.linalg.svd(
        (partials_RN / lengths[:, None]).T, full_matrices=False
    )
    if float(values_r[-1]) * _MOST_ALIKE < float(values_r[0]):
        return None
    inverse_Rr = right_rR.T / values_r
    slopes_R = inverse_Rr @ (left_Nr.T @ errors_N) / lengths
    rest_N = errors_N - partials_RN.T @ slopes_R
    weights_RN = inverse_Rr @ left_Nr.T
    spread_R = (weights_RN.square() @ rest_N.square()).sqrt() / lengths
    z_R = slopes_R / spread_R.clamp_min(1e-150)
    pairs = zip(slopes_R.tolist(), z_R.tolist(), strict=True)
    return tuple(ScaledRank(rank, 1 + slope, z) for rank, (slope, z) in enumerate(pairs))
