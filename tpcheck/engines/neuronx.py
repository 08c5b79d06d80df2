"""NeuronX Distributed 2.28: pads what the others refuse.

Requirement: query heads are padded to a multiple of the degree; KV heads are replicated to the
degree where it is a multiple of them, else the model is converted to multi-head attention. Widths
and vocabulary are padded with `pad=True`. Source: commit fbac349b.
"""

from __future__ import annotations

from typing import Any

from tpcheck.engines.base import WIDTHS, Engine, Finding, Rule, has_kv_heads
from tpcheck.engines.facts import Facts, round_up
from tpcheck.engines.formats import Formats, names, reading

_PAD = "src/neuronx_distributed/parallel_layers/pad.py:13-29"
_GQA = "examples/inference/modules/gqa.py:46-80"
_LAYERS = "src/neuronx_distributed/parallel_layers/layers.py:602-640"
_QKV = "src/neuronx_distributed/modules/qkv_linear.py:444-447"


FORMATS = Formats(
    "src/neuronx_distributed/quantization/quantization_config.py, quantize.py",
    frozenset(),
    unsure=names("fp8 fbgemm_fp8 mxfp4 mxfp8"),
    why="NeuronX Distributed reads no {method} checkpoint: it quantizes unquantized weights itself,"
    " to int8 or fp8",
)


def _heads_and_kv(facts: Facts, tp_size: int) -> tuple[str, int, int]:
    heads, kv_heads = facts.num_attention_heads, facts.num_key_value_heads
    assert heads is not None
    assert kv_heads is not None
    strategy = "convert-to-mha" if tp_size % kv_heads else "replicate-to-tp-degree"
    padded = round_up(heads, tp_size)
    if heads == kv_heads:
        return strategy, padded, padded
    if kv_heads % tp_size == 0:
        return strategy, padded, kv_heads
    return strategy, padded, padded if tp_size % kv_heads else tp_size


def _heads(facts: Facts, tp_size: int) -> Finding | None:
    heads, kv_heads = facts.num_attention_heads, facts.num_key_value_heads
    strategy, padded, held = _heads_and_kv(facts, tp_size)
    if (padded, held) == (heads, kv_heads):
        return None
    reason = f"heads {heads} to {padded}, KV heads {kv_heads} to {held} ({strategy})"
    return Finding("pad", reason)


def _head_sizes(facts: Facts, tp_size: int) -> dict[str, Any] | None:
    if facts.uses_mla or facts.num_key_value_heads is None:
        return None
    strategy, padded, held = _heads_and_kv(facts, tp_size)
    found = {
        "strategy": strategy,
        "heads": padded,
        "kv_heads": held,
        "q_per_rank": padded // tp_size,
        "kv_per_rank": held / tp_size,
    }
    return {"attention": found}


def _latent_heads(facts: Facts, tp_size: int) -> Finding | None:
    heads = facts.num_attention_heads
    assert heads is not None
    if heads % tp_size == 0:
        return None
    return Finding("pad", f"heads {heads} to {round_up(heads, tp_size)}")


def _widths(facts: Facts, tp_size: int) -> Finding | None:
    for field in (
        "intermediate_size",
        "shared_expert_intermediate_size",
        "moe_intermediate_size",
        "vocab_size",
        "sharded_dim",
    ):
        size = getattr(facts, field)
        grain = tp_size * facts.pad_alignment_size_per_rank
        if size and size % grain:
            return Finding("pad", f"{field}={size} padded to {round_up(size, grain)}, pad=True")
    return None


def _width_sizes(facts: Facts, tp_size: int) -> dict[str, Any]:
    """Return how wide all ranks hold each width together, and the vocabulary."""
    grain = tp_size * facts.pad_alignment_size_per_rank
    widths = {
        field: round_up(size, grain) for field in WIDTHS if (size := getattr(facts, field, None))
    }
    found: dict[str, Any] = {"widths": widths}
    if facts.vocab_size:
        padded = round_up(facts.vocab_size, grain)
        found["vocab"] = {"padded": padded, "per_rank": padded // tp_size}
    return found


def _multiplier(facts: Facts, tp_size: int) -> Finding | None:
    times, kv_heads = facts.kv_size_multiplier, facts.num_key_value_heads
    assert times is not None
    if tp_size % times:
        text = "tp_world_size should be divisible by kv_size_multiplier"
        return Finding("error", text, text)
    if kv_heads and facts.head_dim and kv_heads * facts.head_dim * times % tp_size:
        text = "kv_output_dim*kv_size_multiplier should be divisible by tp_world_size"
        return Finding("error", text, text)
    return None


RULES = (
    reading("nxd", FORMATS),
    Rule("nxd.qkv_linear", _QKV, _multiplier, ("kv_size_multiplier",), "qkv_proj"),
    Rule(
        "nxd.heads",
        f"{_GQA}; {_PAD}",
        _heads,
        ("num_attention_heads", "num_key_value_heads"),
        "model",
        when=has_kv_heads,
        refuses=False,
    ),
    Rule(
        "nxd.heads",
        _PAD,
        _latent_heads,
        ("num_attention_heads",),
        "model",
        when=lambda facts: facts.uses_mla,
        refuses=False,
    ),
    Rule("nxd.linear_pad", _LAYERS, _widths, refuses=False),
)

ENGINE = Engine(
    "neuronx-distributed",
    "2.28.0 (fbac349b)",
    RULES,
    (("qkv_proj", ("num_attention_heads",), _head_sizes), ("any", (), _width_sizes)),
    unknown_format=FORMATS.is_unknown,
)
