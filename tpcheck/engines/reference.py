"""tpcheck's own reference decoder: what shard_plan decides.

Requirement: the rules stand in shard_plan alone. A fragment is asked there as a spec whose missing
sizes divide by every degree, so that only what is known can refuse.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any

from tpcheck.engines.base import Engine, Finding, Rule, padded_fix
from tpcheck.engines.facts import Facts
from tpcheck.errors import PlanError
from tpcheck.quantization import Quantization
from tpcheck.shard_plan import STRICT, make_shard_plan
from tpcheck.shard_plan.quant import IN, OUT
from tpcheck.shard_plan.rules import problems
from tpcheck.shard_plan.units import shared_features
from tpcheck.spec import ModelSpec

_SOURCE = "tpcheck/shard_plan/"


_ANY = math.lcm(*range(1, 65))
"""Divides by every degree that is looked at; larger ones are multiplied in."""


@lru_cache(maxsize=1024)
def _spec(facts: Facts, beyond: int) -> ModelSpec:
    quantization = _stored(facts)
    free = _ANY * beyond * _shared(quantization)
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
        head_dim=_head_dim(facts) if quantization else 2,
        position="learned",  # which goes with every head_dim
        num_experts=experts or 0,
        num_experts_per_tok=1 if experts else 0,
        moe_intermediate_size=(facts.moe_intermediate_size or 0) if experts else 0,
        shared_expert_intermediate_size=(
            (facts.shared_expert_intermediate_size or 0) if experts else 0
        ),
        quantization=quantization,
        model_type=facts.model_type or "config",
    )


def _head_dim(facts: Facts) -> int:
    heads, hidden = facts.num_attention_heads, facts.hidden_size
    return facts.head_dim or (hidden // heads if heads and hidden else 2)


def _stored(facts: Facts) -> Quantization | None:
    """Return what facts say of scales that features share; None where that is nothing.

    Names of single layers are left out: where some are skipped, those like them are not. Latent
    attention is no attention of this decoder's.
    """
    quant = facts.quant
    if quant is None:
        return None
    skip = tuple(name for name in quant.ignored if not any(map(str.isdigit, name)))
    skip += ("self_attn",) if facts.uses_mla else ()
    group = max(0, quant.group_size or 0)
    rows, columns = quant.block or (1, 0)
    known = {
        "fp8": partial(Quantization, "fp8", columns, rows),
        "gptq": partial(Quantization, "gptq", group, desc_act=quant.desc_act),
        "awq": partial(Quantization, "awq", group),
        "compressed-tensors": partial(Quantization, "pack-quantized", group),
        "mxfp4": partial(Quantization, "mxfp4", 32),
        "nvfp4": partial(Quantization, "nvfp4", 16),
    }
    if quant.method not in known:
        return None
    if quant.method == "compressed-tensors" and not group and quant.bits == 8:
        return Quantization("int8", skip=skip)
    bits = quant.bits if quant.method in ("gptq", "compressed-tensors") else 0
    return known[quant.method](bits=bits, skip=skip)


def _shared(quantization: Quantization | None) -> int:
    if quantization is None:
        return 1
    return math.lcm(*(shared_features(quantization, side) for side in (OUT, IN)))


def _legal(facts: Facts, up_to: int) -> frozenset[int]:
    """Ask shard_plan about the degrees that divide what it deals out: the others need no answer."""
    try:
        spec = _spec(facts, 1)
    except PlanError:
        return frozenset()
    sizes = math.gcd(
        spec.num_attention_heads,
        spec.moe_intermediate_size,
        spec.shared_expert_intermediate_size,
        0 if spec.num_experts else spec.intermediate_size,
    )
    return frozenset(
        size
        for size in range(1, up_to + 1)
        if sizes % size == 0 and not problems(spec, size, STRICT)
    )


def _decide(facts: Facts, tp_size: int) -> Finding | None:
    try:
        spec = _spec(facts, 1 if tp_size <= 64 else tp_size)
    except PlanError as error:
        return Finding("error", str(error), str(error))
    broken = problems(spec, tp_size, STRICT)
    if broken:
        line = broken[0].line
        field = next((name for name in _FIXABLE if f"{name}=" in line), "")
        return Finding("error", line, line, fix=padded_fix(facts, tp_size, field))
    plan = make_shard_plan(spec, tp_size)
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
