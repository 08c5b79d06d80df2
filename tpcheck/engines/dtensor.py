"""torch DTensor 2.13 with ColwiseParallel and RowwiseParallel: loads at any degree.

Requirement: Shard cuts like torch.chunk, so a shard may be short or empty and that alone is no
error; a view to heads of a cut head, an uneven width given on as a local tensor, and an empty
embedding shard fail at the first forward. Texts are torch's, for the batch and length of `batch`
and `seq_len` (2 and 3 where they are not given).
"""

from __future__ import annotations

from typing import Any

from tpcheck.engines.base import Engine, Finding, Rule, padded_fix
from tpcheck.engines.facts import Facts, ceil_div, chunks
from tpcheck.engines.formats import MODULES_OF_THEIR_OWN, Formats, reading

_SHARD = "torch/distributed/tensor/placement_types.py:340-375"
_STYLE = "torch/distributed/tensor/parallel/style.py:107,237"
_PROPAGATION = "Sharding propagation failed for"


FORMATS = Formats(
    "torch/distributed/tensor/parallel/style.py:160,313",
    frozenset(),
    refuses=MODULES_OF_THEIR_OWN,
    text="ColwiseParallel currently only support nn.Linear and nn.Embedding!",
)


def _unsplit(facts: Facts, tp_size: int) -> Finding | None:
    # one rank needs no parallel style
    return _FORMATS_RULE.find(facts, tp_size) if tp_size > 1 else None


_FORMATS_RULE = reading("dtensor", FORMATS)


def _heads(facts: Facts, tp_size: int) -> Finding | None:
    if facts.head_dim is None:
        return _head_counts(facts, tp_size)
    for name, heads in (
        ("num_attention_heads", facts.num_attention_heads),
        ("num_key_value_heads", facts.num_key_value_heads),
    ):
        if heads is None or heads % tp_size == 0:
            continue
        text = _view_text(facts, tp_size, heads, facts.head_dim)
        reason = f"{name}={heads} is cut inside heads: {text.partition(chr(10))[0]}"
        sizes = _cuts(heads * facts.head_dim, facts.head_dim, tp_size)
        fix = padded_fix(facts, tp_size, name)
        return Finding("late_error", reason, text, {"heads": sizes}, fix)
    return None


def _head_counts(facts: Facts, tp_size: int) -> Finding | None:
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(facts, name)
        if heads and heads % tp_size:
            return Finding("late_error", f"{name}={heads} is cut inside heads")
    return None


def _view_text(facts: Facts, tp_size: int, heads: int, head_dim: int) -> str:
    batch, seq_len = facts.batch or 2, facts.seq_len or 3
    width = heads * head_dim
    if facts.use_local_output:
        size = batch * seq_len * ceil_div(width, tp_size)
        return f"shape '[{batch}, {seq_len}, -1, {head_dim}]' is invalid for input of size {size}"
    return (
        "Cannot unflatten unevenly sharded tensor: output dimension 0 (size"
        f" {heads}) is not evenly divisible by mesh dimension 0 (size {tp_size}). Please"
        f" redistribute the tensor before this operation.\n\n{_PROPAGATION} aten.view.default("
        f"Spec(f32[{batch}, {seq_len}, {width}](S(2))), [{batch}, {seq_len}, -1, {head_dim}]) on"
        f" DeviceMesh(({tp_size},), 'cpu', stride=(1,)))"
    )


def _cuts(total: int, head_dim: int, tp_size: int) -> dict[str, Any]:
    sizes = chunks(total, tp_size)
    cut, start = [], 0
    for rank, size in enumerate(sizes):
        if start % head_dim or (start + size) % head_dim:
            cut.append(rank)
        start += size
    return {
        "per_rank": sizes,
        "even": min(sizes) == max(sizes),
        "ranks_cutting_a_head": cut,
    }


def _mlp(facts: Facts, tp_size: int) -> Finding | None:
    width = facts.intermediate_size
    assert width is not None
    if width % tp_size == 0:
        return None
    if not facts.use_local_output:
        return Finding("uneven", f"intermediate_size={width}: {_spread(width, tp_size)}")
    hidden = facts.hidden_size or "hidden_size"
    tokens = (facts.batch or 2) * (facts.seq_len or 2)
    assumed = ceil_div(width, tp_size) * tp_size
    text = (
        f"a and b must have same reduction dim, but got [{tokens}, {assumed}] X [{width},"
        f" {hidden}].\n\n{_PROPAGATION} aten.mm.default(Spec(f32[{tokens}, {assumed}](S(1))),"
        f" Spec(f32[{width}, {hidden}](S(0)))) on DeviceMesh(({tp_size},), 'cpu', stride=(1,)))"
    )
    reason = f"{text.partition(chr(10))[0]} (use_local_output=False runs)"
    fix = padded_fix(facts, tp_size, "intermediate_size")
    return Finding("late_error", reason, text, fix=f"{fix}, or use_local_output=False")


def _spread(size: int, tp_size: int) -> str:
    sizes = chunks(size, tp_size)
    return f"{sizes[0]} rows on the first rank, {sizes[-1]} on the last"


def _embedding(facts: Facts, tp_size: int) -> Finding | None:
    size = facts.vocab_size
    assert size is not None
    if size % tp_size == 0:
        return None
    if chunks(size, tp_size)[-1] == 0:
        text = "index_select(): self indexing axis dim should be positive"
        return Finding("late_error", text, text)
    return Finding("uneven", f"vocab_size={size}: {_spread(size, tp_size)}")


def _shard(facts: Facts, tp_size: int) -> Finding | None:
    for field in ("sharded_dim", "moe_intermediate_size", "shared_expert_intermediate_size"):
        size = getattr(facts, field)
        if size and size % tp_size:
            return Finding("uneven", f"{field}={size}: {_spread(size, tp_size)}")
    return None


def _sizes(facts: Facts, tp_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if facts.sharded_dim:
        sizes = chunks(facts.sharded_dim, tp_size)
        even = min(sizes) == max(sizes)
        found["shard"] = {"per_rank": sizes, "even": even, "ranks_cutting_a_head": []}
    for name, size in (("mlp", facts.intermediate_size), ("vocab", facts.vocab_size)):
        if size:
            found[name] = {"per_rank": chunks(size, tp_size)}
    heads = facts.num_attention_heads or facts.num_key_value_heads
    if heads and facts.head_dim:
        found["heads"] = _cuts(heads * facts.head_dim, facts.head_dim, tp_size)
    return found


RULES = (
    Rule("dtensor.formats", FORMATS.source, _unsplit, ("quant",), "model"),
    Rule("dtensor.view_heads", f"{_SHARD}; torch DTensor view ops", _heads, area="qkv_proj"),
    Rule("dtensor.local_output", _STYLE, _mlp, ("intermediate_size",), "gate_up_proj"),
    Rule("dtensor.embed", _SHARD, _embedding, ("vocab_size",), "lm_head"),
    Rule("dtensor.shard", _SHARD, _shard, refuses=False),
)

ENGINE = Engine(
    "pytorch-dtensor",
    "2.13.0",
    RULES,
    (("any", (), _sizes),),
    unknown_format=FORMATS.is_unknown,
)
