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
from tpcheck.header_check.dimensions import Block, Dim, Expected
from tpcheck.pieces import resolve_pieces
from tpcheck.placement import Region, Slices
from tpcheck.shard_plan import STRICT, ShardPlan, Span, SplitPolicy, best_plan, make_shard_plan
from tpcheck.spec import ModelSpec

Spans = Mapping[str, tuple[Span, ...]]
"""What is split → the units of each rank."""


class Pair(NamedTuple):
    """A stored run: where it lies in a rank's tensor, and where in the whole one."""

    local: Span
    whole: Span


class Cuts(NamedTuple):
    """The spans of a degree, and how they differ from an even split: "" where they do not."""

    spans: Spans
    way: str = ""


def cuts_at(spec: ModelSpec, dense_width: int | None, tp_size: int, grain: int = 1) -> Cuts | str:
    """Return what each rank holds of every kind, or why this degree cannot be split.

    A degree that does not divide is split as the reference decoder would: with pads, copies or
    uneven parts. Pads are in no checkpoint, so they have no part in what tiles it.

    Args:
        spec: the decoder or tower; with experts where it has any.
        dense_width: the width of its dense layers, where it has both kinds.
        tp_size: the degree.
        grain: features that share a scale, which parts that need not be even are whole numbers of.
    """
    try:
        plan = _plan(spec, tp_size, grain)
        dense = plan
        if spec.num_experts and dense_width is not None:
            dense = _plan(_without_experts(spec, dense_width), tp_size, grain)
    except IllegalDegreeError as error:
        return str(error).partition("\n")[0]
    fields = {"query": "query_heads", "kv": "kv_heads", "vocab": "vocab"}
    fields |= {name: name for name in ("moe_intermediate", "shared_expert_intermediate")}
    spans = {split: _spans(plan, name) for split, name in fields.items()}
    spans["intermediate"] = _spans(dense, "intermediate")
    ways = {**_ways(dense.policy), **_ways(plan.policy)}
    return Cuts(spans, ", ".join(ways))


def _plan(spec: ModelSpec, tp_size: int, grain: int) -> ShardPlan:
    """Return the even split where there is one, else what is padded, copied or uneven instead."""
    try:
        return make_shard_plan(spec, tp_size)
    except IllegalDegreeError:
        return best_plan(spec, tp_size, block=grain)


def _ways(policy: SplitPolicy) -> dict[str, None]:
    said = (
        (policy.heads != STRICT.heads, f"heads {policy.heads}"),
        (policy.kv != STRICT.kv, f"KV heads {policy.kv}"),
        (policy.intermediate != STRICT.intermediate, f"widths {policy.intermediate}"),
    )
    return {words: None for differs, words in said if differs}


def _without_experts(spec: ModelSpec, width: int) -> ModelSpec:
    fields = {
        name: value
        for name, value in spec.to_fields().items()
        if "expert" not in name and name not in ("moe_intermediate_size", "norm_topk_prob")
    }
    return ModelSpec.from_fields({**fields, "intermediate_size": width})


def _spans(plan: ShardPlan, name: str) -> tuple[Span, ...]:
    return tuple(getattr(rank, name) for rank in plan.ranks)


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
        problems += _geometry(shape, axis, dim, pairs, spans)
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


def _geometry(
    shape: tuple[int, ...], axis: int, dim: Dim, pairs: list[list[Pair]], spans: Spans
) -> list[str]:
    """Judge all ranks' runs along one dim of the stored tensor."""
    before: Region = (slice(None),) * axis
    placements = [
        Slices([((*before, slice(*one.local)), (*before, slice(*one.whole))) for one in rank])
        for rank in pairs
    ]
    pieces, problems = resolve_pieces(shape, placements, None)
    held = [(piece.rank, piece.whole[axis]) for piece in pieces]
    return problems or _coverage(shape[axis], axis, dim, held, spans)


def _coverage(
    size: int, axis: int, dim: Dim, held: list[tuple[int, tuple[int, int]]], spans: Spans
) -> list[str]:
    """Name the first indices that nobody holds, or that more ranks hold than have a copy."""
    marks = sorted({0, size, *(edge for _, span in held for edge in span)})
    counts: dict[tuple[int, int], int] = {}
    for start, stop in itertools.pairwise(marks):
        counts[start, stop] = sum(span[0] <= start and stop <= span[1] for _, span in held)
    for (start, stop), count in counts.items():
        if count == 0:
            return [f"no rank holds {start}:{stop} of dim {axis}"]
    at = 0
    for block in dim.blocks:
        end = at + block.size
        for (start, stop), count in counts.items():
            if start * dim.grain < at or stop * dim.grain > up_to(end, dim.grain):
                continue
            wanted = _wanted(block, (start * dim.grain - at) // block.width, spans)
            if count != wanted:
                return [
                    f"{count} ranks hold {start}:{stop} of dim {axis}, but should {wanted}"
                    f" [{block.split}]"
                ]
        at = end
    return []


def up_to(element: int, grain: int) -> int:
    """Return where the stored index of the element before this one ends."""
    return -(-element // grain) * grain


def _wanted(block: Block, unit: int, spans: Spans) -> int:
    """Return how many ranks should hold a unit: of a KV head, those whose queries attend with it.

    Everything else is held once, and what is not split by all, which is checked nowhere.
    """
    if block.split != "kv":
        return 1
    queries = spans["query"]
    group = max(1, max(span.stop for span in queries) // block.units)
    return sum(
        span.size > 0 and span.start // group <= unit <= (span.stop - 1) // group
        for span in queries
    )
