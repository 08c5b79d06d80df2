"""The two halves of a tensor-parallel pair: a column-parallel linear, then a row-parallel one.

Requirement: exactly one all-reduce per pair. The column half needs none, because every rank makes
its own output features; the row half sums what the ranks' input features contribute.

[Pads] Padded features are computed like all others. The row half then leaves them out, with the
columns that would meet them: whatever they hold, NaN included, is in no product and in no sum.

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


def row_term(x_BTf: torch.Tensor, w_Df: torch.Tensor, real: int | None) -> torch.Tensor:
    """Return a rank's term of a row-parallel product: of its first `real` features, or of all."""
    if real is not None:
        x_BTf, w_Df = x_BTf[..., :real], w_Df[:, :real]
    return functional.linear(x_BTf, w_Df)


class ColumnParallelLinear(nn.Module):
    """x [B, T, D] -> y [B, T, f]: every rank makes its own output features."""

    def __init__(self, name: str, weights: RankWeights) -> None:
        super().__init__()
        self.round_input = weights.input_rounding(f"{name}.weight")
        self.weight_fD = frozen(weights.load(f"{name}.weight"))
        bias_f = weights.load_optional(f"{name}.bias")
        self.bias_f = None if bias_f is None else frozen(bias_f)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return this rank's features."""
        if self.round_input is not None:
            x_BTD = self.round_input(x_BTD)
        return functional.linear(x_BTD, self.weight_fD, self.bias_f)


class RowParallelLinear(nn.Module):
    """x [B, T, f] -> y [B, T, D]: ranks sum their terms; the bias is added once, after the sum."""

    def __init__(self, name: str, weights: RankWeights, tp: TPGroup) -> None:
        super().__init__()
        self.tp = tp
        self.round_input = weights.input_rounding(f"{name}.weight")
        self.weight_Df = frozen(weights.load(f"{name}.weight"))
        bias_D = weights.load_optional(f"{name}.bias")
        self.bias_D = None if bias_D is None else frozen(bias_D)
        self.real = weights.real(f"{name}.weight")

    def forward(self, x_BTf: torch.Tensor) -> torch.Tensor:
        """Return the whole output, equal on every rank."""
        if self.round_input is not None:
            x_BTf = self.round_input(x_BTf)
        y_BTD_partial = row_term(x_BTf, self.weight_Df, self.real)
        y_BTD = self.tp.all_reduce(y_BTD_partial)
        return y_BTD if self.bias_D is None else y_BTD + self.bias_D
