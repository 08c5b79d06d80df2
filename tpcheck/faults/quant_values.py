"""Scales of quantized weights that are made, rounded or read otherwise than at TP=1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpcheck.faults.planting import Decoder, fault, full_weight, set_weight
from tpcheck.faults.quant_parts import (
    DOWN,
    GATE,
    UP,
    opened,
    parameter,
    quantize_again,
    quantized,
    reread,
)
from tpcheck.quantization import Quantization

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup

_ONLINE = quantized(Quantization("fp8", 0, 0, online=True))
_NVFP4 = quantized(Quantization("nvfp4", 8))
_WIDER = ("float16", "float32")
_COARSE = "codes of a few bits round either way, and one layer of a model dilutes it"
_OUTPUT = "model.layers.0.self_attn.o_proj.weight"


@fault(
    "vllm-project/vllm#49764",
    "a weight quantized when it is loaded gets a scale of each rank's own maximum",
    needs=_ONLINE,
    drift=_WIDER,
    reason=_COARSE,
)
def online_scale_per_rank(decoder: Decoder, tp: TPGroup) -> None:
    quantize_again(decoder, tp, DOWN, lambda own: own)


@fault(
    "vllm-project/vllm#41021",
    "gate and up are fused before they are quantized, so that they share one scale",
    needs=_ONLINE,
    drift=_WIDER,
    reason=_COARSE,
)
def online_scale_of_fused_parts(decoder: Decoder, tp: TPGroup) -> None:
    largest = max(float(full_weight(tp, decoder, name).abs().max()) for name in (GATE, UP))

    def of_both(own: torch.Tensor) -> torch.Tensor:
        return own.new_full(own.shape, largest)

    for name in (GATE, UP):
        quantize_again(decoder, tp, name, of_both)


@fault(
    "modular/modular#6600",
    "NVFP4's global scale is multiplied by, where it is stored as a divisor",
    needs=_NVFP4,
)
def global_scale_not_inverted(decoder: Decoder, tp: TPGroup) -> None:
    with reread(decoder, tp, DOWN) as one:
        one.parts["weight_global_scale"] = 1 / one.parts["weight_global_scale"]


@fault(
    "vllm-project/vllm#41769",
    "fused parts take the largest of their global scales, without rescaling their groups",
    needs=_NVFP4,
    drift=_WIDER,
    reason="two parts' largest weights may be nearly alike, and so are their scales",
)
def largest_global_scale_of_parts(decoder: Decoder, tp: TPGroup) -> None:
    stored = [opened(decoder, tp, name).parts["weight_global_scale"] for name in (GATE, UP)]
    for name in (GATE, UP):
        with reread(decoder, tp, name) as one:
            one.parts["weight_global_scale"] = stored[0].minimum(stored[1])  # they divide


@fault(
    "NVIDIA/Model-Optimizer#1633",
    "a group's scale is cast to e4m3 without a clamp: beyond its end it is NaN, on one rank",
    needs=_NVFP4,
)
def scale_beyond_e4m3(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    if tp.rank == tp.size - 1:
        with reread(decoder, tp, DOWN) as one:
            stored = one.parts["weight_scale"].view(torch.uint8)
            unclamped = stored.masked_fill(stored == stored.max(), 0x7F)
            one.parts["weight_scale"] = unclamped.view(torch.float8_e4m3fn)


@fault(
    "vllm-project/compressed-tensors#538",
    "the exponents of MXFP4's blocks are read with a bias of 125 for 127",
    needs=quantized(Quantization("mxfp4", 8)),
)
def exponent_bias(decoder: Decoder, tp: TPGroup) -> None:
    with reread(decoder, tp, DOWN) as one:
        one.parts["weight_scale"] = one.parts["weight_scale"] + 2


@fault(
    "InternLM/lmdeploy#4276",
    "float16 scales are loaded as bfloat16, which has three bits less",
    needs=quantized(Quantization("gptq", 8)),
    drift=("float32",),
    reason="a scale is off by bfloat16's own rounding at most",
)
def scales_in_bfloat16(decoder: Decoder, tp: TPGroup) -> None:
    with reread(decoder, tp, DOWN) as one:
        one.parts["scales"] = one.parts["scales"].bfloat16()


@fault(
    "vllm-project/vllm#48508",
    "the layers that stay unquantized are matched otherwise: one of them is quantized",
    needs=quantized(Quantization("fp8", skip=("o_proj",))),
    drift=_WIDER,
    reason=_COARSE,
)
def skipped_layer_quantized(decoder: Decoder, tp: TPGroup) -> None:
    from tpcheck.reference.quantizing import quantize

    parts = quantize(full_weight(tp, decoder, _OUTPUT), decoder.spec.quantization)
    numbers = parts["weight"].double() * parts["weight_scale"].double()
    set_weight(parameter(decoder, _OUTPUT), numbers.chunk(tp.size, 1)[tp.rank].to(tp.dtype))
