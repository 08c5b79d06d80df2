"""Models with state-space layers, against what vLLM's, SGLang's and Megatron's classes assert."""

from __future__ import annotations

from typing import Any

import pytest

from tpcheck.plan_command import config_records
from tpcheck.plan_memory import Request
from tpcheck.planning import PlanResult, plan

GROUPS = "If tensor parallel world size does not divide num_groups, then num_groups must equal 1."
HEADS = "Tensor parallel world size must divide num heads."

FALCON_H1 = {
    **{"model_type": "falcon_h1", "hidden_size": 5120, "intermediate_size": 21504},
    **{"num_attention_heads": 20, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 261120},
    **{"mamba_n_heads": 32, "mamba_d_ssm": 4096, "mamba_d_head": 128, "mamba_n_groups": 2},
}
NEMOTRON_H = {
    **{"model_type": "nemotron_h", "hidden_size": 4480, "intermediate_size": 15680},
    **{"num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072},
    **{"mamba_num_heads": 128, "mamba_head_dim": 80, "n_groups": 8},
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M",
}
GRANITE = {
    **{"model_type": "granitemoehybrid", "hidden_size": 1536, "intermediate_size": 512},
    **{"num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 100352},
    **{"num_local_experts": 64, "num_experts_per_tok": 6, "shared_intermediate_size": 1024},
    **{"mamba_n_heads": 48, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_expand": 2},
    "layer_types": ["mamba", "attention"],
}
MAMBA2 = {
    **{"model_type": "mamba2", "hidden_size": 4096, "num_heads": 128, "head_dim": 64},
    **{"n_groups": 8, "expand": 2, "vocab_size": 32768, "num_hidden_layers": 64},
}
MAMBA = {"model_type": "mamba", "hidden_size": 2560, "expand": 2, "vocab_size": 50280}


def planned(config: dict[str, Any], engine: str, tp_size: int) -> PlanResult:
    (result,) = plan(config, engine, (tp_size,))
    return result


@pytest.mark.parametrize(
    ("config", "engine", "tp_size", "outcome", "text"),
    [
        (FALCON_H1, "vllm", 2, "ok", None),
        (FALCON_H1, "vllm", 4, "error", GROUPS),
        (FALCON_H1, "sglang", 4, "error", GROUPS),
        (FALCON_H1, "megatron", 4, "error", "ngroups must be evenly divisible by tp_size"),
        (NEMOTRON_H, "vllm", 8, "ok", None),
        (NEMOTRON_H | {"n_groups": 4}, "vllm", 8, "error", GROUPS),
        (GRANITE, "vllm", 4, "replicate", None),
        (GRANITE | {"mamba_n_heads": 42}, "vllm", 4, "error", HEADS),
        (GRANITE, "megatron", 4, "error", "ngroups must be evenly divisible by tp_size"),
        (MAMBA2, "vllm", 8, "ok", None),
        (MAMBA2, "vllm", 16, "error", GROUPS),
        (MAMBA2, "vllm", 3, "error", "32768 is not divisible by 3"),  # it has no attention heads
        (MAMBA, "vllm", 8, "pad", None),
        (MAMBA | {"vocab_size": 64 * 3}, "vllm", 3, "error", "5120 is not divisible by 3"),
    ],
)
def test_heads_and_groups_of_state_space_layers_must_divide(
    config: dict[str, Any], engine: str, tp_size: int, outcome: str, text: str | None
) -> None:
    result = planned(config, engine, tp_size)
    assert (result.outcome, result.error_text) == (outcome, text)


def test_sglang_copies_the_one_group_only_where_its_projection_is_not_quantized() -> None:
    quantized = {"quant_method": "fp8"}
    assert planned(GRANITE, "sglang", 4).outcome == "replicate"
    refused = planned(GRANITE | {"quantization_config": quantized}, "sglang", 4)
    assert refused.rule_id == "sglang.mamba2"
    left_out = quantized | {"modules_to_not_convert": ["mamba"]}
    assert planned(GRANITE | {"quantization_config": left_out}, "sglang", 4).is_legal


def test_fields_of_layers_that_a_config_has_none_of_mean_nothing() -> None:
    dense = GRANITE | {"layer_types": ["attention"] * 2, "mamba_n_groups": 8, "mamba_n_heads": 7}
    assert planned(dense, "vllm", 4).outcome == "ok"


@pytest.mark.parametrize("engine", ["deepspeed", "tensorrt-llm", "tgi", "neuronx-distributed"])
def test_an_engine_whose_state_space_layers_were_not_read_says_so(engine: str) -> None:
    assert any("state-space layers" in note for note in planned(FALCON_H1, engine, 2).notes)
    assert not any("state-space" in note for note in planned(FALCON_H1, "vllm", 2).notes)


@pytest.mark.parametrize("config", [MAMBA, MAMBA2])
def test_a_model_without_attention_is_planned_without_asking_for_heads(
    config: dict[str, Any],
) -> None:
    result = planned(config, "vllm", 4)
    assert not any("not given" in note for note in result.notes)
    (record,) = config_records(config, ["vllm"], (4,), Request(seq_len=128))
    assert record["memory"]["weight_bytes"] is None  # counted for no such layers, and not guessed
