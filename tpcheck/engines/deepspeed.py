"""DeepSpeed 0.19 AutoTP: nothing is refused; ranks get uneven or empty shards.

Requirement: attention is cut by KV heads, the MLP and the head by `tp_grain_size`, and lm_head is
row-parallel over hidden_size, so the vocabulary is never split. Inference v2 is strict. Source:
commit edaa7221.
"""

from __future__ import annotations

from typing import Any

from tpcheck.engines.base import Engine, Finding, Rule
from tpcheck.engines.facts import Facts
from tpcheck.engines.formats import MODULES_OF_THEIR_OWN

_SHARD = "deepspeed/module_inject/tp_shard.py:43-110"
_V2 = "deepspeed/inference/v2/model_implementations/sharding/qkv.py"


def _whole_modules(facts: Facts, tp_size: int) -> Finding | None:
    if facts.method not in MODULES_OF_THEIR_OWN or tp_size == 1:
        return None
    reason = (
        f"AutoTP splits nn.Linear alone: {facts.method}'s layers stay whole on each of {tp_size}"
        " ranks, and no memory is saved"
    )
    return Finding("replicate", reason, None, {"whole": True})


def _is_split(facts: Facts) -> bool:
    return facts.method not in MODULES_OF_THEIR_OWN


def _unknown_format(method: str) -> bool:
    return method not in MODULES_OF_THEIR_OWN


