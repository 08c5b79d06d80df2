"""Which rank is to blame, and what it seems to have done.

Requirement: "4,096 elements differ" sends nobody anywhere; "rank 3 holds rank 2's piece" does.
Copies are held against the majority's bits; a foreign piece is looked for where the others belong;
the terms of a sum are regressed onto its error. All of it reads blocks, never whole tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from tpcheck.captures.layouts import Layout, Span
from tpcheck.captures.measuring import BLOCK, Tally, blocks, rows_of
from tpcheck.captures.tensors import Tensor, bits_of
from tpcheck.captures.tolerances import Limit
from tpcheck.numerics.regression import most_scaled_rank

MAX_SUSPECTS = 16
"""Foreign pieces are looked for on so many ranks at most: each is held against all places."""

MAX_OUTPUTS = 1 << 16
"""So many outputs of a sum are regressed at most, evenly spread over it."""


class Disagreement(NamedTuple):
    """A rank whose copy differs from the majority's, and in how many elements."""

    rank: int
    elements: int
    majority: int


def disagreements(
    layout: Layout, locals_: Mapping[int, Tensor], suspects: Sequence[int] = ()
) -> list[Disagreement]:
    """Return the ranks whose bits differ from the most common copy of the same piece.

    Of two copies that differ neither is the common one: it is that of no suspect, else of the lower
    rank.
    """
    places: dict[tuple[int, int], list[Span]] = {}
    for span in layout.spans:
        places.setdefault((span.whole, span.length), []).append(span)
    found: dict[int, Disagreement] = {}
    for spans in places.values():
        if len(spans) < 2:
            continue
        by_bits: dict[bytes, list[Span]] = {}
        for span in spans:
            by_bits.setdefault(_digest(layout, span, locals_[span.rank]), []).append(span)
        groups = sorted(
            by_bits.values(),
            key=lambda group: (-len(group), group[0].rank in suspects, group[0].rank),
        )
        common = groups[0][0]
        for group in groups[1:]:
            count = sum(
                int((bits_of(a) != bits_of(b)).sum())
                for a, b in zip(
                    _runs(layout, common, locals_[common.rank]),
                    _runs(layout, group[0], locals_[group[0].rank]),
                    strict=True,
                )
            )
            for span in group:
                before = found.get(span.rank, Disagreement(span.rank, 0, common.rank))
                found[span.rank] = before._replace(elements=before.elements + count)
    return sorted(found.values())


def foreign_pieces(
    layout: Layout,
    expected: Tensor,
    locals_: Mapping[int, Tensor],
    limit: Limit,
    suspects: Sequence[int],
) -> dict[int, int]:
    """Return, for ranks whose piece is wrong, whose piece it is instead: {rank: owner}."""
    found: dict[int, int] = {}
    for rank in suspects[:MAX_SUSPECTS]:
        mine = [span for span in layout.spans if span.rank == rank]
        for owner in layout.ranks:
            theirs = [span for span in layout.spans if span.rank == owner]
            alike = [(a.length, a.local) for a in mine] == [(b.length, b.local) for b in theirs]
            if owner != rank and alike and _fits(layout, mine, theirs, expected, locals_, limit):
                found[rank] = owner
                break
    return found


def wrong_term(
    layout: Layout, expected: Tensor, locals_: Mapping[int, Tensor]
) -> tuple[int, str] | None:
    """Return the rank whose term of a sum is wrong as a whole, and how; None where none stands out.

    Recorded terms are the truth of neither side: a term recorded twice as large is one of which the
    expected sum counts a half.
    """
    step = max(1, -(-layout.size // MAX_OUTPUTS))
    picked: list[torch.Tensor] = []
    wanted: list[torch.Tensor] = []
    for start in range(0, layout.size, BLOCK):
        stop = min(start + BLOCK, layout.size)
        offset = -start % step
        terms = [locals_[rank].read(start, stop)[offset::step] for rank in layout.ranks]
        if terms[0].is_complex():
            return None
        picked.append(torch.stack([term.double() for term in terms]))
        wanted.append(expected.read(start, stop)[offset::step].double())
    partials = torch.cat(picked, 1)
    empty = [rank for rank, some in zip(layout.ranks, partials.any(1), strict=True) if not some]
    if len(empty) == 1:
        return empty[0], f"rank {empty[0]}'s term is all zeros"
    found = most_scaled_rank(partials, torch.cat(wanted) - partials.sum(0))
    if found is None or not found.significant or found.factor == 0:
        return None
    rank = layout.ranks[found.rank]
    return rank, f"rank {rank}'s term is {1 / found.factor:.6g} times what it should be"


def _fits(
    layout: Layout,
    mine: Sequence[Span],
    theirs: Sequence[Span],
    expected: Tensor,
    locals_: Mapping[int, Tensor],
    limit: Limit,
) -> bool:
    rank = mine[0].rank
    moved = tuple(b._replace(rank=rank) for b in theirs)
    fields = {name: getattr(layout, name) for name in Layout.__slots__}
    for block in blocks(Layout(**{**fields, "spans": moved})):
        tally = Tally(layout.shape, limit, expected.dtype)
        want = rows_of(expected, block.expected, block, block.expected_stride)
        got = rows_of(locals_[rank], block.local, block, block.local_stride)
        tally.add(got, want, block.expected, block.expected_stride)
        loose = not limit.bits and not limit.elementwise
        if tally.mismatches or (loose and tally.differing):
            return False
    return True


def _runs(layout: Layout, span: Span, tensor: Tensor) -> Iterator[torch.Tensor]:
    fields = {name: getattr(layout, name) for name in Layout.__slots__}
    for block in blocks(Layout(**{**fields, "spans": (span,)})):
        yield rows_of(tensor, block.local, block, block.local_stride)


def _digest(layout: Layout, span: Span, tensor: Tensor) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for run in _runs(layout, span, tensor):
        digest.update(bits_of(run).numpy().tobytes())
    return digest.digest()
