"""A number of things dealt out to ranks: evenly, padded, or unevenly; in whole units.

Requirement: what a rank holds is one span, spans ascend with the ranks, and pads lie behind the
real ones of a rank. So "which heads" is two integers everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

from tpcheck.shard_plan.policy import SplitPolicy
from tpcheck.shard_plan.records import Span
from tpcheck.shard_plan.units import head_units
from tpcheck.spec import ModelSpec


class Division(NamedTuple):
    """What each rank gets, and how many it has with pads (0: no more than it got)."""

    spans: tuple[Span, ...]
    padded: int = 0


def round_up(value: int, unit: int) -> int:
    """Return the least multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def divide(total: int, parts: int, way: str, unit: int) -> Division:
    """Deal `total` out to `parts`, the first of them first; `unit` is never split.

    What is dealt out evenly has to divide by `parts`.
    """
    if way == "even":
        size = total // parts
        return Division(tuple(Span(part * size, (part + 1) * size) for part in range(parts)))
    if way == "pad":
        size = round_up(-(-total // parts), unit)
        starts = [min(part * size, total) for part in range(parts + 1)]
        return Division(tuple(map(Span, starts, starts[1:])), size)
    least, more = divmod(-(-total // unit), parts)
    starts = [min((part * least + min(part, more)) * unit, total) for part in range(parts + 1)]
    return Division(tuple(map(Span, starts, starts[1:])))


def divide_heads(spec: ModelSpec, tp_size: int, policy: SplitPolicy) -> tuple[Division, Division]:
    """Return the query heads and the KV heads of every rank."""
    kv_heads, units = spec.num_key_value_heads, head_units(spec, policy)
    group = spec.num_attention_heads // kv_heads
    if policy.kv != "shard_or_replicate":
        query = divide(spec.num_attention_heads, tp_size, policy.heads, units.query)
        return query, _touched(query, group, units.kv, policy)
    if kv_heads >= tp_size or group == 1:
        kv = divide(kv_heads, tp_size, policy.heads, units.group)
        spans = tuple(Span(span.start * group, span.stop * group) for span in kv.spans)
        return Division(spans, kv.padded * group), kv
    replicas = tp_size // kv_heads
    within = divide(group, replicas, policy.heads, units.query)
    ranks = [divmod(rank, replicas) for rank in range(tp_size)]
    spans = tuple(
        Span(head * group + within.spans[copy].start, head * group + within.spans[copy].stop)
        for head, copy in ranks
    )
    padded = round_up(1, units.kv) if policy.heads == "pad" else 0
    kv = Division(tuple(Span(head, head + 1) for head, _ in ranks), padded)
    return Division(spans, within.padded), kv


def _touched(query: Division, group: int, unit: int, policy: SplitPolicy) -> Division:
    """Return the KV heads that each rank's query heads belong to."""
    spans = []
    for start, stop in query.spans:
        first = start // group
        spans.append(Span(first, -(-stop // group) if stop > start else first))
    if policy.heads != "pad":
        return Division(tuple(spans))
    if policy.kv == "mha":
        return Division(tuple(spans), query.padded)
    return Division(tuple(spans), round_up(max(span.size for span in spans), unit))
