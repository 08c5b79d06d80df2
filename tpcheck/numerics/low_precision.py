"""All-reduces that send less than the activations hold: 8, 6 or 4 bits in blocks, or float16.

Requirement: an engine that quantizes its all-reduce drifts by much more than any order of adds, and
in another way: by the largest value of each block, not by the value itself. So the codecs are
emulated bit for bit, saturation included, and what they must cost is predicted from a case's own
partials, saturation excluded: a block that saturates is a finding, not an expectation.

[Two Shots] Every rank's block is encoded, sent to the rank that owns it and decoded there; the
owner adds the ranks up, encodes the sum and sends it to all. That is one rounding to the block's
grid per rank and one of the sum, and all ranks decode the same bits. At 8 ranks TensorRT-LLM sums
two groups of four first, which costs one rounding more.
[Not Taken] The engines hand other dtypes to another all-reduce. A float64 run asks whether the
function is the same, not how it is rounded: there, and wherever an engine does not take the dtype,
these kinds are the ring.
[Ideal Codec] The same blocks, scales and grids in float64, where no scale runs out of range, leave
the error that the format itself must leave: of blocks of float64 the codecs below are that.

Source: vLLM csrc/quickreduce/quick_reduce_impl.cuh and base.h (CodecQ8, Q6, Q4, FP);
TensorRT-LLM customLowPrecisionAllReduceKernels.cu and its page "Low-Precision-AllReduce".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce as fold
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from tpcheck.numerics.grids import GRIDS, round_to
from tpcheck.numerics.ulp import eps

_FLOAT16_MAX = 65504.0
_FLOAT16_SMALLEST = 2.0**-24
_WARP = 496
"""Elements that a warp sends: 31 threads, 16 bytes each; the last thread carries the scale."""
_WARPS = 16
"""Blocks of one owner in a row, where eight ranks take turns."""


def carried_as(kind: str, dtype: torch.dtype) -> str:
    """Return the kind that sums tensors of this dtype where `kind` is asked for.

    Source: [Not Taken]; vLLM's quick_all_reduce.py takes the 16-bit floats, TensorRT-LLM's
        customLowPrecisionAllReduce float32 as well.
    """
    taken = dtype in (torch.bfloat16, torch.float16) or (
        kind == "fp8_wire" and dtype == torch.float32
    )
    return kind if taken or kind not in LOW_PRECISION else "ring"


def sum_over_wire(tensors: Sequence[Tensor], kind: str) -> Tensor:
    """Sum the ranks' tensors as an all-reduce with this wire would.

    fp8_wire: blocks of 496 elements of each owner's chunk, in float8_e4m3fn, scaled in float32 so
    that the largest becomes 448; the owner adds in float32, itself first. A block with an infinity
    is not scaled, and saturates at 448.
    int8_wire, int6_wire, int4_wire: blocks of 32, every other one of 64 elements, in float16
    throughout. The scale is the largest element over -128, -32 or -8, and values are multiplied by
    its float16 reciprocal; ranks are added in order. What exceeds 65504 saturates (FP16_OVFL is
    set), the reciprocal too: blocks whose largest is below 128, 32 or 8 over 65504 come back too
    small. A NaN loses against the rest of its block.
    fp16_wire: cast to float16 without saturation, so 65520 and more are infinite; added in rank
    order, in float16.

    Args:
        tensors: one per rank, in rank order, two or more, equal shapes, not empty, of a dtype that
            the kind takes (`carried_as`); left alone.
        kind: one of LOW_PRECISION.

    Returns:
        A new contiguous tensor of the operands' shape and dtype.

    Source: the kernels named above. The scale that saturates: sgl-project/sglang#40084; the cast
        that does not: vllm-project/vllm#55345. Tails are filled up with zeros, where TensorRT-LLM
        refuses a message that does not divide.
    """
    first = tensors[0]
    if kind == "fp16_wire":
        total = fold(torch.add, [x.to(torch.float16) for x in tensors])
    else:
        total = _through(_CODECS[kind], [x.reshape(-1).float() for x in tensors])
    return total.to(first.dtype).view(first.shape).contiguous()


def wire_error(partials: Sequence[Tensor], kind: str) -> Tensor:
    """Return the error that a block-wise wire must leave in the sum: that of the ideal codec.

    Nothing that saturates is in it, and nothing that float16 or the deployed dtype round.

    Args:
        partials: the exact ones, in rank order, equal shapes.
        kind: one of LOW_PRECISION, or any other kind: its wire leaves nothing.

    Returns:
        Float64, of the partials' shape, signed.

    Source: [Ideal Codec]; its rms is within 15 % of the emulation's, and of q^2/12 per rounding to
        a spacing of q where values spread over many steps: benchmarks/results/low_precision.json.
    """
    exact = [x.double() for x in partials]
    if kind not in _CODECS or len(exact) == 1 or exact[0].numel() == 0:
        return torch.zeros_like(exact[0])
    sent = _through(_CODECS[kind], [x.reshape(-1) for x in exact])
    return sent.view(exact[0].shape) - fold(torch.add, exact)


def float16_energy(partials: Sequence[Tensor], kind: str, dtype: torch.dtype) -> Tensor:
    """Return what a wire's float16 adds round, as the energy of sums rounded to `dtype` instead.

    Args:
        partials: the exact ones, in rank order, equal shapes.
        kind: one of LOW_PRECISION, or any other kind: it adds nothing in float16 on its own.
        dtype: of the deployed tensors; where it is float16 the total is rounded to it anyway.

    Returns:
        Float64, of the partials' shape: to be added to the squares of `sum_nodes`.

    Source: the law of `sum_nodes`, for the adds of vLLM's packed_assign_add<half>.
    """
    exact = [x.double() for x in partials]
    energy = torch.zeros_like(exact[0])
    if kind not in LOW_PRECISION or kind == "fp8_wire":
        return energy
    nodes = list(accumulate(exact))[1:]
    finer = (eps(torch.float16) / eps(dtype)) ** 2
    for node in nodes[:-1] if dtype == torch.float16 else nodes:
        energy += finer * node.square()
    return energy


class _Codec(Protocol):
    """How an engine cuts a tensor into blocks, and what arrives of them."""

    def blocks(self, flat: Tensor, world: int) -> Tensor:
        """Return [blocks, elements of a block], filled up with zeros."""

    def flat(self, blocks: Tensor, count: int, world: int) -> Tensor:
        """Return the first `count` elements in the order that `blocks` took them from."""

    def shots(self, world: int) -> tuple[int, ...]:
        """Return how many terms are added up before what they come to is sent, shot by shot."""

    def sent(self, blocks: Tensor) -> Tensor:
        """Return what arrives of blocks that are encoded, sent and decoded."""

    def total(self, terms: Sequence[Tensor], world: int) -> Tensor:
        """Add up what arrived, in the owner's order and arithmetic."""


