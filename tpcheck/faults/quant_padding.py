"""Pads of quantized weights that stand for numbers, or that move what is real."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpcheck.faults.planting import Decoder, fault
from tpcheck.faults.quant_parts import DOWN, GATE, IN, OUT, UP, quantized, reread
from tpcheck.quantization import Quantization

if TYPE_CHECKING:
    from tpcheck.groups.base import TPGroup

_WORD = 8
"""Codes of four bits in an int32."""


@fault(
    "vllm-project/tpu-inference#2560",
    "codes of gate and of up are padded apart, their scales at the end of both: up's move",
    needs=quantized(Quantization("fp8", 8, 8)),
)
def scales_padded_at_the_end(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    with reread(decoder, tp, UP) as one:
        own = one.parts["weight_scale_inv"]
        one.parts["weight_scale_inv"] = torch.cat([own[1:], torch.zeros_like(own[:1])])


@fault(
    "pytorch/executorch#13576",
    "pads are zero codes: with a zero point that is not 0 they are numbers, and reach the sum",
    needs=quantized(Quantization("awq", 8, symmetric=False)),
)
def pads_below_the_zero_point(decoder: Decoder, tp: TPGroup) -> None:
    import torch
    from torch.nn.functional import pad

    for name in (GATE, UP):
        with reread(decoder, tp, name) as one:
            one.parts["qweight"] = pad(one.parts["qweight"], (0, 1))
            for suffix, count in (("qzeros", 1), ("scales", _WORD)):
                last = one.parts[suffix][:, -count:]
                one.parts[suffix] = torch.cat([one.parts[suffix], last], 1)
            for suffix in one.parts:
                rows = len(one.serving[suffix, OUT])
                one.serving[suffix, OUT] = torch.arange(rows + _WORD)
    with reread(decoder, tp, DOWN) as one:
        one.parts["qweight"] = pad(one.parts["qweight"], (0, 0, 0, _WORD))
        for suffix in one.parts:
            served = one.serving[suffix, IN]
            behind = served[-1].repeat(_WORD)
            if suffix == "qweight":
                behind = behind + torch.arange(1, _WORD + 1)
            one.serving[suffix, IN] = torch.cat([served, behind])


@fault(
    "bytedance-iaas/sglang#731",
    "a rank's part is looked for at its padded width times its rank: all but the first are late",
    needs=quantized(Quantization("mxfp4", 8)),
)
def parts_a_padded_width_apart(decoder: Decoder, tp: TPGroup) -> None:
    from torch.nn.functional import pad

    with reread(decoder, tp, DOWN) as one:
        for suffix, block in (
            ("weight_packed", one.quantization.group_size // 2),
            ("weight_scale", 1),
        ):
            width = one.parts[suffix].shape[1]
            whole = pad(one.whole(suffix), (0, block * tp.size))
            one.parts[suffix] = whole.narrow(1, tp.rank * (width + block), width)
