"""plan_memory: parameter counts that are published, bytes of quantized weights, KV caches."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.configs import QWEN_30B
from tpcheck.hf.config import spec_from_config
from tpcheck.plan_memory import Request, rank_memory
from tpcheck.shard_plan import logical_tensors, make_shard_plan

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "num_hidden_layers": 32,
    "torch_dtype": "bfloat16",
}
MIXTRAL = {**LLAMA_8B, "model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "vocab_size": 50257,
    "n_positions": 1024,
    "torch_dtype": "bfloat16",
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "vocab_size": 129280,
    "num_hidden_layers": 61,
    "torch_dtype": "bfloat16",
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "num_hidden_layers": 24,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (LLAMA_8B, 8.030),
        (MIXTRAL, 46.703),
        (QWEN_30B, 30.532),
        (GPT2, 0.1244),
        (DEEPSEEK, 671.026),
    ],
    ids=["llama-3-8b", "mixtral-8x7b", "qwen3-30b-a3b", "gpt2", "deepseek-v3"],
)
def test_published_parameter_counts(config: dict[str, Any], billions: float) -> None:
    held = rank_memory(config, 1)
    assert held.weight_bytes is not None
    assert math.isclose(held.weight_bytes / 2e9, billions, rel_tol=1e-3)
    assert held.padding == 0


@pytest.mark.parametrize("config", [LLAMA_8B, MIXTRAL, QWEN_30B], ids=["llama", "mixtral", "qwen3"])
@pytest.mark.parametrize("tp_size", [1, 2, 8, 16])
def test_a_rank_holds_what_its_cuts_hold(config: dict[str, Any], tp_size: int) -> None:
    spec = spec_from_config(config)
    plan = make_shard_plan(spec, tp_size)
    spans = plan.ranks[0]
    units = {
        "query": spans.query_heads.size * spec.head_dim,
        "kv": spans.kv_heads.size * spec.head_dim,
        "vocab": plan.vocab_rows,
        "intermediate": spans.intermediate.size,
        "moe_intermediate": spans.moe_intermediate.size,
    }
    elements = 0
    for tensor in logical_tensors(spec).values():
        shape = list(tensor.shape)
        if tensor.split:
            shape[tensor.dim] = units[tensor.split]
        elements += math.prod(shape)
    weight_bytes = rank_memory(config, tp_size).weight_bytes
    assert weight_bytes is not None
    assert weight_bytes == 2 * elements


@pytest.mark.parametrize(
    ("quant", "gigabytes"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 5.73),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 5.73),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 9.08),
    ],
    ids=["gptq", "awq", "fp8"],
)
def test_quantized_weights_count_with_their_scales(quant: dict[str, Any], gigabytes: float) -> None:
    held = rank_memory({**LLAMA_8B, "quantization_config": quant}, 1)
    assert held.weight_bytes is not None
    assert math.isclose(held.weight_bytes / 1e9, gigabytes, rel_tol=5e-3)


def test_mxfp4_is_the_experts_only() -> None:
    # the published checkpoint's index says total_size 13,761,264,768
    held = rank_memory(GPT_OSS_20B, 1)
    assert held.weight_bytes is not None
    assert math.isclose(held.weight_bytes, 13_761_264_768, rel_tol=2e-3)


def test_modules_left_out_keep_their_dtype() -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    all_of_them = rank_memory({**LLAMA_8B, "quantization_config": fp8}, 1).weight_bytes
    fp8 = {**fp8, "modules_to_not_convert": ["self_attn.q_proj"]}
    but_one = rank_memory({**LLAMA_8B, "quantization_config": fp8}, 1).weight_bytes
    assert all_of_them is not None
    assert but_one is not None
    q_proj = 32 * 4096 * 4096
    assert but_one - all_of_them == q_proj - 4 * q_proj // 128**2


@pytest.mark.parametrize(
    ("tp_size", "request_", "expected"),
    [
        (1, Request(4096, 1), 2 * 32 * 8 * 128 * 4096 * 2),
        (8, Request(4096, 3), 2 * 32 * 1 * 128 * 4096 * 3 * 2),
        (16, Request(4096, 1), 2 * 32 * 1 * 128 * 4096 * 2),
        (4, Request(4096, 1, "float8"), 2 * 32 * 2 * 128 * 4096),
    ],
    ids=["all heads", "one head", "copies", "float8"],
)
def test_the_cache_of_kv_heads(tp_size: int, request_: Request, expected: int) -> None:
    assert rank_memory(LLAMA_8B, tp_size, request_).kv_cache_bytes == expected


def test_a_compressed_cache_is_whole_on_every_rank() -> None:
    for tp_size in (1, 8):
        held = rank_memory(DEEPSEEK, tp_size, Request(100))
        assert held.kv_cache_bytes == 61 * (512 + 64) * 100 * 2


def test_layers_without_attention_have_no_cache() -> None:
    mixed = {**LLAMA_8B, "layer_types": ["linear_attention", "full_attention"] * 16}
    full = rank_memory(LLAMA_8B, 2, Request(8)).kv_cache_bytes
    half = rank_memory(mixed, 2, Request(8)).kv_cache_bytes
    assert full is not None
    assert half == full // 2


def test_no_length_no_cache_and_no_field_no_guess() -> None:
    assert rank_memory(LLAMA_8B, 2).kv_cache_bytes is None
    fragment = {name: LLAMA_8B[name] for name in ("hidden_size", "num_attention_heads")}
    held = rank_memory(fragment, 2)
    assert held.weight_bytes is None
    assert held.missing == ("vocab_size", "num_hidden_layers", "intermediate_size")
    odd = rank_memory({**LLAMA_8B, "quantization_config": {"quant_method": "exl2"}}, 2)
    assert odd.missing == ("bytes of quant_method='exl2'",)


def test_padding_is_what_ranks_hold_beyond_the_model() -> None:
    config = {**GPT2, "tie_word_embeddings": True}
    held = rank_memory(config, 4, sizes={"vocab": {"padded": 50304}})
    plain = rank_memory(config, 1)
    assert plain.weight_bytes is not None
    assert held.padding is not None
    assert math.isclose(held.padding, (50304 - 50257) * 768 / (plain.weight_bytes / 2))
    # an engine that pads what this module knows nothing about has no known share
    assert rank_memory(LLAMA_8B, 2, outcome="pad").padding is None


def test_towers_that_stay_whole_are_whole_on_every_rank() -> None:
    tower = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
    }
    config = {"model_type": "llava", "text_config": LLAMA_8B, "vision_config": tower}
    split = rank_memory(config, 8).weight_bytes
    whole = rank_memory(config, 8, splits_towers=False).weight_bytes
    assert split is not None
    assert whole is not None
    matrices = 24 * (4 * 1024 * 1024 + 2 * 4096 * 1024)
    assert whole - split == 2 * (matrices - matrices // 8)
