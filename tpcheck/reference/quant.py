"""Quantized weights: what is stored, and back to the numbers it stands for.

Requirement: what is stored has the bits that checkpoints have; everything after that is plain
arithmetic in the compute dtype or wider, so that a float64 run stays float64 and a rank's part of a
weight has the very values that the whole one has there.

[Served By] A rank dequantizes only what it holds. For each of its features it knows which stored
index serves it (shard_plan: quant), so a group that two ranks share needs no code of its own.

Shape legend: N output features, K input features, S and G the scales along them; capital = full,
lower case = this rank's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tpcheck.numerics.grids import decode
from tpcheck.quantization import Quantization
from tpcheck.reference.packing import (
    AWQ_ORDER,
    GPTQ_V1_ZERO_OFFSET,
    WORD_BITS,
    unpack,
    unpack_nibbles,
)
from tpcheck.shard_plan.quant import IN, OUT

Parts = Mapping[str, Tensor]
"""The stored tensors of one weight, whole or a rank's, by the suffix of their names."""

Serving = Callable[[str, int], Tensor]
"""(suffix, OUT or IN) -> for each feature the index that serves it, in codes where packed."""


def dequantize(
    parts: Parts, quantization: Quantization, serving: Serving, dtype: torch.dtype
) -> Tensor:
    """Return the numbers that stored tensors stand for.

    Args:
        parts: what a rank holds of each stored tensor.
        serving: [Served By]; how many features it names is the shape of the result.
        dtype: of the result; what is computed on the way is float32 or wider.

    Returns:
        [n, k], (codes - zeros) * scales.
    """
    wide = torch.promote_types(dtype, torch.float32)

    def pick(suffix: str, plane_NK: Tensor, columns: Tensor | None = None) -> Tensor:
        rows = serving(suffix, OUT)
        columns = serving(suffix, IN) if columns is None else columns
        return plane_NK.index_select(0, rows).index_select(1, columns).to(wide)

    return _READERS[quantization.format](parts, quantization, pick, wide).to(dtype)


Pick = Callable[..., Tensor]


def _plain(parts: Parts, quantization: Quantization, pick: Pick, wide: torch.dtype) -> Tensor:
    suffix = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    codes = parts["weight"]
    if codes.dtype == torch.float8_e4m3fn:
        codes = decode(codes.view(torch.uint8), "float8_e4m3fn", wide)
    return pick("weight", codes) * pick(suffix, parts[suffix])


def _gptq(parts: Parts, quantization: Quantization, pick: Pick, wide: torch.dtype) -> Tensor:
    bits = quantization.bits
    groups = parts["g_idx"].long() if quantization.desc_act else None
    codes = pick("qweight", _unpacked(parts["qweight"], bits, 0).T)
    offset = 0 if quantization.zeros_as_is else GPTQ_V1_ZERO_OFFSET
    zeros = _unpacked(parts["qzeros"], bits, 1).T + offset
    return (codes - pick("qzeros", zeros, groups)) * pick("scales", parts["scales"].T, groups)


def _awq(parts: Parts, quantization: Quantization, pick: Pick, wide: torch.dtype) -> Tensor:
    codes = pick("qweight", _unpacked(parts["qweight"], 4, 1, AWQ_ORDER).T)
    zeros = pick("qzeros", _unpacked(parts["qzeros"], 4, 1, AWQ_ORDER).T)
    return (codes - zeros) * pick("scales", parts["scales"].T)


def _packed(parts: Parts, quantization: Quantization, pick: Pick, wide: torch.dtype) -> Tensor:
    bits = quantization.bits
    groups = parts["weight_g_idx"].long() if quantization.desc_act else None
    codes = pick("weight_packed", _unpacked(parts["weight_packed"], bits, 1))
    zeros: Tensor | int = 2 ** (bits - 1)
    if not quantization.symmetric:
        stored = _unpacked(parts["weight_zero_point"], bits, 0)
        zeros = pick("weight_zero_point", stored, groups)
    return (codes - zeros) * pick("weight_scale", parts["weight_scale"], groups)


def _float4(parts: Parts, quantization: Quantization, pick: Pick, wide: torch.dtype) -> Tensor:
    codes = decode(unpack_nibbles(parts["weight_packed"]), "float4_e2m1", wide)
    stored = parts["weight_scale"]
    if quantization.format == "mxfp4":
        scales = decode(stored, "e8m0", wide)
    else:
        scales = decode(stored.view(torch.uint8), "float8_e4m3fn", wide)
        scales = scales / parts["weight_global_scale"].to(wide)
    return pick("weight_packed", codes) * pick("weight_scale", scales)


_READERS = {
    "fp8": _plain,
    "int8": _plain,
    "gptq": _gptq,
    "awq": _awq,
    "pack-quantized": _packed,
    "mxfp4": _float4,
    "nvfp4": _float4,
}


def _unpacked(words: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    return unpack(words, bits, dim, words.shape[dim] * (WORD_BITS // bits), order)
