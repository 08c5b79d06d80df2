"""A shard map: how the ranks' tensors make up the logical one, by tensor name.

Requirement: everything that engines do to a tensor can be said in a few lines, and what was said is
held against shapes before any value is read. One `[[shard]]` per kind of tensor:

- `layout`: "replicated" (each rank holds all of it), "concat" (pieces along `dim`, of any sizes),
  "stack" (one slice of a new dim per rank), "partial-sum" (terms of a sum);
- `dim`: a number, or a name out of `dims` (the names of the logical tensor's dims, in order);
- `ranks`: who holds it, in the order of the pieces; all, ascending, if left out;
- `sizes`: the pieces' sizes; a list per segment where there are several;
- `segments`: the sizes of logical parts fused along `dim`, each split over the ranks on its own, as
  q, k and v are in a fused qkv: every rank holds its piece of the first, then of the second, ...;
- `copies`: so many neighbours hold the same piece (KV heads at more ranks than heads); a list, one
  per segment, where they differ;
- `padding`: what a rank holds beyond its pieces belongs to no element and is not compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcheck.captures.reading import MAX_RANKS
from tpcheck.captures.rules import Entry, read_entries
from tpcheck.errors import TPCheckError
from tpcheck.json_reader import brief

LAYOUTS = ("replicated", "concat", "stack", "partial-sum")
KEYS = ("layout", "dim", "dims", "ranks", "sizes", "segments", "copies", "padding")
_ALONG_A_DIM = ("dim", "dims", "sizes", "segments", "copies", "padding")


@dataclass(frozen=True, slots=True)
class ShardRule:
    """One entry of a shard map, with what was left out filled in; `sizes` has one per segment."""

    where: str
    pattern: re.Pattern[str]
    layout: str
    dim: int = 0
    dims: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    sizes: tuple[tuple[int, ...], ...] = ()
    segments: tuple[int, ...] = ()
    copies: tuple[int, ...] = (1,)
    padding: bool = False


def read_shard_map(source: str | Path | Mapping[str, Any]) -> tuple[ShardRule, ...]:
    """Return the rules of a shard map's file, or of a dict that looks like one.

    Raises:
        TPCheckError: it cannot be read, or an entry is unknown, of another kind or contradictory.
    """
    return tuple(_rule(*entry) for entry in read_entries(source, "shard", KEYS))


def _rule(where: str, pattern: re.Pattern[str], entry: Entry) -> ShardRule:
    layout = entry.get("layout")
    if layout not in LAYOUTS:
        raise TPCheckError(
            f"{where}.layout={brief(layout)}, but should be one of {', '.join(LAYOUTS)}"
        )
    meaningless: tuple[str, ...] = {"replicated": _ALONG_A_DIM, "partial-sum": _ALONG_A_DIM}.get(
        layout, ()
    )
    if layout == "stack":
        meaningless = ("sizes", "segments", "copies", "padding")
    for key in meaningless:
        if key in entry:
            raise TPCheckError(f"{where}.{key} means nothing where layout={brief(layout)}")
    if layout == "concat" and "dim" not in entry:
        raise TPCheckError(f"{where}.dim is missing, but should be where the pieces are joined")
    dims = tuple(_list(where, entry, "dims", str))
    segments = tuple(_list(where, entry, "segments", int, least=1))
    ranks = tuple(_list(where, entry, "ranks", int))
    if len(set(ranks)) != len(ranks) or any(rank >= MAX_RANKS for rank in ranks):
        raise TPCheckError(f"{where}.ranks={brief(list(ranks))}, but should name each rank once")
    padding = entry.get("padding", False)
    if not isinstance(padding, bool):
        raise TPCheckError(f"{where}.padding={brief(padding)}, but should be true or false")
    return ShardRule(
        where=where,
        pattern=pattern,
        layout=str(layout),
        dim=_dim(where, entry.get("dim", 0), dims),
        dims=dims,
        ranks=ranks,
        sizes=_sizes(where, entry, len(segments)),
        segments=segments,
        copies=_copies(where, entry, len(segments)),
        padding=padding,
    )


def _dim(where: str, value: object, dims: tuple[str, ...]) -> int:
    if isinstance(value, str):
        if dims.count(value) != 1:
            raise TPCheckError(
                f"{where}.dim={brief(value)}, but should stand once in dims={brief(list(dims))}"
            )
        return dims.index(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TPCheckError(f"{where}.dim={brief(value)}, but should be a dim's number or name")
    return value


def _sizes(where: str, entry: Entry, segments: int) -> tuple[tuple[int, ...], ...]:
    value = entry.get("sizes", [])
    nested = isinstance(value, list) and bool(value) and isinstance(value[0], list)
    if not nested:
        flat = tuple(_list(where, entry, "sizes", int))
        if flat and segments > 1:
            raise TPCheckError(
                f"{where}.sizes={brief(list(flat))}, but should be a list per segment"
            )
        return (flat,) if flat else ()
    if len(value) != max(segments, 1):
        raise TPCheckError(
            f"{where}.sizes has {len(value)} lists, but should have {max(segments, 1)}: one per"
            " segment"
        )
    named = {f"sizes[{i}]": one for i, one in enumerate(value)}
    return tuple(tuple(_list(where, named, name, int)) for name in named)


def _copies(where: str, entry: Entry, segments: int) -> tuple[int, ...]:
    value = entry.get("copies", 1)
    listed = {"copies": value if isinstance(value, list) else [value] * max(segments, 1)}
    copies = tuple(_list(where, listed, "copies", int, least=1))
    if len(copies) != max(segments, 1):
        raise TPCheckError(
            f"{where}.copies={brief(value)}, but should be a number, or a list of one per segment"
        )
    return copies


def _list(where: str, entry: Entry, key: str, kind: type, least: int = 0) -> list[Any]:
    value = entry.get(key, [])
    kinds = "names" if kind is str else f"whole numbers >= {least}"
    good = isinstance(value, list) and all(
        isinstance(one, kind)
        and not isinstance(one, bool)
        and (not isinstance(one, int) or one >= least)
        for one in value
    )
    if not good or (key in entry and not value):
        raise TPCheckError(f"{where}.{key}={brief(value)}, but should be a list of {kinds}")
    return list(value)
