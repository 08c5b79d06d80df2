"""The proof that ranks' parts tile a stored tensor, at one degree, in integers.

Requirement: every index of every sub-block (each head of q, k and v, gate apart from up) is held
once, or by every rank that has a copy; nothing is held that is not there. A scale or a packed
integer is cut with what it belongs to: one that would have to be cut in two is a problem, told with
the numbers. The spans are the plan's own, the geometry is that of `pieces`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

from tpcheck.errors import IllegalDegreeError
from tpcheck.header_check.dimensions import Dim, Expected
from tpcheck.pieces import resolve_pieces
from tpcheck.placement import Region, Slices
from tpcheck.shard_plan import RankPlan, Span, make_shard_plan
from tpcheck.spec import ModelSpec

Spans = Mapping[str, tuple[Span, ...]]
"""What is split → the units of each rank."""


class Pair(NamedTuple):
    """A stored run: where it lies in a rank's tensor, and where in the whole one."""

    local: Span
    whole: Span


def spans_at(spec: ModelSpec, dense_width: int | None, tp_size: int) -> Spans | str:
    """Return what each rank holds of every kind, or why this degree cannot be split evenly.

    Args:
        spec: the decoder; with experts where it has any.
        dense_width: the width of its dense layers, where it has both kinds.
        tp_size: the degree.
    """
    try:
        ranks = list(make_shard_plan(spec, tp_size).ranks)
        dense = _dense_ranks(spec, dense_width, tp_size) if spec.num_experts else ranks
    except IllegalDegreeError as error:
        return str(error).partition("\n")[0]
    fields = {"query": "query_heads", "kv": "kv_heads", "vocab": "vocab"}
    fields |= {name: name for name in ("moe_intermediate", "shared_expert_intermediate")}
    spans = {split: _spans(ranks, name) for split, name in fields.items()}
    return {**spans, "intermediate": _spans(dense, "intermediate")}


def _dense_ranks(spec: ModelSpec, width: int | None, tp_size: int) -> list[RankPlan]:
    if width is None:
        return []
    fields = {
        name: value
        for name, value in spec.to_fields().items()
        if "expert" not in name and name not in ("moe_intermediate_size", "norm_topk_prob")
    }
    dense = ModelSpec.from_fields({**fields, "intermediate_size": width})
    return list(make_shard_plan(dense, tp_size).ranks)


def _spans(ranks: list[RankPlan], name: str) -> tuple[Span, ...]:
    return tuple(getattr(rank, name) for rank in ranks)


def tiling_problems(
    expected: Expected, shape: tuple[int, ...], spans: Spans, tp_size: int
) -> list[str]:
    """Return what keeps ranks' parts from tiling a stored tensor of this shape; empty when none."""
    problems = []
    for axis, dim in enumerate(expected.dims):
        if not dim.is_split:
            continue
        cuts = [_rank_pairs(dim, spans, rank) for rank in range(tp_size)]
        straddling = next((one for one in cuts if isinstance(one, str)), None)
        if straddling is not None:
            problems.append(straddling)
            continue
        pairs = [one for one in cuts if not isinstance(one, str)]
        problems += _geometry(shape, axis, dim, pairs)
    return problems


def _rank_pairs(dim: Dim, spans: Spans, rank: int) -> list[Pair] | str:
    """Return a rank's stored runs of a dim, or where it would cut a stored index in two."""
    pairs: list[Pair] = []
    start_of_block = local = 0
    for block in dim.blocks:
        whole = Span(0, block.units) if not block.split else spans[block.split][rank]
        edges = (
            start_of_block + whole.start * block.width,
            start_of_block + whole.stop * block.width,
        )
        for word, edge in zip(("begins", "ends"), edges, strict=True):
            if edge % dim.grain and edge != dim.elements:
                return (
                    f"rank {rank} {word} at element {edge} of {dim.elements}, which is"
                    f" {edge / dim.grain:g} {dim.what}s of {dim.grain}, but should be a whole"
                    f" number of them: the {dim.what} belongs to two ranks"
                )
        stored = Span(edges[0] // dim.grain, -(-edges[1] // dim.grain))
        if stored.size:
            pairs.append(Pair(Span(local, local + stored.size), stored))
        local += stored.size
        start_of_block += block.size
    return pairs


def _geometry(shape: tuple[int, ...], axis: int, dim: Dim, pairs: list[list[Pair]]) -> list[str]:
    """Judge all ranks' runs along one dim of the stored tensor."""
    before: Region = (slice(None),) * axis
    placements = [
        Slices([((*before, slice(*one.local)), (*before, slice(*one.whole))) for one in rank])
        for rank in pairs
    ]
    pieces, problems = resolve_pieces(shape, placements, None)
    held = [(piece.rank, piece.whole[axis]) for piece in pieces]
    return problems or _coverage(shape[axis], axis, dim, held, len(pairs))


def _coverage(
    size: int, axis: int, dim: Dim, held: list[tuple[int, tuple[int, int]]], ranks: int
) -> list[str]:
    """Name the first indices that nobody holds, or that more ranks hold than have a copy."""
    marks = sorted({0, size, *(edge for _, span in held for edge in span)})
    counts: dict[tuple[int, int], int] = {}
    for start, stop in itertools.pairwise(marks):
        counts[start, stop] = sum(span[0] <= start and stop <= span[1] for _, span in held)
    for (start, stop), count in counts.items():
        if count == 0:
            return [f"no rank holds {start}:{stop} of dim {axis}"]
    at = 0.0
    for block in dim.blocks:
        end = at + block.size / dim.grain
        wanted = max(1, ranks // block.units) if block.split == "kv" else 1
        for (start, stop), count in counts.items():
            if at <= start and stop <= end and count != wanted:
                return [
                    f"{count} ranks hold {start}:{stop} of dim {axis}, but should {wanted}"
                    f" [{block.split}]"
                ]
        at = end
    return []
