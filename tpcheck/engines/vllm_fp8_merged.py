"""What vLLM's loader does with the block scales of a merged fp8 layer, row by row.

Requirement: the block check is off for merged layers with a misaligned part, so what comes out is
played through: each part's scale rows are placed at ceil(offset / block), the kernel reads row r's
scale at r // block, and the two differ.
"""

from __future__ import annotations

import itertools
from typing import Any

from tpcheck.engines.facts import Facts, Linear, ceil_div

_NAMES = {2: ("gate", "up"), 3: ("q", "k", "v"), 4: ("q", "k", "v", "z")}
"""Number of parts → what they are called."""


def first_load_error(linear: Linear, block_n: int, tp_size: int) -> tuple[int, str] | None:
    """Return the first rank whose scales do not fit, with torch's text; None where all load."""
    for rank in range(tp_size):
        text = _load_error(linear, block_n, tp_size, rank)
        if text:
            return rank, text
    return None


def _load_error(linear: Linear, block_n: int, tp_size: int, rank: int) -> str | None:
    rows = ceil_div(linear.local_out(tp_size), block_n)
    offset = 0
    for part in linear.parts:
        local = part.local(tp_size)
        start, length = ceil_div(offset, block_n), ceil_div(local, block_n)
        stored = ceil_div(part.size, block_n)
        first = rank // max(1, tp_size // part.units) * length
        for begin, limit in ((start, rows), (first, stored)):
            if begin + length > limit:
                return f"start ({begin}) + length ({length}) exceeds dimension size ({limit})."
        offset += local
    return None


def wrong_ranks(linear: Linear, block_n: int, tp_size: int) -> dict[int, dict[str, str]]:
    """Return rank → part → how many of its rows are read with a scale that is not theirs."""
    found = {}
    for rank in range(tp_size):
        wrong = _wrong_rows(linear, block_n, tp_size, rank)
        if wrong:
            found[rank] = wrong
    return found


def _wrong_rows(linear: Linear, block_n: int, tp_size: int, rank: int) -> dict[str, str]:
    placed: dict[int, tuple[int, int]] = {}  # local scale row → (part, scale row in the checkpoint)
    offset, spans = 0, []
    for i, part in enumerate(linear.parts):
        local = part.local(tp_size)
        start, length = ceil_div(offset, block_n), ceil_div(local, block_n)
        shard = rank // max(1, tp_size // part.units)
        for k in range(length):
            placed[start + k] = (i, shard * length + k)
        spans.append((offset, shard * local, local))
        offset += local
    wrong = {}
    names = _NAMES[len(linear.parts)]
    for i, (offset, first, local) in enumerate(spans):
        count = sum(
            stop - start
            for start, stop in _runs(offset, first, local, block_n)
            if placed.get((offset + start) // block_n) != (i, (first + start) // block_n)
        )
        if count:
            wrong[names[i]] = f"{count}/{local} rows use a wrong scale"
    return wrong


def _runs(offset: int, first: int, local: int, block_n: int) -> list[tuple[int, int]]:
    """Return the spans of rows that stay in one block, here and in the checkpoint."""
    edges = {0, local}
    for base in (offset, first):
        edges.update(range(-base % block_n, local, block_n))
    cuts = sorted(edges)
    return list(itertools.pairwise(cuts))


def merged_load(facts: Facts, linear: Linear, tp_size: int) -> dict[str, Any]:
    """Return what loading the scales does on every rank."""
    if facts.stage == "create" or facts.block is None:
        return {}
    block_n, block_k = facts.block
    errors = [
        {"rank": rank, "loaded": False, "error_type": "RuntimeError", "error_text": text}
        for rank in range(tp_size)
        if (text := _load_error(linear, block_n, tp_size, rank))
    ]
    rows = ceil_div(linear.local_out(tp_size), block_n)
    columns = ceil_div(linear.in_features or 0, block_k)
    wrong = [
        {"rank": rank, "loaded": True, "wrong": parts, "scale_shape": [rows, columns]}
        for rank, parts in ({} if errors else wrong_ranks(linear, block_n, tp_size)).items()
    ]
    return {
        "first_error": errors[:1],
        "wrong_ranks": wrong,
        "n_err": len(errors),
        "n_wrong": len(wrong),
    }
