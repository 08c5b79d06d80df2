"""Apply an engine's rules: one degree in full, 64 degrees for which are legal.

Requirement: a plan is fast enough to be asked in a scheduler's loop, so which rules apply and which
degrees are legal is found once per engine and model and remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from tpcheck.engines import (
    deepspeed,
    dtensor,
    exllamav2,
    exllamav3,
    megatron,
    neuronx,
    reference,
    sglang,
    tensorrt_llm,
    tgi,
    transformers_,
    vllm,
)
from tpcheck.engines.base import REFUSED, SEVERITY, Engine, Finding, Rule
from tpcheck.engines.facts import Facts

ENGINES: dict[str, Engine] = {
    module.ENGINE.name: module.ENGINE
    for module in (
        reference,
        vllm,
        sglang,
        megatron,
        tensorrt_llm,
        tgi,
        transformers_,
        dtensor,
        deepspeed,
        neuronx,
        exllamav2,
        exllamav3,
    )
}
"""Every engine by the name users ask for."""

UP_TO = 64
"""Legal degrees are looked for up to here."""


class Decision(NamedTuple):
    """What an engine does with one part at one degree."""

    finding: Finding
    rule: Rule | None
    sizes: Mapping[str, Any]


class Survey(NamedTuple):
    """The rules that apply to one part, those that could not be, and the legal degrees."""

    rules: tuple[Rule, ...]
    notes: tuple[str, ...]
    legal: frozenset[int]


@lru_cache(maxsize=8192)
def survey(engine_name: str, facts: Facts) -> Survey:
    """Return which rules apply to a part and which degrees up to 64 they leave."""
    engine = ENGINES[engine_name]
    if facts.role == "tower" and not engine.splits_towers:
        return Survey((), ("this engine keeps towers whole",), frozenset(range(1, UP_TO + 1)))
    rules: list[Rule] = []
    notes = _unknown(facts)
    for rule in engine.rules:
        if not _is_about(rule, facts):
            continue
        missing = [name for name in rule.needs if getattr(facts, name) is None]
        if not missing:
            rules.append(rule)
        elif not _absent(facts) & set(missing):
            notes.append(f"{rule.rule_id} not applied: {', '.join(missing)} not given")
    applied = tuple(rules)
    if engine.legal is not None:
        legal = engine.legal(facts, UP_TO)
    else:
        legal = frozenset(size for size in range(1, UP_TO + 1) if _is_legal(applied, facts, size))
    return Survey(applied, tuple(dict.fromkeys(notes)), legal)


_OPTIONAL = frozenset(
    "quant num_experts moe_intermediate_size shared_expert_intermediate_size kv_size_multiplier"
    " sharded_dim".split()
)


def _unknown(facts: Facts) -> list[str]:
    kind = facts.model_type
    if kind is None or facts.role == "tower" or transformers_.is_known(kind):
        return []
    return [f"model_type={kind!r} is not known: planned from the fields that are there"]


def _absent(facts: Facts) -> frozenset[str]:
    """Return what a model may simply not have, so that nothing is left out without it."""
    if facts.role == "tower":
        return _OPTIONAL | {"vocab_size"}
    return _OPTIONAL | {"intermediate_size"} if facts.moe_intermediate_size else _OPTIONAL


def _is_about(rule: Rule, facts: Facts) -> bool:
    if rule.role not in ("any", facts.role):
        return False
    if facts.tensor is not None and rule.area not in ("any", facts.tensor):
        return False
    return rule.when is None or rule.when(facts)


def _is_legal(rules: tuple[Rule, ...], facts: Facts, tp_size: int) -> bool:
    for rule in rules:
        found = rule.find(facts, tp_size) if rule.refuses else None
        if found is not None and found.outcome in REFUSED:
            return False
    return True


def decide(engine_name: str, facts: Facts, tp_size: int) -> Decision:
    """Return what the engine does: its first error, else the worst that any rule finds."""
    engine = ENGINES[engine_name]
    worst, by = Finding("ok", ""), None
    sizes: dict[str, Any] = {}
    for rule in survey(engine_name, facts).rules:
        found = rule.find(facts, tp_size)
        if found is None:
            continue
        if found.outcome == "error":
            return Decision(found, rule, found.sizes or {})
        sizes.update(found.sizes or {})
        if SEVERITY[found.outcome] > SEVERITY[worst.outcome]:
            worst, by = found, rule
    if worst.outcome in REFUSED:
        return Decision(worst, by, worst.sizes or {})
    return Decision(worst, by, {**_sizes(engine, facts, tp_size), **sizes})


def _sizes(engine: Engine, facts: Facts, tp_size: int) -> dict[str, Any]:
    if facts.role == "tower" and not engine.splits_towers:
        return {}
    sizes: dict[str, Any] = {}
    for area, needs, size in engine.sizes:
        if facts.tensor is not None and area not in ("any", facts.tensor):
            continue
        if all(getattr(facts, name) is not None for name in needs):
            sizes.update(size(facts, tp_size) or {})
    return sizes
