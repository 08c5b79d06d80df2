"""tpcheck's own reference decoder: what shard_plan decides.

Requirement: the rules stand in shard_plan alone. A fragment is asked there as a spec whose missing
sizes divide by every degree, so that only what is known can refuse.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from tpcheck.engines.base import Engine, Finding, Rule, padded_fix
from tpcheck.engines.facts import Facts
from tpcheck.errors import IllegalDegreeError, PlanError
from tpcheck.shard_plan import legal_tp_sizes, make_shard_plan
from tpcheck.spec import ModelSpec

_SOURCE = "tpcheck/shard_plan/"


_ANY = math.lcm(*range(1, 65))
"""Divides by every degree that is looked at; larger ones are multiplied in."""


@lru_cache(maxsize=1024)
def _spec(facts: Facts, beyond: int) -> ModelSpec:
    free = _ANY * beyond
    heads, kv_heads = facts.num_attention_heads, facts.num_key_value_heads
    if facts.uses_mla:
        kv_heads = heads
    heads = heads or math.lcm(free, kv_heads or 1)
    experts = facts.num_experts if facts.moe_intermediate_size else None
    return ModelSpec(
        vocab_size=facts.vocab_size or free,
        hidden_size=facts.hidden_size or 2 * heads,
        intermediate_size=facts.intermediate_size or facts.sharded_dim or free,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        head_dim=2,
        num_experts=experts or 0,
        num_experts_per_tok=1 if experts else 0,
        moe_intermediate_size=(facts.moe_intermediate_size or 0) if experts else 0,
        shared_expert_intermediate_size=(
            (facts.shared_expert_intermediate_size or 0) if experts else 0
        ),
        model_type=facts.model_type or "config",
    )


def _legal(facts: Facts, up_to: int) -> frozenset[int]:
    try:
        return frozenset(legal_tp_sizes(_spec(facts, 1), up_to))
    except PlanError:
        return frozenset()


def _decide(facts: Facts, tp_size: int) -> Finding | None:
    try:
        plan = make_shard_plan(_spec(facts, 1 if tp_size <= 64 else tp_size), tp_size)
    except IllegalDegreeError as error:
        line = str(error).partition("\n")[0].partition(" [")[0]
        field = next((name for name in _FIXABLE if f"{name}=" in line), "")
        return Finding("error", line, line, fix=padded_fix(facts, tp_size, field))
    except PlanError as error:
        return Finding("error", str(error), str(error))
    if facts.vocab_size and plan.padded_vocab_size != facts.vocab_size:
        reason = f"vocab_size={facts.vocab_size} padded to {plan.padded_vocab_size}, pads cut off"
        return Finding("pad", reason)
    if plan.kv_replicas > 1 and facts.num_key_value_heads and not facts.uses_mla:
        kv_heads = facts.num_key_value_heads
        reason = f"num_key_value_heads={kv_heads}, each on {plan.kv_replicas} ranks"
        return Finding("replicate", reason)
    return None


_FIXABLE = (
    "shared_expert_intermediate_size",
    "moe_intermediate_size",
    "intermediate_size",
    "num_attention_heads",
)


def _sizes(facts: Facts, tp_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if facts.num_attention_heads:
        found["num_heads"] = facts.num_attention_heads // tp_size
    if facts.num_key_value_heads and not facts.uses_mla:
        found["num_kv_heads"] = max(1, facts.num_key_value_heads // tp_size)
        found["kv_replicas"] = max(1, tp_size // facts.num_key_value_heads)
    if facts.intermediate_size:
        found["intermediate"] = facts.intermediate_size // tp_size
    if facts.vocab_size:
        rows = -(-facts.vocab_size // tp_size)
        found["vocab"] = {"padded": rows * tp_size, "per_rank": rows}
    return found


RULES = (Rule("reference.shard_plan", _SOURCE, _decide),)
ENGINE = Engine("reference", "tpcheck", RULES, (("any", (), _sizes),), legal=_legal)
