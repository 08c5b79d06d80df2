"""RMSNorm and LayerNorm, whole or over a dim that is split across ranks.

Requirement: statistics are taken in float32 or wider. [Upcast] `wide(x)` never narrows: float64
stays float64, so that a float64 run of the decoder has no rounding but float64's own.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tpcheck.groups.base import TPGroup
from tpcheck.reference.linear import frozen
from tpcheck.reference.rounding import wide
from tpcheck.reference.weights import RankWeights
from tpcheck.spec import ModelSpec


def make_norm(name: str, spec: ModelSpec, weights: RankWeights) -> nn.Module:
    """Return the norm over hidden_size that a spec asks for."""
    if spec.norm_type == "layer":
        return LayerNorm(name, spec.norm_eps, weights)
    return RMSNorm(name, spec.norm_eps, weights)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim."""

    def __init__(self, name: str, eps: float, weights: RankWeights) -> None:
        super().__init__()
        self.eps = eps
        self.weight = frozen(weights.load(f"{name}.weight"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized input, in its dtype."""
        x_wide = wide(x)
        mean_square = x_wide.square().mean(-1, keepdim=True)
        return (x_wide * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * self.weight


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last dim."""

    def __init__(self, name: str, eps: float, weights: RankWeights) -> None:
        super().__init__()
        self.eps = eps
        self.weight = frozen(weights.load(f"{name}.weight"))
        self.bias = frozen(weights.load(f"{name}.bias"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized input, in its dtype."""
        y = functional.layer_norm(
            wide(x), self.weight.shape, wide(self.weight), wide(self.bias), self.eps
        )
        return y.to(x.dtype)


class ShardedRMSNorm(nn.Module):
    """RMSNorm over all heads together, [B, T, h, d] -> [B, T, h, d], heads split across ranks.

    The ranks' sums of squares are added by an all-reduce. Of a KV head that is held several times
    only the first copy counts, and a padded head never does.
    """

    def __init__(
        self,
        name: str,
        spec: ModelSpec,
        weights: RankWeights,
        tp: TPGroup,
        *,
        heads: int,
        counted: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.tp = tp
        self.eps = spec.norm_eps
        self.full_size = heads * spec.head_dim
        self.weight_hd = frozen(weights.load(f"{name}.weight").view(-1, spec.head_dim))
        every = counted == tuple(range(len(self.weight_hd)))
        self.counted = None if every else torch.tensor(counted, dtype=torch.int64, device=tp.device)

    def forward(self, x_BThd: torch.Tensor) -> torch.Tensor:
        """Return this rank's heads, normalized by the rms over all ranks' heads."""
        x_wide = wide(x_BThd)
        counted = x_wide if self.counted is None else x_wide.index_select(-2, self.counted)
        squares_BT_partial = counted.square().sum((-2, -1), keepdim=True)
        mean_square = self.tp.all_reduce(squares_BT_partial) / self.full_size
        return (x_wide * torch.rsqrt(mean_square + self.eps)).to(x_BThd.dtype) * self.weight_hd
