"""What the rules of all engines share: a rule, what it finds, an engine, and how outcomes rank.

Requirement: a rule is a row of data with its source, and the formula behind it; an engine is a
name, the version that was read, and its rules in the order in which the engine meets them. The
first error ends a plan, as it ends the engine; else the worst outcome wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from tpcheck.engines.facts import Facts, round_up

OUTCOMES = (
    "ok",
    "replicate",
    "allgather_kv",
    "uneven",
    "pad",
    "uneven_empty_rank",
    "fallback",
    "silent_wrong",
    "late_error",
    "error",
)
"""From best to worst."""

SEVERITY = {outcome: i for i, outcome in enumerate(OUTCOMES)}
REFUSED = frozenset({"error", "late_error", "silent_wrong"})
"""A degree with one of these cannot be used."""


class Finding(NamedTuple):
    """What a rule says about one degree. `error_text` is the engine's own; "" is a bare assert."""

    outcome: str
    reason: str
    error_text: str | None = None
    sizes: Mapping[str, Any] | None = None
    fix: str | None = None


Find = Callable[[Facts, int], Finding | None]
Size = Callable[[Facts, int], Mapping[str, Any] | None]
When = Callable[[Facts], bool] | None


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of one engine.

    `needs` are the facts without which it cannot be applied; `area` is the tensor it speaks of
    ("model" is the model as a whole, "any" several tensors); `role` is where it holds; `when`
    tells the models it is about. `refuses` is False for a rule that leaves every degree usable.
    """

    rule_id: str
    source: str
    find: Find
    needs: tuple[str, ...] = ()
    area: str = "any"
    role: str = "any"
    when: When = None
    refuses: bool = True


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine: the version read, its rules in its own order, and the sizes each rank gets.

    `sizes` holds (area, facts needed, function). `splits_towers` is False where vision and audio
    towers stay whole on every rank, `whole_towers` are the model types of those that do although
    others are split. `legal`, where given, knows the legal degrees up to a bound
    without asking the rules one by one; `unknown_format` whether nothing is known of how this
    engine takes a quantization method; `unknown_model` what to say of a model whose code in this
    engine was not read.
    """

    name: str
    version: str
    rules: tuple[Rule, ...]
    sizes: tuple[tuple[str, tuple[str, ...], Size], ...] = ()
    splits_towers: bool = True
    whole_towers: frozenset[str] = frozenset()
    legal: Callable[[Facts, int], frozenset[int]] | None = None
    unknown_format: Callable[[str], bool] | None = None
    unknown_model: Callable[[Facts], str | None] | None = None

    def keeps_whole(self, facts: Facts) -> bool:
        """Whether a part is a tower that no rank has less than all of."""
        whole = not self.splits_towers or facts.model_type in self.whole_towers
        return facts.role == "tower" and whole


def divisible(
    rule_id: str,
    field: str,
    source: str,
    *,
    text: str = "",
    area: str = "model",
    role: str = "any",
    when: When = None,
) -> Rule:
    """Return the rule that a fact must divide by tp_size; `text` is what the engine says then.

    `{value}` and `{tp}` stand for the numbers; no text is a bare assert.
    """
    value_of = attrgetter(field)

    def find(facts: Facts, tp_size: int) -> Finding | None:
        value = value_of(facts)
        if value % tp_size == 0:
            return None
        said = text.format(value=value, tp=tp_size)
        return refused(facts, tp_size, field, said, f"{field}={value}")

    return Rule(rule_id, source, find, (field,), area, role, when)


def refused(facts: Facts, tp_size: int, field: str, said: str, value: str) -> Finding:
    """Return the finding of a fact that does not divide, with what would make it legal."""
    reason = said or f"{value} is not divisible by tp_size={tp_size} (a bare assert, no text)"
    return Finding("error", reason, said, fix=padded_fix(facts, tp_size, field))


def padded_fix(facts: Facts, tp_size: int, field: str) -> str | None:
    """Say to which size a dimension must be padded, all constraints taken together.

    Heads that are padded to the degree alone can break the quantization blocks: 64 heads of 64 to
    66 at six ranks are 704 rows a rank, which 128 does not divide; 72 heads are 768.
    """
    value = getattr(facts, field, None)
    if value is None:
        return None
    grain = quant_grain(facts)
    if field in WIDTHS:
        step = tp_size * grain
    elif field == "num_attention_heads":
        head_dim = facts.head_dim or grain
        step = tp_size * (grain // math.gcd(grain, head_dim))
    else:
        return None
    padded = round_up(value, step)
    return f"pad {field} to {padded}" if padded != value else None


WIDTHS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "sharded_dim",
)


