"""What engines do by a model's name: classes they dropped, experts they count, towers, MLP names.

Each was seen in the engine's own code, run at that size: vLLM 0.33's model classes built under the
degree, DeepSpeed's get_shard_size_list, exllamav3's table of architectures.
"""

from __future__ import annotations

from typing import Any

import pytest

from tpcheck.plan_memory import rank_memory
from tpcheck.planning import PlanResult, plan

DENSE = {
    **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}
EXPERTS = {
    **{"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"vocab_size": 32000, "num_experts": 8, "num_experts_per_tok": 2},
    "moe_intermediate_size": 14336,
}
KIMI_K2 = {
    **{"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168},
    **{"intermediate_size": 18432, "moe_intermediate_size": 2048, "num_attention_heads": 64},
    **{"num_key_value_heads": 64, "n_routed_experts": 384, "n_shared_experts": 1},
    **{"first_k_dense_replace": 1, "vocab_size": 163840, "kv_lora_rank": 512, "v_head_dim": 128},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
}


def planned(config: dict[str, Any], engine: str, tp_size: int) -> PlanResult:
    (result,) = plan(config, engine, (tp_size,))
    return result


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("MPTForCausalLM", "0.28.0"),
        ("BaichuanForCausalLM", "0.23.0"),
        ("Grok1ForCausalLM", "0.24.0"),
    ],
)
def test_vllm_has_dropped_a_class_at_every_degree(name: str, version: str) -> None:
    for tp_size in (1, 4):
        result = planned(DENSE | {"architectures": [name]}, "vllm", tp_size)
        assert result.rule_id == "vllm.architecture"
        assert f"supported in vLLM until v{version}" in (result.error_text or "")
        assert result.legal_tp_sizes == ()


def test_vllm_loads_a_dropped_class_that_transformers_has_in_a_form_it_takes() -> None:
    assert planned(DENSE | {"architectures": ["Dots1ForCausalLM"]}, "vllm", 4).is_legal


def test_exllamav3_reads_the_class_and_not_only_the_model_type() -> None:
    result = planned(KIMI_K2, "exllamav3", 2)
    assert result.error_text == (
        "Tensor-parallel is not currently implemented for DeepseekV3ForCausalLM"
    )
    assert planned(KIMI_K2, "exllamav3", 1).is_legal
    unknown = planned(DENSE | {"architectures": ["DeepseekV2ForCausalLM"]}, "exllamav3", 1)
    assert unknown.error_text == "Unknown architecture DeepseekV2ForCausalLM in config.json"


def test_the_class_of_the_whole_is_that_of_its_decoder() -> None:
    config = {"architectures": ["MantisForConditionalGeneration"], "text_config": DENSE}
    assert planned(config, "vllm", 2).rule_id == "vllm.architecture"


@pytest.mark.parametrize(
    ("model_type", "engine", "counts"),
    [
        ("qwen3_moe", "vllm", True),
        ("minimax_m2", "vllm", True),
        ("mixtral", "vllm", False),
        ("glm4_moe", "vllm", False),
        ("deepseek_v3", "vllm", False),
        ("deepseek_v3", "sglang", True),
        ("glm4_moe", "sglang", True),
        ("mixtral", "sglang", False),
    ],
)
def test_only_some_models_refuse_more_ranks_than_experts(
    model_type: str, engine: str, counts: bool
) -> None:
    result = planned(EXPERTS | {"model_type": model_type}, engine, 16)
    assert (result.rule_id == f"{engine}.moe_experts") == counts
    assert result.is_legal != counts


@pytest.mark.parametrize(
    ("kv_heads", "tp_size", "text"),
    [(3, 8, "8 is not divisible by 3"), (24, 16, "24 is not divisible by 16")],
)
def test_a_model_without_an_assert_of_its_own_shows_what_the_layer_says(
    kv_heads: int, tp_size: int, text: str
) -> None:
    config = {"num_attention_heads": 48, "num_key_value_heads": kv_heads, "head_dim": 64}
    for model_type in ("gpt_oss", "starcoder2"):
        result = planned(config | {"model_type": model_type}, "vllm", tp_size)
        assert result.error_text == text
    assert planned(config | {"model_type": "llama"}, "vllm", tp_size).error_text == ""


def test_widths_of_the_dense_layers_and_of_experts_are_both_told() -> None:
    sizes = planned(KIMI_K2, "vllm", 8).sizes
    assert sizes["mlp"] == {"gate_up": [2304, 2304], "down_in": 2304}
    assert sizes["experts"] == {"gate_up": [256, 256], "down_in": 256}


def test_a_dense_layer_is_built_before_the_experts_behind_it() -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = KIMI_K2 | {"intermediate_size": 4896, "moe_intermediate_size": 352}
    result = planned(config | {"quantization_config": fp8}, "vllm", 2)
    assert result.error_text == (
        "Weight input_size_per_partition = 2448 is not divisible by weight quantization"
        " block_k = 128."
    )


