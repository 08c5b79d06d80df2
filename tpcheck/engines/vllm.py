"""vLLM 0.33: heads are refused before a weight moves, the rest while layers are built.

Requirement: the first check that fails is the one a user sees, so rules stand in vLLM's order:
config, vocabulary, attention, MLP, experts, then what only loading or the first forward finds.
Sources are paths of vLLM's wheel 0.33.0 (g4ba787ec9). Quantized layers are in vllm_quant.
"""

from __future__ import annotations

from typing import Any

from tpcheck.engines import gated_delta, state_space, vllm_experts, vllm_models, vllm_quant
from tpcheck.engines.base import (
    Engine,
    Finding,
    Rule,
    divisible,
    has_kv_heads,
    is_gpt_oss,
    kv_multiple,
    kv_replicate,
    replicas,
)
from tpcheck.engines.facts import Facts, ceil_div, round_up
from tpcheck.engines.formats import Formats, names, reading

_VOCAB = "vllm/model_executor/layers/vocab_parallel_embedding.py:36,95-97,286-330"
_VOCAB_GRAIN = 64
_DIVIDE = "{value} is not divisible by {tp}"


FORMATS = Formats(
    "vllm/config/model.py:1464-1469; model_executor/layers/quantization/__init__.py",
    names(
        "awq auto_awq awq_marlin auto_gptq gptq gptq_marlin wna16 compressed-tensors moe_wna16"
        " fp8 modelopt_fp4 modelopt_mxfp8 modelopt_mixed mixed_precision nvfp4 mxfp4 mxfp8"
        " mxfp4_online gpt_oss_mxfp4 deepseek_v4_fp8 quark quark_nvfp4 experts_int8 torchao inc"
        " online fp8_per_tensor fp8_per_block fp8_per_channel int8_per_channel_weight_only"
    ),
    unsure=names("fbgemm_fp8 fp_quant humming auto_round w4a16_awq w4a8_awq petit_nvfp4"),
    text="Unknown quantization method: {method}. Must be one of [...]",
)


def _decode_context(facts: Facts, tp_size: int) -> Finding | None:
    kv_heads = facts.num_key_value_heads
    if facts.decode_context_parallel_size == 1 or kv_heads is None or tp_size > kv_heads:
        return None
    text = (
        "Decode context parallelism for GQA/MQA requires `--tensor-parallel-size`"
        f" ({tp_size}) to be greater than the model's total number of KV heads ({kv_heads})."
    )
    return Finding("error", text, text)


def _vocab(facts: Facts, tp_size: int) -> Finding | None:
    assert facts.vocab_size is not None
    padded = round_up(facts.vocab_size, _VOCAB_GRAIN)
    if padded % tp_size:
        text = _DIVIDE.format(value=padded, tp=tp_size)
        fix = f"pad vocab_size to {_padded_vocab(facts.vocab_size, tp_size)}"
        return Finding("error", text, text, fix=fix)
    if padded == facts.vocab_size:
        return None
    return Finding("pad", f"vocab_size={facts.vocab_size} padded to {padded}, a multiple of 64")


def _padded_vocab(vocab_size: int, tp_size: int) -> int:
    padded = round_up(vocab_size, _VOCAB_GRAIN)
    while padded % tp_size:
        padded += _VOCAB_GRAIN
    return padded


def _gpt_oss_kv(facts: Facts, tp_size: int) -> Finding | None:
    kv_heads = facts.num_key_value_heads
    if kv_heads is None or kv_heads >= tp_size:
        return None
    text = "integer modulo by zero"
    return Finding("error", text, text)


def _experts_divide(facts: Facts) -> bool:
    return facts.ep_size == 1 and facts.method != "mxfp4"


