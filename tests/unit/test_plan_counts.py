"""plan_memory against the parameters of transformers' own models, built without memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tpcheck.engines.extras import UNCOUNTED
from tpcheck.plan_memory import Request, rank_memory
from tpcheck.planning import plan

PATH = Path(__file__).parents[1] / "data" / "model_configs.json"
MODELS = {one["name"]: one["config"] for one in json.loads(PATH.read_text(encoding="utf-8"))}
EXACT = [
    *("Llama-3-8B", "Qwen2.5-0.5B", "Qwen3-0.6B", "Qwen3-30B-A3B", "Mixtral-8x7B", "Phi-4"),
    *("Mistral-7B-v0.3", "DeepSeek-V2-Lite", "Gemma-2-9b", "gemma", "gpt2", "opt-125m"),
    *("Falcon-7B", "Falcon-40B", "gpt-oss-20b", "StarCoder2-7B", "cohere", "phi", "gptj"),
    *("codegen", "bloom", "gpt_neox", "gpt_bigcode", "olmo", "olmo2", "olmoe", "glm", "glm4"),
    *("persimmon", "phimoe", "qwen2_moe", "exaone4", "helium", "mpt", "granitemoe", "arcee"),
    *("minicpm3", "bitnet"),
]
NEARLY = {"apertus": 2e-6, "diffllama": 4e-6}
"""What has parameters of its own that no rule counts: at most this share of all."""


def whole_config(config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return transformers' config object, and what its config.json would say in bfloat16."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {
        name: value
        for name, value in config.items()
        if name not in ("model_type", "architectures", "quantization_config")
    }
    made = CONFIG_MAPPING[config["model_type"]](**fields)
    said = json.loads(made.to_json_string(use_diff=False))
    said.pop("dtype", None)
    return made, {**said, "torch_dtype": "bfloat16"}


def parameters(made: Any) -> int:
    """Return how many parameters the model has; tied ones count once."""
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", EXACT)
def test_every_parameter_is_counted_once(name: str) -> None:
    made, said = whole_config(MODELS[name])
    held = rank_memory(said, 1)
    assert held.missing == ()
    assert held.weight_bytes == 2 * parameters(made)


@pytest.mark.parametrize("name", NEARLY)
def test_what_no_rule_counts_is_little(name: str) -> None:
    made, said = whole_config(MODELS[name])
    held = rank_memory(said, 1).weight_bytes
    assert held is not None
    count = 2 * parameters(made)
    assert 0 < abs(held - count) <= NEARLY[name] * count


def test_layers_of_another_kind_are_said_and_not_guessed() -> None:
    counted = set()
    for name in ("jamba", "jetmoe", "longcat_flash", "minimax", "gemma3n_text", "doge"):
        kind = MODELS[name]["model_type"]
        assert kind in UNCOUNTED
        held = rank_memory({**MODELS[name], "num_hidden_layers": 2}, 1)
        assert held.weight_bytes is None
        assert f"the layers of model_type={kind!r}" in held.missing
        counted.add(kind)
    assert len(counted) == 6


def test_a_nested_model_counts_its_tower_and_what_joins_it(tmp_path: Path) -> None:
    import torch
    import transformers

    from tests.unit.test_header_parts import MODELS as NESTED

    for kind, fields in NESTED.items():
        made = getattr(transformers, f"{kind}Config")(**fields)
        with torch.device("meta"):
            model = getattr(transformers, f"{kind}ForConditionalGeneration")(made)
        count = sum(parameter.numel() for parameter in model.parameters())
        said = json.loads(made.to_json_string(use_diff=False))
        for part in ("text_config", "vision_config", "audio_config"):
            if part in said:
                said[part] = {**said[part], "dtype": "bfloat16"}
        held = rank_memory({**said, "dtype": "bfloat16"}, 1, Request(8))
        assert (held.missing, held.weight_bytes) == ((), 2 * count), kind


# -- ranks, pads and copies

LLAMA: dict[str, Any] = {
    **{"model_type": "qwen2", "hidden_size": 960, "intermediate_size": 2500, "head_dim": 64},
    **{"num_attention_heads": 15, "num_key_value_heads": 5, "vocab_size": 50257},
    **{"num_hidden_layers": 3, "torch_dtype": "bfloat16", "tie_word_embeddings": False},
}


def counted(tp_size: int, heads: int, kv_heads: int, width: int, vocab: int) -> int:
    """Return the elements that all ranks hold together, with these sizes and norms copied."""
    query, keys = heads * 64, kv_heads * 64
    layer = query * 960 + 2 * keys * 960 + 960 * query + 3 * width * 960
    biases = query + 2 * keys
    norms = tp_size * 960 * (2 * 3 + 1)
    return 3 * (layer + biases) + 2 * vocab * 960 + norms


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 8])
def test_all_that_neuronx_pads_is_counted_as_padding(tp_size: int) -> None:
    (result,) = plan(LLAMA, "neuronx-distributed", (tp_size,))
    held = rank_memory(LLAMA, tp_size, sizes=result.sizes, outcome=result.outcome)

    def up(size: int) -> int:
        return -(-size // tp_size) * tp_size

    kv_heads = 5 if 5 % tp_size == 0 else (tp_size if tp_size % 5 == 0 else up(15))
    together = counted(tp_size, up(15), kv_heads, up(2500), up(50257))
    assert held.weight_bytes == 2 * together // tp_size
    real = counted(1, 15, 5, 2500, 50257)
    # copies of KV heads are no pads, nor are biases' and norms'
    matrices = 3 * (2 * (up(15) - 15) * 64 * 960 + 3 * (up(2500) - 2500) * 960)
    pads = matrices + 2 * (up(50257) - 50257) * 960
    assert held.padding == pytest.approx(pads / real)
    assert (held.padding == 0) == (tp_size == 1)


def test_pads_of_experts_count_where_the_plan_says_them() -> None:
    config = {
        **{"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880},
        **{"num_local_experts": 32, "num_attention_heads": 64, "num_key_value_heads": 8},
        **{"head_dim": 64, "vocab_size": 201088, "num_hidden_layers": 24},
        "quantization_config": {"quant_method": "mxfp4"},
    }
    (result,) = plan(config, "vllm", (8,))
    held = rank_memory(config, 8, sizes=result.sizes, outcome=result.outcome)
    experts = 24 * 32 * 3 * 2880 * 2880
    whole = rank_memory(config, 1)
    assert whole.weight_bytes is not None
    assert held.padding == pytest.approx(experts * (8 * 384 / 2880 - 1) / 20.9e9, rel=5e-3)


def test_layers_that_deepspeed_leaves_whole_are_whole_on_every_rank() -> None:
    config = {**LLAMA, "quantization_config": {"quant_method": "gptq", "group_size": 128}}
    (result,) = plan(config, "deepspeed", (4,))
    one = rank_memory(config, 1).weight_bytes
    assert rank_memory(config, 4, sizes=result.sizes, outcome="replicate").weight_bytes == one


@pytest.mark.parametrize(("kv_dtype", "size"), [(None, 2), ("float8", 1), ("float32", 4)])
def test_the_cache_has_its_own_dtype(kv_dtype: str | None, size: int) -> None:
    held = rank_memory(LLAMA, 5, Request(100, 3, kv_dtype))
    assert held.kv_cache_bytes == 3 * 2 * 1 * 64 * 300 * size


@pytest.mark.parametrize(
    ("bits", "scales"), [(4, lambda n, out: 4 * n // 64), (8, lambda n, out: 4 * out)]
)
def test_bitsandbytes_counts_its_runs_or_its_rows(bits: int, scales: Any) -> None:
    quant = {"quant_method": "bitsandbytes", "load_in_8bit": bits == 8}
    plain = rank_memory(LLAMA, 1).weight_bytes
    held = rank_memory({**LLAMA, "quantization_config": quant}, 1).weight_bytes
    assert plain is not None
    shapes = [(960, 960)] * 2 + [(320, 960)] * 2 + [(2500, 960)] * 2 + [(960, 2500)]
    count = sum(out * into for out, into in shapes)
    beside = sum(scales(out * into, out) for out, into in shapes)
    assert held == plain - 3 * 2 * count + 3 * (count * bits // 8 + beside)
