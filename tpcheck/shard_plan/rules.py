"""Which degrees a policy refuses, and the sentences that say so.

Requirement: a refusal comes before a weight moves and names the rule with its numbers. What slicing
by size alone would have done is said too, because that is what an engine without the rule does.
"""

from __future__ import annotations

from collections.abc import Iterator

from tpcheck.shard_plan.dividing import Division, divide, divide_heads
from tpcheck.shard_plan.policy import SplitPolicy
from tpcheck.shard_plan.scale_rules import fused_problems, scale_problems
from tpcheck.shard_plan.units import width_unit
from tpcheck.shard_plan.words import Problem, Width
from tpcheck.spec import ModelSpec


def widths(spec: ModelSpec) -> tuple[Width, Width, Width]:
    """Return the widths of the MLP, of routed experts and of the shared expert."""
    dense = 0 if spec.num_experts else spec.intermediate_size
    shared = spec.shared_expert_intermediate_size
    return (
        Width("layers.*.mlp", "intermediate_size", dense, "intermediate"),
        Width("layers.*.mlp.experts.*", _MOE_SIZE, spec.moe_intermediate_size, "moe_intermediate"),
        Width("layers.*.mlp.shared_expert", _SHARED_SIZE, shared, "shared_expert_intermediate"),
    )


_MOE_SIZE, _SHARED_SIZE = "moe_intermediate_size", "shared_expert_intermediate_size"


def problems(spec: ModelSpec, tp_size: int, policy: SplitPolicy) -> list[Problem]:
    """Return every rule that this degree breaks; empty when it is legal."""
    return degree_problems(tp_size) or [
        *head_problems(spec, tp_size, policy),
        *width_problems(spec, tp_size, policy),
        *fused_problems(spec, tp_size, policy),
    ]


def degree_problems(tp_size: object) -> list[Problem]:
    """Return what keeps a value from being a degree at all."""
    if isinstance(tp_size, int) and not isinstance(tp_size, bool) and tp_size >= 1:
        return []
    return [Problem(f"tp_size={tp_size!r}, but should be a whole number of at least 1")]


def head_problems(spec: ModelSpec, tp_size: int, policy: SplitPolicy) -> list[Problem]:
    """Return the rules of attention that this degree breaks."""
    heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
    if policy.heads == "even" and heads % tp_size:
        line = (
            f"layers.*.self_attn: num_attention_heads={heads},"
            f" but should be divisible by tp_size={tp_size}"
        )
        return [Problem(line, _silent_heads(spec, tp_size))]
    # whole KV groups can always be dealt out; ranks that get none are of use to groups of one only
    splits = policy.heads != "even" and (kv_heads > tp_size or heads == kv_heads)
    fits = splits or kv_heads % tp_size == 0 or tp_size % kv_heads == 0
    if policy.kv == "shard_or_replicate" and not fits:
        line = (
            f"layers.*.self_attn: num_key_value_heads={kv_heads},"
            f" but should divide tp_size={tp_size} or be divisible by it"
        )
        return [Problem(line, ("some ranks' query heads would need parts of two KV groups",))]
    return list(_head_blocks(spec, tp_size, policy))


def width_problems(spec: ModelSpec, tp_size: int, policy: SplitPolicy) -> list[Problem]:
    """Return the rules of the MLP and the experts that this degree breaks."""
    found = []
    for where, name, size, split in widths(spec):
        if policy.intermediate == "even" and size % tp_size:
            line = f"{where}: {name}={size}, but should be divisible by tp_size={tp_size}"
            found.append(Problem(line))
            continue
        division = divide(size, tp_size, policy.intermediate, width_unit(spec, policy, split))
        broken = _broken_block(division, 1, policy.block)
        if broken:
            found.append(Problem(f"{where}: {name}={size}: {broken}"))
        else:
            found += scale_problems(spec, policy, Width(where, name, size, split), division)
    return found


def _head_blocks(spec: ModelSpec, tp_size: int, policy: SplitPolicy) -> Iterator[Problem]:
    counts = (spec.num_attention_heads, spec.num_key_value_heads)
    names = ("num_attention_heads", "num_key_value_heads")
    divisions = divide_heads(spec, tp_size, policy)
    for name, count, division in zip(names, counts, divisions, strict=True):
        if policy.kv == "mha" and counts[0] != counts[1] and spec.head_dim % policy.block:
            broken = (
                f"copies of single heads are cut out, so head_dim={spec.head_dim} should be"
                f" a multiple of block={policy.block}"
            )
        else:
            broken = _broken_block(division, spec.head_dim, policy.block)
        if broken:
            yield Problem(f"layers.*.self_attn: {name}={count}: {broken}")
            continue
        split = "query" if name == "num_attention_heads" else "kv"
        yield from scale_problems(
            spec, policy, Width("layers.*.self_attn", name, count, split), division
        )


def _broken_block(division: Division, width: int, block: int) -> str:
    """Say which rank's piece is not made of whole blocks (policy: [Whole Blocks])."""
    for rank, span in enumerate(division.spans):
        features = (division.padded or span.size) * width
        if features % block:
            return f"rank {rank} gets {features} features, but should get whole blocks of {block}"
        if span.size and span.start * width % block:
            return (
                f"rank {rank} begins at feature {span.start * width},"
                f" but should begin at a block of {block}"
            )
    return ""


def _silent_heads(spec: ModelSpec, tp_size: int) -> tuple[str, ...]:
    """Say what slicing by size alone would do to the heads, where nothing would stop it."""
    heads = spec.num_attention_heads
    width = heads * spec.head_dim
    if width % tp_size:
        return ()
    name = "hidden_size" if width == spec.hidden_size else "num_attention_heads * head_dim"
    columns, local_heads = width // tp_size, heads // tp_size
    silent = f"{name}={width} divides by {tp_size}, so slicing alone would succeed and silently"
    if local_heads and columns % local_heads == 0:
        return (f"{silent} give head_dim={columns // local_heads} instead of {spec.head_dim}",)
    return (f"{silent} give {columns} columns, not whole heads of {spec.head_dim}",)
