"""The result of `tpcheck probe` for a terminal: what is wrong first, then how each size is reduced.

Requirement: the first line says what was read, or that it differs from the other report; sizes that
are reduced alike share a row, and each degree shows its orders once, as a sum and as a tree. A
function of the JSON.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tabulate import tabulate

Record = Mapping[str, Any]

COLUMNS = ("tp", "dtype", "elements", "orders", "accumulator", "wire", "AVG")

_CHUNKS_SHOWN = 8
_DIFFERENCES_SHOWN = 12
_VALUE_WIDTH = 48


def render_probe(record: Record) -> str:
    """Return the verdict on the first line, what differs, a row per kind of message, the orders."""
    against = record["against"]
    lines = [_head(record)] if against is None else [_verdict(against), *_differences(against)]
    lines += [f"  {problem}" for problem in _problems(record["messages"])]
    table = tabulate(_rows(record["messages"]), headers=COLUMNS, disable_numparse=True)
    lines += ["", *(line.rstrip() for line in table.splitlines())]
    switches = _switches(record)
    lines += ["", *switches] if switches else []
    lines += _wider(record["messages"])
    for group in _longest(record["messages"]):
        lines += ["", *_orders(group)]
    return "\n".join(lines)


def format_order(order: Any) -> str:
    """Return an order, nested lists or tuples of ranks, as a sum: `((1+2)+3)+0`.

    More than two operands that are added at once stand as `sum(0, 1, 2)`.
    """
    if order is None:
        return "invisible"
    return _inner(order).removeprefix("(").removesuffix(")") if _is_pair(order) else _inner(order)


def tree_lines(order: Any, indent: str = "") -> Iterator[str]:
    """Yield an order as an indented tree, the last addition first."""
    if isinstance(order, int):
        yield f"{indent}rank {order}"
        return
    yield f"{indent}+"
    for child in order:
        yield from tree_lines(child, indent + "  ")


def _inner(order: Any) -> str:
    if isinstance(order, int):
        return str(order)
    children = [_inner(child) for child in order]
    return f"({'+'.join(children)})" if _is_pair(order) else f"sum({', '.join(children)})"


def _is_pair(order: Any) -> bool:
    return not isinstance(order, int) and len(order) == 2


def _head(record: Record) -> str:
    messages = record["messages"]
    where = f"{record['collective']} on {record['environment']['backend']}"
    if _problems(messages):
        return f"{where}: not every message is read, repeatable and the same on all ranks"
    degrees = ", ".join(dict.fromkeys(str(one["tp_size"]) for one in messages))
    return (
        f"{where}, tp {degrees}: repeatable, the same on all ranks, and emulated bit for bit in all"
        f" {len(messages)} messages"
    )


def _problems(messages: Sequence[Record]) -> list[str]:
    found: dict[str, list[str]] = {}
    for one in messages:
        name = f"tp {one['tp_size']} {one['dtype']} [{one['count']}]"
        for said in _problems_of(one):
            found.setdefault(said, []).append(name)
    return [
        f"{said}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
        for said, names in found.items()
    ]


def _problems_of(one: Record) -> Iterator[str]:
    if not one["repeatable"]:
        yield "other bits in another call"
    if one["disagreeing_ranks"]:
        ranks = ", ".join(map(str, one["disagreeing_ranks"]))
        yield f"other bits than rank 0 has, on {ranks}"
    if one["reason"]:
        if one["repeatable"]:
            yield one["reason"]
    elif one["reproduced"] is False:
        yield "read, but random operands come out with other bits"


def _verdict(against: Record) -> str:
    if not against["differences"]:
        return f"SAME as {against['path']}: {against['compared']} messages are reduced alike"
    differing = {
        (one["tp_size"], one["dtype"], one["count"])
        for one in against["differences"]
        if one["count"] is not None
    }
    counted = f"{len(differing)} of {against['compared']} messages are reduced differently"
    return f"DIFFERS from {against['path']}: {counted if differing else 'other switch points'}"


def _differences(against: Record) -> Iterator[str]:
    for one in against["differences"][:_DIFFERENCES_SHOWN]:
        count = "" if one["count"] is None else f" [{one['count']}]"
        yield (
            f"  tp {one['tp_size']} {one['dtype']}{count}: {one['field']}={one['actual']},"
            f" but there {one['expected']}"
        )
    if len(against["differences"]) > _DIFFERENCES_SHOWN:
        yield f"  and {len(against['differences']) - _DIFFERENCES_SHOWN} more: see --json"
    for name, (here, there) in against["environment"].items():
        yield f"  around it, {name}: {_short(here)}, there {_short(there)}"
    for key, where in (("only_here", "only here"), ("only_there", "only there")):
        if against[key]:
            yield f"  messages not compared, {where}: {len(against[key])}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _VALUE_WIDTH else text[: _VALUE_WIDTH - 3] + "..."


def _rows(messages: Sequence[Record]) -> list[tuple[str, ...]]:
    """Return a row for each run of sizes that are reduced alike."""
    rows = []
    for (tp_size, dtype, *rest), run in itertools.groupby(messages, _summary):
        counts = [one["count"] for one in run]
        sizes = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
        rows.append((str(tp_size), dtype, sizes, *rest))
    return rows


def _summary(one: Record) -> tuple[Any, ...]:
    orders = {json.dumps(chunk["order"]) for chunk in one["chunks"]}
    accumulators = sorted({chunk["accumulator"] or "unknown" for chunk in one["chunks"]})
    average = one["average"]
    said = "-" if average is None else average[0] if average else "unknown"
    return (
        one["tp_size"],
        one["dtype"],
        str(len(orders)) if one["order"] == "read" else one["order"],
        ", ".join(accumulators) or "-",
        one["wire"] or "-",
        said,
    )


def _switches(record: Record) -> list[str]:
    found = [
        f"switch: tp {one['tp_size']} {one['dtype']}: {one['change']} between {one['last']} and"
        f" {one['first']} elements"
        for one in record["switch_points"]
    ]
    # what could not be read may have switched
    counts = {one["count"] for one in record["messages"] if one["order"] != "unreadable"}
    if found or len(counts) < 2:
        return found
    return [f"no switch of the reduction from {min(counts)} to {max(counts)} elements"]


def _wider(messages: Sequence[Record]) -> list[str]:
    """Say what cannot be told apart, where an accumulator is wider than the wire."""
    pairs = {(one["wire"], chunk["accumulator"]) for one in messages for chunk in one["chunks"]}
    wider = sorted({str(sums) for wire, sums in pairs if sums not in (wire, "any", None)})
    return [f"{one} in the accumulator or on the wire: the same bits" for one in wider]


def _longest(messages: Sequence[Record]) -> list[list[Record]]:
    """Return the longest message of each degree and dtype, grouped where chunks are the same."""
    longest: dict[tuple[int, str], Record] = {}
    for one in messages:
        key = (one["tp_size"], one["dtype"])
        if one["order"] == "read" and one["count"] >= longest.get(key, one)["count"]:
            longest[key] = one
    groups: dict[str, list[Record]] = {}
    for one in longest.values():
        parts = [(chunk["start"], chunk["stop"], chunk["order"]) for chunk in one["chunks"]]
        groups.setdefault(json.dumps((one["tp_size"], parts)), []).append(one)
    return list(groups.values())


def _orders(group: Sequence[Record]) -> Iterator[str]:
    first = group[0]
    dtypes = ", ".join(one["dtype"] for one in group)
    yield f"tp {first['tp_size']}, {first['count']} elements of {dtypes}:"
    for chunk in first["chunks"][:_CHUNKS_SHOWN]:
        yield f"  {chunk['start']} to {chunk['stop'] - 1}: {format_order(chunk['order'])}"
    if len(first["chunks"]) > _CHUNKS_SHOWN:
        yield f"  and {len(first['chunks']) - _CHUNKS_SHOWN} more chunks: see --json"
    shown = first["chunks"][0]["order"]
    if shown is not None and first["tp_size"] > 2:
        yield "  the first of them as a tree:"
        yield from tree_lines(shown, "    ")
