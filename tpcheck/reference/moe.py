"""A mixture of experts in the MLP's place: a router, routed experts, and one shared by all tokens.

Requirement: one all-reduce. The router is whole on every rank, so that all ranks choose the same
experts; every expert is split by features, as the MLP is. What the routed experts and the shared
one give are terms of one sum over ranks: reducing either by itself, or neither, or adding one that
is whole already, counts it wrongly.

[Chosen Tokens] An expert sees only the tokens that chose it: a weight of zero would not silence
what overflowed in an expert that nobody asked.

Shape legend: B batch, T tokens, N the tokens that chose one expert, D hidden, E experts,
f features of one expert; capital = full, lower case = this rank's.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tpcheck.groups.base import TPGroup
from tpcheck.reference.linear import ColumnParallelLinear, frozen, row_term
from tpcheck.reference.mlp import gated
from tpcheck.reference.rounding import wide
from tpcheck.reference.weights import RankWeights
from tpcheck.spec import ModelSpec


class Router(nn.Module):
    """x [B, T, D] -> shares [B, T, E], whole and equal on every rank; zero where not chosen."""

    def __init__(self, name: str, spec: ModelSpec, weights: RankWeights) -> None:
        super().__init__()
        self.chosen = spec.num_experts_per_tok
        self.scoring = spec.router_scoring
        self.renormalize = spec.norm_topk_prob
        self.weight_ED = frozen(weights.load(f"{name}.weight"))
        bias_E = weights.load_optional(f"{name}.bias")
        self.bias_E = None if bias_E is None else frozen(bias_E)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return how much of each expert every token takes."""
        scores_BTE = wide(functional.linear(x_BTD, self.weight_ED, self.bias_E))
        if self.scoring == "softmax_topk":
            scores_BTE = scores_BTE.softmax(-1)
        shares, experts = scores_BTE.topk(self.chosen, dim=-1)
        if self.scoring == "topk_softmax":
            shares = shares.softmax(-1)
        if self.renormalize:
            shares = shares / shares.sum(-1, keepdim=True)
        return torch.zeros_like(scores_BTE).scatter(-1, experts, shares).to(x_BTD.dtype)


class Expert(nn.Module):
    """x [..., D] -> y [..., D], this rank's term of the sum; `bias_D` is for after the sum."""

    def __init__(self, name: str, spec: ModelSpec, weights: RankWeights) -> None:
        super().__init__()
        self.spec = spec
        self.gate_proj = ColumnParallelLinear(f"{name}.gate_proj", weights)
        self.up_proj = ColumnParallelLinear(f"{name}.up_proj", weights)
        self.round_input = weights.input_rounding(f"{name}.down_proj.weight")
        self.down_Df = frozen(weights.load(f"{name}.down_proj.weight"))
        self.real = weights.real(f"{name}.down_proj.weight")
        bias_D = weights.load_optional(f"{name}.down_proj.bias")
        self.bias_D = None if bias_D is None else frozen(bias_D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return down of gate and up over this rank's features, without down's bias."""
        y_f = gated(self.spec, self.gate_proj(x), self.up_proj(x))
        if self.round_input is not None:
            y_f = self.round_input(y_f)
        return row_term(y_f, self.down_Df, self.real)


class LateExpert(nn.Module):
    """An expert that is made when tokens come and dropped when they left: one at a time is held."""

    def __init__(self, name: str, spec: ModelSpec, weights: RankWeights) -> None:
        super().__init__()
        self.make = partial(Expert, name, spec, weights)
        bias_D = weights.load_optional(f"{name}.down_proj.bias")
        self.bias_D = None if bias_D is None else frozen(bias_D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the expert gives; where no token came there is nothing to read it for."""
        return self.make()(x) if len(x) else x


class Experts(nn.ModuleList):
    """x [B, T, D], shares [B, T, E] -> y [B, T, D], this rank's term of the sum."""

    def forward(self, x_BTD: torch.Tensor, shares_BTE: torch.Tensor) -> torch.Tensor:
        """Return what each token takes of the experts it chose."""
        y_BTD_partial = torch.zeros_like(x_BTD)
        for expert, share_BT in zip(self, shares_BTE.unbind(-1), strict=True):
            chosen_BT = share_BT != 0
            y_ND_partial = expert(x_BTD[chosen_BT])
            y_BTD_partial[chosen_BT] += share_BT[chosen_BT, None] * y_ND_partial
        return y_BTD_partial

    def bias(self, shares_BTE: torch.Tensor) -> torch.Tensor | None:
        """Return what each token takes of the chosen experts' biases, whole on every rank."""
        if self[0].bias_D is None:
            return None
        bias_ED = torch.stack([expert.bias_D for expert in self])  # type: ignore[misc]
        return shares_BTE @ bias_ED


class SparseMLP(nn.Module):
    """x [B, T, D] -> y [B, T, D], both equal on every rank."""

    def __init__(self, layer: int, spec: ModelSpec, weights: RankWeights, tp: TPGroup) -> None:
        super().__init__()
        name = f"model.layers.{layer}.mlp"
        self.tp = tp
        self.gate = Router(f"{name}.gate", spec, weights)
        one = LateExpert if weights.late else Expert
        self.experts = Experts(
            one(f"{name}.experts.{expert}", spec, weights) for expert in range(spec.num_experts)
        )
        self.shared_expert: Expert | None = None
        if spec.shared_expert_intermediate_size:
            self.shared_gate_1D = frozen(weights.load(f"{name}.shared_expert_gate.weight"))
            self.shared_expert = Expert(f"{name}.shared_expert", spec, weights)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return the shares of the chosen experts, and the gated shared expert where there is one.

        The biases of the experts are whole on every rank, so they are added after the sum.
        """
        shares_BTE = self.gate(x_BTD)
        y_BTD_partial = self.experts(x_BTD, shares_BTE)
        if self.shared_expert is not None:
            share_BT1 = functional.linear(x_BTD, self.shared_gate_1D).sigmoid()
            y_BTD_partial = y_BTD_partial + share_BT1 * self.shared_expert(x_BTD)
        y_BTD = self.tp.all_reduce(y_BTD_partial)
        bias_BTD = self.experts.bias(shares_BTE)
        return y_BTD if bias_BTD is None else y_BTD + bias_BTD
