"""Wire dtypes, overflow, and the scales of quantised weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpcheck.faults.planting import Decoder, fault, full_weight, in_order, reduce_with, set_weight

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup


@fault(
    "NVIDIA/TransformerEngine#1761",
    "partials are reduced in bfloat16 whatever the activations are",
    "drift",
    dtypes=("float16", "float32"),
)
def bfloat16_wire(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    for layer in decoder.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            reduce_with(module, lambda y: tp.all_reduce(y.to(torch.bfloat16)).to(y.dtype))


@fault("vllm-project/vllm#55345", "partials above 65504 are cast to float16 without saturation")
def float16_overflow(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    scale = 1e7
    reduce_with(
        decoder.layers[0].mlp.down_proj,
        lambda y: tp.all_reduce((y * scale).to(torch.float16)).to(y.dtype) / scale,
    )


@fault(
    "sgl-project/sglang#26436",
    "one rank's attention is scaled by 1 + 2^-7",
    drift=("float32",),
    reason="2^-7 on one rank is bfloat16's own step; a whole model dilutes it",
)
def scaled_rank(decoder: Decoder, tp: TPGroup) -> None:
    factor = 1 + 2**-7 if tp.rank == tp.size - 1 else 1.0
    reduce_with(decoder.layers[0].self_attn.o_proj, lambda y: tp.all_reduce(y * factor))


@fault(
    "tenstorrent/tt-metal#36749",
    "the sum is handed on in bfloat16 from rank to rank",
    "drift",
    dtypes=("float16", "float32"),
)
def bfloat16_hops(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    def all_reduce(y: torch.Tensor) -> torch.Tensor:
        terms = tp.all_gather(y[None], 0).to(torch.bfloat16)
        return in_order(terms).to(y.dtype)

    for layer in decoder.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            reduce_with(module, all_reduce)


@fault(
    "sgl-project/sglang#34473",
    "only messages beyond a size are cast to float16, and those overflow",
)
def large_messages_overflow(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    def all_reduce(y: torch.Tensor) -> torch.Tensor:
        if y.numel() < 24 * y.shape[-1]:
            return tp.all_reduce(y)
        return tp.all_reduce((y * 1e7).to(torch.float16)).to(y.dtype) / 1e7

    reduce_with(decoder.layers[0].mlp.down_proj, all_reduce)


@fault(
    "vllm-project/vllm-omni#5761",
    "the column scales of a row-parallel weight are not cut: every rank uses the first",
)
def scales_not_cut(decoder: Decoder, tp: TPGroup) -> None:
    weight = full_weight(tp, decoder, "model.layers.0.mlp.down_proj.weight")
    scales = weight.abs().amax(0)
    held = decoder.layers[0].mlp.down_proj.weight_Df
    own = scales.chunk(tp.size)[tp.rank]
    set_weight(held, held.data / own * scales[: own.shape[0]])


@fault(
    "vllm-project/vllm#7374",
    "the columns are cut in order of activation, their inputs as they stand",
)
def act_order_cut(decoder: Decoder, tp: TPGroup) -> None:
    weight = full_weight(tp, decoder, "model.layers.0.mlp.down_proj.weight")
    by_activation = weight[:, weight.abs().sum(0).argsort(descending=True)]
    held = decoder.layers[0].mlp.down_proj.weight_Df
    set_weight(held, by_activation.chunk(tp.size, 1)[tp.rank])
