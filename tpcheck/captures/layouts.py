"""Which elements of the logical tensor each rank holds, from shapes alone.

Requirement: geometry is settled before a value is read. A layout is a list of spans along one dim;
what a shard map says is held against every rank's shape, and what does not fit is a sentence that
names the rank. Without a map the sizes decide, as in reconciliation: [Undeclared Placements]: whole
tensors are copies (or terms of a sum, which their values tell), else pieces along the one dim
whose sizes add up: pieces that are no whole tensors differ from it in one dim only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tpcheck.captures.shard_map import ShardRule

Shape = tuple[int, ...]


class Span(NamedTuple):
    """Indices `local` on of a rank's dim are indices `whole` on of the logical one's."""

    rank: int
    local: int
    whole: int
    length: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A logical tensor as [outer, size, inner] and the spans of `size` that ranks hold.

    `widths`: each rank's own size along the dim. `said`: a map says so, sizes did not have to.
    """

    kind: str
    text: str
    shape: Shape
    outer: int
    size: int
    inner: int
    spans: tuple[Span, ...]
    widths: Mapping[int, int]
    said: bool

    @property
    def ranks(self) -> tuple[int, ...]:
        """Who holds something, in the order of the pieces."""
        return tuple(dict.fromkeys(self.widths))


class Settled(NamedTuple):
    """A layout, or why there is none; problems may stand beside a layout of the ranks that fit."""

    layout: Layout | None
    problems: tuple[str, ...] = ()
    rank: int | None = None


def whole_tensors(
    shape: Shape, ranks: Sequence[int], kind: str = "replicated", *, said: bool = False
) -> Layout:
    """Return the layout of ranks that each hold a tensor of the whole shape."""
    count = math.prod(shape)
    spans = tuple(Span(rank, 0, 0, count) for rank in ranks)
    text = {"replicated": "Replicate()", "partial-sum": 'Partial("sum")'}[kind]
    text = text if len(ranks) > 1 or kind != "replicated" else "whole"
    return Layout(kind, text, shape, 1, count, 1, spans, dict.fromkeys(ranks, count), said)


def settle(
    rule: ShardRule | None, shape: Shape, shapes: Mapping[int, Shape], ranks: Sequence[int]
) -> Settled:
    """Return how the ranks' tensors make up one of `shape`.

    Args:
        rule: of the shard map; None where it says nothing.
        shape: the logical tensor's.
        shapes: of each rank that recorded the tensor.
        ranks: all there are; a rule may name some of them.
    """
    ranks = rule.ranks if rule is not None and rule.ranks else tuple(ranks)
    absent = [rank for rank in ranks if rank not in shapes]
    problems = []
    if absent:
        way_out = "" if rule else "; if that is right, say so with ranks = [...] in a shard map"
        problems.append(f"{_ranks(absent)} recorded no such tensor{way_out}")
    extra = sorted(set(shapes) - set(ranks))
    if extra:
        problems.append(f"{_ranks(extra)} recorded it too, but the shard map names {list(ranks)}")
    present = [rank for rank in ranks if rank in shapes]
    blamed = absent[0] if len(absent) == 1 else None
    if rule is None:
        found = _infer(shape, {rank: shapes[rank] for rank in present}, bool(absent))
    elif rule.layout in ("replicated", "partial-sum"):
        found = _whole(rule.layout, shape, {rank: shapes[rank] for rank in present}, bool(absent))
    elif absent:
        found = Settled(None)
    elif rule.layout == "stack":
        found = _stack(rule, shape, ranks, shapes)
    else:
        found = _concat(rule, shape, ranks, shapes)
    rank = blamed if blamed is not None else found.rank
    return Settled(found.layout, (*problems, *found.problems), rank)


def _whole(kind: str, shape: Shape, shapes: Mapping[int, Shape], lacking: bool) -> Settled:
    odd = [rank for rank, other in shapes.items() if other != shape]
    problems = tuple(_wrong_shape(rank, shapes[rank], shape) for rank in odd)
    ranks = [rank for rank in shapes if rank not in odd]
    if not ranks or (kind == "partial-sum" and (odd or lacking)):
        return Settled(None, problems, rank=odd[0] if len(odd) == 1 else None)
    layout = whole_tensors(shape, ranks, kind, said=True)
    return Settled(layout, problems, rank=odd[0] if len(odd) == 1 else None)


