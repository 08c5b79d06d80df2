"""Causal self-attention with the heads split across ranks: MHA, GQA and MQA.

Requirement: one all-reduce, in o_proj (and two small ones for q/k norm across heads). A rank
attends with its query heads to the KV heads they belong to; with more ranks than KV heads
neighbours hold a copy of one (shard_plan: [KV Replication]). Where query heads do not come in equal
groups per KV head, because a rank holds parts of groups or pads, each is told its KV head. What
padded heads give is left out of o_proj (linear: [Pads]).

Shape legend: B batch, T tokens, S tokens seen so far, D hidden, H query heads, K kv heads,
d head_dim; capital = full, lower case = this rank's.
"""

from __future__ import annotations

import torch
from torch import nn

from tpcheck.groups.base import TPGroup
from tpcheck.reference.cache import Cache
from tpcheck.reference.layout import attended_places, counted_places
from tpcheck.reference.linear import ColumnParallelLinear, RowParallelLinear, frozen
from tpcheck.reference.norm import RMSNorm, ShardedRMSNorm
from tpcheck.reference.rope import apply_rope
from tpcheck.reference.rounding import on_grid, wide
from tpcheck.reference.weights import RankWeights
from tpcheck.shard_plan import ShardPlan
from tpcheck.spec import ModelSpec


class Attention(nn.Module):
    """x [B, T, D] -> y [B, T, D], both equal on every rank."""

    def __init__(
        self, layer: int, spec: ModelSpec, plan: ShardPlan, weights: RankWeights, tp: TPGroup
    ) -> None:
        super().__init__()
        self.layer, self.spec = layer, spec
        name = f"model.layers.{layer}.self_attn"
        self.q_proj = ColumnParallelLinear(f"{name}.q_proj", weights)
        self.k_proj = ColumnParallelLinear(f"{name}.k_proj", weights)
        self.v_proj = ColumnParallelLinear(f"{name}.v_proj", weights)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if spec.qk_norm == "per_head":
            self.q_norm = RMSNorm(f"{name}.q_norm", spec.norm_eps, weights)
            self.k_norm = RMSNorm(f"{name}.k_norm", spec.norm_eps, weights)
        elif spec.qk_norm == "across_heads":
            counts = {"q": spec.num_attention_heads, "k": spec.num_key_value_heads}
            splits = {"q": "query", "k": "kv"}
            self.q_norm, self.k_norm = (
                ShardedRMSNorm(
                    f"{name}.{part}_norm",
                    spec,
                    weights,
                    tp,
                    heads=counts[part],
                    counted=counted_places(spec, plan, tp.rank, splits[part]),
                )
                for part in "qk"
            )
        sinks_h = weights.load_optional(f"{name}.sinks")
        self.sinks_h = None if sinks_h is None else frozen(sinks_h)
        self.k_scale_k = weights.load_optional(f"{name}.k_scale")
        self.v_scale_k = weights.load_optional(f"{name}.v_scale")
        self.o_proj = RowParallelLinear(f"{name}.o_proj", weights, tp)
        places = attended_places(spec, plan, tp.rank)
        kv_heads = len(self.k_proj.weight_fD) // spec.head_dim
        grouped = kv_heads > 0 and places == _equal_groups(len(places), kv_heads)
        self.places = None if grouped else torch.tensor(places, dtype=torch.int64, device=tp.device)

    def forward(self, x_BTD: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Return what every token gathers from those up to it; `cache` holds earlier calls'."""
        start = 0 if cache is None else cache.length
        q_BhTd = self.q_norm(self._heads(self.q_proj(x_BTD))).transpose(1, 2)
        k_BkSd = self.k_norm(self._heads(self.k_proj(x_BTD))).transpose(1, 2)
        v_BkSd = self._heads(self.v_proj(x_BTD)).transpose(1, 2)
        if self.spec.position == "rope":
            q_BhTd = apply_rope(q_BhTd, self.spec, start)
            k_BkSd = apply_rope(k_BkSd, self.spec, start)
        if self.k_scale_k is not None and self.v_scale_k is not None:
            k_BkSd = on_grid(k_BkSd, self.k_scale_k[:, None, None], "float8_e4m3fn")
            v_BkSd = on_grid(v_BkSd, self.v_scale_k[:, None, None], "float8_e4m3fn")
        if cache is not None:
            k_BkSd, v_BkSd = cache.extend(self.layer, k_BkSd, v_BkSd)
        if self.places is not None:
            k_BkSd = k_BkSd.index_select(1, self.places)
            v_BkSd = v_BkSd.index_select(1, self.places)
        window = self.spec.window_of(self.layer)
        y_BhTd = attend(q_BhTd, k_BkSd, v_BkSd, start=start, window=window, sinks_h=self.sinks_h)
        return self.o_proj(y_BhTd.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], -1, self.spec.head_dim)


def _equal_groups(heads: int, kv_heads: int) -> tuple[int, ...]:
    """Return each query head's KV head where equally many neighbours share one."""
    return tuple(head // (heads // kv_heads) for head in range(heads) if heads >= kv_heads)


def attend(
    q_BhTd: torch.Tensor,
    k_BkSd: torch.Tensor,
    v_BkSd: torch.Tensor,
    *,
    start: int,
    window: int,
    sinks_h: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(d)) v, where query t sits at position start + t.

    A query sees the positions up to its own; with a window only the last `window` of them. A sink
    is one more score of its head: it takes weight from all positions and has no value to give.
    """
    group = q_BhTd.shape[1] // max(1, k_BkSd.shape[1])
    k_BhSd = k_BkSd.repeat_interleave(group, dim=1)
    v_BhSd = v_BkSd.repeat_interleave(group, dim=1)
    scores_BhTS = wide(q_BhTd @ k_BhSd.transpose(-2, -1)) * q_BhTd.shape[-1] ** -0.5
    seen = torch.arange(k_BhSd.shape[-2], device=q_BhTd.device)
    own = torch.arange(start, start + q_BhTd.shape[-2], device=q_BhTd.device)[:, None]
    hidden_TS = seen > own
    if window:
        hidden_TS |= seen <= own - window
    scores_BhTS = scores_BhTS.masked_fill(hidden_TS, float("-inf"))
    if sinks_h is None:
        weights_BhTS = scores_BhTS.softmax(-1)
    else:
        sinks_BhT1 = wide(sinks_h)[:, None, None].expand(*scores_BhTS.shape[:-1], 1)
        weights_BhTS = torch.cat((scores_BhTS, sinks_BhT1), -1).softmax(-1)[..., :-1]
    y_BhTd: torch.Tensor = weights_BhTS.to(v_BhSd.dtype) @ v_BhSd
    return y_BhTd
