"""vLLM 0.33's quantized experts: fp8 blocks refined, groups cut or refused, MXFP4 padded.

Requirement: experts are fused, so their blocks follow rules of their own: a finer block of at least
32 rows that still divides is taken without loss, and what gpt-oss's last rank lacks is padding.
"""

from __future__ import annotations

import math
from typing import Any

from tpcheck.engines.base import Finding, Rule, has_fp8_blocks, quantized_as, width_fix
from tpcheck.engines.facts import Facts, ceil_div, round_up
from tpcheck.engines.vllm_kernels import tile_refusal

_FP8_UTILS = "vllm/model_executor/layers/quantization/utils/fp8_utils.py"
_QUANTIZATION = "vllm/model_executor/layers/quantization"


def _fp8_experts(facts: Facts, tp_size: int) -> Finding | None:
    width, hidden = facts.moe_intermediate_size, facts.hidden_size
    if facts.block is None or width is None or facts.ep_size > 1:
        return None
    block_n, block_k = facts.block
    local = width // tp_size
    text = None
    if local % block_n:
        text = (
            f"The output_size of gate's and up's weight = {local} is not divisible by weight"
            f" quantization block_n = {block_n}."
        )
    elif tp_size > 1 and local % block_k:
        text = (
            f"The input_size of down's weight = {local} is not divisible by weight"
            f" quantization block_k = {block_k}."
        )
    refined = math.gcd(block_n, block_k, local, hidden or 0)
    refined_block = [refined, refined] if text and refined >= 32 else None
    pads = width % block_n == 0 and (hidden or 0) % block_n == 0
    sizes = {
        "intermediate_size_per_partition": local,
        "validate_error": text,
        "refined_block": refined_block,
        "pad_ok": bool(text) and pads,
        "pad_error": None if pads or not text else _PAD_ERROR.format(block_n=block_n),
        "padded_ispp": round_up(local, block_n),
    }
    if text is None:
        return Finding("ok", f"experts: {local} rows a rank are whole blocks", None, sizes)
    if facts.moe_backend not in _REFINING:
        return _aligned(facts, tp_size, local, sizes)
    if refined_block:
        reason = f"experts: {local} rows a rank, blocks of {block_n} refined to {refined}"
        return Finding("fallback", reason, None, sizes)
    fix = width_fix(facts, tp_size, "experts", local)
    return Finding("error", text, text, sizes, fix)


_REFINING = (None, "auto", "triton")
"""Values of --moe-backend whose kernels read finer blocks; None is the flag not given."""


def _aligned(facts: Facts, tp_size: int, local: int, sizes: dict[str, Any]) -> Finding:
    """Return what a backend does that needs whole blocks: it pads, or is refused."""
    assert facts.block is not None
    block_n, backend = facts.block[0], facts.moe_backend
    if sizes["pad_ok"]:
        padded = sizes["padded_ispp"]
        reason = f"experts: {local} rows a rank padded to {padded} for --moe-backend {backend}"
        return Finding("pad", reason, None, sizes)
    said = _PAD_ERROR.format(block_n=block_n)
    return Finding("error", said, said, sizes, width_fix(facts, tp_size, "experts", local))


_PAD_ERROR = (
    "Block-aligned FP8 TP sharding requires {block_n}-aligned global expert dimensions, pure TP,"
    " and no LoRA or expert bias."
)


def _expert_groups(facts: Facts, tp_size: int, *, refit: bool = False) -> Finding | None:
    group, width = facts.quant.group_size if facts.quant else None, facts.moe_intermediate_size
    if group is None or group < 0 or width is None or width % tp_size:
        return None
    local = width // tp_size
    if local % group == 0:
        return None
    if refit or facts.method == "moe_wna16":
        fits = group
        while local % fits and fits >= 32:
            fits //= 2
        if fits >= 32:
            return Finding("fallback", f"experts: groups of {group} cut to {fits}")
        reason = f"experts: no group of at least 32 divides {local} (a bare assert, no text)"
        return Finding("error", reason, "")
    text = (
        "CompressedTensors WNA16 MoE with static group scales requires the MoE intermediate size"
        f" per tensor-parallel partition ({local}) to be divisible by group_size ({group}). Scale"
        " groups would otherwise cross"
        " TP shard boundaries; use a compatible TP size or enable expert parallelism."
    )
    return Finding("error", text, text, fix=width_fix(facts, tp_size, "experts", local))


def _marlin_experts(facts: Facts, tp_size: int) -> Finding | None:
    """Return what happens to experts in groups that Marlin's tiles do not fit.

    Gate and up together are 2 * local rows in tiles of 128, down has local inputs in tiles of 64:
    both are whole where local is a multiple of 64. Act-order and wider hidden sizes are not padded,
    so those experts go to moe_wna16, whose groups may be cut.
    """
    quant, width, hidden = facts.quant, facts.moe_intermediate_size, facts.hidden_size
    if quant is None or width is None or width % tp_size or facts.ep_size > 1:
        return None
    local, group = width // tp_size, quant.group_size or -1
    padded = round_up(local, math.lcm(64, max(1, group)))
    whole_groups = group < 0 or local % group == 0
    fits = (hidden or 128) % 128 == 0 and group in (-1, 32, 64, 128) and whole_groups
    if fits and padded == local:
        return None
    if fits and not quant.desc_act:
        reason = f"experts: {local} rows a rank padded to {padded} for Marlin"
        return Finding("pad", reason, None, {"padded_experts": padded})
    cut = _expert_groups(facts, tp_size, refit=True)
    if cut is not None:
        return cut
    if group < 0:
        # moe_wna16 divides by the group's size, and there is none
        shape = [facts.num_experts or 0, 2 * local, -(hidden or 0)]
        text = f"Trying to create tensor with negative dimension {shape[2]}: {shape}"
        return Finding("error", f"experts: {text}", text)
    return Finding("fallback", f"experts: {local} rows a rank go to moe_wna16, not to Marlin")