def _infer(shape: Shape, shapes: Mapping[int, Shape], lacking: bool) -> Settled:
    ranks = list(shapes)
    same = [rank for rank in ranks if shapes[rank] == shape]
    if len(same) == len(ranks) or (lacking and same):
        return Settled(whole_tensors(shape, same))
    if lacking:
        return Settled(None)
    if len(ranks) == 1 or (len(same) > len(ranks) / 2):
        odd = [rank for rank in ranks if rank not in same]
        problems = tuple(_wrong_shape(rank, shapes[rank], shape) for rank in odd)
        blamed = odd[0] if len(odd) == 1 and len(ranks) > 1 else None
        return Settled(whole_tensors(shape, same) if same else None, problems, rank=blamed)
    dims = [dim for dim in range(len(shape)) if _adds_up(dim, shape, list(shapes.values()))]
    if dims:
        widths = {rank: shapes[rank][dims[0]] for rank in ranks}
        return Settled(_along(shape, dims[0], widths, _consecutive(widths), said=False))
    listed = ", ".join(str(list(shapes[rank])) for rank in ranks[:4])
    more = ", ..." if len(ranks) > 4 else ""
    text = f"the ranks' shapes {listed}{more} do not make up {list(shape)}"
    return Settled(None, (f"{text}{_hint(shape, list(shapes.values()))}; say how in a shard map",))


def _hint(shape: Shape, locals_: Sequence[Shape]) -> str:
    """Say what may explain pieces that are more than the whole."""
    for dim, size in enumerate(shape):
        held = sum(one[dim] for one in locals_) if _others_fit(dim, shape, locals_) else 0
        if held > size:
            several = f"copies = {held // size}" if size and held % size == 0 else "padding"
            return f" ({several} along dim {dim}?)"
    return ""


def _others_fit(dim: int, shape: Shape, locals_: Sequence[Shape]) -> bool:
    rest = (*shape[:dim], *shape[dim + 1 :])
    return all(
        len(other) == len(shape) and (*other[:dim], *other[dim + 1 :]) == rest for other in locals_
    )


def _adds_up(dim: int, shape: Shape, locals_: Sequence[Shape]) -> bool:
    return _others_fit(dim, shape, locals_) and sum(one[dim] for one in locals_) == shape[dim]


def _stack(
    rule: ShardRule, shape: Shape, ranks: Sequence[int], shapes: Mapping[int, Shape]
) -> Settled:
    dim = _dim(rule, shape)
    if isinstance(dim, str):
        return Settled(None, (dim,))
    fitting = (*shape[:dim], *shape[dim + 1 :])
    odd = [rank for rank in ranks if shapes[rank] != fitting]
    problems = [_wrong_shape(rank, shapes[rank], fitting) for rank in odd]
    if shape[dim] != len(ranks):
        problems.append(f"{len(ranks)} ranks are stacked, but dim {dim} has size {shape[dim]}")
    if problems:
        return Settled(None, tuple(problems), rank=odd[0] if len(odd) == 1 else None)
    spans = tuple(Span(rank, 0, i, 1) for i, rank in enumerate(ranks))
    layout = _along(shape, dim, dict.fromkeys(ranks, 1), spans, said=True)
    return Settled(_named(layout, "stack", f"Stack(dim={dim})"))


def _concat(
    rule: ShardRule, shape: Shape, ranks: Sequence[int], shapes: Mapping[int, Shape]
) -> Settled:
    dim = _dim(rule, shape)
    if isinstance(dim, str):
        return Settled(None, (dim,))
    odd = [rank for rank in ranks if not _others_fit(dim, shape, [shapes[rank]])]
    if odd:
        texts = [
            f"{_wrong_shape(rank, shapes[rank], shape)} in every dim but {dim}" for rank in odd
        ]
        return Settled(None, tuple(texts), rank=odd[0] if len(odd) == 1 else None)
    widths = {rank: shapes[rank][dim] for rank in ranks}
    sizes = _piece_sizes(rule, shape[dim], list(widths.values()))
    if isinstance(sizes, str):
        return Settled(None, (f"{sizes} [dim {dim}]",))
    spans: list[Span] = []
    problems: list[tuple[int, str]] = []
    for position, (rank, width) in enumerate(widths.items()):
        at = begin = 0
        for segment, copies in zip(sizes, rule.copies, strict=True):
            piece = position // copies
            spans.append(Span(rank, at, begin + sum(segment[:piece]), segment[piece]))
            at += segment[piece]
            begin += sum(segment)
        if at > width or (at < width and not rule.padding):
            problems.append(
                (rank, f"rank {rank}: holds {width} of dim {dim}, but should hold {at}")
            )
    if problems:
        blamed = problems[0][0] if len(problems) == 1 else None
        return Settled(None, tuple(text for _, text in problems), rank=blamed)
    held = tuple(span for span in spans if span.length)
    layout = _along(shape, dim, widths, held, said=True)
    parts = f" in {len(sizes)} segments" if len(sizes) > 1 else ""
    order = "" if list(ranks) == sorted(ranks) else f", ranks {list(ranks)}"
    return Settled(_named(layout, "concat", f"Shard(dim={dim}){parts}{order}"))