def _qkv_sizes(facts: Facts, tp_size: int) -> dict[str, Any] | None:
    heads, kv_heads = facts.num_attention_heads, facts.num_key_value_heads
    if facts.uses_mla or heads is None or kv_heads is None:
        return None
    times = replicas(facts, tp_size)
    found: dict[str, Any] = {
        "num_heads": heads // tp_size,
        "num_kv": max(1, kv_heads // tp_size),
        "replicas": times,
    }
    weight = next((one for one in facts.linears if one.name == "self_attn.qkv_proj"), None)
    if weight is not None:
        # q holds a gate beside each head where the model has one
        found["out_partition"] = [part.local(tp_size) for part in weight.parts]
    sizes = {"qkv": found}
    return sizes if times == 1 else {**sizes, "kv_replicated": True}


def _vocab_sizes(facts: Facts, tp_size: int) -> dict[str, Any]:
    assert facts.vocab_size is not None
    padded = round_up(facts.vocab_size, _VOCAB_GRAIN)
    rows = padded // tp_size
    pads = [min(rows, max(0, (rank + 1) * rows - facts.vocab_size)) for rank in range(tp_size)]
    return {"vocab": {"padded": padded, "per_rank": rows, "pad_per_rank": pads}}


def _mlp_sizes(facts: Facts, tp_size: int) -> dict[str, Any]:
    """Return the widths of the MLP; of experts beside it where layers are of both kinds."""
    dense, experts = facts.intermediate_size, facts.moe_intermediate_size
    widths = {"mlp": dense or experts, "experts": experts if dense else None}
    found = {}
    for name, width in widths.items():
        if width is None or (facts.method == "mxfp4" and width % tp_size):
            continue
        local = ceil_div(width, tp_size)
        found[name] = {"gate_up": [local] * (2 if facts.gated else 1), "down_in": local}
    return found


_KV_SOURCE = "vllm/model_executor/models/llama.py:149-155; layers/linear.py:1065-1071"
_LINEAR = "vllm/model_executor/layers/linear.py"

RULES = (
    vllm_models.ARCHITECTURE,
    reading("vllm", FORMATS),
    divisible(
        "vllm.heads",
        "num_attention_heads",
        "vllm/config/model.py:1558-1565",
        text="Total number of attention heads ({value}) must be divisible by tensor parallel"
        " size ({tp}).",
        role="text",
    ),
    Rule(
        "vllm.dcp_gqa",
        "vllm/config/model.py:1583-1592",
        _decode_context,
        ("num_key_value_heads",),
        "model",
        "text",
        has_kv_heads,
    ),
    *vllm_quant.CONFIG_RULES,
    *vllm_models.TOWERS,
    Rule("vllm.vocab", _VOCAB, _vocab, ("vocab_size",), "lm_head"),
    vllm_models.KV_DIVIDE,
    Rule(
        "vllm.gpt_oss_kv",
        "vllm/model_executor/models/gpt_oss.py:133-155; layers/attention/attention.py:329",
        _gpt_oss_kv,
        ("num_key_value_heads",),
        "qkv_proj",
        when=is_gpt_oss,
    ),
    kv_multiple("vllm.kv_heads", _KV_SOURCE, when=vllm_models.has_assert),
    kv_replicate("vllm.kv_replicate", _KV_SOURCE),
    *gated_delta.VLLM,
    *state_space.VLLM,
    *vllm_quant.ATTENTION_RULES,
    divisible(
        "vllm.mlp_gate_up",
        "intermediate_size",
        f"{_LINEAR}:714",
        area="gate_up_proj",
        when=lambda facts: facts.gated and facts.method != "mxfp4",
    ),
    divisible(
        "vllm.divide",
        "intermediate_size",
        "vllm/distributed/utils.py:57-61",
        text=_DIVIDE,
        area="gate_up_proj",
        when=lambda facts: not facts.gated,
    ),
    divisible(
        "vllm.mlp_down",
        "intermediate_size",
        f"{_LINEAR} (RowParallelLinear)",
        text=_DIVIDE,
        area="down_proj",
        when=lambda facts: facts.method != "mxfp4",
    ),
    vllm_models.EXPERTS,
    divisible(
        "vllm.mlp_gate_up",
        "shared_expert_intermediate_size",
        f"{_LINEAR}:714",
        area="gate_up_proj",
    ),
    *vllm_quant.MLP_RULES,
    divisible(
        "vllm.moe",
        "moe_intermediate_size",
        "vllm/model_executor/layers/fused_moe/config.py:1352",
        area="experts",
        when=_experts_divide,
    ),
    *vllm_experts.RULES,
    vllm_quant.LOAD_RULE,
)

ENGINE = Engine(
    "vllm",
    "0.33.0",
    RULES,
    (
        ("qkv_proj", ("num_attention_heads",), _qkv_sizes),
        ("lm_head", ("vocab_size",), _vocab_sizes),
        ("down_proj", (), _mlp_sizes),
        *vllm_quant.SIZES,
    ),
    whole_towers=vllm_models.WHOLE_TOWERS,
    unknown_format=FORMATS.is_unknown,
)
