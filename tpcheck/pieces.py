"""Which box of a logical tensor each rank holds: placements resolved to pieces. Torch-free.

Requirement: `Shard`, `Replicate`, `Slices` and `Partial` become one plain form, (rank, local box,
global box), so that slicing, joining and judging need to know only that. Placements and shapes come
from code under test: what does not fit is a sentence in the result, not an exception.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tpcheck.placement import Placement, Region, Replicate, Shard, Slices

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]
"""(start, stop) in every dim."""


class Piece(NamedTuple):
    """What lies at box `local` of a rank's tensor is box `whole` of the logical one."""

    rank: int
    local: Box
    whole: Box


def resolve_pieces(
    shape: Shape, placements: Sequence[Placement], local_shapes: Sequence[Shape] | None
) -> tuple[list[Piece], list[str]]:
    """Return every rank's pieces that are sound, and what is wrong with the others.

    Args:
        shape: the logical tensor's.
        placements: one per rank.
        local_shapes: one per rank; None means "as the placements would make them".

    Returns:
        The pieces in rank order, and one sentence per problem that names the rank.
    """
    ranks = len(placements)
    if ranks == 0 or (local_shapes is not None and len(local_shapes) != ranks):
        count = 0 if local_shapes is None else len(local_shapes)
        return [], [f"{count} local tensors, but should be {max(ranks, 1)}: one per rank"]
    first = placements[0]
    odd = next((rank for rank, other in enumerate(placements) if not _alike(first, other)), None)
    if odd is not None:
        return [], [f"rank {odd}: placement={placements[odd]}, but should be rank 0's {first}"]
    found: list[Piece | str] = []
    if isinstance(first, Shard):
        found += _sharded(shape, first.dim, ranks, local_shapes)
    else:
        for rank, placement in enumerate(placements):
            local_shape = None if local_shapes is None else local_shapes[rank]
            if isinstance(placement, Slices):
                found += (_sliced(rank, pair, shape, local_shape) for pair in placement.pieces)
            else:
                found.append(_whole(rank, placement, shape, local_shape))
    pieces = [entry for entry in found if isinstance(entry, Piece)]
    return pieces, [entry for entry in found if isinstance(entry, str)]


def _alike(one: Placement, other: Placement) -> bool:
    """Whether two ranks' placements can describe one tensor: Slices and Replicate may be mixed."""
    free = (Slices, Replicate)
    return one == other or (isinstance(one, free) and isinstance(other, free))


def _whole(rank: int, placement: Placement, shape: Shape, local_shape: Shape | None) -> Piece | str:
    if local_shape is not None and local_shape != shape:
        return f"rank {rank}: shape={list(local_shape)}, but should be {list(shape)} [{placement}]"
    box = tuple((0, size) for size in shape)
    return Piece(rank, box, box)


def _sharded(
    shape: Shape, dim: int, ranks: int, local_shapes: Sequence[Shape] | None
) -> Iterator[Piece | str]:
    if not -len(shape) <= dim < len(shape):
        yield f"Shard(dim={dim}), but should be a dim of shape {list(shape)}"
        return
    dim %= len(shape)
    if local_shapes is None:
        local_shapes = _chunk_shapes(shape, dim, ranks)
    start = 0
    for rank, local_shape in enumerate(local_shapes):
        fitting = (*shape[:dim], *local_shape[dim : dim + 1], *shape[dim + 1 :])
        stop = start + (local_shape[dim] if len(local_shape) > dim else 0)
        if local_shape != fitting or stop > shape[dim]:
            yield (
                f"rank {rank}: shape={list(local_shape)}, but should be a piece of {list(shape)}"
                f" from index {start} of dim {dim} [Shard(dim={dim})]"
            )
        else:
            local = tuple((0, size) for size in local_shape)
            yield Piece(rank, local, (*local[:dim], (start, stop), *local[dim + 1 :]))
        start = stop


def _chunk_shapes(shape: Shape, dim: int, ranks: int) -> list[Shape]:
    step = -(-shape[dim] // ranks)
    starts = [min(rank * step, shape[dim]) for rank in range(ranks + 1)]
    sizes = [stop - start for start, stop in itertools.pairwise(starts)]
    return [(*shape[:dim], size, *shape[dim + 1 :]) for size in sizes]


def _sliced(
    rank: int, pair: tuple[Region, Region], shape: Shape, local_shape: Shape | None
) -> Piece | str:
    """Resolve one (local, global) pair of a Slices placement."""
    whole = _box(pair[1], shape)
    if isinstance(whole, str):
        return f"rank {rank}: global {whole}"
    sizes = tuple(stop - start for start, stop in whole)
    local = _box(pair[0], local_shape, sizes)
    if isinstance(local, str):
        return f"rank {rank}: local {local}"
    if tuple(stop - start for start, stop in local) != sizes:
        return (
            f"rank {rank}: local {show_box(local)}, but should have the size of {show_box(whole)}"
        )
    return Piece(rank, local, whole)


def _box(region: Region, bounds: Shape | None, sizes: Shape = ()) -> Box | str:
    """Resolve slices within `bounds`, or say why not; without bounds open ends follow `sizes`."""
    ndim = len(sizes if bounds is None else bounds)
    shown = f"slices {region!r}"
    plain = all(isinstance(part, slice) and part.step in (None, 1) for part in region)
    if not plain or len(region) > ndim:
        return f"{shown}, but should be at most {ndim} slices of step 1"
    box = []
    for dim, part in enumerate((*region, *[slice(None)] * (ndim - len(region)))):
        start = part.start or 0
        end = start + sizes[dim] if bounds is None else bounds[dim]
        stop = end if part.stop is None else part.stop
        if not 0 <= start <= stop or (bounds is not None and stop > end):
            return (
                f"slices {show_box(((start, stop),))} of dim {dim}, but should lie within 0:{end}"
            )
        box.append((start, stop))
    return tuple(box)


def as_slices(box: Box) -> Region:
    """Return a box as an index for a tensor."""
    return tuple(slice(start, stop) for start, stop in box)


def show_box(box: Box) -> str:
    """Return a box as messages print it: `[0:4, 8:16]`."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"
