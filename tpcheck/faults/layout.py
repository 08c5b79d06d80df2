"""Shards cut, ordered, gathered or declared otherwise than the plan says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpcheck.faults.planting import Decoder, Seam, fault, full_weight, set_weight

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup


@fault("NVIDIA/Megatron-LM#360", "the fused [gate; up] weight is cut in one piece")
def gate_up_contiguous(decoder: Decoder, tp: TPGroup) -> None:
    names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]
    import torch

    fused = torch.cat([full_weight(tp, decoder, name) for name in names]).chunk(tp.size)[tp.rank]
    mlp = decoder.layers[0].mlp
    for projection, half in zip((mlp.gate_proj, mlp.up_proj), fused.chunk(2), strict=True):
        set_weight(projection.weight_fD, half)


@fault(
    "NVIDIA-NeMo/Automodel#1324",
    "the fused [q; k; v] weight is cut in one piece",
    needs={"num_key_value_heads": 8},
)
def qkv_contiguous(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    attention = decoder.layers[0].self_attn
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    fused = torch.cat([full_weight(tp, decoder, name) for name in names]).chunk(tp.size)[tp.rank]
    for part, piece in zip("qkv", fused.chunk(3), strict=True):
        set_weight(getattr(attention, f"{part}_proj").weight_fD, piece)


@fault("vllm-project/vllm-gguf-plugin#103", "every rank loads rank 0's piece of the gate")
def shard_of_rank_0(decoder: Decoder, tp: TPGroup) -> None:
    gate = full_weight(tp, decoder, "model.layers.0.mlp.gate_proj.weight")
    set_weight(decoder.layers[0].mlp.gate_proj.weight_fD, gate.chunk(tp.size)[0])


@fault("vllm-project/vllm#42803", "ranks hold their neighbour's piece of the attention output")
def neighbours_shard(decoder: Decoder, tp: TPGroup) -> None:
    weight = full_weight(tp, decoder, "model.layers.0.self_attn.o_proj.weight")
    piece = weight.chunk(tp.size, 1)[(tp.rank + 1) % tp.size]
    set_weight(decoder.layers[0].self_attn.o_proj.weight_Df, piece)


@fault(
    "ndif-team/nnsight#719", "logits are gathered interleaved instead of one shard after another"
)
def interleaved_gather(decoder: Decoder, tp: TPGroup) -> None:
    def gather(x: torch.Tensor, dim: int) -> torch.Tensor:
        return tp.all_gather(x.unsqueeze(-1), -1).flatten(-2)

    decoder.lm_head.tp = Seam(tp, all_gather=gather)


@fault(
    "NVIDIA/Megatron-LM#4841",
    "the sharded state dict declares the wrong dim; the forward is right",
    "tiling",
    drift=False,
    reason="the forward is right",
)
def wrong_shard_dim(decoder: Decoder, tp: TPGroup) -> None:
    from tpcheck.placement import Shard

    name = "model.layers.0.mlp.down_proj.weight"
    decoder._shards[name] = (decoder._shards[name][0], Shard(0))


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


@fault("deepspeedai/DeepSpeed#5428", "the value heads are permuted against the query heads")
def permuted_value_heads(decoder: Decoder, tp: TPGroup) -> None:
    weight = full_weight(tp, decoder, "model.layers.0.self_attn.o_proj.weight")
    heads = weight.unflatten(1, (-1, decoder.spec.head_dim)).roll(1, 1).flatten(1)
    set_weight(decoder.layers[0].self_attn.o_proj.weight_Df, heads.chunk(tp.size, 1)[tp.rank])


@fault("vllm-project/vllm#38191", "q_norm holds rank 0's weight", needs={"qk_norm": "across_heads"})
def q_norm_of_rank_0(decoder: Decoder, tp: TPGroup) -> None:
    norm = decoder.layers[0].self_attn.q_norm
    weight = full_weight(tp, decoder, "model.layers.0.self_attn.q_norm.weight")
    set_weight(norm.weight_hd, weight.chunk(tp.size)[0].view_as(norm.weight_hd))
