"""Megatron-LM core 0.15: the vocabulary's padding depends on the degree, and nothing masks it.

Requirement: heads and query groups are refused with a text; fewer groups than ranks are no weight
replication but an all-gather of the qkv activations, which costs and rounds differently. Source:
commit d98e8a64.
"""

from __future__ import annotations

from typing import Any

from tpcheck.engines import gated_delta, state_space
from tpcheck.engines.base import Engine, Finding, Rule, divisible, has_kv_heads, kv_multiple
from tpcheck.engines.facts import Facts, round_up
from tpcheck.engines.formats import Formats, reading

_CONFIG = "megatron/core/transformer/transformer_config.py:1446-1468"
_DIVIDE = "megatron/core/utils.py:590-599"
_VOCAB = "megatron/training/vocab_utils.py:41-58; core/tokenizers/utils/build_tokenizer.py:133-146"


FORMATS = Formats(
    "tools/checkpoint/loader_mixtral_hf.py:139, loader_core.py; core/fp8_utils.py",
    frozenset(),
    why="Megatron-LM reads no {method} checkpoint: its converters take unquantized weights, from"
    " which Transformer Engine makes its own fp8 and fp4",
    fix="convert the checkpoint that is not quantized",
)


def _allgather(facts: Facts, tp_size: int) -> Finding | None:
    groups = facts.num_key_value_heads
    assert groups is not None
    if groups >= tp_size:
        return None
    reason = (
        f"{groups} query groups over {tp_size} ranks: qkv is cut inside groups and all-gathered"
    )
    return Finding("allgather_kv", reason)


def _inference_layers(facts: Facts, tp_size: int) -> Finding | None:
    """Check what inference-optimized layers check themselves: gate and up are one output."""
    for width in (facts.intermediate_size, facts.shared_expert_intermediate_size):
        if width is None:
            continue
        out = 2 * width if facts.gated else width
        for side, size in (("output_size", out), ("input_size", width)):
            if size % tp_size:
                text = f"{side} ({size}) must be divisible by tp_size ({tp_size})"
                return Finding("error", text, text)
    return None


def _sequence_parallel(facts: Facts, tp_size: int) -> Finding | None:
    if facts.seq_len is None or facts.seq_len % tp_size == 0:
        return None
    text = "First dimension of the tensor should be divisible by tensor parallel size"
    reason = f"seq_len={facts.seq_len}: {text}"
    return Finding("late_error", reason, text, fix=f"a length of whole {tp_size} tokens")


def _padded(facts: Facts, tp_size: int) -> int:
    assert facts.vocab_size is not None
    return round_up(facts.vocab_size, facts.make_vocab_size_divisible_by * tp_size)


def _vocab(facts: Facts, tp_size: int) -> Finding | None:
    padded = _padded(facts, tp_size)
    if padded == facts.vocab_size:
        return None
    reason = f"vocab_size={facts.vocab_size} padded to {padded}; the padded logits are not masked"
    return Finding("pad", reason)


def _vocab_sizes(facts: Facts, tp_size: int) -> dict[str, Any]:
    assert facts.vocab_size is not None
    padded = _padded(facts, tp_size)
    found = {
        "padded": padded,
        "per_rank": padded // tp_size,
        "pad_rows": padded - facts.vocab_size,
        "logits_masked": False,
    }
    return {"vocab": found}


def _head_sizes(facts: Facts, tp_size: int) -> dict[str, Any] | None:
    heads, groups = facts.num_attention_heads, facts.num_key_value_heads
    if heads is None or groups is None or facts.uses_mla:
        return None
    cut = groups < tp_size
    how = "linear_qkv sharded inside a group, all-gathered over TP then sliced"
    return {
        "heads": {
            "num_query_groups_per_partition": max(1, groups // tp_size),
            "q_heads_from_linear_qkv": heads // groups if cut else heads // tp_size,
            "q_heads_after": heads // tp_size,
            "kv_mode": how if cut else "sharded",
        }
    }


RULES = (
    reading("megatron", FORMATS),
    divisible(
        "megatron.heads",
        "num_attention_heads",
        _CONFIG,
        text="num_attention_heads ({value}) must be a multiple of tensor_model_parallel_size"
        " ({tp}).",
    ),
    kv_multiple(
        "megatron.groups",
        _CONFIG,
        "num_query_groups ({value}) must be a multiple or divisor of tensor_model_parallel_size"
        " ({tp}).",
    ),
    *gated_delta.MEGATRON,
    *state_space.MEGATRON,
    Rule(
        "megatron.kv_allgather",
        "megatron/core/transformer/attention.py:353-384,1851-1950",
        _allgather,
        ("num_key_value_heads",),
        "qkv_proj",
        when=has_kv_heads,
        refuses=False,
    ),
    Rule(
        "megatron.inference_linear",
        "megatron/core/tensor_parallel/inference_layers.py:174,326,445",
        _inference_layers,
        area="gate_up_proj",
        when=lambda facts: facts.inference_layers,
    ),
    Rule(
        "megatron.sp",
        "megatron/core/tensor_parallel/mappings.py:74,178",
        _sequence_parallel,
        area="model",
        when=lambda facts: facts.sequence_parallel,
    ),
    Rule("megatron.vocab", _VOCAB, _vocab, ("vocab_size",), "lm_head", refuses=False),
    *(
        divisible(
            "megatron.mlp", field, _DIVIDE, text="{value} is not divisible by {tp}", area=area
        )
        for field, area in (
            ("intermediate_size", "gate_up_proj"),
            ("shared_expert_intermediate_size", "gate_up_proj"),
            ("moe_intermediate_size", "experts"),
        )
    ),
)

ENGINE = Engine(
    "megatron",
    "core 0.15 (d98e8a64)",
    RULES,
    (
        ("qkv_proj", ("num_attention_heads",), _head_sizes),
        ("lm_head", ("vocab_size",), _vocab_sizes),
    ),
)