def _piece_sizes(
    rule: ShardRule, size: int, widths: Sequence[int]
) -> Sequence[Sequence[int]] | str:
    """Return the pieces' sizes of every segment, or why they are not known."""
    segments = rule.segments or (size,)
    if sum(segments) != size:
        return f"segments={list(segments)} sum to {sum(segments)}, but should to {size}"
    for copies in rule.copies:
        if len(widths) % copies:
            return f"{len(widths)} ranks do not divide into groups of copies={copies}"
    counts = [len(widths) // copies for copies in rule.copies]
    if rule.sizes:
        for given, segment, count in zip(rule.sizes, segments, counts, strict=True):
            if len(given) != count or sum(given) != segment:
                return (
                    f"sizes={list(given)} are {len(given)} pieces of {sum(given)} in all, but"
                    f" should be {count} of {segment}"
                )
        return rule.sizes
    if len(segments) == 1:
        found, at = [], 0
        for width in widths[:: rule.copies[0]]:
            found.append(min(width, size - at) if rule.padding else width)
            at += found[-1]
        if at != size:
            return f"the ranks hold {at} in all, but should hold {size}"
        return [found]
    fitting = []
    for split in (_chunked, _balanced):
        sizes = [split(segment, count) for segment, count in zip(segments, counts, strict=True)]
        held = [
            sum(one[i // copies] for one, copies in zip(sizes, rule.copies, strict=True))
            for i in range(len(widths))
        ]
        pairs = zip(held, widths, strict=True)
        if all(a == b or (rule.padding and a < b) for a, b in pairs) and sizes not in fitting:
            fitting.append(sizes)
    if len(fitting) != 1:
        why = "more than one way" if fitting else "no way"
        return (
            f"there is {why} to split segments={list(segments)} into the ranks' {list(widths)};"
            " say how with sizes = [[...], ...]"
        )
    return fitting[0]


def _chunked(size: int, count: int) -> list[int]:
    step = -(-size // count)
    edges = [min(i * step, size) for i in range(count + 1)]
    return [stop - start for start, stop in itertools.pairwise(edges)]


def _balanced(size: int, count: int) -> list[int]:
    return [size // count + (i < size % count) for i in range(count)]


def _consecutive(widths: Mapping[int, int]) -> tuple[Span, ...]:
    ends = itertools.accumulate(widths.values(), initial=0)
    pairs = zip(widths.items(), ends, strict=False)
    return tuple(Span(rank, 0, start, width) for (rank, width), start in pairs if width)


def _along(
    shape: Shape, dim: int, widths: Mapping[int, int], spans: tuple[Span, ...], *, said: bool
) -> Layout:
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    text = f"Shard(dim={dim})"
    return Layout("concat", text, shape, outer, shape[dim], inner, spans, dict(widths), said)


def _named(layout: Layout, kind: str, text: str) -> Layout:
    fields = {name: getattr(layout, name) for name in Layout.__slots__}
    return Layout(**{**fields, "kind": kind, "text": text})


def _dim(rule: ShardRule, shape: Shape) -> int | str:
    if rule.dims and len(rule.dims) != len(shape):
        return f"dims={list(rule.dims)} in the shard map, but the shape is {list(shape)}"
    if not -len(shape) <= rule.dim < len(shape):
        return f"dim={rule.dim} in the shard map, but should be a dim of shape {list(shape)}"
    return rule.dim % len(shape)


def _wrong_shape(rank: int, got: Shape, wanted: Shape) -> str:
    turned = " (transposed?)" if got != wanted and got == wanted[::-1] else ""
    return f"rank {rank}: shape={list(got)}, but should be {list(wanted)}{turned}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:3])) + (f" and {len(ranks) - 3} more" * (len(ranks) > 3))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