def _through(codec: _Codec, tensors: Sequence[Tensor]) -> Tensor:
    """Return the flat sum of flat tensors: float32 as the engine has it, float64 ideally."""
    world = len(tensors)
    terms = [codec.sent(codec.blocks(x, world)) for x in tensors]
    for size in codec.shots(world):
        groups = [terms[i : i + size] for i in range(0, len(terms), size)]
        terms = [codec.sent(codec.total(group, world)) for group in groups]
    return codec.flat(terms[0], tensors[0].numel(), world)


@dataclass(frozen=True, slots=True)
class _Integers:
    """AMD's quick reduce: the largest of 32 becomes -levels, and the other side ends one before."""

    grid: str

    def blocks(self, flat: Tensor, world: int) -> Tensor:
        # Two float16 share a register and are reduced side by side: even and odd elements.
        pairs = pad(flat, (0, -flat.numel() % 64)).view(-1, 32, 2)
        return pairs.transpose(1, 2).reshape(-1, 32)

    def flat(self, blocks: Tensor, count: int, world: int) -> Tensor:
        return blocks.view(-1, 2, 32).transpose(1, 2).reshape(-1)[:count]

    def shots(self, world: int) -> tuple[int, ...]:
        return (world,)

    def sent(self, blocks: Tensor) -> Tensor:
        levels = -GRIDS[self.grid].min
        blocks = _float16(blocks)
        scale = _float16(_largest(blocks) / -levels)
        if blocks.dtype == torch.float64:
            codes = blocks / torch.where(scale == 0, 1.0, scale)
        else:
            codes = _float16(blocks * _float16(1 / _float16(scale + _FLOAT16_SMALLEST)))
        codes = codes.masked_fill(codes.isnan(), -levels)  # as v_pk_max_f16 has it
        return _float16(round_to(codes, self.grid) * scale)

    def total(self, terms: Sequence[Tensor], world: int) -> Tensor:
        return fold(lambda a, b: _float16(a + b), terms)


