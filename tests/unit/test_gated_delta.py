"""Linear attention's own heads, and configs that keep fields in objects of their own."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.engine_rules import Answer, Restated, hold_to_its_text, planned, restated
from tpcheck.engines.reading import read_facts
from tpcheck.errors import PlanError
from tpcheck.planning import plan

# Qwen/Qwen3-Next-80B-A3B: transformers 5.23.0, defaults of Qwen3NextConfig
QWEN3_NEXT: dict[str, Any] = {
    **{"model_type": "qwen3_next", "hidden_size": 2048, "num_attention_heads": 16},
    **{"num_key_value_heads": 2, "head_dim": 256, "vocab_size": 151936, "num_experts": 512},
    **{"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
    **{"linear_num_key_heads": 16, "linear_num_value_heads": 32},
    **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},
}


def layer(keys: int, times: int, key_dim: int, value_dim: int, tp: int) -> dict[str, Any]:
    return {
        **{"model_type": "qwen3_next", "linear_num_key_heads": keys},
        **{"linear_num_value_heads": keys * times, "linear_key_head_dim": key_dim},
        "linear_value_head_dim": value_dim,
    }


def late(keys: int, times: int, tp: int) -> Answer:
    return ("late_error" if keys % tp or keys * times % tp else "ok"), None


def vllm_answer(keys: int, times: int, key_dim: int, value_dim: int, tp: int) -> Answer:
    values = keys * times
    conv = 2 * keys * key_dim + values * value_dim
    if conv % tp:
        return "error", f"{conv} is not divisible by {tp}"
    if (conv + values * value_dim) % tp or 2 * values % tp:
        return "error", ""
    if values % tp:
        return "error", f"{values} is not divisible by {tp}"
    return late(keys, times, tp)


def sglang_answer(keys: int, times: int, key_dim: int, value_dim: int, tp: int) -> Answer:
    values = keys * times
    conv = 2 * keys * key_dim + values * value_dim
    for size in (conv, conv + values * value_dim, 2 * values, values * value_dim):
        if size % tp:
            return "error", f"{size} is not divisible by {tp}"
    return late(keys, times, tp)


def megatron_answer(keys: int, times: int, key_dim: int, value_dim: int, tp: int) -> Answer:
    for name, heads in (("key", keys), ("value", keys * times)):
        if heads % tp:
            return "error", (
                f"self.linear_num_{name}_heads={heads} must be a multiple of"
                f" (self.tensor_model_parallel_size={tp} * self.context_parallel_size=1)."
            )
    return "ok", None


SIZES: dict[str, Any] = {
    **{"keys": [2, 3, 4, 6, 8, 12, 16], "times": [1, 2, 3], "tp": [1, 2, 3, 4, 6, 8, 12, 16]},
    **{"key_dim": [64, 96, 128], "value_dim": [64, 128]},
}
ENGINES = [
    restated("gated_delta", engine, layer, answer, **SIZES)
    for engine, answer in (
        ("vllm", vllm_answer),
        ("sglang", sglang_answer),
        ("megatron", megatron_answer),
    )
]


@pytest.mark.parametrize("one", ENGINES, ids=lambda one: one.engine)
def test_heads_of_linear_attention_are_refused_as_each_engine_does(one: Restated) -> None:
    hold_to_its_text(one)


def test_keys_and_values_apart_are_judged_apart() -> None:
    # 3.5 keeps q, k, v and z apart: 6 keys of 96 and 12 values of 64 have whole sums at eight ranks
    sizes = layer(6, 2, 96, 64, 8)
    apart = planned({**sizes, "model_type": "qwen3_5_text"}, "vllm", 8)
    together = planned(sizes, "vllm", 8)
    assert (apart.outcome, apart.error_text) == ("error", "")
    assert "in_proj_ba" in apart.reason
    assert (together.outcome, together.error_text) == ("error", "12 is not divisible by 8")


def test_qwen3_next_on_real_degrees() -> None:
    assert planned(QWEN3_NEXT, "vllm", 4).outcome == "replicate"
    wide = {**QWEN3_NEXT, "num_attention_heads": 64}
    result = planned(wide, "vllm", 32)
    assert result.outcome == "late_error"
    assert result.reason == "linear_num_key_heads=16 is cut inside heads at tp_size=32"
    assert result.fix is not None
    assert result.fix.startswith("pad linear_num_key_heads to 32 and values to 64;")
    padded = {**wide, "linear_num_key_heads": 32, "linear_num_value_heads": 64}
    assert planned(padded, "vllm", 32).is_legal


def test_an_output_gate_doubles_the_queries_that_blocks_have_to_divide() -> None:
    fp8 = {"quant": "fp8", "weight_block_size": [128, 128], "tensor": "qkv_proj", "stage": "load"}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "hidden_size": 512}
    sizes = {
        kind: planned({**heads, **fp8, "model_type": kind}, "sglang", 8).sizes
        for kind in ("qwen3", "qwen3_next")
    }
    assert sizes["qwen3"]["output_partition_sizes"] == [64, 64, 64]
    assert sizes["qwen3_next"]["output_partition_sizes"] == [128, 64, 64]


def test_sglang_pads_heads_of_linear_attention_on_a_cpu() -> None:
    result = planned({**layer(6, 2, 128, 128, 4), "device": "cpu"}, "sglang", 4)
    assert result.outcome == "pad"
    assert result.sizes["linear_heads"] == {"keys": 8, "values": 16}


def test_exllamav3_groups_key_heads_to_128_channels() -> None:
    def outcome(keys: int, dim: int) -> str:
        sizes = {**layer(keys, 2, dim, dim, 2), "model_type": "qwen3_5_text"}
        return planned(sizes, "exllamav3", 2).outcome

    assert [outcome(*one) for one in ((16, 128), (16, 64), (3, 64), (16, 96))] == [
        *("ok", "ok", "error", "error"),
    ]


def test_an_engine_without_a_rule_says_so() -> None:
    note = "linear attention: no rule is known, its heads are planned as if they divide"
    assert note in planned(QWEN3_NEXT, "tgi", 2).notes
    assert note not in planned(QWEN3_NEXT, "transformers", 2).notes


# -- fields in objects of their own

# databricks/dbrx-base: config.json
DBRX: dict[str, Any] = {
    **{"model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "vocab_size": 100352},
    "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
}


@pytest.mark.parametrize("tp_size", range(1, 17))
def test_dbrx_has_its_kv_heads_and_experts_in_objects(tp_size: int) -> None:
    result = planned(DBRX, "vllm", tp_size)
    heads = 48 % tp_size == 0 and (8 % tp_size == 0 or tp_size % 8 == 0)
    vocab = math.ceil(100352 / 64) * 64 % tp_size == 0
    assert result.is_legal == (heads and vocab and 10752 % tp_size == 0)


def test_dbrx_is_a_mixture_of_16_experts() -> None:
    facts = read_facts(DBRX)
    assert (facts.num_experts, facts.moe_intermediate_size) == (16, 10752)
    assert (facts.num_key_value_heads, facts.head_dim, facts.num_hidden_layers) == (8, 128, 40)
    plain = read_facts({**DBRX, "ffn_config": {"ffn_hidden_size": 10752}})
    assert (plain.num_experts, plain.intermediate_size) == (None, 10752)


def test_such_an_object_has_to_be_one() -> None:
    with pytest.raises(PlanError, match="config: ffn_config=3, but should be an object of fields"):
        plan({**DBRX, "ffn_config": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"n_embd": 768, "hidden_size": 1024},
            "config: hidden_size=1024, but n_embd=768: they say the same thing",
        ),
        (
            {"num_attention_heads": 32, "num_key_value_heads": 6},
            "config: num_attention_heads=32, but should be a multiple of num_key_value_heads=6",
        ),
        (
            {"num_experts": 4, "num_experts_per_tok": 8},
            "config: num_experts_per_tok=8, but should be at most num_experts=4",
        ),
    ],
    ids=["two widths", "heads", "experts"],
)
def test_fields_that_contradict_each_other_are_one_error(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError) as error:
        plan(fields)
    assert str(error.value) == message
