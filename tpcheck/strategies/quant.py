"""Quantization blocks, and the dims they do and do not divide.

Requirement: a rank that holds part of a block needs a scale that another rank holds. Published
models failed on odd group counts (29 of 64, 231 of 128), on shards smaller than a block, and on
rounding up per rank; all of them are drawn on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from hypothesis import strategies as st

from tpcheck.strategies.shapes import require_at_least
from tpcheck.strategies.tables import Group, Question, answers, grouped, pick, questions

KINDS = ("block", "group")
"""A block is square and cuts both dims of a weight, a group cuts the input dim only."""

SIZES = (2, 3, 4, 8, 16, 32, 64, 128)

_ODD_COUNTS = (29, 231)
_COUNTS = (*range(1, 9), 12, 16, 37, 58, *_ODD_COUNTS)
_PUBLISHED = {32: (7984,), 64: (1856,), 128: (258, 640, 1536, 29568)}
"""Widths of published models that some degree cut through a block of this size."""


class QuantBlock(NamedTuple):
    """`size` elements of a dim share a scale. `kind` is "block" or "group"."""

    kind: str
    size: int
    dim: int

    @property
    def scales(self) -> int:
        """How many scales the whole dim has; the last may be of a part of a block."""
        return -(-self.dim // self.size)


def whole_blocks(dim: int, size: int, tp_size: int) -> bool:
    """Return whether every rank's equal share of `dim` is a whole number of blocks.

    Example:
        >>> whole_blocks(1536, 128, 4), whole_blocks(1536, 128, 8), whole_blocks(1856, 64, 2)
        (True, False, False)
    """
    share, rest = divmod(dim, tp_size)
    return rest == 0 and share > 0 and share % size == 0


def quant_blocks(
    tp_size: int | Sequence[int] | None = None,
    legal: bool | None = None,
    *,
    max_dim: int | None = None,
) -> st.SearchStrategy[QuantBlock]:
    """Draw a block or group size and a dim it is cut from.

    Args:
        tp_size: a degree, or several that `legal` holds for at once; by default one of 2, 3, 4, 6
            and 8, drawn.
        legal: True for dims of which every rank gets whole blocks, False for dims of which some
            rank does not, at every given degree; None for either.
        max_dim: by default nothing is left out: published dims go up to 29568.

    Raises:
        TPCheckError: a degree or bound is malformed, or no dim up to max_dim is on this side.

    Example:
        >>> from hypothesis import find
        >>> from tpcheck.strategies import quant_blocks
        >>> block = find(quant_blocks(2, legal=True), lambda block: block.scales == 58)
        >>> block.dim // block.size, block.dim // 2 // block.size
        (58, 29)
        >>> find(quant_blocks(2, legal=False), lambda block: block.dim == 29568).scales
        231
    """
    if max_dim is not None:
        require_at_least("quant_blocks", "max_dim", max_dim, 1)
    asked = questions(
        "quant_blocks",
        tp_size,
        legal,
        bounds={"max_dim": max_dim},
        among=lambda question: _sizes(question, max_dim),
    )
    return _quant_blocks(asked, max_dim)


@st.composite
def _quant_blocks(draw: st.DrawFn, asked: tuple[Question, ...], max_dim: int | None) -> QuantBlock:
    question = draw(st.sampled_from(asked))
    kind = draw(st.sampled_from(KINDS))
    size = draw(st.sampled_from(_sizes(question, max_dim)))
    return QuantBlock(kind, size, pick(draw, _dims(question, max_dim, size)))


def _sizes(question: Question, max_dim: int | None) -> list[int]:
    return [size for size in SIZES if _dims(question, max_dim, size)]


@lru_cache(maxsize=512)
def _dims(question: Question, max_dim: int | None, size: int) -> tuple[Group[int], ...]:
    """Return dims that answer the question for one block size, grouped by what is wrong."""

    def judge(dim: int) -> tuple[frozenset[int], str]:
        fits = frozenset(tp for tp in question.tp_sizes if whole_blocks(dim, size, tp))
        return fits, "" if fits else _fault(dim, size, question.tp_sizes)

    def often(dims: tuple[int, ...]) -> Iterator[Sequence[int]]:
        yield dims[:8]
        yield [dim for dim in dims if dim in _PUBLISHED.get(size, ())]
        yield [dim for dim in dims if dim // size in _ODD_COUNTS]

    least = math.lcm(*question.tp_sizes)
    dims = [dim for dim in _candidates(size, least) if max_dim is None or dim <= max_dim]
    return tuple(group for group in grouped(dims, judge, often) if answers(group.fits, question))


def _fault(dim: int, size: int, tp_sizes: tuple[int, ...]) -> str:
    """Name the way in which a dim does not divide at any degree."""
    if dim % size:
        return "ragged"
    return "shard smaller than a block" if dim < size * min(tp_sizes) else "blocks do not divide"


def _candidates(size: int, least: int) -> list[int]:
    """Propose whole blocks, one element and half a block off, parts of one, published dims."""
    whole = [size * count for count in _COUNTS]
    dims = {*whole, *(least * dim for dim in whole), *(least * many for many in range(1, 9))}
    dims |= {dim + off for dim in whole[:4] for off in (-1, 1, size // 2)}
    return sorted(dims | set(_PUBLISHED.get(size, ())))
