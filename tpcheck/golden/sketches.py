"""What a small record keeps of logits: a sketch of all of them, and a few as they are.

Requirement: a record of a few kilobytes in which a change at any position shows, and that people
can read. So every position keeps its rms, how many of its values are not finite, and a sketch; and
a few positions keep their largest logits with their indices.

[Sketch] SUMS sums of a position's logits, each with weights of its own, over the root of their
count. Weights have random signs, random sizes of mean square 1, and none is 0. So a difference d of
two tensors moves each sum by one with mean 0 and variance |d|^2 / V, relative rms and ratios of
errors can be read from sketches as from the tensors, and what one element changes moves every sum:
no logit is left out. Two logits that change places stay unseen where all their weights are equal,
once in 2^128 pairs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

SUMS = 16
TOP = 8
"""Logits kept of a chosen position: its largest in the oracle."""

MAX_ROWS = 8
"""Rows of which positions are chosen: the first, the last and others drawn."""

_AT_ONCE = 1 << 22

_ROOT_MEAN_SQUARE = math.sqrt(sum(size**2 for size in range(128, 256)) / 128)


@dataclass(frozen=True, slots=True)
class Sketch:
    """Of logits [..., vocab], as P positions: float64 [P, SUMS]; float64 [P]; int32 [P, 3].

    `strange` counts NaN, +inf and -inf; the rest is of what is finite.
    """

    sums: torch.Tensor
    rms: torch.Tensor
    strange: torch.Tensor


def as_positions(logits: torch.Tensor) -> torch.Tensor:
    """Return any output as [positions, values] without copying; complex numbers become pairs."""
    x = logits.detach()
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.reshape(positions_of(x.shape))


def positions_of(shape: Sequence[int]) -> tuple[int, int]:
    """Return how many positions an output of this shape has, and how many values each."""
    return (1, math.prod(shape)) if len(shape) < 2 else (math.prod(shape[:-1]), shape[-1])


def sketch(logits: torch.Tensor) -> Sketch:
    """Return the [Sketch] of an output; a few million values at a time."""
    rows = as_positions(logits)
    count, vocab = rows.shape
    step = max(1, _AT_ONCE // max(1, vocab))
    made = [_sketch(rows[at : at + step]) for at in range(0, count, step)] or [_sketch(rows)]
    return Sketch(*(torch.cat([getattr(one, name) for one in made]) for name in Sketch.__slots__))


def _sketch(rows: torch.Tensor) -> Sketch:
    values = rows.to(torch.float64)
    kinds = (values.isnan(), values == math.inf, values == -math.inf)
    strange = torch.stack([kind.sum(1) for kind in kinds], 1).to(torch.int32)
    held = torch.where(values.isfinite(), values, 0.0)
    vocab = max(1, rows.shape[1])
    sums = held @ sketch_weights(rows.shape[1]) / math.sqrt(vocab)
    return Sketch(sums, (held.square().sum(1) / vocab).sqrt(), strange)


@lru_cache(maxsize=4)
def sketch_weights(vocab: int) -> torch.Tensor:
    """Return the weights of SUMS sums over `vocab` logits, float64 [vocab, SUMS].

    Bytes of SHAKE-128, so that they are the same in every version of everything: one bit is the
    sign, seven say a size of 128 to 255, in units of what makes the mean square 1.
    """
    drawn = hashlib.shake_128(b"tpcheck golden weights/2").digest(vocab * SUMS)
    # torch makes no tensor of an empty buffer
    flat = torch.frombuffer(bytearray(drawn + b"\0"), dtype=torch.uint8)[:-1]
    raw = flat.reshape(vocab, SUMS).to(torch.float64)
    return torch.where(raw < 128, raw + 128, -raw) / _ROOT_MEAN_SQUARE


def chosen_positions(shape: Sequence[int], key: str) -> list[int]:
    """Return which positions of an output keep logits: of every row the first, the last, one more.

    Of more than MAX_ROWS rows the first, the last and others drawn; what is drawn is a function of
    `key` alone.

    Example:
        >>> chosen_positions((2, 16, 131), "s0-b2-t16 A")
        [0, 15, 16, 30, 31]
    """
    rows = shape[0] if len(shape) > 2 else 1
    count = math.prod(shape[:-1]) if len(shape) > 1 else 1
    if count == 0 or rows == 0:
        return []
    length = count // rows
    kept = {0, rows - 1} | _drawn(f"{key} rows", rows, MAX_ROWS - 2)
    if rows <= MAX_ROWS:
        kept = set(range(rows))
    return sorted(
        row * length + at
        for row in kept
        for at in {0, length - 1} | _drawn(f"{key} {row}", length, 1)
    )


def _drawn(key: str, below: int, count: int) -> set[int]:
    stream = hashlib.shake_128(key.encode()).digest(8 * count)
    return {int.from_bytes(stream[8 * i : 8 * i + 8], "little") % below for i in range(count)}


def largest(logits: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
    """Return the indices of the TOP largest finite values at some positions, int32 [n, k]."""
    rows = as_positions(logits)[list(positions)].to(torch.float64)
    held = torch.where(rows.isfinite(), rows, -math.inf)
    return held.topk(min(TOP, rows.shape[1]), dim=1).indices.to(torch.int32)


def taken(logits: torch.Tensor, positions: Sequence[int], indices: torch.Tensor) -> torch.Tensor:
    """Return the values at some indices of some positions, in the dtype they have."""
    return as_positions(logits)[list(positions)].gather(1, indices.long()).contiguous()
