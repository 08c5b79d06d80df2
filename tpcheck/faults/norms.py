"""Norms: over which elements, with which weight and which epsilon."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tpcheck.faults.planting import (
    MANY_HEADS,
    WIDE_HEADS,
    Decoder,
    fault,
    full_weight,
    reduce_with,
    set_weight,
)

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup


@fault(
    "bigscience-workshop/Megatron-DeepSpeed#227",
    "a table by head is sliced from head 0 on every rank: q_norm's weight",
    needs={"qk_norm": "across_heads"},
)
def q_norm_of_rank_0(decoder: Decoder, tp: TPGroup) -> None:
    norm = decoder.layers[0].self_attn.q_norm
    weight = full_weight(tp, decoder, "model.layers.0.self_attn.q_norm.weight")
    set_weight(norm.weight_hd, weight.chunk(tp.size)[0].view_as(norm.weight_hd))


@fault(
    "EleutherAI/gpt-neox#1424",
    "the norm across heads takes its statistic over the rank's own heads",
    needs={"qk_norm": "across_heads"},
    drift=("float16", "float32"),
    reason="at TP=2 the two halves' statistics are close: twice TP=1's error",
)
def local_norm(decoder: Decoder, tp: TPGroup) -> None:
    norm = decoder.layers[0].self_attn.q_norm
    norm.full_size //= tp.size
    reduce_with(norm, lambda squares: squares)


@fault(
    "turboderp-org/exllamav3#141",
    "k_norm spans all KV heads, but its sum of squares is not reduced",
    needs=MANY_HEADS | {"qk_norm": "across_heads"},
)
def unreduced_k_norm(decoder: Decoder, tp: TPGroup) -> None:
    reduce_with(decoder.layers[0].self_attn.k_norm, lambda squares: squares)


@fault(
    "vllm-project/vllm#16311",
    "the norm per head is taken across the rank's heads",
    needs=MANY_HEADS | {"qk_norm": "per_head"},
)
def across_for_per_head(decoder: Decoder, tp: TPGroup) -> None:
    _norm_over(decoder.layers[0].self_attn.q_norm, lambda x: x.flatten(-2))


@fault(
    "state-spaces/mamba#908",
    "a norm's group is its width divided by tp where the width is whole already",
    needs=WIDE_HEADS | {"qk_norm": "per_head"},
)
def norm_group_too_small(decoder: Decoder, tp: TPGroup) -> None:
    _norm_over(decoder.layers[0].self_attn.q_norm, lambda x: x.unflatten(-1, (tp.size, -1)))


@fault("NVIDIA/Megatron-LM#1446", "a replicated norm's weight has drifted apart over the ranks")
def norm_weights_apart(decoder: Decoder, tp: TPGroup) -> None:
    weight = decoder.norm.weight
    set_weight(weight, weight.data * (1 + 2**-4 * tp.rank))


@fault(
    "NVIDIA-NeMo/Megatron-Bridge#5712",
    "the sharded path builds its norms with eps 1e-5 for 1e-6",
    drift=("float32",),
    reason="moves logits by 1e-6 relative, far below a 16-bit dtype's rounding",
)
def norm_eps(decoder: Decoder, tp: TPGroup) -> None:
    for layer in decoder.layers:
        layer.input_layernorm.eps = layer.post_attention_layernorm.eps = 1e-5


def _norm_over(norm: Any, grouped: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Take an RMSNorm's statistic over the last dim of what `grouped` makes of its input."""
    import torch

    def forward(x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        groups = grouped(wide)
        scaled = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + norm.eps)
        normed: torch.Tensor = scaled.reshape(x.shape).to(x.dtype) * norm.weight
        return normed

    norm.forward = forward
