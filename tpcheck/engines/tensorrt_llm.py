"""TensorRT-LLM's PyTorch backend: heads and KV are bare asserts, block scales are not checked.

Requirement: block scales are cut in ceil chunks whatever the weight does, so a degree is either
silently misaligned or ends in a raw copy error; DeepSeek's dense MLP runs at a smaller degree
instead. Everything here was traced in the source and never run: the weakest evidence of all.
"""

from __future__ import annotations

import math
from typing import Any

from tpcheck.engines.base import (
    Engine,
    Finding,
    Rule,
    divisible,
    kv_multiple,
    kv_replicate,
    padded_fix,
    replicas,
    width_fix,
)
from tpcheck.engines.facts import Facts, ceil_div, chunks, round_up
from tpcheck.engines.formats import MODULES_OF_THEIR_OWN, Formats, names, reading

_ATTENTION = "tensorrt_llm/_torch/modules/attention.py"
_MAPPER = "tensorrt_llm/_torch/models/checkpoints/base_weight_mapper.py"
_LINEAR = "tensorrt_llm/_torch/modules/linear.py"
_DEEPSEEK = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2")


FORMATS = Formats(
    "tensorrt_llm/_torch/model_config.py; models/quant_config_utils.py (21156a7a)",
    names("fp8 mxfp4 mxfp8 nvfp4 w4a16_awq w4a8_awq mixed_precision fp8_block_scales w4a16_mxfp4"),
    refuses=MODULES_OF_THEIR_OWN
    | names("bitsandbytes gguf compressed-tensors moe_wna16 wna16 quark auto_round torchao"),
    why="no branch reads quant_method={method}: layers are built unquantized and the checkpoint"
    " has no such weights",
    fix="quantize with ModelOpt (FP8, NVFP4, W4A16_AWQ), or load the unquantized checkpoint",
)


def _block_size(facts: Facts, tp_size: int) -> Finding | None:
    if facts.block is None or facts.block == (128, 128):
        return None
    text = "FP8_BLOCK_SCALES only supports block_size=(128,128)"
    return Finding("error", f"{text}, and not {facts.block}", text)


def _vocab(facts: Facts, tp_size: int) -> Finding | None:
    size = facts.vocab_size
    assert size is not None
    padded = round_up(size, tp_size)
    if padded == size:
        return None
    return Finding("pad", f"vocab_size={size} padded to {padded}, the pads are cut off the logits")


