"""Query heads and KV heads: how many a rank has, which ones, and what depends on their width."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tpcheck.faults.planting import (
    MANY_HEADS,
    ONE_KV_HEAD,
    WIDE_HEADS,
    Decoder,
    change_output,
    fault,
    full_weight,
    set_weight,
)

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup

_ONE_KV_HEAD_NORMED = ONE_KV_HEAD | {"qk_norm": "across_heads"}


@fault("vllm-project/vllm-ascend#3366", "with tp above the KV heads a rank holds the wrong one")
def wrong_kv_head(decoder: Decoder, tp: TPGroup) -> None:
    kv, d = decoder.spec.num_key_value_heads, decoder.spec.head_dim
    held = max(1, kv // tp.size)
    for part in "kv":
        weight = full_weight(tp, decoder, f"model.layers.0.self_attn.{part}_proj.weight")
        rows = weight.view(kv, d, -1).roll(-held, 0)
        first = tp.rank * held if kv >= tp.size else tp.rank * kv // tp.size
        piece = rows[first : first + held].flatten(0, 1)
        set_weight(getattr(decoder.layers[0].self_attn, f"{part}_proj").weight_fD, piece)


@fault(
    "PaddlePaddle/PaddleFormers#4482",
    "the head count is kept global after the split, so that heads become tp times narrower",
    needs=WIDE_HEADS,
)
def global_head_count(decoder: Decoder, tp: TPGroup) -> None:
    attention = decoder.layers[0].self_attn
    attention.spec = replace(decoder.spec, head_dim=decoder.spec.head_dim // tp.size)


@fault(
    "huggingface/transformers#43481",
    "attention is scaled by the width a rank sees and not by the head's",
)
def local_attention_scale(decoder: Decoder, tp: TPGroup) -> None:
    change_output(decoder.layers[0].self_attn.q_norm, lambda q: q * tp.size**0.5)


@fault(
    "huggingface/transformers#48307",
    "one KV head is split over the ranks in place of being replicated",
    "schedule",
    needs=ONE_KV_HEAD,
    drift=False,
    reason="the forward raises",
)
def part_of_a_kv_head(decoder: Decoder, tp: TPGroup) -> None:
    for part in "kv":
        weight = full_weight(tp, decoder, f"model.layers.0.self_attn.{part}_proj.weight")
        projection = getattr(decoder.layers[0].self_attn, f"{part}_proj")
        set_weight(projection.weight_fD, weight.chunk(tp.size)[tp.rank])


@fault(
    "onnx/onnx#7274",
    "KV heads are tiled over the query heads where each should be repeated",
    needs=MANY_HEADS,
)
def tiled_kv_heads(decoder: Decoder, tp: TPGroup) -> None:
    attention = decoder.layers[0].self_attn
    group = decoder.spec.num_attention_heads // decoder.spec.num_key_value_heads
    change_output(attention.k_norm, lambda k: k.repeat(1, 1, group, 1))
    change_output(attention.v_proj, lambda v: v.repeat(1, 1, group))


@fault(
    "TheTom/llama-cpp-turboquant#324",
    "attention is split by KV heads, and ranks beyond them hold nothing",
    needs=ONE_KV_HEAD,
)
def empty_kv_shard(decoder: Decoder, tp: TPGroup) -> None:
    if tp.rank >= decoder.spec.num_key_value_heads:
        attention = decoder.layers[0].self_attn
        for projection in (attention.k_proj, attention.v_proj):
            set_weight(projection.weight_fD, projection.weight_fD.data * 0)


@fault(
    "vllm-project/vllm#35932",
    "a norm's full width is taken for tp times a rank's KV heads, copies counted",
    needs=_ONE_KV_HEAD_NORMED,
)
def copies_counted_in_norm(decoder: Decoder, tp: TPGroup) -> None:
    norm = decoder.layers[0].self_attn.k_norm
    norm.full_size = norm.weight_hd.numel() * tp.size


@fault(
    "sgl-project/sglang#20967",
    "k_norm's weight is cut by tp where its KV head is held whole",
    needs=_ONE_KV_HEAD_NORMED,
)
def part_of_k_norm(decoder: Decoder, tp: TPGroup) -> None:
    held = decoder.layers[0].self_attn.k_norm.weight_hd
    weight = full_weight(tp, decoder, "model.layers.0.self_attn.k_norm.weight")
    part = weight.chunk(tp.size)[0]
    set_weight(held, part.repeat(held.numel())[: held.numel()].view_as(held))


@fault(
    "sgl-project/sglang#19086",
    "decoding takes over the prefill's KV heads in another order; a whole forward is right",
    "decode",
    needs=MANY_HEADS,
    drift=False,
    reason="a whole forward is right",
)
def kv_heads_handed_over(decoder: Decoder, tp: TPGroup) -> None:
    real = decoder.prefill

    def prefill(ids: torch.Tensor) -> Any:
        logits, state = real(ids)
        return logits, tuple((k.roll(1, 1), v.roll(1, 1)) for k, v in state)

    decoder.prefill = prefill


@fault(
    "vllm-project/vllm-ascend#11885",
    "the state dict counts tp times a rank's KV heads, copies and all; the forward is right",
    "tiling",
    needs=ONE_KV_HEAD,
    drift=False,
    reason="the forward is right",
)
def kv_copies_declared_shards(decoder: Decoder, tp: TPGroup) -> None:
    from tpcheck.placement import Shard

    name = "model.layers.0.self_attn.k_proj.weight"
    decoder._shards[name] = (decoder._shards[name][0], Shard(0))
