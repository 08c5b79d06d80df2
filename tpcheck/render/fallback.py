"""What the TP=1 fallback buys and costs, for a terminal: one table, levels side by side.

Requirement: the effect stands beside its price, both as measured; a level that this subject cannot
have says why; and where nothing was to be gained the reader is told so. A function of the JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpcheck.render.lines import table, wrapped

Json = Mapping[str, Any]

COLUMNS = (
    "tp",
    "dtype",
    "level",
    "ratio\nbefore -> after",
    "log-probability\noff TP=1 by at most",
    "TP=1's\nbits",
    "bytes\nreceived",
    "held\nat once",
    "time\n(deployed)",
)


def render_fallback(rows: Sequence[Json]) -> str:
    """Return a table of effects; each row is an Effect's JSON with `tp_size` and `dtype`."""
    if not rows:
        return ""
    cells = effect_rows(rows)
    filled = table(cells, COLUMNS) if cells else []
    return "\n".join([*wrapped(effect_title(rows)), *filled, *wrapped(*effect_remarks(rows))])


def effect_title(rows: Sequence[Json]) -> str:
    """Say what the table is, and where its times were measured."""
    return (
        f"what scoring at TP=1 buys, and costs; times of one forward, on {rows[0]['measured_on']}"
    )


def effect_rows(rows: Sequence[Json]) -> list[tuple[str, ...]]:
    """Return a row of COLUMNS per effect that was measured."""
    return [_cells(row) for row in rows if not row["reason"]]


def effect_remarks(rows: Sequence[Json]) -> list[str]:
    """Say why a level was not measured, and what else has to be known of the others."""
    refused: dict[str, list[str]] = {}
    for level, reason in dict.fromkeys((row["level"], row["reason"]) for row in rows):
        if reason:
            refused.setdefault(reason.removeprefix(f"{level}: "), []).append(level)
    lines = [f"{', '.join(levels)}: not measured: {text}" for text, levels in refused.items()]
    return lines + _remarks([row for row in rows if not row["reason"]])


def _cells(row: Json) -> tuple[str, ...]:
    return (
        str(row["tp_size"]),
        row["dtype"],
        row["level"],
        f"{_number(row['ratio_before'])} -> {_number(row['ratio_after'])}",
        f"{_number(row['logprob_before'])} -> {_number(row['logprob_after'])}",
        "yes" if row["same_bits_as_tp1"] else "no",
        _bytes(row["bytes_gathered"]),
        _bytes(row["device_peak_bytes"] or row["peak_bytes"]),
        _time(row["seconds"], row["seconds_deployed"]),
    )


def _remarks(rows: Sequence[Json]) -> list[str]:
    """Say of every level what it changed, where TP=N had an excess at all."""
    said = []
    apart = [row for row in rows if not row["ranks_agree"]]
    said += [f"{row['level']} at tp={row['tp_size']}: ranks do not agree" for row in apart]
    free = dict.fromkeys(row["level"] for row in rows if row.get("routing_pinned") is False)
    if free:
        said.append(
            f"{', '.join(free)}: routing could not be pinned to the oracle's, so flips of experts"
            " count as what the level changes"
        )
    known = [row for row in rows if row["ratio_before"] is not None]
    if known and max(row["ratio_before"] for row in known) <= 1.05:
        said.append(
            "TP=N is no further from float64 than 1.05 x TP=1: there is nothing to buy here"
        )
    return said


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _time(seconds: float | None, deployed: float | None) -> str:
    if seconds is None or deployed is None:
        return "-"
    return f"{1e3 * seconds:.3g} ms ({1e3 * deployed:.3g})"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
