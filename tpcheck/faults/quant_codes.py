"""Codes, zero points and group indices that are cut, packed or read otherwise than at TP=1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpcheck.faults.planting import Decoder, fault
from tpcheck.faults.quant_parts import DOWN, GATE, UP, quantized, reread
from tpcheck.quantization import Quantization

if TYPE_CHECKING:
    from tpcheck.groups.base import TPGroup

_ACT_ORDER = quantized(Quantization("gptq", 8, desc_act=True))
_AWQ = quantized(Quantization("awq", 8, symmetric=False))
_FP8 = quantized(Quantization("fp8"))


@fault(
    "vllm-project/vllm#7374",
    "under act-order the groups are those of the columns' places: g_idx is not asked",
    needs=_ACT_ORDER,
)
def groups_by_place(decoder: Decoder, tp: TPGroup) -> None:
    with reread(decoder, tp, DOWN) as one:
        own, group = one.parts["g_idx"], one.quantization.group_size
        one.parts["g_idx"] = own.new_tensor(one.features(tp.rank)) // group


@fault(
    "sgl-project/sglang#35955",
    "under act-order scales and zero points are cut, while g_idx points into all of them",
    needs=_ACT_ORDER,
)
def act_order_scales_cut(decoder: Decoder, tp: TPGroup) -> None:
    with reread(decoder, tp, DOWN) as one:
        for suffix in ("scales", "qzeros"):
            one.parts[suffix] = one.parts[suffix].chunk(tp.size)[tp.rank]
        one.parts["g_idx"] = one.parts["g_idx"] % len(one.parts["scales"])


@fault(
    "vllm-project/vllm#38966",
    "zero points stored as they are get 1 added, as if the format were GPTQ's first",
    needs=quantized(Quantization("gptq", 8, symmetric=False)),
)
def zero_points_plus_one(decoder: Decoder, tp: TPGroup) -> None:
    from tpcheck.reference.packing import pack, unpack

    with reread(decoder, tp, DOWN) as one:
        own = one.parts["qzeros"]
        zeros = unpack(own, 4, 1, 8 * own.shape[1])
        one.parts["qzeros"] = pack((zeros + 1) % 16, 4, 1)


@fault(
    "ModelCloud/GPTQModel#2350",
    "a repacking takes 1 off zero points: those that are 0 become 15",
    needs=_AWQ,
)
def zero_points_underflow(decoder: Decoder, tp: TPGroup) -> None:
    from tpcheck.reference.packing import AWQ_ORDER, pack, unpack

    for name in (GATE, UP, DOWN):
        with reread(decoder, tp, name) as one:
            own = one.parts["qzeros"]
            zeros = unpack(own, 4, 1, 8 * own.shape[1], AWQ_ORDER)
            one.parts["qzeros"] = pack(zeros.masked_fill(zeros == 0, 15), 4, 1, AWQ_ORDER)


@fault(
    "Tlntin/Qwen-TensorRT-LLM#40",
    "zero points are not cut with their codes: every rank has those of the first columns",
    needs=_AWQ,
)
def zero_points_of_first_columns(decoder: Decoder, tp: TPGroup) -> None:
    for name in (GATE, UP):
        with reread(decoder, tp, name) as one:
            width = one.parts["qzeros"].shape[1]
            one.parts["qzeros"] = one.whole("qzeros")[:, :width]


@fault(
    "pie-project/pie#491",
    "AWQ's order within a word is undone for the codes and forgotten for the zero points",
    needs=_AWQ,
)
def zero_points_in_plain_order(decoder: Decoder, tp: TPGroup) -> None:
    from tpcheck.reference.packing import AWQ_ORDER, pack, unpack

    with reread(decoder, tp, DOWN) as one:
        own = one.parts["qzeros"]
        one.parts["qzeros"] = pack(unpack(own, 4, 1, 8 * own.shape[1]), 4, 1, AWQ_ORDER)


@fault(
    "kekzl/imp#567",
    "a block's low nibbles are taken for its first half, its high ones for its second",
    needs=quantized(Quantization("mxfp4", 8)),
)
def nibbles_by_halves(decoder: Decoder, tp: TPGroup) -> None:
    from tpcheck.reference.packing import pack_nibbles, unpack_nibbles

    with reread(decoder, tp, DOWN) as one:
        half = one.quantization.group_size // 2
        blocks = unpack_nibbles(one.parts["weight_packed"]).unflatten(1, (-1, half, 2))
        one.parts["weight_packed"] = pack_nibbles(blocks.transpose(2, 3).flatten(1))


@fault(
    "ml-explore/mlx#3132",
    "the sharded layer forgets the format: float8 codes are read as int8",
    needs=_FP8,
)
def float8_read_as_int8(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    with reread(decoder, tp, DOWN) as one:
        one.parts["weight"] = one.parts["weight"].view(torch.int8)


@fault(
    "causalflow-ai/petit-kernel#3",
    "float8 codes are read as the other e4m3: values halve and a negative zero is NaN",
    needs=_FP8,
)
def float8_of_other_kind(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    with reread(decoder, tp, DOWN) as one:
        other = one.parts["weight"].view(torch.float8_e4m3fnuz)
        one.parts["weight"] = other.float()
