"""What the plots of a drift report show, as numbers: cases pooled, long lists bounded.

Requirement: a plot and the table beside it hold the same numbers, and those are the report's. Cases
of one degree and dtype are one line: errors by their root mean square, counts by their sum, a
rank's distance by the largest. Pure functions of a report's drift content.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tpcheck.render.drift_content import DriftContent, ProfileOf, Row

Key = tuple[str, int]
"""(deployed dtype, degree)."""

MAX_KEYS = 9
"""Lines, or small plots, of one kind: three degrees in three dtypes."""

MAX_LAYERS = 32
"""Rows of a heat map; neighbours share one from there on."""


@dataclass(frozen=True, slots=True)
class Depth:
    """The error after each layer, in eps; None where there is no number."""

    layers: tuple[str, ...]
    tp1: tuple[float | None, ...]
    tpn: tuple[float | None, ...]

    def ratios(self) -> list[float | None]:
        """Return TP=N's error over TP=1's, layer by layer."""
        pairs = zip(self.tp1, self.tpn, strict=True)
        return [b / a if a and b is not None else None for a, b in pairs]


@dataclass(frozen=True, slots=True)
class RankZ:
    """By how many standard errors each rank's term is not counted once; [layers][ranks]."""

    layers: tuple[str, ...]
    z: tuple[tuple[float, ...], ...]

    def worst(self) -> tuple[float, str, int]:
        """Return the z that is furthest from 0, its layer and its rank."""
        found = ((abs(z), i, r) for i, row in enumerate(self.z) for r, z in enumerate(row))
        _, layer, rank = max(found)
        return self.z[layer][rank], self.layers[layer], rank


def depths(content: DriftContent) -> dict[Key, Depth]:
    """Return the error by depth of every degree and dtype that has one."""
    return _pooled(content, lambda profile: (profile.get("depth") or {}).get("points"), _depth)


def ulp_counts(content: DriftContent) -> dict[Key, dict[int, int]]:
    """Return how many outputs of what is deployed are off TP=1 by up to so many ulp."""
    return _pooled(content, _deployed_ulp, _counts)


def rank_distances(content: DriftContent) -> dict[Key, RankZ]:
    """Return every rank's distance at each row-parallel layer, where that could be had."""
    return _pooled(content, _layers_with_z, _rank_z)


def at_most(counts: dict[int, int], share: float) -> int:
    """Return the ulp that a share of the outputs is not above.

    Example:
        >>> at_most({0: 90, 1: 5, 2: 5}, 0.95)
        1
    """
    wanted = share * sum(counts.values())
    held = 0
    for edge in sorted(counts):
        held += counts[edge]
        if held >= wanted - 1e-9:
            return edge
    return 0


def why_none(content: DriftContent, name: str, otherwise: str) -> str:
    """Say why a plot has nothing to show: what profiles say of it, or why there are none."""
    said = [one.reason for one in content.profiles if one.profile is None]
    held = [one.profile for one in content.profiles if one.profile is not None]
    said += [str(p[f"{name}_reason"]) for p in held if p.get(f"{name}_reason")]
    if not said or (held and not any(p.get(f"{name}_reason") for p in held)):
        said.insert(0, otherwise)
    kept = list(dict.fromkeys(said))
    rest = len(kept) - 2
    return "; ".join(kept[:2]) + (f"; and {rest} more reasons" if rest > 0 else "")


def pooled_layers(found: RankZ) -> RankZ:
    """Return at most MAX_LAYERS rows: of neighbours, each rank's largest distance."""
    if len(found.layers) <= MAX_LAYERS:
        return found
    size = math.ceil(len(found.layers) / MAX_LAYERS)
    layers, rows = [], []
    for start in range(0, len(found.layers), size):
        group = found.z[start : start + size]
        more = len(group) - 1
        layers.append(f"{found.layers[start]}{f' and {more} more' if more else ''}")
        rows.append(tuple(max(column, key=abs) for column in zip(*group, strict=True)))
    return RankZ(tuple(layers), tuple(rows))


def _pooled(
    content: DriftContent, get: Callable[[Row], Any], pool: Callable[[list[Any]], Any]
) -> dict[Key, Any]:
    groups: dict[Key, list[Any]] = {}
    for one in _deployed_order(content.profiles):
        held = get(one.profile) if one.profile is not None else None
        if held:
            groups.setdefault((one.dtype, one.tp_size), []).append(held)
    return {key: pool(group) for key, group in groups.items()}


def _deployed_order(profiles: Sequence[ProfileOf]) -> list[ProfileOf]:
    dtypes = list(dict.fromkeys(one.dtype for one in profiles))
    return sorted(profiles, key=lambda one: (dtypes.index(one.dtype), one.tp_size))


def _depth(cases: list[list[Row]]) -> Depth:
    """Pool cases by layer: generated cases need not have the same ones."""
    points: dict[str, list[Row]] = {}
    for case in cases:
        for point in case:
            points.setdefault(str(point["fqn"]), []).append(point)
    names = ("tp1_epsilons", "epsilons")
    tp1, tpn = (
        tuple(_rms([p[name] for p in group]) for group in points.values()) for name in names
    )
    return Depth(tuple(points), tp1, tpn)


def _rms(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    return math.sqrt(sum(value**2 for value in known) / len(known))


def _deployed_ulp(profile: Row) -> list[list[int]]:
    own: Row = next((one for one in profile["reductions"] if one["deployed"]), {})
    return (own.get("difference") or {}).get("ulp") or []


def _counts(cases: list[list[list[int]]]) -> dict[int, int]:
    total: dict[int, int] = {}
    for case in cases:
        for edge, count in case:
            total[edge] = total.get(edge, 0) + count
    return dict(sorted(total.items()))


def _layers_with_z(profile: Row) -> list[Row]:
    return [one for one in (profile.get("rows") or {}).get("layers", ()) if one.get("rank_z")]


def _rank_z(cases: list[list[Row]]) -> RankZ:
    layers: dict[str, list[Sequence[float]]] = {}
    for case in cases:
        for layer in case:
            layers.setdefault(str(layer["fqn"]), []).append(layer["rank_z"])
    largest = [
        tuple(max(z, key=abs) for z in zip(*all_z, strict=True)) for all_z in layers.values()
    ]
    return RankZ(tuple(layers), tuple(largest))
