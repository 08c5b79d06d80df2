"""Shards cut, ordered, gathered or declared otherwise than the plan says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tpcheck.faults.planting import (
    MANY_HEADS,
    WIDE_HEADS,
    Decoder,
    fault,
    full_weight,
    set_weight,
)

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
    needs={"num_key_value_heads": 0},
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


@fault("deepspeedai/DeepSpeed#5428", "the value heads are permuted against the query heads")
def permuted_value_heads(decoder: Decoder, tp: TPGroup) -> None:
    weight = full_weight(tp, decoder, "model.layers.0.self_attn.o_proj.weight")
    heads = weight.unflatten(1, (-1, decoder.spec.head_dim)).roll(1, 1).flatten(1)
    set_weight(decoder.layers[0].self_attn.o_proj.weight_Df, heads.chunk(tp.size, 1)[tp.rank])


@fault(
    "bigscience-workshop/Megatron-DeepSpeed#338",
    "a checkpoint of two ranks' [gate; up] pieces is read as one [gate; up]",
)
def resharded_gate_up(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    mlp = decoder.layers[0].mlp
    gate, up = _full_parts(tp, decoder, "mlp", ("gate", "up"))
    pieces = [half for pair in zip(gate.chunk(2), up.chunk(2), strict=True) for half in pair]
    for projection, half in zip(
        (mlp.gate_proj, mlp.up_proj), torch.cat(pieces).chunk(2), strict=True
    ):
        set_weight(projection.weight_fD, half.chunk(tp.size)[tp.rank])


@fault(
    "NVIDIA/Megatron-LM#1989",
    "a packed projection of unequal parts is cut evenly, whatever its parts",
    needs=MANY_HEADS,
)
def packed_projection_cut_evenly(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    attention = decoder.layers[0].self_attn
    packed = torch.cat(_full_parts(tp, decoder, "self_attn", "qkv"))
    held = [getattr(attention, f"{part}_proj").weight_fD for part in "qkv"]
    pieces = packed.chunk(tp.size)[tp.rank].split([weight.shape[0] for weight in held])
    for weight, piece in zip(held, pieces, strict=True):
        set_weight(weight, piece)


@fault(
    "deepspeedai/DeepSpeed#4903",
    "[q k v] stored by KV group is cut as if all of q came first",
    needs=MANY_HEADS,
)
def groups_taken_for_parts(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    attention, groups = decoder.layers[0].self_attn, decoder.spec.num_key_value_heads
    parts = _full_parts(tp, decoder, "self_attn", "qkv")
    grouped = torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)
    for name, part in zip("qkv", grouped.split([part.shape[0] for part in parts]), strict=True):
        projection = getattr(attention, f"{name}_proj")
        set_weight(projection.weight_fD, part.chunk(tp.size)[tp.rank])


@fault(
    "huggingface/transformers#48519",
    "rows are permuted for rope after the cut, with a head size taken from the shard",
    needs=WIDE_HEADS,
)
def rope_permuted_by_shard(decoder: Decoder, tp: TPGroup) -> None:
    heads = decoder.spec.num_attention_heads
    weight = full_weight(tp, decoder, "model.layers.0.self_attn.q_proj.weight")
    pairs = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    held = pairs.chunk(tp.size)[tp.rank]
    halves = held.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    set_weight(decoder.layers[0].self_attn.q_proj.weight_fD, halves)


def _full_parts(
    tp: TPGroup, decoder: Decoder, module: str, parts: Iterable[str]
) -> list[torch.Tensor]:
    """Return the whole weights of layer 0's projections `parts`."""
    names = [f"model.layers.0.{module}.{part}_proj.weight" for part in parts]
    return [full_weight(tp, decoder, name) for name in names]
