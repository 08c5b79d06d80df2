"""The weights of a part that ranks share out, in the order in which a model builds them.

Requirement: rules about blocks, groups and tiles look at weights, not at config fields, so every
weight is there with its logical parts: q apart from k and v, gate apart from up, and the keys and
values of linear attention apart where a checkpoint keeps them apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tpcheck.engines.facts import Linear, Part
from tpcheck.engines.fields import choice, count, number

Numbers = Mapping[str, int | None]
_SHARED = "shared_expert_intermediate_size"
_GATED_QUERIES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe")
"""Model types whose q_proj holds a gate beside each query head, unless attn_output_gate is off."""
_INTERLEAVED = ("qwen3_next",)
"""Model types whose linear attention keeps q, k, v and z of a key head together."""


def part_linears(
    numbers: Numbers, config: Mapping[str, Any], *, uses_mla: bool, gated: bool
) -> list[Linear]:
    """Return the weights that `numbers` describe, or the one weight that a fragment is."""
    return [
        *_attention(numbers, config, uses_mla=uses_mla),
        *_linear_attention(numbers, config),
        *_mlp(numbers, gated=gated),
        *_one_linear(config),
    ]


def query_units(config: Mapping[str, Any]) -> int:
    """Return how many heads' rows q_proj holds for each query head: 2 with an output gate."""
    gated = config.get("model_type") in _GATED_QUERIES
    return 2 if gated and config.get("attn_output_gate") is not False else 1


def _attention(numbers: Numbers, config: Mapping[str, Any], *, uses_mla: bool) -> Iterator[Linear]:
    hidden, heads, kv_heads, head_dim, v_dim = (
        numbers[name]
        for name in (
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "v_head_dim",
        )
    )
    if not heads or not head_dim or not v_dim:
        return
    if uses_mla:
        nope = count(config, "qk_nope_head_dim", "config")
        yield Linear("self_attn.q_b_proj", "columns", None, (Part(heads, head_dim),))
        yield Linear("self_attn.kv_b_proj", "columns", None, (Part(heads, nope + v_dim),))
    elif kv_heads:
        queries = Part(heads * query_units(config), head_dim)
        parts = (queries, Part(kv_heads, head_dim), Part(kv_heads, v_dim))
        yield Linear("self_attn.qkv_proj", "columns", hidden, parts)
    yield Linear("self_attn.o_proj", "rows", heads * v_dim, _outs(hidden))


def _linear_attention(numbers: Numbers, config: Mapping[str, Any]) -> Iterator[Linear]:
    hidden, keys, values, key_dim, value_dim = (
        numbers[name]
        for name in (
            "hidden_size",
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
        )
    )
    if not keys or not values or not key_dim or not value_dim:
        return
    key, value = Part(keys, key_dim), Part(values, value_dim)
    parts: tuple[Part, ...] = (key, key, value, value)
    if config.get("model_type") in _INTERLEAVED and values % keys == 0:
        parts = (Part(keys, 2 * key_dim + 2 * value_dim * (values // keys)),)
    yield Linear("linear_attn.in_proj_qkvz", "columns", hidden, parts)
    yield Linear("linear_attn.out_proj", "rows", values * value_dim, _outs(hidden))


def _mlp(numbers: Numbers, *, gated: bool) -> Iterator[Linear]:
    hidden = numbers["hidden_size"]
    for where, fact in (("mlp", "intermediate_size"), ("mlp.shared_expert", _SHARED)):
        width = numbers[fact]
        if width:
            columns = (Part(width, 1),) * (2 if gated else 1)
            yield Linear(f"{where}.gate_up_proj", "columns", hidden, columns)
            yield Linear(f"{where}.down_proj", "rows", width, _outs(hidden))


def _outs(hidden: int | None) -> tuple[Part, ...]:
    return (Part(hidden, 1),) if hidden else ()


def _one_linear(config: Mapping[str, Any]) -> list[Linear]:
    """Read a fragment that is one weight: K, N and `style`, or what one rank gets of K."""
    if "input_size_per_partition" in config and "K" not in config:
        local = number(config, ("input_size_per_partition",), "config")
        return [Linear("linear", "local", local, ())]
    k, n = (number(config, (name,), "config") for name in ("K", "N"))
    if k is None or n is None:
        return []
    style = choice(config, "style", ("rows", "columns"), "rows", "config")
    return [Linear("linear", style, k, (Part(n, 1),))]