def _vocab_sizes(facts: Facts, tp_size: int) -> dict[str, Any]:
    size = facts.vocab_size
    assert size is not None
    padded = round_up(size, tp_size)
    return {"vocab": {"padded": padded, "per_rank": padded // tp_size, "sliced": padded - size}}


def _width(facts: Facts, tp_size: int) -> Finding | None:
    for field in ("intermediate_size", "shared_expert_intermediate_size"):
        width = getattr(facts, field)
        if width is None or width % tp_size == 0:
            continue
        out = 2 * width if facts.gated else width
        if out % tp_size:
            text = f"out_features {out} must be divisible by tp_size {tp_size}"
        else:
            text = f"in_features {width} must be divisible by tp_size {tp_size}"
        return Finding("error", text, text, fix=padded_fix(facts, tp_size, field))
    return None


def _is_deepseek(facts: Facts) -> bool:
    return facts.model_type in _DEEPSEEK


def _deepseek_tp(width: int, tp_size: int) -> int:
    return math.gcd(width // 128, tp_size)


def _deepseek(facts: Facts, tp_size: int) -> Finding | None:
    width = facts.intermediate_size or facts.shared_expert_intermediate_size
    if width is None:
        return None
    mlp_tp = _deepseek_tp(width, tp_size)
    sizes = {"mlp_tp": mlp_tp, "copies": tp_size // mlp_tp}
    return Finding("ok", f"dense MLP at tp={mlp_tp}, {tp_size // mlp_tp} copies", None, sizes)


def _blocks(facts: Facts, tp_size: int) -> Finding | None:
    assert facts.block is not None
    worst = None
    for name, size in _block_dims(facts, tp_size):
        found = _scales(facts, tp_size, name, size, facts.block[0])
        if found.outcome == "error":
            return found
        if worst is None or worst.outcome == "ok":
            worst = found
    return worst


def _block_dims(facts: Facts, tp_size: int) -> list[tuple[str, int]]:
    """Return every dimension that is cut together with its scales."""
    dims = [("linear", facts.sharded_dim)] if facts.sharded_dim else []
    for linear in facts.linears:
        if not facts.quantized(linear) or (_is_deepseek(facts) and "mlp" in linear.name):
            continue
        if linear.style == "rows" and linear.in_features:
            dims.append((linear.name, linear.in_features))
        if linear.style == "columns":
            # KV heads are repeated up to the degree before anything is cut
            dims += [(linear.name, part.local(tp_size) * tp_size) for part in linear.parts]
    return [(name, size) for name, size in dims if size]


def _scales(facts: Facts, tp_size: int, name: str, size: int, block: int) -> Finding:
    local = ceil_div(size, tp_size)
    needed = ceil_div(local, block)
    loaded = chunks(ceil_div(size, block), tp_size)
    aligned = tp_size == 1 or local % block == 0
    outcome = "ok" if aligned else "silent_wrong"
    if any(count != needed for count in loaded):
        outcome = "error"
    sizes = {
        "weight_per_rank": size / tp_size,
        "scale_blocks_needed": needed,
        "scale_blocks_loaded": loaded,
        "aligned": aligned,
        "outcome": outcome,
    }
    if outcome == "ok":
        return Finding("ok", f"{name}: {needed} scale blocks a rank", None, sizes)
    fix = width_fix(facts, tp_size, name, local)
    if outcome == "error":
        reason = f"{name}: scale blocks {loaded} over the ranks, {needed} needed; the copy fails"
        return Finding("error", reason, None, sizes, fix)
    reason = f"{name}: {local} rows a rank are {local / block:g} blocks of {block}; no check"
    return Finding("silent_wrong", reason, None, sizes, fix)


def _nvfp4(facts: Facts, tp_size: int) -> Finding | None:
    for linear in facts.linears:
        local = linear.local_in(tp_size)
        if local and local % 16 and facts.quantized(linear):
            text = f"in_features {local} must be divisible by scaling_vector_size 16"
            return Finding("error", text, text, fix=width_fix(facts, tp_size, linear.name, local))
    return None


def _w4a8_experts(facts: Facts, tp_size: int) -> Finding | None:
    width = facts.moe_intermediate_size
    assert width is not None
    if (width // tp_size) % 128 == 0:
        return None
    text = f"K shape is required to be multiple of 128, received {width // tp_size}."
    return Finding("error", text, text)


def _floored_experts(facts: Facts, tp_size: int) -> Finding | None:
    width = facts.moe_intermediate_size
    assert width is not None
    lost = width % tp_size
    if lost == 0:
        return None
    reason = f"moe_intermediate_size={width} // {tp_size}, no check: {lost} channels on no rank"
    fix = padded_fix(facts, tp_size, "moe_intermediate_size")
    return Finding("silent_wrong", reason, fix=fix)


def _head_sizes(facts: Facts, tp_size: int) -> dict[str, Any] | None:
    heads, kv_heads = facts.num_attention_heads, facts.num_key_value_heads
    if heads is None or kv_heads is None or facts.uses_mla:
        return None
    found = {
        "num_heads": heads // tp_size,
        "num_kv_heads": max(1, kv_heads // tp_size),
        "kv_reps": replicas(facts, tp_size),
    }
    return {"heads": found}


RULES = (
    reading("trtllm", FORMATS),
    Rule(
        "trtllm.fp8_block_size",
        "tensorrt_llm/_torch/model_config.py (008e0af8)",
        _block_size,
        ("quant",),
        "model",
        when=lambda facts: facts.quant is not None and not facts.quant.forced,
    ),
    divisible("trtllm.heads", "num_attention_heads", _ATTENTION),
    Rule(
        "trtllm.linear",
        _LINEAR,
        _width,
        area="gate_up_proj",
        when=lambda facts: not _is_deepseek(facts),
    ),
    Rule(
        "trtllm.deepseek_mlp_tp",
        "tensorrt_llm/_torch/models/modeling_deepseekv3.py",
        _deepseek,
        area="gate_up_proj",
        when=_is_deepseek,
    ),
    kv_multiple("trtllm.kv", _MAPPER),
    kv_replicate("trtllm.kv_replicate", _MAPPER),
    Rule(
        "trtllm.fp8_block",
        f"{_LINEAR} load_weight_shard",
        _blocks,
        ("quant",),
        when=lambda facts: facts.block is not None,
    ),
    Rule("trtllm.nvfp4", _LINEAR, _nvfp4, ("quant",), when=lambda facts: facts.method == "nvfp4"),
    Rule(
        "trtllm.w4a8_moe",
        "tensorrt_llm/_torch/modules/fused_moe/quantization.py",
        _w4a8_experts,
        ("quant", "moe_intermediate_size"),
        "experts",
        when=lambda facts: facts.method == "w4a8_awq",
    ),
    Rule(
        "trtllm.moe_floor",
        "tensorrt_llm/_torch/modules/fused_moe/interface.py",
        _floored_experts,
        ("moe_intermediate_size",),
        "experts",
    ),
    Rule(
        "trtllm.vocab",
        "tensorrt_llm/_torch/modules/embedding.py",
        _vocab,
        ("vocab_size",),
        "lm_head",
        refuses=False,
    ),
)

ENGINE = Engine(
    "tensorrt-llm",
    "PyTorch backend (linear.py 00bbf71e, attention.py 00547a25, embedding.py 06d0733f)",
    RULES,
    (
        ("qkv_proj", ("num_attention_heads",), _head_sizes),
        ("lm_head", ("vocab_size",), _vocab_sizes),
    ),
    splits_towers=False,
    unknown_format=FORMATS.is_unknown,
)
