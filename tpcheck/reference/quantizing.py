"""Weights rounded to a storage format: how generated models get quantized weights.

Requirement: what is stored has the layout and the bits that the format's own tools write, so that
a generated case says something about real checkpoints. Scales are the plain ones: from the largest
magnitude that shares a scale, or from the range where there are zero points. Real tools choose
better ones; nothing here depends on the choice.

Shape legend: N output features, K input features, S and G the scales along them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad as zero_pad

from tpcheck.numerics.grids import GRIDS, encode, round_to
from tpcheck.quantization import Quantization
from tpcheck.reference.packing import AWQ_ORDER, GPTQ_V1_ZERO_OFFSET, pack, pack_nibbles


def quantize(weight_NK: Tensor, quantization: Quantization) -> dict[str, Tensor]:
    """Return a whole weight as its format stores it, by the suffix of each tensor's name.

    Args:
        weight_NK: read in float64, whatever its dtype.
    """
    return _WRITERS[quantization.format](weight_NK.double(), quantization)


class Shared(NamedTuple):
    """Which part of a weight [N, K] a rank has, and how ranks find what they share.

    `rows` and `columns` are its features among all; `largest` returns the elementwise maximum over
    ranks of a tensor that all of them give.
    """

    rows: Sequence[int]
    columns: Sequence[int]
    shape: tuple[int, ...]
    largest: Callable[[Tensor], Tensor]


def quantize_part(
    part_nk: Tensor, quantization: Quantization, shared: Shared
) -> tuple[dict[str, Tensor], Tensor]:
    """Quantize a rank's part of a weight, fp8 or int8, with the scales of the whole.

    Returns:
        The stored tensors: this rank's codes first, then all scales. And the numbers they stand
        for, in float64.
    """
    grid, dtype = _PLAIN[quantization.format]
    rows, group = quantization.block_rows, quantization.group_size
    height, width = rows or max(1, shared.shape[0]), group or max(1, shared.shape[1])
    which_S = torch.tensor([row // height for row in shared.rows], dtype=torch.int64)
    which_G = torch.tensor([column // width for column in shared.columns], dtype=torch.int64)
    sizes = (-(-shared.shape[0] // height), -(-shared.shape[1] // width))
    place = (which_S[:, None] * sizes[1] + which_G).flatten().to(part_nk.device)
    exact = part_nk.double()
    own = exact.new_zeros(sizes[0] * sizes[1]).scatter_reduce(
        0, place, exact.abs().flatten(), "amax"
    )
    scales = scale_to(shared.largest(own), grid).float()
    each = scales.double()[place].view(part_nk.shape)
    codes = round_to(exact / each, grid)
    suffix = "weight_scale_inv" if rows > 1 and group else "weight_scale"
    return {"weight": codes.to(dtype), suffix: scales.view(sizes)}, codes * each


def scale_to(largest: Tensor, grid: str) -> Tensor:
    """Return the scale that takes a largest magnitude to the end of a grid; 1 for all zeros."""
    return torch.where(largest > 0, largest / GRIDS[grid].max, torch.ones_like(largest))


def _plain(weight: Tensor, quantization: Quantization) -> dict[str, Tensor]:
    grid, dtype = _PLAIN[quantization.format]
    rows, group = quantization.block_rows, quantization.group_size
    scales = scale_to(_extreme(weight.abs(), rows, group), grid).float()
    codes = round_to(weight / _spread(scales.double(), rows, group, weight), grid)
    suffix = "weight_scale_inv" if rows > 1 and group else "weight_scale"
    return {"weight": codes.to(dtype), suffix: scales}


_PLAIN = {"fp8": ("float8_e4m3fn", torch.float8_e4m3fn), "int8": ("int8", torch.int8)}


def _gptq(weight: Tensor, quantization: Quantization) -> dict[str, Tensor]:
    bits, offset = quantization.bits, 0 if quantization.zeros_as_is else GPTQ_V1_ZERO_OFFSET
    g_idx = _group_index(weight, quantization)
    codes, scales, zeros = _integers(weight, quantization, torch.float16, offset, g_idx)
    return {
        "qweight": pack(codes.T, bits, 0),
        "qzeros": pack(zeros.T - offset, bits, 1),
        "scales": scales.T.contiguous(),
        "g_idx": g_idx.int(),
    }


def _awq(weight: Tensor, quantization: Quantization) -> dict[str, Tensor]:
    g_idx = _group_index(weight, quantization)
    codes, scales, zeros = _integers(weight, quantization, torch.float16, 0, g_idx)
    return {
        "qweight": pack(codes.T, 4, 1, AWQ_ORDER),
        "qzeros": pack(zeros.T, 4, 1, AWQ_ORDER),
        "scales": scales.T.contiguous(),
    }


def _packed(weight: Tensor, quantization: Quantization) -> dict[str, Tensor]:
    bits = quantization.bits
    g_idx = _group_index(weight, quantization)
    codes, scales, zeros = _integers(weight, quantization, torch.bfloat16, 0, g_idx)
    parts = {"weight_packed": pack(codes, bits, 1), "weight_scale": scales}
    if not quantization.symmetric:
        parts["weight_zero_point"] = pack(zeros, bits, 0)
    if quantization.desc_act:
        parts["weight_g_idx"] = g_idx.int()
    return parts


def _mxfp4(weight: Tensor, quantization: Quantization) -> dict[str, Tensor]:
    """Source: OCP Microscaling Formats 1.0, section 6.3 (the shared exponent of a block)."""
    group = quantization.group_size
    largest = _extreme(weight.abs(), 1, group)
    exponent = torch.floor(torch.log2(torch.where(largest > 0, largest, 1.0))) - _FLOAT4_EXPONENT
    scales = torch.exp2(exponent.clamp(-127, 127))
    codes = _float4_codes(weight / _spread(scales, 1, group, weight))
    return {"weight_packed": codes, "weight_scale": encode(scales, "e8m0")}


_FLOAT4_EXPONENT = 2
"""Of the largest value of float4_e2m1, 6."""


def _nvfp4(weight: Tensor, quantization: Quantization) -> dict[str, Tensor]:
    """Scales are e4m3 of a global one, which takes the largest of them to the end of e4m3."""
    group = quantization.group_size
    ends = GRIDS["float8_e4m3fn"].max * GRIDS["float4_e2m1"].max
    largest = weight.abs().max() if weight.numel() else weight.new_ones(())
    whole = torch.where(largest > 0, ends / largest, torch.ones_like(largest)).float()
    stored = _extreme(weight.abs(), 1, group) / GRIDS["float4_e2m1"].max * whole.double()
    scales = round_to(stored, "float8_e4m3fn")
    divisor = torch.where(scales > 0, scales / whole.double(), torch.ones_like(scales))
    codes = _float4_codes(weight / _spread(divisor, 1, group, weight))
    return {
        "weight_packed": codes,
        "weight_scale": scales.to(torch.float8_e4m3fn),
        "weight_global_scale": whole.reshape(1),
    }


_WRITERS = {
    "fp8": _plain,
    "int8": _plain,
    "gptq": _gptq,
    "awq": _awq,
    "pack-quantized": _packed,
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
}


class _Integers(NamedTuple):
    """Codes [N, K], scales and zeros [N, G]; a number is (code - zero) * scale."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def _integers(
    weight: Tensor,
    quantization: Quantization,
    scale_dtype: torch.dtype,
    lowest_zero: int,
    g_idx: Tensor,
) -> _Integers:
    most, half = 2**quantization.bits - 1, 2 ** (quantization.bits - 1)
    order = torch.argsort(g_idx, stable=True)
    group = quantization.group_size
    low = _extreme(-weight[:, order], 1, group).neg().clamp_max(0)
    high = _extreme(weight[:, order], 1, group).clamp_min(0)
    if quantization.symmetric:
        width = 2 * torch.maximum(high, -low)
    else:
        width = high - low
    scales = torch.where(width > 0, width / most, torch.ones_like(width)).to(scale_dtype)
    tiny = torch.finfo(scale_dtype).tiny
    scales = torch.where(scales == 0, torch.full_like(scales, tiny), scales)
    exact = scales.double()
    zeros = torch.full_like(exact, half)
    if not quantization.symmetric:
        zeros = torch.round(-low / exact).clamp(lowest_zero, most)
    codes = torch.round(weight / exact[:, g_idx]) + zeros[:, g_idx]
    return _Integers(codes.clamp(0, most).int(), scales, zeros.int())


