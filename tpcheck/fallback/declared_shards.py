"""Any callable that says what its ranks hold: `forward.shards()`, and what it is at TP=1.

Requirement: code that was written by hand has weights with placements and nothing else in common.
So its owner says what the model is at TP=1, as a function of whole weights; these are gathered when
they are looked up, and go when the forward that looked them up ends.

[Exchange] A rank knows its own placements only; once, when this is made, all ranks tell each other
theirs, as JSON in a tensor of bytes. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from tpcheck.errors import SubjectError
from tpcheck.fallback.gathering import Collectives, Meter, gathered_pieces, gathered_weight
from tpcheck.fallback.models import Forward, Products
from tpcheck.outputs import whole
from tpcheck.placement import Partial, Placement, Replicate, Shard, Slices

Alone = Callable[[Mapping[str, torch.Tensor]], Callable[..., Any]]
"""Whole weights by name -> the forward at TP=1. A weight is gathered when it is looked up."""


class DeclaredShards:
    """A callable with `shards()` on this rank.

    Raises:
        SubjectError: shards() gives nothing, or something else than {name: (tensor, placement)}.
    """

    def __init__(self, forward: Any, tp: Collectives, alone: Alone | None) -> None:
        self.forward, self.tp, self._alone = forward, tp, alone
        self.name = getattr(forward, "__name__", type(forward).__name__)
        self._shards: dict[str, tuple[torch.Tensor, Placement]] = dict(forward.shards())
        if not self._shards:
            raise SubjectError(f"{self.name}: shards() is empty, but should name every weight")
        first = next(iter(self._shards.values()))[0]
        self.dtype, self.device = first.dtype, first.device
        self._layouts = _exchanged(self._shards, tp)

    def run(self, *arguments: Any, **options: Any) -> Any:
        """Run the model as deployed."""
        return whole(self.forward(*arguments, **options))

    def alone(self, meter: Meter, dtype: torch.dtype | None = None) -> Forward:
        """Return the forward at TP=1 that the owner gave, on weights gathered at each look-up."""
        make = self._alone
        if make is None:
            raise SubjectError(
                f"{self.name}: shards() says what the ranks hold, but not what the model is at"
                " TP=1; pass alone=fn, fn(whole weights by name) -> forward"
            )

        def forward(*arguments: Any, **options: Any) -> Any:
            weights = _Lookup(self._shards, self._layouts, self.tp, meter, dtype)
            try:
                return whole(make(weights)(*arguments, **options))
            finally:
                weights.forget()

        return forward

    def with_products(self, products: Products, meter: Meter) -> Forward:
        """Refuse: products of code that is not known cannot be replaced."""
        raise SubjectError(
            f"{self.name}: a callable with shards() has no products that can be replaced, but"
            " should be a reference decoder or a module with DTensor parameters; take level full"
        )

    def with_head(self, meter: Meter) -> Forward:
        """Refuse: where its head begins is not known."""
        raise SubjectError(
            f"{self.name}: a callable with shards() has no head that can be found, but should be"
            " a reference decoder or a module with DTensor parameters; take level full"
        )


class _Lookup(Mapping[str, torch.Tensor]):
    """Whole weights by name; gathered anew at each look-up and counted until `forget`."""

    def __init__(
        self,
        shards: Mapping[str, tuple[torch.Tensor, Placement]],
        layouts: Mapping[str, list[tuple[Placement, tuple[int, ...]]]],
        tp: Collectives,
        meter: Meter,
        dtype: torch.dtype | None,
    ) -> None:
        self._shards, self._layouts, self._tp = shards, layouts, tp
        self._meter, self._dtype, self._held = meter, dtype, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        local = self._shards[name][0]
        placements = [placement for placement, _ in self._layouts[name]]
        shapes = [shape for _, shape in self._layouts[name]]
        shape = whole_shape(placements, shapes)
        dtype = self._dtype if self._dtype is not None and local.is_floating_point() else None
        size = torch.Size(shape).numel() * (dtype or local.dtype).itemsize
        self._meter.hold(name, size)
        self._held += size
        tensor = gathered_weight(local, placements, shapes, shape, self._tp, self._meter)
        return tensor if dtype is None else tensor.to(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def forget(self) -> None:
        """Count as held no longer what was looked up."""
        self._meter.release(self._held)
        self._held = 0


def whole_shape(placements: list[Placement], shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the logical shape that the ranks' pieces span."""
    first = placements[0]
    if isinstance(first, Shard):
        dim = first.dim % len(shapes[0])
        return (*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :])
    if not any(isinstance(placement, Slices) for placement in placements):
        return shapes[0]
    ends = map(_ends, placements, shapes)
    return tuple(max(sizes) for sizes in zip(*ends, strict=True))


def _ends(placement: Placement, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(placement, Slices):
        return shape
    ends = [0] * len(shape)
    for _, region in placement.pieces:
        for dim, size in enumerate(shape):
            stop = region[dim].stop if dim < len(region) else None
            ends[dim] = max(ends[dim], size if stop is None else stop)
    return tuple(ends)


def _exchanged(
    shards: Mapping[str, tuple[torch.Tensor, Placement]], tp: Collectives
) -> dict[str, list[tuple[Placement, tuple[int, ...]]]]:
    """Return every rank's (placement, local shape) of every weight, in rank order."""
    mine = {name: _to_json(placement, tensor) for name, (tensor, placement) in shards.items()}
    device = next(iter(shards.values()))[0].device
    said = torch.tensor(list(json.dumps(mine).encode()), dtype=torch.uint8, device=device)
    lengths = tp.all_gather(torch.tensor([len(said)], device=device), 0).tolist()
    texts = gathered_pieces(said, [(length,) for length in lengths], tp)
    ranks = [json.loads(bytes(text.tolist()).decode()) for text in texts]
    odd = next((rank for rank, names in enumerate(ranks) if set(names) != set(mine)), None)
    if odd is not None:
        raise SubjectError(
            f"shards(): rank {odd} names other weights than rank {tp.rank}, but should name the"
            f" same: {', '.join(sorted(set(ranks[odd]) ^ set(mine))[:3])}"
        )
    return {name: [_from_json(rank[name]) for rank in ranks] for name in mine}


def _to_json(placement: Placement, tensor: torch.Tensor) -> list[Any]:
    shape = list(tensor.shape)
    if isinstance(placement, Shard):
        return [shape, "shard", placement.dim]
    if isinstance(placement, Slices):
        pairs = [[_bounds(local), _bounds(one)] for local, one in placement.pieces]
        return [shape, "slices", pairs]
    return [shape, "partial", placement.op] if isinstance(placement, Partial) else [shape, "whole"]


def _from_json(entry: list[Any]) -> tuple[Placement, tuple[int, ...]]:
    shape, kind, *rest = entry
    placement: Placement = Replicate()
    if kind == "shard":
        placement = Shard(rest[0])
    elif kind == "partial":
        placement = Partial(rest[0])
    elif kind == "slices":
        placement = Slices([(_region(local), _region(one)) for local, one in rest[0]])
    return placement, tuple(shape)


def _bounds(region: tuple[slice, ...]) -> list[list[int | None]]:
    return [[part.start, part.stop] for part in region]


def _region(bounds: list[list[int | None]]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in bounds)
