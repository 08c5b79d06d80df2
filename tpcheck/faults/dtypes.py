"""Wire dtypes, overflow and scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpcheck.faults.planting import Decoder, fault, reduce_with

if TYPE_CHECKING:
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
    drift=False,
    reason="2^-7 on one rank is bfloat16's own step; a whole model dilutes it",
)
def scaled_rank(decoder: Decoder, tp: TPGroup) -> None:
    factor = 1 + 2**-7 if tp.rank == tp.size - 1 else 1.0
    reduce_with(decoder.layers[0].self_attn.o_proj, lambda y: tp.all_reduce(y * factor))
