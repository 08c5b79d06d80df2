"""Probe reports as JSON: written with every field, read back only if every field makes sense.

Requirement: a probe of one machine is held against another's weeks later, and can drive simulated
ranks. Whoever wrote the file, it is plain data: it is read strictly, never unpickled, and what is
missing or impossible (an order that forgets a rank, chunks with a gap) is refused by its path.
"""

from __future__ import annotations

import os
from typing import Any

from tpcheck.errors import TPCheckError
from tpcheck.files import read_json
from tpcheck.json_reader import JsonReader, refuse
from tpcheck.numerics.order import Chunk, Tree, in_order, leaves_of
from tpcheck.numerics.probed_reduction import ANY
from tpcheck.probes.sweep import MessageProbe, ProbeReport, SwitchPoint

SCHEMA = "tpcheck.probe/1"

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_ORDERS = ("read", "invisible", "unreadable")

Json = dict[str, Any]


def to_json(report: ProbeReport) -> Json:
    """Return a report as plain JSON values; an order is a nested list of ranks."""
    return {
        "schema": SCHEMA,
        "collective": report.collective,
        "tpcheck": report.environment["tpcheck"],
        "environment": report.environment,
        "messages": [_message_to_json(one) for one in report.messages],
        "switch_points": [
            {
                "tp_size": one.tp_size,
                "dtype": one.dtype,
                "last": one.last,
                "first": one.first,
                "change": one.change,
            }
            for one in report.switch_points
        ],
    }


def read_probe(path: str | os.PathLike[str]) -> ProbeReport:
    """Return the probe report in a file.

    Raises:
        TPCheckError: the file cannot be read, or is no probe report; names the path in it.
    """
    value = read_json(path)
    try:
        return from_json(value)
    except TPCheckError as error:
        raise TPCheckError(f"{path}: is no probe report: {error}") from None


def from_json(value: Any) -> ProbeReport:
    """Return the report that `to_json` wrote.

    Raises:
        TPCheckError: something is missing, of another type or impossible; names its path.
    """
    top = JsonReader(value, "probe")
    top.choice("schema", (SCHEMA,))
    return ProbeReport(
        collective=top.get("collective", str),
        environment=top.get("environment", dict),
        messages=tuple(_message(one) for one in top.items("messages", dict)),
        switch_points=tuple(_switch(one) for one in top.items("switch_points", dict)),
    )


def _message_to_json(one: MessageProbe) -> Json:
    return {
        "tp_size": one.tp_size,
        "dtype": one.dtype,
        "count": one.count,
        "bytes": one.count * _BYTES[one.dtype],
        "order": one.order,
        "reason": one.reason,
        "wire": one.wire,
        "chunks": [
            {
                "start": chunk.start,
                "stop": chunk.stop,
                "order": _tree_to_json(chunk.tree),
                "accumulator": chunk.accumulator,
            }
            for chunk in one.chunks
        ],
        "repeatable": one.repeatable,
        "disagreeing_ranks": list(one.disagreeing_ranks),
        "reproduced": one.reproduced,
        "average": None if one.average is None else list(one.average),
    }


def _tree_to_json(tree: Tree | None) -> Any:
    return [_tree_to_json(child) for child in tree] if isinstance(tree, tuple) else tree


def _message(reader: JsonReader) -> MessageProbe:
    tp_size, count = _at_least(reader, "tp_size", 2), _at_least(reader, "count", 1)
    order = reader.choice("order", _ORDERS)
    wire = None if reader.get("wire", (str, type(None))) is None else _dtype(reader, "wire")
    chunks = tuple(_chunk(one, tp_size) for one in reader.items("chunks", dict))
    _require_whole(reader, chunks, count, order)
    return MessageProbe(
        tp_size=tp_size,
        dtype=_dtype(reader, "dtype"),
        count=count,
        order=order,
        wire=wire,
        chunks=chunks,
        repeatable=reader.get("repeatable", bool),
        disagreeing_ranks=tuple(one.value for one in reader.items("disagreeing_ranks", int)),
        reproduced=reader.optional("reproduced", bool),
        average=None
        if reader.value.get("average") is None
        else tuple(one.value for one in reader.items("average", str)),
        reason=reader.get("reason", str),
    )


def _require_whole(reader: JsonReader, chunks: tuple[Chunk, ...], count: int, order: str) -> None:
    edges = [0, *(one.stop for one in chunks)]
    whole = [one.start for one in chunks] == edges[:-1] and edges[-1] == count
    if (order == "unreadable") != (not chunks) or (chunks and not whole):
        expected = f"chunks from 0 to {count} without a gap" if order != "unreadable" else "[]"
        refuse(f"{reader.path}.chunks", reader.value["chunks"], expected)


def _chunk(reader: JsonReader, world: int) -> Chunk:
    start, stop = _at_least(reader, "start", 0), _at_least(reader, "stop", 1)
    if stop <= start:
        refuse(f"{reader.path}.stop", stop, f"above start={start}")
    accumulator = reader.optional("accumulator", str)
    if accumulator not in (None, ANY, *_BYTES):
        refuse(f"{reader.path}.accumulator", accumulator, f"{ANY}, {', '.join(_BYTES)} or null")
    order = reader.value.get("order")
    return Chunk(start, stop, None if order is None else _tree(reader, order, world), accumulator)


def _tree(reader: JsonReader, order: Any, world: int) -> Tree:
    try:
        tree = _subtree(order)
    except (TypeError, RecursionError):
        tree = -1
    leaves = leaves_of(tree)
    if len(leaves) != world or leaves != list(range(world)):  # a world is any number, also 10^18
        refuse(f"{reader.path}.order", order, f"nested lists with each rank below {world} once")
    return tree


def _subtree(order: Any) -> Tree:
    if isinstance(order, int) and not isinstance(order, bool):
        return order
    if not isinstance(order, list) or len(order) < 2:
        raise TypeError(order)
    return in_order([_subtree(child) for child in order])


def _switch(reader: JsonReader) -> SwitchPoint:
    return SwitchPoint(
        tp_size=_at_least(reader, "tp_size", 2),
        dtype=_dtype(reader, "dtype"),
        last=_at_least(reader, "last", 1),
        first=_at_least(reader, "first", 2),
        change=reader.get("change", str),
    )


def _dtype(reader: JsonReader, key: str) -> str:
    return reader.choice(key, tuple(_BYTES))


def _at_least(reader: JsonReader, key: str, least: int) -> int:
    value: int = reader.get(key, int)
    if value < least:
        refuse(f"{reader.path}.{key}", value, f"at least {least}")
    return value