def _asks_for_marlin(facts: Facts) -> bool:
    small = facts.method in ("nvfp4", "modelopt_fp4") or (facts.method == "fp8" and not facts.block)
    return small and facts.moe_backend == "marlin"


def _marlin_variants(facts: Facts, tp_size: int) -> Finding | None:
    """Check the tiles of fp8 and fp4 experts where --moe-backend marlin was asked for."""
    width, hidden = facts.moe_intermediate_size, facts.hidden_size
    if width is None or hidden is None or width % tp_size or facts.ep_size > 1:
        return None
    local = width // tp_size
    for n, k in ((2 * local, hidden), (hidden, local)):
        said = tile_refusal(n, k)
        if said is not None:
            return Finding("error", f"experts: {said}", said)
    return None


_MXFP4_GRAINS = {
    (1, 64): "NONE AITER_MXFP4_BF16 AITER_TRITON_MXFP4_BF16 AITER_MXFP4_FP8 AITER_MXFP4_MXFP4"
    " AITER_TRITON_MXFP4_MXFP4 TRITON TRITON_UNFUSED XPU HUMMING",
    (1, 1): "B12X_MXFP4_MXFP8 B12X_MXFP4_BF16 CPU EMULATION FLASHINFER_MOE_EP_CUTEDSL"
    " FLASHINFER_MOE_EP_DEEP_GEMM",
    (128, 128): "DEEPGEMM_MXFP4 FLASHINFER_CUTLASS_MXFP4_MXFP8 FLASHINFER_CUTLASS_MXFP4_BF16"
    " CUTLASS_MXFP4_MXFP4",
    (256, 128): "FLASHINFER_TRTLLM_MXFP4_MXFP8 FLASHINFER_TRTLLM_MXFP4_BF16 BATCHED_MARLIN MARLIN",
}
"""(hidden, intermediate) grain of the buffers → the backends that have it."""


def _mxfp4(facts: Facts, tp_size: int) -> Finding | None:
    width = facts.expert_width
    if width is None:
        return None
    local = ceil_div(width // 32, tp_size) * 32
    valid = [max(0, min(local, width - rank * local)) for rank in range(tp_size)]
    sizes: dict[str, Any] = {"per_rank_size": local, "per_rank_valid": valid}
    if facts.hidden_size:
        sizes["alloc_padded_(hidden,inter)_by_backend"] = {
            backend: [round_up(facts.hidden_size, grains[0]), round_up(local, grains[1])]
            for grains, backends in _MXFP4_GRAINS.items()
            for backend in backends.split()
        }
    if valid[-1] == local:
        return Finding("ok", f"experts: {local} rows a rank are whole MXFP4 blocks", None, sizes)
    blocks = f"{width // 32} MXFP4 blocks over {tp_size} ranks"
    reason = f"experts: {blocks}, {valid[-1]} rows of {local} on the last"
    return Finding("pad", reason, None, sizes)


RULES = (
    Rule(
        "vllm.fp8_block_moe",
        f"vllm/model_executor/layers/fused_moe/oracle/fp8.py:292-360; {_FP8_UTILS}:1348-1373",
        _fp8_experts,
        ("quant", "moe_intermediate_size"),
        "experts",
        when=has_fp8_blocks,
    ),
    Rule(
        "vllm.ct_wna16_moe",
        f"{_QUANTIZATION}/compressed_tensors/compressed_tensors_moe/"
        "compressed_tensors_moe_wna16.py:247",
        _expert_groups,
        ("quant", "moe_intermediate_size"),
        "experts",
        when=quantized_as("compressed-tensors", "moe_wna16"),
    ),
    Rule(
        "vllm.marlin_experts",
        f"{_QUANTIZATION}/utils/marlin_utils.py:222-330; moe_wna16.py",
        _marlin_experts,
        ("quant", "moe_intermediate_size"),
        "experts",
        when=quantized_as("gptq", "gptq_marlin", "awq", "awq_marlin"),
    ),
    Rule(
        "vllm.marlin_legacy",
        f"{_QUANTIZATION}/utils/marlin_utils.py:161-194",
        _marlin_variants,
        ("quant", "moe_intermediate_size"),
        "experts",
        when=_asks_for_marlin,
    ),
    Rule(
        "vllm.mxfp4",
        "vllm/model_executor/models/gpt_oss.py:575-586; fused_moe/oracle/mxfp4.py:837-917",
        _mxfp4,
        ("quant",),
        "experts",
        when=quantized_as("mxfp4"),
    ),
)