@dataclass(frozen=True, slots=True)
class _Float8:
    """TensorRT-LLM: a warp sends float8_e4m3fn and one scale in float32."""

    def blocks(self, flat: Tensor, world: int) -> Tensor:
        chunks = self._chunks(world)
        chunk = -(-flat.numel() // chunks)
        cut = pad(flat, (0, chunks * chunk - flat.numel())).view(chunks, chunk)
        return pad(cut, (0, -chunk % _WARP)).view(-1, _WARP)

    def flat(self, blocks: Tensor, count: int, world: int) -> Tensor:
        chunks = self._chunks(world)
        return blocks.view(chunks, -1)[:, : -(-count // chunks)].reshape(-1)[:count]

    def shots(self, world: int) -> tuple[int, ...]:
        return (4, 2) if world == 8 else (world,)

    def sent(self, blocks: Tensor) -> Tensor:
        largest = blocks.abs().nan_to_num(0.0, math.inf).amax(-1, keepdim=True)
        # a number over a tensor is taken as its reciprocal times the number: two roundings
        scale = torch.full_like(largest, GRIDS["float8_e4m3fn"].max) / largest
        scale = scale.masked_fill((largest == 0) | (scale == 0), 1.0)  # zeros, or an infinity
        return round_to(blocks * scale, "float8_e4m3fn") / scale

    def total(self, terms: Sequence[Tensor], world: int) -> Tensor:
        rows = torch.arange(len(terms[0]), device=terms[0].device)
        owner = rows // (_WARPS if world == 8 else len(rows) // world) % len(terms)
        stacked = torch.stack(list(terms))
        in_turn = [stacked[(owner + k) % len(terms), rows] for k in range(len(terms))]
        return fold(torch.add, in_turn)

    def _chunks(self, world: int) -> int:
        """Return into how many chunks the tensor is cut before blocks are: one per owner."""
        return 1 if world == 8 else world


def _largest(blocks: Tensor) -> Tensor:
    """Return each block's element of the largest magnitude with its sign; NaN loses."""
    highest = blocks.nan_to_num(-math.inf, math.inf, -math.inf).amax(-1, keepdim=True)
    lowest = blocks.nan_to_num(math.inf, math.inf, -math.inf).amin(-1, keepdim=True)
    return torch.where(highest.abs() > lowest.abs(), highest, lowest)


def _float16(x: Tensor) -> Tensor:
    """Round float32 to float16's values; an overflow saturates, an infinity stays; float64 is."""
    if x.dtype == torch.float64:
        return x
    return torch.where(x.isinf(), x, x.clamp(-_FLOAT16_MAX, _FLOAT16_MAX)).half().float()


_CODECS: dict[str, _Codec] = {
    "fp8_wire": _Float8(),
    "int8_wire": _Integers("int8"),
    "int6_wire": _Integers("int6"),
    "int4_wire": _Integers("int4"),
}

LOW_PRECISION = (*_CODECS, "fp16_wire")
"""What reduction kinds these are, by what is on the wire."""
