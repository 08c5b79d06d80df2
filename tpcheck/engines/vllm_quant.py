"""vLLM 0.33's quantized layers: fp8 blocks, GPTQ and AWQ groups, MXFP4 and NVFP4.

Requirement: a shard that cuts a block or a group is refused, padded, refined or silently wrong,
each where vLLM's own code is. Merged layers skip the block check, so what loading does with their
scales is played through row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tpcheck.engines.base import (
    SEVERITY,
    Finding,
    Rule,
    has_fp8_blocks,
    quantized_as,
    width_fix,
)
from tpcheck.engines.facts import Facts, Linear, ceil_div, round_up
from tpcheck.engines.vllm_fp8_merged import first_load_error, merged_load, wrong_ranks
from tpcheck.engines.vllm_kernels import choose_kernel, marlin_padded, tile_refusal

_FP8_UTILS = "vllm/model_executor/layers/quantization/utils/fp8_utils.py"
_QUANTIZATION = "vllm/model_executor/layers/quantization"


def _desc_act(facts: Facts, tp_size: int) -> Finding | None:
    quant = facts.quant
    if quant is None or not quant.desc_act or quant.group_size == -1:
        return None
    text = (
        "GPTQ group activation ordering (desc_act=True) is no longer supported. Use a checkpoint"
        " with static activation ordering or desc_act=False."
    )
    return Finding("error", text, text)


def _fp8_dense(facts: Facts, tp_size: int, linear: Linear) -> Finding | None:
    assert facts.block is not None
    block_n, block_k = facts.block
    said, local = None, 0
    if linear.style == "rows":
        local = linear.local_in(tp_size) or 0
        if tp_size > 1 and local % block_k:
            said = f"input_size_per_partition = {local}", f"block_k = {block_k}"
    elif len(linear.parts) == 1 and tp_size > 1:
        local = linear.local_out(tp_size)
        if local % block_n:
            said = f"output_partition_size = {local}", f"block_n = {block_n}"
    if said is None:
        return None
    text = f"Weight {said[0]} is not divisible by weight quantization {said[1]}."
    return Finding("error", text, text, fix=width_fix(facts, tp_size, linear.name, local))


def _fp8_merged(facts: Facts, tp_size: int, linear: Linear) -> Finding | None:
    if len(linear.parts) < 2 or facts.stage == "create":
        return None
    assert facts.block is not None
    block_n = facts.block[0]
    if all(part.local(tp_size) % block_n == 0 for part in linear.parts):
        return None
    failed = first_load_error(linear, block_n, tp_size)
    fix = width_fix(facts, tp_size, linear.name, min(part.local(tp_size) for part in linear.parts))
    if failed:
        return Finding("error", failed[1], failed[1], merged_load(facts, linear, tp_size), fix)
    wrong = wrong_ranks(linear, block_n, tp_size)
    if not wrong:
        return None
    rank, parts = next(iter(wrong.items()))
    names = ", ".join(f"{part}: {rows}" for part, rows in parts.items())
    reason = f"{linear.name} loads without a check; rank {rank}: {names}"
    sizes = merged_load(facts, linear, tp_size)
    return Finding("silent_wrong", reason, None, sizes, fix)


def _wna16(facts: Facts, tp_size: int, linear: Linear) -> Finding | None:
    quant = facts.quant
    if quant is None or quant.group_size is None or linear.in_features is None:
        return None
    local, out = linear.local_in(tp_size), linear.local_out(tp_size)
    if local is None or not out:
        return None
    act = facts.dtype or "bfloat16"
    capability = facts.compute_capability
    chosen = choose_kernel(linear.in_features, local, out, quant, act, capability)
    straddles = 0 < quant.group_size < linear.in_features and local % quant.group_size != 0
    rows = local // quant.group_size if quant.group_size > 0 else 1
    sizes: dict[str, Any] = {
        "partition_KN": [local, out],
        "group_straddles": straddles,
        "scale_rows_floor": rows,
    }
    fix = width_fix(facts, tp_size, linear.name, local) if straddles else None
    if chosen.kernel is None:
        return Finding("error", chosen.text.partition("\n")[0], chosen.text, sizes, fix)
    sizes["kernel"] = chosen.kernel
    groups = f"{linear.in_features // quant.group_size} groups of {quant.group_size}"
    if straddles and chosen.kernel == "ExllamaLinearKernel":
        reason = f"{linear.name}: {groups} over {tp_size} ranks; Exllama reads the wrong groups"
        return Finding("silent_wrong", reason, None, sizes, fix)
    if straddles and chosen.kernel == "MacheteLinearKernel":
        reason = f"{linear.name}: {groups} over {tp_size} ranks; Machete fails at first forward"
        return Finding("late_error", reason, None, sizes, fix)
    if chosen.kernel == "MarlinLinearKernel":
        padded = marlin_padded(out, local, quant.group_size)
        sizes["marlin_padded_nk"] = list(padded)
        if padded != (out, local):
            reason = f"{linear.name}: [{out}, {local}] padded to {list(padded)} for Marlin"
            return Finding("pad", reason, None, sizes)
    return Finding("ok", f"{linear.name}: {chosen.kernel}", None, sizes)


def _compressed(facts: Facts, tp_size: int, linear: Linear) -> Finding | None:
    group = facts.quant.group_size if facts.quant else None
    local = linear.local_in(tp_size)
    if group is None or group < 0 or local is None:
        return None
    if local % group == 0:
        return None if linear.style == "local" else _wna16(facts, tp_size, linear)
    name = "mlp.down_proj" if linear.name == "linear" else linear.name
    text = (
        f"Weight input_size_per_partition={local} for layer 'model.layers.0.{name}' is not"
        f" divisible by group_size={group}. This happens when tensor_parallel_size splits the"
        " layer input into shards that are not a whole number of quant groups. Consider reducing"
        " tensor_parallel_size."
    )
    return Finding("error", text, text, fix=width_fix(facts, tp_size, linear.name, local))


def _awq(facts: Facts, tp_size: int, linear: Linear) -> Finding | None:
    quant, local = facts.quant, linear.local_in(tp_size)
    if quant is None or quant.group_size is None or local is None:
        return None
    side = None
    if quant.group_size > 0 and local % quant.group_size:
        side = "input"
    elif linear.local_out(tp_size) % (32 // quant.bits):
        side = "output"
    if side is None:
        return None
    text = (
        f"The {side} size is not aligned with the quantized weight shape. This can be caused by"
        " too large tensor parallel size."
    )
    return Finding("error", text, text, fix=width_fix(facts, tp_size, linear.name, local))


def _row_multiple(block: int, text: str) -> Callable[[Facts, int, Linear], Finding | None]:
    def find(facts: Facts, tp_size: int, linear: Linear) -> Finding | None:
        local = linear.local_in(tp_size)
        if linear.style == "columns" or local is None or local % block == 0:
            return None
        if facts.method == "mxfp4" and linear.name != "linear":
            return None  # a checkpoint's MXFP4 is its experts', with rules of their own
        said = text.format(local=local)
        return Finding("error", said, said, fix=width_fix(facts, tp_size, linear.name, local))

    return find


def _marlin_variant(facts: Facts, tp_size: int, linear: Linear) -> Finding | None:
    local, out = linear.local_in(tp_size), linear.local_out(tp_size)
    said = tile_refusal(out, local) if local is not None and out else None
    return Finding("error", f"{linear.name}: {said}", said) if said else None


def _asks_for_marlin(facts: Facts) -> bool:
    return facts.linear_backend == "marlin" and (_NVFP4(facts) or facts.method == "fp8")


def _nvfp4_pad(facts: Facts, tp_size: int, linear: Linear) -> Finding | None:
    local, out = linear.local_in(tp_size), linear.local_out(tp_size)
    if local is None or (local % 32 == 0 and out % 32 == 0):
        return None
    padded = [round_up(out, 32), round_up(local, 32)]
    return Finding("pad", f"{linear.name}: [{out}, {local}] padded to {padded} for CUTLASS")


def _each(
    find: Callable[[Facts, int, Linear], Finding | None], *prefixes: str
) -> Callable[[Facts, int], Finding | None]:
    """Return a finder that tries the quantized weights under these names in order."""

    def find_first(facts: Facts, tp_size: int) -> Finding | None:
        kept = None
        for linear in facts.linears:
            if not linear.name.startswith(prefixes) or not facts.quantized(linear):
                continue
            if linear.style == "rows" and (linear.in_features or 0) % tp_size:
                continue
            found = find(facts, tp_size, linear)
            if found is None:
                continue
            if found.outcome == "error":
                return found
            if kept is None or SEVERITY[found.outcome] > SEVERITY[kept.outcome]:
                kept = found
        return kept

    return find_first


_ATTENTION = ("self_attn", "linear_attn")
_MLP = ("mlp", "linear")


def _per_linear(
    rule_id: str,
    source: str,
    find: Callable[[Facts, int, Linear], Finding | None],
    when: Callable[[Facts], bool],
) -> tuple[Rule, Rule]:
    """Return one rule twice: for attention's weights, and for the MLP's."""
    return (
        Rule(rule_id, source, _each(find, *_ATTENTION), ("quant",), when=when),
        Rule(rule_id, source, _each(find, *_MLP), ("quant",), when=when),
    )


_NVFP4 = quantized_as("nvfp4", "modelopt_fp4")
_DENSE = (
    _per_linear("vllm.fp8_block", f"{_FP8_UTILS}:1296-1345", _fp8_dense, has_fp8_blocks),
    _per_linear(
        "vllm.wna16",
        "vllm/model_executor/kernels/linear/__init__.py:539,887-955; mixed_precision/*.py",
        _wna16,
        quantized_as("gptq", "gptq_marlin", "wna16"),
    ),
    _per_linear(
        "vllm.ct_wna16",
        "vllm/distributed/utils.py:137-152",
        _compressed,
        quantized_as("compressed-tensors"),
    ),
    _per_linear(
        "vllm.awq",
        f"{_QUANTIZATION}/auto_awq.py:813-835",
        _awq,
        quantized_as("awq", "awq_marlin"),
    ),
    _per_linear(
        "vllm.nvfp4",
        f"{_QUANTIZATION}/modelopt.py:2026",
        _row_multiple(16, "Unsupported model when in features size is not multiple of 16"),
        _NVFP4,
    ),
    _per_linear(
        "vllm.nvfp4_quark",
        f"{_QUANTIZATION}/quark/schemes/quark_nvfp4.py:82",
        _row_multiple(
            16, "Input size per partition ({local}) must be divisible by group size (16)"
        ),
        quantized_as("quark_nvfp4"),
    ),
    _per_linear(
        "vllm.marlin_legacy",
        f"{_QUANTIZATION}/utils/marlin_utils.py:161-194",
        _marlin_variant,
        _asks_for_marlin,
    ),
    _per_linear(
        "vllm.nvfp4_pad", "NVFP4 CUTLASS kernel preparation", _nvfp4_pad, quantized_as("nvfp4")
    ),
    _per_linear(
        "vllm.mxfp4_online",
        f"{_QUANTIZATION}/online/mxfp4.py:103",
        _row_multiple(
            32, "MXFP4 requires input_size_per_partition ({local}) to be divisible by 32."
        ),
        quantized_as("mxfp4", "mxfp4_online", "mxfp8"),
    ),
)

CONFIG_RULES = (
    Rule(
        "vllm.gptq_desc_act",
        f"{_QUANTIZATION}/utils/gptq_utils.py:21-50",
        _desc_act,
        ("quant",),
        when=quantized_as("gptq", "gptq_marlin"),
    ),
)
LOAD_RULE = Rule(
    "vllm.fp8_block_merged_allowance",
    "vllm/model_executor/layers/linear.py:562-589,82-93,1147-1155",
    _each(_fp8_merged, *_ATTENTION, *_MLP),
    ("quant",),
    when=has_fp8_blocks,
)
"""What only shows when weights arrive, after every layer was built."""

ATTENTION_RULES = tuple(rules[0] for rules in _DENSE)
MLP_RULES = tuple(rules[1] for rules in _DENSE)


def _created_sizes(facts: Facts, tp_size: int) -> dict[str, Any] | None:
    """Return the shapes of the one fp8 weight that is asked about."""
    if facts.block is None or not facts.linears:
        return None
    linear = facts.linears[0]
    if facts.tensor is None and linear.name != "linear":
        return None
    local_in = linear.local_in(tp_size)
    if local_in is None:
        return None
    block_n, block_k = facts.block
    out = linear.local_out(tp_size)
    sizes = [part.local(tp_size) for part in linear.parts]
    return {
        "allow_fp8_block_shape_mismatch": len(sizes) > 1 and any(size % block_n for size in sizes),
        "weight": [out, local_in],
        "scale": [ceil_div(out, block_n), ceil_div(local_in, block_k)],
        "output_partition_sizes": [out] if linear.style == "rows" else sizes,
        **(merged_load(facts, linear, tp_size) if len(sizes) > 1 else {}),
    }


def _act_order_sizes(facts: Facts, tp_size: int) -> dict[str, Any] | None:
    return {"effective_desc_act": False} if facts.method == "gptq" else None


SIZES = (("any", ("quant",), _created_sizes), ("any", ("quant",), _act_order_sizes))
