"""Mean squares of rounding errors, element by element: what a sum over ranks must leave.

Requirement: a prediction of drift, and an alarm on a reduction, rest on the same law. Rounding to
nearest leaves an error that is uniform over the spacing s of the dtype there: s^2 / 12. The
operands of a sum stand on a grid of their own, s / 2^m at the finest, so the sum's error takes one
of 2^m values, ties to even: s^2 (1/12 + 1/6 / 4^m), and none where m = 0. Two numbers of one
binade, m = 1, leave exactly 0 or s / 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tpcheck.numerics.ulp import ulps_of


def rounding_square(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mean square of the error that rounding a value to `dtype` leaves.

    Args:
        value: float64, of magnitudes that say where the dtype's steps are.

    Source: the variance of an error uniform over one spacing, s^2 / 12.
    """
    return ulps_of(value, dtype).square() / 12


def node_square(operands: Tensor, node: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mean square of the error that a rounded sum leaves; 0 where nothing is added.

    Args:
        operands: float64, stacked along the first dim: numbers of the dtype.
        node: their exact sum.

    Source: the variance of a uniform error on a grid, ties to even; see the module.
    """
    return sum_square(node, finest_grid([grid_of(one, dtype) for one in operands]), dtype)


def sum_square(node: Tensor, finest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `node_square` for operands of which the finest stand on a grid of that step.

    Source: as `node_square`.
    """
    step = ulps_of(node, dtype)
    coarser = (step / finest).square()
    return torch.where(coarser > 1, step.square() * (1 / 12 + 1 / (6 * coarser)), 0.0)


def grid_of(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the step of the grid that numbers of `dtype` stand on; infinite for 0, on every one.

    Source: numerics/ulp.py.
    """
    return torch.where(value != 0, ulps_of(value, dtype), math.inf)


def finest_grid(grids: Sequence[Tensor]) -> Tensor:
    """Return the step of the grid that a sum of numbers on these stands on before it is rounded.

    A sum that nearly cancels is a small number on its operands' coarse grid: adding to it rounds
    less than its size says.

    Source: sums of multiples of a step are multiples of it.
    """
    return torch.stack(list(grids)).amin(0)
