"""Activations made wider, or rounded to a grid: the inputs of linear layers, keys and values.

Requirement: the same function at every degree. A scale that a token's features share is made of all
of them, so where ranks hold some each the largest magnitude is a maximum over ranks; each rank's
own is another function. All of it is arithmetic in float32 or wider (grids: round_to).

[Ties] What was on a grid lies halfway between two values of another grid quite often: half of the
largest is 63.5 of int8's 127. A sum in another order then decides which way it goes, and float64
would tell two degrees apart that are one function. So float64 forgets its last bits first, and what
is near to halfway is halfway at every degree.

Shape legend: f this rank's features, G the groups of all ranks' features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tpcheck.groups.base import TPGroup
from tpcheck.numerics.grids import GRIDS, round_to


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return x in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def on_grid(x: torch.Tensor, scale: torch.Tensor, grid: str) -> torch.Tensor:
    """Return x as a grid with this scale holds it, in x's dtype; what is too large saturates."""
    return (round_to(_settled(wide(x) / wide(scale)), grid) * wide(scale)).to(x.dtype)


def _settled(x: torch.Tensor) -> torch.Tensor:
    """Return float64 in 33 bits, by arithmetic in float64 (rounding: [Ties]); others as they are.

    Source: Dekker 1971, A floating-point technique for extending the available precision, 5.
    """
    if x.dtype != torch.float64:
        return x
    large = x * (2.0**20 + 1)
    return large - (large - x)


class InputRounding:
    """x [..., f] -> x [..., f] on a grid, one scale per token and group of features.

    Args:
        grid: a key of numerics.grids.GRIDS.
        groups: for each real feature of this rank the group it belongs to, among all ranks'.
        count: how many groups there are.
        tp: the ranks that hold parts of one group; None where no group has parts on two ranks.
    """

    def __init__(
        self, grid: str, groups: Sequence[int], count: int, tp: TPGroup | None, device: torch.device
    ) -> None:
        self.grid, self.count, self.tp = grid, count, tp
        self.groups = torch.tensor(groups, dtype=torch.int64, device=device)

    def __call__(self, x_f: torch.Tensor) -> torch.Tensor:
        """Return the real features, rounded; pads are left out."""
        x_f = x_f[..., : len(self.groups)]
        largest_G = self.largest(x_f)
        if self.tp is not None:
            largest_G = self.tp.all_reduce(largest_G, op="max")
        ends = GRIDS[self.grid].max
        scale_G = torch.where(largest_G > 0, largest_G / ends, torch.ones_like(largest_G))
        return on_grid(x_f, scale_G.index_select(-1, self.groups), self.grid)

    def largest(self, x_f: torch.Tensor) -> torch.Tensor:
        """Return the largest magnitude of each group [..., G], among this rank's features."""
        none_G = wide(x_f).new_zeros(*x_f.shape[:-1], self.count)
        groups = self.groups.expand(x_f.shape)
        return none_G.scatter_reduce(-1, groups, wide(x_f).abs(), "amax")
