"""The feed-forward block: gated (SwiGLU and its family) or plain (GPT-2), split by features.

Requirement: one all-reduce, in down_proj. Gate and up hold the same features on a rank, so that
their product needs no communication.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tpcheck.groups.base import TPGroup
from tpcheck.reference.linear import ColumnParallelLinear, RowParallelLinear
from tpcheck.reference.weights import RankWeights
from tpcheck.spec import ModelSpec

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
}


def gated(spec: ModelSpec, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return act(gate) * up; where the spec has a limit, both are clamped as gpt-oss does it.

    Source: as transformers 5.23's modeling_gpt_oss computes it.
    """
    if not spec.swiglu_limit:
        return ACTIVATIONS[spec.hidden_act](gate) * up
    gate = gate.clamp(max=spec.swiglu_limit)
    up = up.clamp(-spec.swiglu_limit, spec.swiglu_limit)
    return gate * (spec.swiglu_alpha * gate).sigmoid() * (up + 1)


class MLP(nn.Module):
    """x [B, T, D] -> y [B, T, D], both equal on every rank."""

    def __init__(self, layer: int, spec: ModelSpec, weights: RankWeights, tp: TPGroup) -> None:
        super().__init__()
        name = f"model.layers.{layer}.mlp"
        self.spec = spec
        self.gate_proj = None
        if spec.mlp == "gated":
            self.gate_proj = ColumnParallelLinear(f"{name}.gate_proj", weights)
        self.up_proj = ColumnParallelLinear(f"{name}.up_proj", weights)
        self.down_proj = RowParallelLinear(f"{name}.down_proj", weights, tp)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""
        if self.gate_proj is None:
            y_BTf = ACTIVATIONS[self.spec.hidden_act](self.up_proj(x_BTD))
        else:
            y_BTf = gated(self.spec, self.gate_proj(x_BTD), self.up_proj(x_BTD))
        return self.down_proj(y_BTf)  # type: ignore[no-any-return]
