"""ExLlamaV3 1.4: splits by the memory that is left on each device, in KV heads and 128 channels.

Requirement: attention takes its share first, so later weights follow the memory it left; a device
may hold no KV head. Refused are architectures without support and heads that make no 128 channels.
Source: commit 4f8ad012.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpcheck.engines import gated_delta
from tpcheck.engines.base import Engine, Finding, Rule
from tpcheck.engines.facts import Facts
from tpcheck.engines.formats import Formats, names, reading

_NO_TP = frozenset(
    "afmoe deepseek_v3 lfm2_moe mistral4 nanochat olmo3 olmo_hybrid qwen3_next".split()
)
_NO_TP_CLASSES = frozenset(
    "AfmoeForCausalLM DeepseekV3ForCausalLM Lfm2MoeForCausalLM NanoChatForCausalLM"
    " Olmo3ForCausalLM OlmoHybridForCausalLM Qwen3NextForCausalLM".split()
)
_CLASSES = _NO_TP_CLASSES | frozenset(
    "ApertusForCausalLM ArceeForCausalLM Cohere2ForCausalLM CohereForCausalLM DeciLMForCausalLM"
    " DeepseekV4ForCausalLM Dots1ForCausalLM Ernie4_5_ForCausalLM Ernie4_5_MoeForCausalLM"
    " Exaone4ForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration"
    " Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration Glm4ForCausalLM"
    " Glm4MoeForCausalLM Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration"
    " GptOssForCausalLM HCXVisionV2ForCausalLM HYV3ForCausalLM HyperCLOVAXForCausalLM"
    " IQuestCoderForCausalLM LagunaForCausalLM LlamaForCausalLM MiMoForCausalLM"
    " MiniMaxM2ForCausalLM Ministral3ForCausalLM Mistral3ForConditionalGeneration"
    " MistralForCausalLM MixtralForCausalLM NemotronHForCausalLM Phi3ForCausalLM Qwen2ForCausalLM"
    " Qwen2_5_VLForConditionalGeneration Qwen3ForCausalLM Qwen3MoeForCausalLM"
    " Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3_5ForCausalLM"
    " Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration"
    " SeedOssForCausalLM SmolLM3ForCausalLM SolarOpenForCausalLM Step3p5ForCausalLM"
    " Step3p7ForConditionalGeneration".split()
)
"""Every class that it loads; of these, the first have no tensor-parallel path."""
_GRAIN = 128
_BYTES = 1 << 12
"""Of storage per channel and matrix: small beside a device, so that it only decides ties."""


FORMATS = Formats(
    "exllamav3/modules/linear.py:179-300,435-442",
    names("exl3 fp8 mxfp4"),
    refuses=names(
        "gptq gptq_marlin awq awq_marlin exl2 eetq hqq aqlm vptq spqr higgs marlin gguf"
        " compressed-tensors moe_wna16 wna16 auto_round"
    ),
    text="No tensors found for model.layers.0.self_attn.q_proj matching supported quantization"
    " format.",
    why="{method}: No tensors found for model.layers.0.self_attn.q_proj matching supported"
    " quantization format.",
    fix="convert the unquantized checkpoint to EXL3",
)


def _unknown_class(facts: Facts, tp_size: int) -> Finding | None:
    name = facts.architecture
    if name is None or name in _CLASSES:
        return None
    text = f"Unknown architecture {name} in config.json"
    return Finding("error", text, text, fix="use an engine that has this class")


def _architecture(facts: Facts, tp_size: int) -> Finding | None:
    known = facts.model_type in _NO_TP or facts.architecture in _NO_TP_CLASSES
    if tp_size == 1 or not known:
        return None
    name = facts.architecture or facts.model_type
    text = f"Tensor-parallel is not currently implemented for {name}"
    return Finding("error", text, text)


def _grouped_heads(kv_heads: int, head_dim: int) -> int | None:
    """Return how many KV heads go together to 128 channels or more, None where none do."""
    together, left = 1, kv_heads
    while together * head_dim < _GRAIN:
        if left % 2:
            return None
        together, left = 2 * together, left // 2
    return together if together * head_dim % _GRAIN == 0 else None


def _heads(facts: Facts, tp_size: int) -> Finding | None:
    if facts.num_key_value_heads is None or facts.head_dim is None or tp_size == 1:
        return None
    if _grouped_heads(facts.num_key_value_heads, facts.head_dim):
        return None
    text = "Model's K/V heads cannot divide into 128-channel tensors"
    return Finding("error", text, text)


def _ratio_split(total: int, weights: Sequence[float]) -> list[int]:
    whole = sum(weights)
    ideal = [total * weight / whole for weight in weights]
    shares = [int(share) for share in ideal]
    order = sorted(range(len(shares)), key=lambda i: shares[i] - ideal[i])
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _sizes(facts: Facts, tp_size: int) -> dict[str, Any]:
    memory = facts.memory if facts.memory and len(facts.memory) == tp_size else None
    left = [float(one) * 2**30 for one in memory or (24.0,) * tp_size]
    plan: list[dict[str, Any]] = [{} for _ in range(tp_size)]
    together, head_dim = 1, facts.head_dim or _GRAIN
    queries = (facts.num_attention_heads or 0) // (facts.num_key_value_heads or 1) or 4
    if facts.num_key_value_heads and facts.head_dim:
        together = _grouped_heads(facts.num_key_value_heads, facts.head_dim) or 1
    for key, size, width, unit, matrices in (
        ("attn", facts.num_key_value_heads, together, "heads", 2 * (queries + 1) * head_dim),
        ("mlp", facts.intermediate_size, _GRAIN, "channels", 3),
        ("lm_head", facts.vocab_size, _GRAIN, "channels", 1),
    ):
        if not size:
            continue
        shares = _ratio_split(size // width, left)
        begin = 0
        for rank, share in enumerate(shares):
            end = begin + share * width
            plan[rank][key] = [begin, end, unit]
            begin = end
            left[rank] -= share * width * matrices * _BYTES
    return {"plan": plan}


RULES = (
    Rule(
        "exllamav3.unknown_class",
        "exllamav3/model/config.py:226-234; architecture/architectures.py",
        _unknown_class,
        area="model",
        role="text",
    ),
    reading("exllamav3", FORMATS),
    Rule("exllamav3.arch", "exllamav3/model/model.py:430", _architecture, area="model"),
    Rule(
        "exllamav3.kv128",
        "exllamav3/modules/attn.py:936-944",
        _heads,
        ("num_key_value_heads",),
        "model",
    ),
    *gated_delta.EXLLAMAV3,
)

ENGINE = Engine(
    "exllamav3",
    "1.4.1 (4f8ad012)",
    RULES,
    (("any", (), _sizes),),
    splits_towers=False,
    unknown_format=FORMATS.is_unknown,
)
