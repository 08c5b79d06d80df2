"""The two halves of a tensor-parallel pair: a column-parallel linear, then a row-parallel one.

Requirement: exactly one all-reduce per pair. The column half needs none, because every rank makes
its own output features; the row half sums what the ranks' input features contribute.

Shape legend: B batch, T tokens, D hidden, F features; capital = full, lower case = this rank's.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tpcheck.groups.base import TPGroup
from tpcheck.reference.weights import RankWeights


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    """Return a parameter that takes no gradient: the decoder only runs forward."""
    return nn.Parameter(tensor, requires_grad=False)


class ColumnParallelLinear(nn.Module):
    """x [B, T, D] -> y [B, T, f]: every rank makes its own output features."""

    def __init__(self, name: str, weights: RankWeights) -> None:
        super().__init__()
        self.weight_fD = frozen(weights.load(f"{name}.weight"))
        bias_f = weights.load_optional(f"{name}.bias")
        self.bias_f = None if bias_f is None else frozen(bias_f)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return this rank's features."""
        return functional.linear(x_BTD, self.weight_fD, self.bias_f)


class RowParallelLinear(nn.Module):
    """x [B, T, f] -> y [B, T, D]: ranks sum their terms; the bias is added once, after the sum."""

    def __init__(self, name: str, weights: RankWeights, tp: TPGroup) -> None:
        super().__init__()
        self.tp = tp
        self.weight_Df = frozen(weights.load(f"{name}.weight"))
        bias_D = weights.load_optional(f"{name}.bias")
        self.bias_D = None if bias_D is None else frozen(bias_D)

    def forward(self, x_BTf: torch.Tensor) -> torch.Tensor:
        """Return the whole output, equal on every rank."""
        y_BTD_partial = functional.linear(x_BTf, self.weight_Df)
        y_BTD = self.tp.all_reduce(y_BTD_partial)
        return y_BTD if self.bias_D is None else y_BTD + self.bias_D
