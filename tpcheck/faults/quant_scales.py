"""Scales of quantized weights that a rank takes from the wrong place, or for the wrong features."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpcheck.faults.planting import Decoder, fault
from tpcheck.faults.quant_parts import (
    DOWN,
    EXPERTS,
    GATE,
    IN,
    KEY,
    MLP,
    OUT,
    QUERY,
    UP,
    VALUE,
    opened,
    quantized,
    reread,
)
from tpcheck.quantization import Quantization

if TYPE_CHECKING:
    from tpcheck.groups.base import TPGroup

_BLOCKS = quantized(Quantization("fp8", 8, 8))


@fault(
    "vllm-project/vllm-omni#5761",
    "the scales of a row-parallel weight's groups are not cut: every rank uses the first",
    needs=quantized(Quantization("fp8", 8)),
)
def scales_of_first_groups(decoder: Decoder, tp: TPGroup) -> None:
    with reread(decoder, tp, DOWN) as one:
        own = one.parts["weight_scale"]
        one.parts["weight_scale"] = one.whole("weight_scale")[:, : own.shape[1]]


@fault(
    "vllm-project/vllm-omni#5761",
    "the scales of a row-parallel weight are declared to be whole on every rank, and are cut",
    "tiling",
    needs=quantized(Quantization("fp8", 8)),
    drift=False,
    reason="the forward is right",
)
def cut_scales_declared_whole(decoder: Decoder, tp: TPGroup) -> None:
    from tpcheck.placement import Replicate

    name = DOWN.replace(".weight", ".weight_scale")
    decoder._shards[name] = (decoder._shards[name][0], Replicate())


@fault(
    "vllm-project/vllm#41511",
    "the scales are handed over whole: the kernel takes a rank's width over all groups for a group",
    needs=quantized(Quantization("pack-quantized", 8), **EXPERTS),
)
def group_size_of_uncut_scales(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    for expert in range(decoder.spec.num_experts):
        with reread(decoder, tp, f"{MLP}.experts.{expert}.down_proj.weight") as one:
            whole = one.parts["weight_scale"] = one.whole("weight_scale")
            width = len(one.features(tp.rank))
            served = torch.arange(width) * whole.shape[1] // width
            one.serving["weight_scale", IN] = served


@fault(
    "vllm-project/vllm#37403",
    "an expert's scales per channel are loaded from the first row on, whatever the rank",
    needs=quantized(Quantization("fp8"), **EXPERTS),
)
def channel_scales_of_first_rows(decoder: Decoder, tp: TPGroup) -> None:
    for expert in range(decoder.spec.num_experts):
        for part in ("gate", "up"):
            with reread(decoder, tp, f"{MLP}.experts.{expert}.{part}_proj.weight") as one:
                own = one.parts["weight_scale"]
                one.parts["weight_scale"] = one.whole("weight_scale")[: len(own)]


@fault(
    "NVIDIA/TensorRT-LLM#8432",
    "the scales of q, k and v are put together whole, and then read as a rank's",
    needs=quantized(Quantization("awq", 8)),
)
def qkv_scales_joined_uncut(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    names, at = (QUERY, KEY, VALUE), 0
    joined = torch.cat([opened(decoder, tp, name).whole("scales") for name in names], 1)
    for name in names:
        with reread(decoder, tp, name) as one:
            width = one.parts["scales"].shape[1]
            one.parts["scales"] = joined[:, at : at + width]
            at += width


@fault(
    "NVIDIA/TensorRT-Model-Connect#1115",
    "the size of a block is taken from the shapes: short where the last block is a partial one",
    needs={
        "hidden_size": 64,
        "num_attention_heads": 48,
        "num_key_value_heads": 48,
        "head_dim": 12,
        "intermediate_size": 576,
        "quantization": Quantization("fp8", 24, 24),
    },
    drift=("float16", "float32"),
    reason="two rows in a block have the next one's scale, which is much alike",
)
def block_size_of_shapes(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    with reread(decoder, tp, DOWN) as one:
        rows, blocks = len(one.parts["weight"]), len(one.parts["weight_scale_inv"])
        one.serving["weight_scale_inv", OUT] = torch.arange(rows) // -(-rows // blocks)


@fault(
    "vllm-project/vllm#44630",
    "one kernel transposes the scales of blocks in place, another reads them as they were",
    needs=_BLOCKS,
)
def scale_grid_transposed(decoder: Decoder, tp: TPGroup) -> None:
    with reread(decoder, tp, DOWN) as one:
        own = one.parts["weight_scale_inv"]
        one.parts["weight_scale_inv"] = own.T.contiguous().view(own.shape)


@fault(
    "ROCm/ATOM#442",
    "blocks are halved to fit a rank, and their scales repeated all in turn, not each by itself",
    needs=_BLOCKS,
)
def scales_of_halves_in_turn(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    with reread(decoder, tp, DOWN) as one:
        blocks, half = one.parts["weight_scale_inv"].shape[1], one.quantization.group_size // 2
        one.serving["weight_scale_inv", IN] = torch.arange(2 * half * blocks) // half % blocks


@fault(
    "sgl-project/sglang#32430",
    "the halves of [gate; up] change places for a kernel, and their scales do not",
    needs=quantized(Quantization("nvfp4", 8)),
)
def gate_and_up_swap_scales(decoder: Decoder, tp: TPGroup) -> None:
    gate, up = (opened(decoder, tp, name) for name in (GATE, UP))
    for name, other in ((GATE, up), (UP, gate)):
        with reread(decoder, tp, name) as one:
            one.parts["weight_scale"] = other.parts["weight_scale"]


@fault(
    "vllm-project/vllm-ascend#16806",
    "all experts are dequantized with the first one's scales",
    needs=quantized(Quantization("int8"), **EXPERTS),
)
def scales_of_first_expert(decoder: Decoder, tp: TPGroup) -> None:
    for part in ("gate", "up"):
        first = opened(decoder, tp, f"{MLP}.experts.0.{part}_proj.weight")
        for expert in range(1, decoder.spec.num_experts):
            with reread(decoder, tp, f"{MLP}.experts.{expert}.{part}_proj.weight") as one:
                one.parts["weight_scale"] = first.parts["weight_scale"]