def _by_kv_heads(total: int, kv_heads: int, tp_size: int) -> list[int]:
    slices = [kv_heads // tp_size + (rank < kv_heads % tp_size) for rank in range(tp_size)]
    return [total * mine // kv_heads for mine in slices]


def _by_grain(total: int, grain: int, tp_size: int) -> list[int]:
    if total < grain:
        return [total // tp_size + (rank < total % tp_size) for rank in range(tp_size)]
    grains = total // grain
    sizes = [(grains // tp_size + (rank < grains % tp_size)) * grain for rank in range(tp_size)]
    sizes[-1] += total % grain
    return sizes


_UNNAMED_MLP = ("opt",)
"""Model types whose MLP is fc1 and fc2 of the layer itself: AutoTP knows an MLP by its name, and
takes any other weight for attention's."""


def _layers(facts: Facts, tp_size: int) -> dict[str, list[int]]:
    """Return name → the size on each rank, for the weights that the facts describe."""
    found = {}
    kv_heads, grain = facts.num_key_value_heads, facts.tp_grain_size
    attention = _attention_width(facts)
    if attention and kv_heads and facts.tensor in (None, "qkv_proj", "o_proj"):
        even = attention % kv_heads == 0
        found["self_attn.q_proj"] = (
            _by_kv_heads(attention, kv_heads, tp_size)
            if even
            else _by_grain(attention, grain, tp_size)
        )
    for name, width in (
        ("mlp", facts.intermediate_size),
        ("mlp.shared_expert", facts.shared_expert_intermediate_size),
        ("mlp.experts", facts.moe_intermediate_size),
    ):
        if width and facts.tensor in (None, "gate_up_proj", "down_proj", "experts"):
            by_heads = facts.model_type in _UNNAMED_MLP and kv_heads and width % kv_heads == 0
            found[name] = (
                _by_kv_heads(width, kv_heads, tp_size)
                if by_heads and kv_heads
                else _by_grain(width, grain, tp_size)
            )
    head = facts.hidden_size if facts.num_attention_heads or facts.vocab_size is None else None
    head = head or facts.vocab_size
    if head and facts.vocab_size and facts.tensor in (None, "lm_head"):
        found["lm_head"] = _by_grain(head, grain, tp_size)
    return found


def _attention_width(facts: Facts) -> int | None:
    if facts.num_attention_heads and facts.head_dim:
        return facts.num_attention_heads * facts.head_dim
    return facts.hidden_size or facts.num_attention_heads


def _shards(facts: Facts, tp_size: int) -> Finding | None:
    worst: tuple[str, list[int]] | None = None
    for name, sizes in _layers(facts, tp_size).items():
        if min(sizes) == max(sizes):
            continue
        if worst is None or (min(sizes) == 0 and min(worst[1]) > 0):
            worst = name, sizes
    if worst is None:
        return None
    name, sizes = worst
    empty = [rank for rank, size in enumerate(sizes) if size == 0]
    if empty:
        reason = f"{name}: {max(sizes)} rows on the first ranks, none on ranks {empty}"
        return Finding("uneven_empty_rank", reason)
    return Finding("uneven", f"{name}: from {min(sizes)} to {max(sizes)} rows a rank")


def _shard_sizes(facts: Facts, tp_size: int) -> dict[str, Any]:
    if not _is_split(facts):
        return {}
    return {
        name: {
            "layer": name,
            "shard_sizes": sizes,
            "even": min(sizes) == max(sizes),
            "empty_ranks": [rank for rank, size in enumerate(sizes) if size == 0],
        }
        for name, sizes in _layers(facts, tp_size).items()
    }


_CODEGEN_GROUPS = 4
"""As fusedqkv_utils.py:110 has it, after CodeGen's own model file."""


def _codegen(facts: Facts, tp_size: int) -> Finding | None:
    kv_heads = facts.num_key_value_heads
    if kv_heads is None or tp_size == 1 or kv_heads % (tp_size * _CODEGEN_GROUPS) == 0:
        return None
    text = "codgen autoTP requires num_kv_heads % (mp_size*codegen_mp_num) == 0"
    return Finding("error", text, text)


def _yuan(facts: Facts, tp_size: int) -> Finding | None:
    heads = facts.num_attention_heads
    if heads is None or tp_size <= heads / 2:
        return None
    text = f"world_size {tp_size} is larger than half of num_heads {heads}"
    return Finding("error", text, text)


def _v2_heads(facts: Facts, tp_size: int) -> Finding | None:
    if (facts.num_attention_heads or tp_size) >= tp_size:
        return None
    text = "There must be at least as many query heads as there are shards."
    return Finding("error", text, text)


def _v2_kv(facts: Facts, tp_size: int) -> Finding | None:
    kv_heads = facts.num_key_value_heads
    if kv_heads is None:
        return None
    text = None
    if kv_heads >= tp_size and kv_heads % tp_size:
        text = "Currently do not support uneven partitioning of KV heads for GQA."
    elif kv_heads < tp_size and tp_size % kv_heads:
        text = "Currently do not support distributing KV heads across different numbers of shards."
    return Finding("error", text, text) if text else None


def _v2(facts: Facts) -> bool:
    return facts.inference_v2


RULES = (
    Rule("deepspeed.v2_heads", f"{_V2}:54", _v2_heads, ("num_attention_heads",), "model", when=_v2),
    Rule("deepspeed.v2_kv", f"{_V2}:72-76", _v2_kv, ("num_key_value_heads",), "model", when=_v2),
    Rule(
        "deepspeed.codegen",
        "deepspeed/module_inject/fusedqkv_utils.py:113",
        _codegen,
        ("num_key_value_heads",),
        "model",
        when=lambda facts: facts.model_type == "codegen",
    ),
    Rule(
        "deepspeed.yuan",
        "deepspeed/module_inject/fusedqkv_utils.py:231",
        _yuan,
        ("num_attention_heads",),
        "model",
        when=lambda facts: facts.model_type == "yuan",
    ),
    Rule(
        "deepspeed.formats",
        "deepspeed/module_inject/auto_tp.py:666,738-751",
        _whole_modules,
        ("quant",),
        "model",
        refuses=False,
    ),
    Rule("deepspeed.shard_size", _SHARD, _shards, when=_is_split, refuses=False),
)

ENGINE = Engine(
    "deepspeed",
    "0.19.5 (edaa7221)",
    RULES,
    (("any", (), _shard_sizes),),
    unknown_format=_unknown_format,
)
