"""SGLang 0.5.23's quantized layers: strict fp8 blocks, AWQ with a way back, GPTQ without a check.

Requirement: merged layers are checked like any other, the preflight of experts names the flags that
help, and a GPTQ group that a rank cuts is read wrong because the check's answer is dropped.
"""

from __future__ import annotations

from typing import Any

from tpcheck.engines.base import Finding, Rule, has_fp8_blocks, quantized_as, width_fix
from tpcheck.engines.facts import Facts, Linear, ceil_div, round_up

_FP8 = "sglang/srt/layers/quantization/fp8.py"
_SETUP = "sglang/srt/model_executor/model_runner_components/moe_ep_setup.py"


def _preflight(facts: Facts, tp_size: int) -> Finding | None:
    width, ep_size = facts.moe_intermediate_size, facts.ep_size
    assert width is not None
    assert facts.block is not None
    block_n = facts.block[0]
    moe_tp = tp_size // ep_size // facts.moe_dp_size
    text = None
    if tp_size % ep_size or moe_tp == 0:
        text = f"tp_size {tp_size} must be divisible by ep_size {ep_size}"
    elif width % moe_tp:
        text = (
            f"moe_intermediate_size {width} must be divisible by moe_tp_size ({moe_tp}) which is"
            f" tp_size ({tp_size}) divided by moe_ep_size ({ep_size})."
        )
    elif (width // moe_tp) % block_n:
        text = (
            "For quantized MoE models, please make sure"
            f" (moe_intermediate_size={width} / moe_tp_size={moe_tp}) %"
            f" weight_block_size_n={block_n} == 0 where moe_tp_size is equal to tp_size"
            f" ({tp_size}) divided by ep_size ({ep_size}). You can fix this by setting arguments"
            " `--tp` and `--ep` correctly."
        )
    if text is None:
        return None
    fix = width_fix(facts, tp_size, "experts", width // max(1, moe_tp))
    return Finding("error", text, text, fix=fix)


def _checks_blocks(facts: Facts) -> bool:
    # on CPU heads and widths are padded to whole blocks before a layer is built
    return has_fp8_blocks(facts) and facts.device == "cuda"


def _blocks(facts: Facts, tp_size: int) -> Finding | None:
    assert facts.block is not None
    for linear in facts.linears:
        text, local = _block_error(facts, linear, tp_size)
        if text:
            fix = width_fix(facts, tp_size, linear.name, local)
            return Finding("error", text, text, _partitions(linear, tp_size), fix)
    return None


def _block_error(facts: Facts, linear: Linear, tp_size: int) -> tuple[str | None, int]:
    assert facts.block is not None
    block_n, block_k = facts.block
    if not facts.quantized(linear):
        return None, 0
    if linear.style == "rows":
        local = linear.local_in(tp_size) or 0
        if tp_size > 1 and local % block_k:
            name = f"input_size_per_partition = {local}"
            quantity = f"block_k = {block_k}"
            return f"Weight {name} is not divisible by weight quantization {quantity}.", local
        return None, 0
    if tp_size == 1 and len(linear.parts) == 1:
        return None, 0
    for part in linear.parts:
        local = part.local(tp_size)
        if local % block_n:
            name = f"output_partition_size = {local}"
            quantity = f"block_n = {block_n}"
            return f"Weight {name} is not divisible by weight quantization {quantity}.", local
    return None, 0


def _marlin_refusal(facts: Facts, tp_size: int, linear: Linear) -> str | None:
    """Return what SGLang's Marlin shape check says, None where the shape fits."""
    group = facts.quant.group_size if facts.quant else None
    k, n = linear.local_in(tp_size), linear.local_out(tp_size)
    if group is None or k is None or linear.in_features is None:
        return None
    advice = "Consider reducing tensor_parallel_size or running with --quantization gptq."
    if n % 64:
        return (
            f"Weight output_size_per_partition = {n} is not divisible by  min_thread_n = 64."
            f" {advice}"
        )
    if k % 128:
        return (
            f"Weight input_size_per_partition = {k} is not divisible by min_thread_k = 128."
            f" {advice}"
        )
    if 0 < group < linear.in_features and k % group:
        return (
            f"Weight input_size_per_partition = {k} is not divisible by group_size = {group}."
            f" {advice}"
        )
    return None


_AWQ_TEXT = (
    "The input size is not aligned with the quantized weight shape. This can be caused by too"
    " large tensor parallel size."
)


def _awq(facts: Facts, tp_size: int) -> Finding | None:
    kept = None
    for linear in facts.linears:
        if not facts.quantized(linear) or linear.local_in(tp_size) is None:
            continue
        refusal = _marlin_refusal(facts, tp_size, linear)
        k, n = linear.local_in(tp_size), linear.local_out(tp_size)
        sizes = {
            "partition_KN": [k, n],
            "check_marlin_supports_shape": [refusal is None, refusal],
        }
        if refusal is None:
            kept = kept or Finding("ok", f"{linear.name}: AWQ-Marlin", None, sizes)
            continue
        group = facts.quant.group_size if facts.quant else None
        if group and group > 0 and k is not None and k % group:
            fix = width_fix(facts, tp_size, linear.name, k)
            return Finding("error", _AWQ_TEXT, _AWQ_TEXT, sizes, fix)
        if kept is None or kept.outcome == "ok":
            kept = Finding("fallback", f"{linear.name}: plain AWQ; {refusal}", None, sizes)
    return kept


def _gptq(facts: Facts, tp_size: int) -> Finding | None:
    quant = facts.quant
    assert quant is not None
    if quant.method == "gptq" and quant.forced and quant.group_size is None:
        text = "The non-Marlin GPTQ CUDA kernel has been removed. Use ..."
        return Finding("error", text, text)
    if quant.desc_act and quant.group_size != -1:
        return Finding("replicate", "act-order: GPTQ scales on every rank") if tp_size > 1 else None
    group = quant.group_size
    if not group or group < 0:
        return None
    for linear in facts.linears:
        local = linear.local_in(tp_size)
        if local is None or not facts.quantized(linear) or linear.style == "columns":
            continue
        if linear.in_features and group < linear.in_features and local % group:
            reason = (
                f"{linear.name}: {linear.in_features // group} groups of {group} over {tp_size}"
                f" ranks; the shape check is made and its result dropped, {local // group} scale"
                " rows are read"
            )
            fix = width_fix(facts, tp_size, linear.name, local)
            sizes = {"partition_KN": [local, linear.local_out(tp_size)]}
            return Finding("silent_wrong", reason, None, sizes, fix)
    return None


def _bitsandbytes(facts: Facts, tp_size: int) -> Finding | None:
    quant = facts.quant
    assert quant is not None
    if not quant.forced and tp_size > 1:
        text = "Prequant BitsAndBytes models with TP is not supported.Please try with PP."
        return Finding("error", text, text, fix="quantize at load with --quantization bitsandbytes")
    if quant.bits != 4:
        return None
    packed = 4 if facts.dtype == "float32" else 2
    for linear in facts.linears:
        local = linear.local_in(tp_size)
        if local is None or not facts.quantized(linear):
            continue
        if local * linear.local_out(tp_size) % packed:
            text = "The input size is not aligned with the quantized weight shape."
            reason = f"{linear.name}: {local} x {linear.local_out(tp_size)}: {text}"
            return Finding("error", reason, text)
    return None


def _mxfp4(facts: Facts, tp_size: int) -> Finding | None:
    width = facts.expert_width
    if width is None:
        return None
    if width % 32:
        text = f"intermediate_size={width} must be divisible by mxfp4_block=32"
        return Finding("error", text, text, fix=f"pad intermediate_size to {round_up(width, 32)}")
    local = ceil_div(width // 32, tp_size) * 32
    valid = [max(0, min(local, width - rank * local)) for rank in range(tp_size)]
    sizes = {"per_rank_size": local, "per_rank_valid": valid}
    if valid[-1] == local:
        return Finding("ok", f"experts: {local} rows a rank", None, sizes)
    reason = (
        f"experts: {width // 32} MXFP4 blocks over {tp_size} ranks, {valid[-1]} rows on the last"
    )
    return Finding("pad", reason, None, sizes)


def partition_sizes(facts: Facts, tp_size: int) -> dict[str, Any] | None:
    """Return what one rank holds of the first quantized weight."""
    if facts.quant is None or facts.block is None or not facts.linears:
        return None
    return _partitions(facts.linears[0], tp_size)


def _partitions(linear: Linear, tp_size: int) -> dict[str, Any]:
    columns = linear.style == "columns"
    found: dict[str, Any] = {
        "output_partition_sizes": [
            part.local(tp_size) if columns else part.size for part in linear.parts
        ]
    }
    if linear.in_features is not None:
        found["input_size_per_partition"] = linear.local_in(tp_size)
    return found


PREFLIGHT_RULES = (
    Rule(
        "sglang.fp8_block_moe_preflight",
        f"{_SETUP}:135-178",
        _preflight,
        ("quant", "moe_intermediate_size"),
        "experts",
        when=has_fp8_blocks,
    ),
)
LAYER_RULES = (
    Rule("sglang.fp8_block", f"{_FP8}:570-612", _blocks, ("quant",), when=_checks_blocks),
    Rule(
        "sglang.marlin",
        "sglang/srt/layers/quantization/marlin_utils.py:161-225; awq/schemes/awq_linear.py:41-49",
        _awq,
        ("quant",),
        when=quantized_as("awq", "awq_marlin"),
    ),
    Rule(
        "sglang.gptq_marlin_ignored",
        "sglang/srt/hardware_backend/gpu/quantization/gptq_kernels.py:89-94",
        _gptq,
        ("quant",),
        when=quantized_as("gptq", "gptq_marlin"),
    ),
    Rule(
        "sglang.bnb",
        "sglang/srt/layers/quantization/bitsandbytes.py:231-250; model_loader/loader.py",
        _bitsandbytes,
        ("quant",),
        when=quantized_as("bitsandbytes"),
    ),
)
EXPERT_RULES = (
    Rule(
        "sglang.mxfp4",
        "sglang/srt/models/gpt_oss.py:958-970",
        _mxfp4,
        ("quant",),
        "experts",
        when=quantized_as("mxfp4"),
    ),
)
