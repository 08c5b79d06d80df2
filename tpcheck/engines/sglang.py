"""SGLang 0.5.23: as vLLM, but bare asserts, a vocabulary that pads at any degree, strict blocks.

Requirement: fp8 blocks are checked for merged layers too, the mixture-of-experts preflight speaks
before a layer is built, and on CPU heads and widths are padded instead. Sources are paths of the
wheel 0.5.23.
"""

from __future__ import annotations

import math
from typing import Any

from tpcheck.engines import gated_delta, sglang_models, sglang_quant, state_space
from tpcheck.engines.base import (
    WIDTHS,
    Engine,
    Finding,
    Rule,
    divisible,
    kv_multiple,
    kv_replicate,
    replicas,
)
from tpcheck.engines.facts import Facts, round_up
from tpcheck.engines.formats import Formats, names, reading

_VOCAB = "sglang/srt/layers/vocab_parallel_embedding.py:274-286"


FORMATS = Formats(
    "sglang/srt/configs/model_config.py; layers/quantization/__init__.py",
    names(
        "fp8 blockwise_int8 modelopt_fp8 modelopt_fp4 nvfp4 w8a8_int8 w8a8_fp8 awq awq_marlin gguf"
        " bitsandbytes gptq gptq_marlin moe_wna16 compressed-tensors qoq w4afp8 petit_nvfp4"
        " fbgemm_fp8 quark mxfp4 auto_round modelslim wna16"
    ),
    refuses=names("exl2 exl3 eetq spqr vptq higgs quanto bitnet"),
    text="Unknown quantization method: {method}. Must be one of [...]",
)


def _on_gpu(facts: Facts) -> bool:
    return facts.device == "cuda"


def _on_cpu(facts: Facts) -> bool:
    return facts.device == "cpu"


def _vocab_padding(vocab_size: int, tp_size: int) -> int:
    return 64 if round_up(vocab_size, 64) % tp_size == 0 else 64 * tp_size


def _vocab(facts: Facts, tp_size: int) -> Finding | None:
    assert facts.vocab_size is not None
    grain = _vocab_padding(facts.vocab_size, tp_size)
    padded = round_up(facts.vocab_size, grain)
    if padded == facts.vocab_size:
        return None
    reason = f"vocab_size={facts.vocab_size} padded to {padded}, a multiple of {grain}"
    return Finding("pad", reason)


def _vocab_sizes(facts: Facts, tp_size: int) -> dict[str, Any]:
    assert facts.vocab_size is not None
    grain = _vocab_padding(facts.vocab_size, tp_size)
    padded = round_up(facts.vocab_size, grain)
    return {
        "vocab": {
            "padding_size": grain,
            "padded": padded,
            "per_rank": padded // tp_size,
            "pad_rows": padded - facts.vocab_size,
        }
    }


def _cpu_heads(facts: Facts, tp_size: int) -> Finding | None:
    heads, kv_heads = facts.num_attention_heads, facts.num_key_value_heads
    assert heads is not None
    if heads % tp_size == 0 and (kv_heads or heads) % tp_size == 0:
        return None
    padded = _cpu_padding(facts, tp_size)[1]
    return Finding("pad", f"num_attention_heads={heads} padded to {padded} on CPU")


def _cpu_padding(facts: Facts, tp_size: int) -> tuple[int, int]:
    heads = facts.num_attention_heads
    assert heads is not None
    kv_heads = facts.num_key_value_heads or heads
    unit = tp_size
    if facts.block and facts.head_dim is None:
        unit *= 1 + tp_size % 2
    elif facts.block and facts.head_dim and facts.head_dim % facts.block[0]:
        unit *= math.lcm(facts.head_dim, facts.block[0]) // facts.block[0]
    return unit, round_up(kv_heads, unit) * (heads // kv_heads)


def _cpu_width(facts: Facts, tp_size: int) -> Finding | None:
    grain = tp_size * (facts.block[0] if facts.block else 32)
    if facts.method == "mxfp4":
        grain *= 2  # two values share a byte
    widths = {
        name: (size, round_up(size, grain))
        for name in WIDTHS
        if (size := getattr(facts, name)) and size % grain
    }
    if not widths:
        return None
    said = ", ".join(f"{name}={size} padded to {padded}" for name, (size, padded) in widths.items())
    held = {name: padded for name, (_, padded) in widths.items()}
    return Finding("pad", f"{said} on CPU", None, {"widths": held})


def _head_sizes(facts: Facts, tp_size: int) -> dict[str, Any] | None:
    heads, kv_heads = facts.num_attention_heads, facts.num_key_value_heads
    if heads is None or kv_heads is None or facts.uses_mla:
        return None
    if facts.device == "cpu":
        unit, padded = _cpu_padding(facts, tp_size)
        return {"heads": {"pad_unit": unit, "padded_heads": padded}}
    found = {
        "num_heads": heads // tp_size,
        "num_kv_heads": max(1, kv_heads // tp_size),
        "kv_replicas": replicas(facts, tp_size),
    }
    return {"heads": found}


RULES = (
    reading("sglang", FORMATS),
    *sglang_quant.PREFLIGHT_RULES,
    Rule(
        "sglang.cpu_heads_pad",
        "sglang/srt/configs/update_config.py",
        _cpu_heads,
        ("num_attention_heads",),
        "model",
        when=_on_cpu,
    ),
    Rule("sglang.cpu_width_pad", "sglang/srt/configs/update_config.py", _cpu_width, when=_on_cpu),
    Rule("sglang.vocab", _VOCAB, _vocab, ("vocab_size",), "lm_head", refuses=False),
    divisible(
        "sglang.heads",
        "num_attention_heads",
        "sglang/srt/models/llama.py:183",
        role="text",
        when=_on_gpu,
    ),
    *sglang_models.TOWERS,
    kv_multiple("sglang.kv", "sglang/srt/models/llama.py:186-194", when=sglang_models.checks_heads),
    kv_replicate("sglang.kv_replicate", "sglang/srt/layers/linear.py:1139-1145", when=_on_gpu),
    *gated_delta.SGLANG,
    *state_space.SGLANG,
    divisible(
        "sglang.mlp",
        "intermediate_size",
        "sglang/srt/layers/linear.py:693",
        area="gate_up_proj",
        when=lambda facts: _on_gpu(facts) and facts.method != "mxfp4",
    ),
    sglang_models.EXPERTS,
    divisible(
        "sglang.mlp",
        "shared_expert_intermediate_size",
        "sglang/srt/layers/linear.py:693",
        area="gate_up_proj",
        when=_on_gpu,
    ),
    *sglang_quant.LAYER_RULES,
    divisible(
        "sglang.moe",
        "moe_intermediate_size",
        "sglang/srt/layers/moe/fused_moe_triton/layer.py:427",
        area="experts",
        when=lambda facts: facts.ep_size == 1 and _on_gpu(facts) and facts.method != "mxfp4",
    ),
    *sglang_quant.EXPERT_RULES,
)

ENGINE = Engine(
    "sglang",
    "0.5.23",
    RULES,
    (
        ("qkv_proj", ("num_attention_heads",), _head_sizes),
        ("lm_head", ("vocab_size",), _vocab_sizes),
        ("any", ("quant",), sglang_quant.partition_sizes),
    ),
    whole_towers=sglang_models.WHOLE_TOWERS,
    unknown_format=FORMATS.is_unknown,
)
