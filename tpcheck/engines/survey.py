"""Apply an engine's rules: one degree in full, 64 degrees for which are legal.

Requirement: a plan is fast enough to be asked in a scheduler's loop, so which rules apply and which
degrees are legal is found once per engine and model and remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from tpcheck.engines import gated_delta, state_space
from tpcheck.engines.base import REFUSED, SEVERITY, Engine, Finding, Rule
from tpcheck.engines.facts import Facts
from tpcheck.engines.registry import engine_named
from tpcheck.engines.transformers_plans import is_known
from tpcheck.json_reader import brief

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
    engine = engine_named(engine_name)
    if engine.keeps_whole(facts):
        return Survey((), ("this engine keeps towers whole",), frozenset(range(1, UP_TO + 1)))
    rules: list[Rule] = []
    notes = _unknown(engine, facts)
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
    " sharded_dim linear_num_key_heads linear_num_value_heads linear_key_head_dim"
    " linear_value_head_dim mamba_num_heads mamba_n_groups mamba_intermediate_size".split()
)


_OF_OTHER_LAYERS = frozenset("num_attention_heads num_key_value_heads intermediate_size".split())
"""What a model of state-space layers alone has none of."""


def _unknown(engine: Engine, facts: Facts) -> list[str]:
    """Return what is planned although nothing is known of it here."""
    kind, method, notes = facts.model_type, facts.method, []
    if kind is not None and facts.role != "tower" and not is_known(kind):
        notes.append(
            f"model_type={brief(kind)} is not known: planned from the fields that are there"
        )
    if method is not None and engine.unknown_format and engine.unknown_format(method):
        notes.append(
            f"quant_method={brief(method)}: not known how it is split, planned as unquantized"
        )
    said = engine.unknown_model(facts) if engine.unknown_model and facts.role == "text" else None
    if said is not None:
        notes.append(said)
    if facts.linear_num_key_heads and not gated_delta.covers(engine.rules):
        notes.append("linear attention: no rule is known, its heads are planned as if they divide")
    if facts.mamba_intermediate_size and not state_space.covers(engine.rules, facts):
        notes.append("state-space layers: no rule is known, planned as if they divide")
    return notes


def _absent(facts: Facts) -> frozenset[str]:
    """Return what a model may simply not have, so that nothing is left out without it."""
    if facts.role == "tower":
        return _OPTIONAL | {"vocab_size"}
    if facts.mamba_intermediate_size and facts.num_attention_heads is None:
        return _OPTIONAL | _OF_OTHER_LAYERS
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


def decide(engine: Engine, known: Survey, facts: Facts, tp_size: int) -> Decision:
    """Return what the engine does: its first error, else the worst that any rule finds.

    Args:
        known: `survey` of this engine and these facts.
    """
    worst, by = Finding("ok", ""), None
    sizes: dict[str, Any] = {}
    for rule in known.rules:
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
    if engine.keeps_whole(facts):
        return {"whole": True}
    sizes: dict[str, Any] = {}
    for area, needs, size in engine.sizes:
        if facts.tensor is not None and area not in ("any", facts.tensor):
            continue
        if all(getattr(facts, name) is not None for name in needs):
            sizes.update(size(facts, tp_size) or {})
    return sizes