def _group_index(weight: Tensor, quantization: Quantization) -> Tensor:
    """Return the group of each input feature [K]; under act-order by falling energy."""
    size = weight.shape[1]
    places = torch.arange(size, device=weight.device) // (quantization.group_size or max(1, size))
    if not quantization.desc_act:
        return places
    order = torch.argsort(weight.square().sum(0), descending=True, stable=True)
    return torch.empty_like(places).index_copy_(0, order, places)


def _float4_codes(scaled: Tensor) -> Tensor:
    codes = encode(round_to(scaled, "float4_e2m1"), "float4_e2m1")
    return pack_nibbles(zero_pad(codes, (0, codes.shape[1] % 2)))


def _extreme(values: Tensor, rows: int, group: int) -> Tensor:
    """Return the largest value of each block [S, G]; 0 rows or columns mean all of them."""
    height, width = (rows or max(1, len(values))), (group or max(1, values.shape[1]))
    behind = (0, -values.shape[1] % width, 0, -values.shape[0] % height)
    filled = zero_pad(values, behind, value=-torch.inf)
    blocks = filled.reshape(len(filled) // height, height, -1, width)
    return blocks.amax((1, 3))


def _spread(scales: Tensor, rows: int, group: int, like: Tensor) -> Tensor:
    """Return each element's scale."""
    height, width = (rows or max(1, len(like))), (group or max(1, like.shape[1]))
    every = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return every[: len(like), : like.shape[1]]