def test_tgi_says_when_a_model_is_transformers_own() -> None:
    assert any("transformers 4.51" in note for note in planned(KIMI_K2, "tgi", 2).notes)
    assert not any("transformers 4.51" in note for note in planned(DENSE, "tgi", 2).notes)


def test_autotp_takes_opts_mlp_for_attention_and_shares_out_less_than_a_grain_evenly() -> None:
    opt = {"model_type": "opt", "hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12}
    sizes = planned(opt | {"vocab_size": 50272}, "deepspeed", 8).sizes
    assert sizes["mlp"]["shard_sizes"] == [512] * 4 + [256] * 4
    small = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 57}
    sizes = planned(small | {"num_attention_heads": 4}, "deepspeed", 5).sizes
    assert sizes["mlp"]["shard_sizes"] == [12, 12, 11, 11, 11]


def test_llama4_has_a_wider_mlp_in_the_layers_between() -> None:
    llama4 = {
        **{"model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192},
        **{"intermediate_size_mlp": 16386, "num_local_experts": 128, "num_attention_heads": 40},
        **{"num_key_value_heads": 8, "vocab_size": 202048, "num_experts_per_tok": 1},
    }
    between = planned(llama4 | {"interleave_moe_layer_step": 2}, "vllm", 4)
    assert between.rule_id == "vllm.mlp_gate_up"
    assert "16386" in between.reason
    assert planned(llama4 | {"interleave_moe_layer_step": 1}, "vllm", 4).is_legal


def test_experts_in_one_group_that_marlin_does_not_take_have_nowhere_to_go() -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": -1}
    config = EXPERTS | {"model_type": "qwen3_moe", "hidden_size": 576, "head_dim": 64}
    result = planned(config | {"quantization_config": gptq}, "vllm", 1)
    assert result.error_text == (
        "Trying to create tensor with negative dimension -576: [8, 28672, -576]"
    )


@pytest.mark.parametrize("name", ["shared_intermediate_size", "share_expert_dim"])
def test_a_shared_expert_of_no_width_is_none(name: str) -> None:
    assert planned(EXPERTS | {name: 0}, "vllm", 2).is_legal
    assert planned(EXPERTS | {name: 1001}, "vllm", 2).rule_id == "vllm.mlp_gate_up"


def test_hunyuans_shared_expert_is_as_wide_as_a_dense_layer() -> None:
    hunyuan = EXPERTS | {"model_type": "hunyuan_v1_moe", "intermediate_size": 4226}
    result = planned(hunyuan | {"num_shared_expert": [1, 1]}, "sglang", 4)
    assert result.rule_id == "sglang.mlp"
    assert "shared_expert_intermediate_size=4226" in result.reason


def test_ernies_first_layers_are_dense_and_have_a_width_of_their_own() -> None:
    ernie = EXPERTS | {
        **{"model_type": "ernie4_5_moe", "intermediate_size": 12289, "moe_num_experts": 64},
        **{"moe_num_shared_experts": 2, "moe_layer_start_index": 1, "num_experts": None},
    }
    result = planned(ernie, "vllm", 4)
    assert result.rule_id == "vllm.mlp_gate_up"
    assert "intermediate_size=12289" in result.reason
    assert planned(ernie | {"moe_layer_start_index": 0}, "vllm", 4).is_legal


def test_the_gate_beside_each_query_head_is_part_of_the_qkv_weight() -> None:
    qwen3_next = EXPERTS | {"model_type": "qwen3_next", "head_dim": 256}
    sizes = planned(qwen3_next, "vllm", 4).sizes
    assert sizes["qkv"]["out_partition"] == [2 * 8 * 256, 2 * 256, 2 * 256]


def test_attention_that_stays_whole_counts_in_full_on_every_rank() -> None:
    tower = {
        **{"model_type": "intern_vit_6b", "hidden_size": 3200, "intermediate_size": 12800},
        **{"num_attention_heads": 25, "num_hidden_layers": 45},
    }
    config = {
        "text_config": DENSE | {"num_hidden_layers": 2, "torch_dtype": "bfloat16"},
        "vision_config": tower | {"torch_dtype": "bfloat16"},
    }
    sizes = dict(planned(config, "vllm", 4).sizes)
    assert sizes["vision_config"]["whole_attention"]
    whole = rank_memory(config, 4, sizes=sizes).weight_bytes
    cut = rank_memory(config, 4, sizes=sizes | {"vision_config": {}}).weight_bytes
    assert whole is not None
    assert cut is not None
    assert whole - cut == 2 * 45 * 4 * 3200 * (25 - 7) * 128
