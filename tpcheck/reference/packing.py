"""Codes of a few bits, packed as checkpoints store them: into int32 words or into bytes.

Requirement: a weight's true sizes are those of its codes, while files hold words. A cut that looks
right in words may split or shuffle codes, so the way back to codes has to be exact and separate.

[Layouts] K is the input dim, N the output dim, G the groups along K; code 0 of a word is its
lowest bits.

    format              stored            shape, dtype             along   code
    GPTQ                qweight           [K/8, N] int32           0 (K)   unsigned
    GPTQ                qzeros            [G, N/8] int32           1 (N)   zero; in v1 zero - 1
    AWQ                 qweight           [K, N/8] int32           1 (N)   unsigned, AWQ_ORDER
    AWQ                 qzeros            [G, N/8] int32           1 (N)   unsigned, AWQ_ORDER
    compressed-tensors  weight_packed     [N, K/8] int32           1 (K)   signed + 2^(bits-1)
    compressed-tensors  weight_zero_point [N/8, G] int32           0 (N)   signed + 2^(bits-1)
    MXFP4, NVFP4        weight_packed     [N, K/2] uint8           1 (K)   float4_e2m1, nibbles
    gpt-oss             *_blocks          [E, N, K/32, 16] uint8  -1 (K)   float4_e2m1, nibbles

The 8 stands for 32 / bits at 4 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

WORD_BITS = 32
CODE_BITS = (1, 2, 4, 8)
"""Widths that fill a word; 3-bit formats let codes run over its end, each in its own way."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Place i of an AWQ word, from its lowest bits, holds code AWQ_ORDER[i] of its eight."""

GPTQ_V1_ZERO_OFFSET = 1
"""GPTQ v1 stores a zero point less this, modulo 2^bits; checkpoint_format `gptq_v2` does not."""


def pack(codes: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack codes into words along one dim; an incomplete last word is filled with zeros.

    Args:
        codes: integers of any dtype in 0..2^bits - 1, at least one dim.
        bits: of a code, one of CODE_BITS.
        dim: along which 32 / bits neighbours share a word.
        order: which of a word's codes stands at each place, from its lowest bits; as they come if
            None.

    Returns:
        A new contiguous int32 tensor, `dim` ceil(bits * size / 32) long.

    Raises:
        ValueError: bits, the order, a code or the dtype is none of these; the value is named.

    Source: [Layouts]; measured against the formats' own packers: tests/unit/test_packing.py.
    """
    per_word = _codes_per_word(bits, order)
    _require_codes(codes, bits)
    last = codes.movedim(dim, -1).to(torch.int32)
    count = -(-last.shape[-1] // per_word)
    filled = pad(last, (0, count * per_word - last.shape[-1]))
    places = filled.unflatten(-1, (count, per_word))
    if order is not None:
        places = places[..., list(order)]
    shifted = torch.bitwise_left_shift(places, _shifts(bits, codes.device))
    words = shifted.sum(-1, dtype=torch.int32)
    return words.movedim(-1, dim).contiguous()


def unpack(
    words: Tensor, bits: int, dim: int, size: int, order: tuple[int, ...] | None = None
) -> Tensor:
    """Return the codes that `pack` made these words of.

    Args:
        words: int32.
        bits: of a code, one of CODE_BITS.
        dim: along which they were packed.
        size: codes along `dim`; what fills the last word is dropped.
        order: as for pack.

    Returns:
        A new contiguous int32 tensor of codes 0..2^bits - 1, `dim` being `size` long.

    Raises:
        ValueError: bits, the order or the dtype is none of these, or the words along `dim` are
            not as many as `size` codes need.

    Source: as for pack.
    """
    per_word = _codes_per_word(bits, order)
    if words.dtype != torch.int32:
        raise ValueError(f"unpack: words.dtype={words.dtype}, but should be torch.int32")
    needed = -(-size // per_word)
    if words.shape[dim] != needed:
        raise ValueError(
            f"unpack: words.shape[{dim}]={words.shape[dim]}, but should be {needed} "
            f"[{size} codes of {bits} bits]"
        )
    last = words.movedim(dim, -1).unsqueeze(-1)
    shifted = torch.bitwise_right_shift(last, _shifts(bits, words.device))
    places = torch.bitwise_and(shifted, 2**bits - 1)  # the shift dragged the sign along
    if order is not None:
        places = places[..., [order.index(code) for code in range(per_word)]]
    return places.flatten(-2)[..., :size].movedim(-1, dim).contiguous()


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack pairs of 4-bit codes along the last dim into bytes, the first in the low nibble.

    Args:
        codes: integers of any dtype in 0..15, [..., K] with an even K.

    Returns:
        A new uint8 tensor [..., K/2].

    Raises:
        ValueError: K is odd, or a code or the dtype is none of these; the value is named.

    Source: [Layouts]; measured against the formats' own packers: tests/unit/test_packing.py.
    """
    _require_codes(codes, 4)
    if codes.shape[-1] % 2:
        raise ValueError(f"pack_nibbles: codes.shape[-1]={codes.shape[-1]}, but should be even")
    pairs = codes.to(torch.uint8)
    return pairs[..., ::2] | (pairs[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Return the codes that `pack_nibbles` made these bytes of.

    Args:
        packed: uint8 [..., K/2].

    Returns:
        A new uint8 tensor [..., K] of codes 0..15.

    Raises:
        ValueError: the dtype is not uint8.

    Source: as for pack_nibbles.
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f"unpack_nibbles: dtype={packed.dtype}, but should be torch.uint8")
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _codes_per_word(bits: int, order: tuple[int, ...] | None) -> int:
    if bits not in CODE_BITS:
        raise ValueError(f"bits={bits}, but should be one of {', '.join(map(str, CODE_BITS))}")
    count = WORD_BITS // bits
    if order is not None and sorted(order) != list(range(count)):
        raise ValueError(f"order={order}, but should hold 0..{count - 1} once each [bits={bits}]")
    return count


def _require_codes(codes: Tensor, bits: int) -> None:
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
        raise ValueError(f"codes.dtype={codes.dtype}, but should be of integers")
    if codes.numel() == 0:
        return
    for code in (int(codes.min()), int(codes.max())):
        if not 0 <= code < 2**bits:
            raise ValueError(f"code={code}, but should be in 0..{2**bits - 1} [bits={bits}]")


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=device)
