"""Full tensors to a rank's pieces and back, and the proof that nothing got lost between them.

Requirement: pure slicing, no decisions left in it: a Placement says where elements live, this
module moves them and judges them. Shards come from code under test, so everything about them is
checked before it is used, and every problem found is reported, not only the first.

[Tiling] Ranks' pieces tile a logical tensor when every element is held at least once, all copies
are equal, and no piece reaches outside the tensor: what no piece covers locally is padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tpcheck.errors import SubjectError
from tpcheck.pieces import Piece, Shape, as_slices, resolve_pieces, show_box
from tpcheck.placement import Partial, Placement


def shard(full: torch.Tensor, placement: Placement, rank: int, size: int) -> torch.Tensor:
    """Return what `rank` of `size` holds of `full`: a tensor of its own.

    `Shard` cuts like torch.chunk: pieces of one size, the last ones short or empty. `Slices` gives
    the smallest tensor with room for its pieces, zeros between them. Of `Partial("sum")` rank 0
    holds everything and the others zeros; of other ops every rank holds the whole.

    Raises:
        SubjectError: the placement does not fit the tensor.
    """
    if isinstance(placement, Partial):
        zeros = placement.op == "sum" and rank > 0
        return torch.zeros_like(full) if zeros else full.clone()
    placements = [placement] * size
    pieces, problems = resolve_pieces(tuple(full.shape), placements, None)
    if problems:
        raise SubjectError(f"shard: {problems[0]}")
    mine = [piece for piece in pieces if piece.rank == rank]
    ends = [max((piece.local[dim][1] for piece in mine), default=0) for dim in range(full.ndim)]
    local = full.new_zeros(ends)
    for piece in mine:
        local[as_slices(piece.local)] = full[as_slices(piece.whole)]
    return local


def unshard(
    locals_: Sequence[torch.Tensor], placements: Sequence[Placement], shape: Sequence[int]
) -> torch.Tensor:
    """Return the whole tensor that the ranks' pieces make up; where copies differ, the first wins.

    Raises:
        SubjectError: the pieces do not cover `shape`; names the first problem.
    """
    shape = tuple(shape)
    pieces, problems = resolve_pieces(shape, placements, [tuple(x.shape) for x in locals_])
    problems += _holes(shape, pieces)
    if problems:
        raise SubjectError(f"unshard: {problems[0]}")
    return _assembled(shape, pieces, placements, locals_)


def tiling_problems(
    shape: Sequence[int],
    placements: Sequence[Placement],
    locals_: Sequence[torch.Tensor] | None = None,
    expected: torch.Tensor | None = None,
) -> list[str]:
    """Return what keeps the ranks' pieces from tiling a logical tensor; empty when they do.

    Args:
        shape: the logical tensor's.
        placements: one per rank.
        locals_: one tensor per rank; without them the geometry alone is judged.
        expected: the logical tensor itself; every piece must equal it, bit for bit.

    Returns:
        One sentence per problem, each naming the rank and the index range.

    Source: a sum of `Partial` terms is compared within the worst case of recursive summation,
    gamma_n * sum|term| (Higham 2002, section 4.2).
    """
    shape = tuple(shape)
    local_shapes = None if locals_ is None else [tuple(x.shape) for x in locals_]
    if expected is not None and tuple(expected.shape) != shape:
        return [f"shape={list(shape)}, but should be {list(expected.shape)}"]
    pieces, problems = resolve_pieces(shape, placements, local_shapes)
    problems += _holes(shape, pieces)
    if locals_ is None or problems:
        return problems
    if isinstance(placements[0], Partial):
        return [] if expected is None else _partial_problems(locals_, placements[0].op, expected)
    if expected is not None:
        return _value_problems(pieces, locals_, expected, "the reference")
    whole = _assembled(shape, pieces, placements, locals_)
    return _value_problems(pieces, locals_, whole, "the copy on a lower rank")


def _holes(shape: Shape, pieces: Sequence[Piece]) -> list[str]:
    """Name the regions that no rank holds, on the grid of all pieces' edges."""
    edges = [
        sorted({0, size, *(edge for piece in pieces for edge in piece.whole[dim])})
        for dim, size in enumerate(shape)
    ]
    held = torch.zeros([len(marks) - 1 for marks in edges], dtype=torch.bool)
    for piece in pieces:
        held[
            tuple(
                slice(marks.index(start), marks.index(stop))
                for marks, (start, stop) in zip(edges, piece.whole, strict=True)
            )
        ] = True
    boxes = (
        tuple((marks[i], marks[i + 1]) for marks, i in zip(edges, cell, strict=True))
        for cell in (~held).nonzero().tolist()
    )
    return [f"no rank holds {show_box(box)}" for box in boxes]


def _assembled(
    shape: Shape,
    pieces: Sequence[Piece],
    placements: Sequence[Placement],
    locals_: Sequence[torch.Tensor],
) -> torch.Tensor:
    if isinstance(placements[0], Partial):
        return _reduced(locals_, placements[0].op)
    whole = locals_[0].new_empty(shape)
    for piece in reversed(pieces):
        whole[as_slices(piece.whole)] = locals_[piece.rank][as_slices(piece.local)]
    return whole


def _reduced(locals_: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    stacked = torch.stack(tuple(locals_))
    if op in ("max", "min"):
        return stacked.amax(0) if op == "max" else stacked.amin(0)
    wide = stacked.to(torch.promote_types(stacked.dtype, torch.float64))
    total = wide.sum(0) if op == "sum" else wide.mean(0)
    return total.to(stacked.dtype)


def _value_problems(
    pieces: Sequence[Piece], locals_: Sequence[torch.Tensor], whole: torch.Tensor, source: str
) -> list[str]:
    problems = []
    for piece in pieces:
        actual = locals_[piece.rank][as_slices(piece.local)]
        expected = whole[as_slices(piece.whole)].to(actual.device)
        where = f"rank {piece.rank}: {show_box(piece.whole)}"
        if actual.dtype != expected.dtype:
            problems.append(f"{where} is {actual.dtype}, but should be {expected.dtype}")
            continue
        wrong = (actual != expected) & ~(actual.isnan() & expected.isnan())
        if wrong.any():
            at = [int(i) for i in wrong.nonzero()[0]]
            index = [i + start for i, (start, _) in zip(at, piece.whole, strict=True)]
            problems.append(
                f"{where}: {int(wrong.sum())} of {wrong.numel()} elements differ from {source};"
                f" first at {index}: actual={actual[tuple(at)].item():.6g},"
                f" but should be {expected[tuple(at)].item():.6g}"
            )
    return problems


def _partial_problems(
    locals_: Sequence[torch.Tensor], op: str, expected: torch.Tensor
) -> list[str]:
    total = _reduced(locals_, op)
    magnitude = torch.stack(tuple(locals_)).double().abs().sum(0)
    unit = torch.finfo(total.dtype).eps / 2 if total.dtype.is_floating_point else 0.0
    limit = (len(locals_) + 1) * unit * magnitude
    error = (total.double() - expected.to(total.device).double()).abs()
    wrong = ~(error <= limit)
    if not wrong.any():
        return []
    index = [int(i) for i in wrong.nonzero()[0]]
    return [
        f"all ranks: the {op} of their terms differs from the reference in {int(wrong.sum())} of"
        f" {wrong.numel()} elements; first at {index}: actual={total[tuple(index)].item():.6g},"
        f" but should be {expected[tuple(index)].item():.6g}"
    ]
