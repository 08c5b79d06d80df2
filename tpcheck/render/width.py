"""What width costs, for a terminal: a row per degree, the all-reduces by size, the recommendation.

Requirement: the first line says where the times were measured, because they belong there and
nowhere else. A function of the JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpcheck.render.lines import table, wrapped

Json = Mapping[str, Any]

COLUMNS = ("tp", "forward", "from - to", "communication", "share", "slowest / mean rank")
BY_SIZE = ("tp", "bytes", "in the forward", "calls", "by itself", "bus bandwidth")


def render_width(cost: Json) -> str:
    """Return a WidthCost's JSON as text."""
    where = f"what width costs {cost['subject']} in {cost['dtype']}, on {cost['measured_on']}"
    lines = [*wrapped(where), *table(degree_rows(cost), COLUMNS)]
    sizes = size_rows(cost)
    lines += ["", *table(sizes, BY_SIZE)] if sizes else []
    lines += wrapped(*degree_reasons(cost))
    return "\n".join([*lines, "", *wrapped(cost["recommendation"])])


def degree_reasons(cost: Json) -> list[str]:
    """Say of degrees why a number of theirs is missing."""
    return [f"tp={one['tp_size']}: {one['reason']}" for one in cost["degrees"] if one["reason"]]


def degree_rows(cost: Json) -> list[tuple[str, ...]]:
    """Return a row of COLUMNS per degree."""
    return [_degree(one) for one in cost["degrees"]]


def size_rows(cost: Json) -> list[tuple[str, ...]]:
    """Return a row of BY_SIZE per degree and size of an all-reduce."""
    return [row for one in cost["degrees"] for row in _sizes(one)]


def _degree(one: Json) -> tuple[str, ...]:
    return (
        str(one["tp_size"]),
        _time(one["forward_s"]),
        f"{_time(one['fastest_s'])} - {_time(one['slowest_s'])}",
        _time(one["communication_s"]),
        "-" if one["share"] is None else f"{100 * one['share']:.0f} %",
        "-" if one["imbalance"] is None else f"{one['imbalance']:.2f}",
    )


def _sizes(one: Json) -> list[tuple[str, ...]]:
    """Return a row per size, whether it was seen in the forward, by itself, or both."""
    inside = {entry["nbytes"]: entry for entry in one["all_reduces"]}
    alone = {entry["nbytes"]: entry for entry in one["bandwidths"]}
    rows: list[tuple[str, ...]] = []
    for nbytes in sorted({*inside, *alone}):
        seen, swept = inside.get(nbytes), alone.get(nbytes)
        rows.append(
            (
                str(one["tp_size"]),
                str(nbytes),
                "" if seen is None else _time(seen["seconds"]),
                "" if seen is None else str(seen["calls"]),
                "" if swept is None else _time(swept["seconds"]),
                "" if swept is None else f"{swept['bytes_per_second'] / 1e6:.3g} MB/s",
            )
        )
    return rows


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3g} ms"
