"""Make a plan, or say why none can be made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

from tpcheck.errors import IllegalDegreeError
from tpcheck.shard_plan.dividing import Division, divide, divide_heads
from tpcheck.shard_plan.policy import STRICT, SplitPolicy
from tpcheck.shard_plan.records import Padded, RankPlan, ShardPlan
from tpcheck.shard_plan.rules import (
    degree_problems,
    head_problems,
    problems,
    width_problems,
    widths,
)
from tpcheck.shard_plan.scale_rules import fused_problems
from tpcheck.shard_plan.units import width_unit
from tpcheck.shard_plan.words import Problem
from tpcheck.spec import ModelSpec

HEAD_ORDER = (
    ("even", "shard_or_replicate"),
    ("even", "unaligned"),
    ("pad", "shard_or_replicate"),
    ("pad", "unaligned"),
    ("uneven", "shard_or_replicate"),
    ("uneven", "unaligned"),
)
"""(heads, kv) as `best_plan` tries them. KV copies cost memory, pads cost time as well, and uneven
ranks need code that engines rarely have. Copies for every query head ("mha") hold more than
"unaligned" and do nothing better, so they are only made when asked for."""

WIDTH_ORDER = ("even", "pad", "uneven")
"""`intermediate` as `best_plan` tries it."""

SCALE_ORDER = ("refuse", "replicate")
"""`scales` as `best_plan` tries it."""


def make_shard_plan(spec: ModelSpec, tp_size: int, policy: SplitPolicy = STRICT) -> ShardPlan:
    """Decide what each of `tp_size` ranks holds.

    Raises:
        IllegalDegreeError: heads, KV heads or the width of the MLP or its experts cannot be split
            this way; names every broken rule with its numbers and the degrees that fit.
    """
    broken = problems(spec, tp_size, policy)
    if broken:
        raise _refusal(spec, tp_size, policy, broken)
    query, kv = divide_heads(spec, tp_size, policy)
    features = [
        divide(width.size, tp_size, policy.intermediate, width_unit(spec, policy, width.split))
        for width in widths(spec)
    ]
    vocab = divide(spec.vocab_size, tp_size, "pad", policy.vocab_quantum)
    dense, routed, shared = (division.spans for division in features)
    return ShardPlan(
        tp_size=tp_size,
        kv_replicas=_replicas(kv),
        vocab_rows=vocab.padded,
        ranks=tuple(map(RankPlan, query.spans, kv.spans, dense, vocab.spans, routed, shared)),
        policy=policy,
        padded=Padded(query.padded, kv.padded, *(division.padded for division in features)),
    )


def legal_tp_sizes(
    spec: ModelSpec, up_to: int = 64, policy: SplitPolicy = STRICT
) -> tuple[int, ...]:
    """Return every degree from 1 to `up_to` that the reference decoder can run, ascending."""
    return tuple(size for size in range(1, up_to + 1) if not problems(spec, size, policy))


def best_plan(
    spec: ModelSpec, tp_size: int, *, vocab_quantum: int = 1, block: int = 1
) -> ShardPlan:
    """Return the plan of the first policy that can run: HEAD_ORDER, and by itself WIDTH_ORDER.

    Scales of quantization blocks are copied only where no way to split leaves all blocks whole.

    Raises:
        IllegalDegreeError: none can; names what each of them breaks.
    """
    wanted = SplitPolicy(vocab_quantum=vocab_quantum, block=block)
    broken = degree_problems(tp_size)
    if broken:
        raise _refusal(spec, tp_size, wanted, broken)
    refused: list[str] = []
    for scales in SCALE_ORDER if spec.quantization else SCALE_ORDER[:1]:
        whole = replace(wanted, scales=scales)
        by_heads = [replace(whole, heads=heads, kv=kv) for heads, kv in HEAD_ORDER]
        by_widths = [replace(whole, intermediate=way) for way in WIDTH_ORDER]
        heads = _first(by_heads, lambda one: head_problems(spec, tp_size, one), refused)
        rest = _first(by_widths, lambda one: width_problems(spec, tp_size, one), refused)
        fused = _first([whole], lambda one: fused_problems(spec, tp_size, one), refused)
        if heads is not None and rest is not None and fused is not None:
            return make_shard_plan(spec, tp_size, replace(heads, intermediate=rest.intermediate))
    lines = "".join(f"\n  {line}" for line in dict.fromkeys(refused))
    raise IllegalDegreeError(
        f"tp_size={tp_size}, but should be one that some way to split allows"
        f" [{spec.model_type}, tp_size={tp_size}]{lines}"
    )


def _first(
    policies: Sequence[SplitPolicy],
    broken: Callable[[SplitPolicy], list[Problem]],
    refused: list[str],
) -> SplitPolicy | None:
    """Return the first policy that breaks nothing; why the others do not go is added to `refused`.

    Where one goes nothing is added.
    """
    reasons = []
    for policy in policies:
        found = broken(policy)
        if not found:
            return policy
        reasons.append(found[0].line)
    refused += dict.fromkeys(reasons)
    return None


def _replicas(kv: Division) -> int:
    """Return on how many ranks the KV head is that most ranks hold."""
    # spans change where they start and stop: heads are not counted one by one, they may be many
    held = [span for span in kv.spans if span.size]
    edges = Counter(span.start for span in held)
    edges.subtract(span.stop for span in held)
    return max(accumulate(edges[edge] for edge in sorted(edges)))


def _refusal(
    spec: ModelSpec, tp_size: int, policy: SplitPolicy, broken: Sequence[Problem]
) -> IllegalDegreeError:
    up_to = max(12, 2 * tp_size) if isinstance(tp_size, int) else 12
    legal = legal_tp_sizes(spec, up_to, policy)
    first, *rest = broken
    lines = [f"{first.line} [{spec.model_type}, tp_size={tp_size}]"]
    lines += [f"  {text}" for text in first.consequences]
    for problem in rest:
        lines += [f"  {text}" for text in (problem.line, *problem.consequences)]
    fitting = ", ".join(map(str, legal)) or "none"
    lines.append(f"  tp_size that fit this spec, up to {up_to}: {fitting}")
    return IllegalDegreeError("\n".join(lines), legal_tp_sizes=legal)