def quant_grain(facts: Facts) -> int:
    """Return how many features share a scale: a block or a group; 1 where none do."""
    quant = facts.quant
    if quant is None:
        return 1
    if quant.block:
        return math.lcm(*quant.block)
    return quant.group_size if quant.group_size and quant.group_size > 0 else 1


def width_fix(facts: Facts, tp_size: int, name: str, local: int) -> str | None:
    """Say what makes a quantized weight's shard whole blocks: a wider layer or a smaller block."""
    field = next((field for key, field in _FIELD_OF.items() if key in name), None)
    grain = quant_grain(facts)
    ways = []
    if field and getattr(facts, field) is not None:
        ways.append(padded_fix(facts, tp_size, field))
    smaller = math.gcd(grain, local)
    if smaller >= 32:
        ways.append(f"quantize in blocks or groups of {smaller}")
    return ", or ".join(way for way in ways if way) or None


_FIELD_OF = {
    "shared_expert": "shared_expert_intermediate_size",
    "experts": "moe_intermediate_size",
    "down_proj": "intermediate_size",
    "gate_up_proj": "intermediate_size",
    "o_proj": "num_attention_heads",
    "qkv_proj": "num_attention_heads",
}


def is_gpt_oss(facts: Facts) -> bool:
    """Whether this is gpt-oss, whose attention and experts have code of their own in engines."""
    return facts.model_type == "gpt_oss" or facts.architecture == "GptOssForCausalLM"


def quantized_as(*methods: str) -> Callable[[Facts], bool]:
    """Return the question whether a checkpoint is stored in one of these ways."""
    return lambda facts: facts.method in methods


def has_fp8_blocks(facts: Facts) -> bool:
    """Whether weights are fp8 with a scale per block."""
    return facts.block is not None and facts.method == "fp8"


def has_kv_heads(facts: Facts) -> bool:
    """Whether rules about KV heads hold: latent attention has none to split."""
    return not facts.uses_mla


def replicas(facts: Facts, tp_size: int) -> int:
    """Return how many ranks hold each KV head."""
    assert facts.num_key_value_heads is not None
    return max(1, tp_size // facts.num_key_value_heads)


def kv_replicate(rule_id: str, source: str, when: When = None) -> Rule:
    """Return the rule that fewer KV heads than ranks are held more than once.

    Copies are made when weights arrive, so a plan of stage "create" knows nothing of them.
    """

    def find(facts: Facts, tp_size: int) -> Finding | None:
        kv_heads = facts.num_key_value_heads
        assert kv_heads is not None
        if kv_heads >= tp_size or tp_size % kv_heads:
            return None
        times = tp_size // kv_heads
        return Finding("replicate", f"num_key_value_heads={kv_heads}, each on {times} ranks")

    def about(facts: Facts) -> bool:
        return facts.stage != "create" and has_kv_heads(facts) and (when is None or when(facts))

    needs = ("num_key_value_heads",)
    return Rule(rule_id, source, find, needs, "qkv_proj", when=about, refuses=False)


def kv_multiple(rule_id: str, source: str, text: str = "", when: When = None) -> Rule:
    """Return the rule that KV heads and ranks must divide one another."""

    def find(facts: Facts, tp_size: int) -> Finding | None:
        kv_heads = facts.num_key_value_heads
        assert kv_heads is not None
        if kv_heads % tp_size == 0 or tp_size % kv_heads == 0:
            return None
        said = text.format(value=kv_heads, tp=tp_size)
        why = f"num_key_value_heads={kv_heads} and tp_size={tp_size} do not divide one another"
        repeated = math.lcm(kv_heads, tp_size)
        heads = facts.num_attention_heads
        fix = None
        if heads and heads % repeated == 0:
            fix = f"repeat KV heads to num_key_value_heads={repeated}"
        return Finding("error", said or f"{why} (a bare assert, no text)", said, fix=fix)

    def about(facts: Facts) -> bool:
        return has_kv_heads(facts) and (when is None or when(facts))

    return Rule(rule_id, source, find, ("num_key_value_heads",), "qkv_proj", when=about)


def enough_experts(rule_id: str, source: str, model_types: frozenset[str]) -> Rule:
    """Return the rule of the model types whose file refuses more ranks than experts."""

    def check(facts: Facts, tp_size: int) -> Finding | None:
        experts = facts.num_experts
        if experts is None or tp_size <= experts or facts.ep_size > 1:
            return None
        text = f"Tensor parallel size {tp_size} is greater than the number of experts {experts}."
        return Finding("error", text, text)

    def applies(facts: Facts) -> bool:
        return facts.model_type is None or facts.model_type in model_types

    return Rule(rule_id, source, check, ("num_experts",), "experts", when=applies)
