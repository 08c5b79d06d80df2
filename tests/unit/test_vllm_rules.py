"""Every rule of vLLM and SGLang, held to its own text at sizes that no recorded case has."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.engine_rules import Answer, Restated, hold_to_its_text, refused, restated

HEADS = [*range(1, 40), 48, 64, 71, 96, 128]
WIDTHS = [96 * one for one in range(1, 60)] + [11008, 14336, 27648, 29568, 10944, 9728]
VOCABS = [*range(32000, 32200, 7), 50257, 100352, 128256, 129280, 152064]
BLOCKS = [32, 64, 128]
BEYOND = "start ({}) + length ({}) exceeds dimension size ({})."


def ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def kv_answer(kv: int, tp: int, **_: Any) -> Answer:
    if kv % tp == 0:
        return "ok", None
    return ("replicate", None) if tp % kv == 0 else ("error", "")


def gpt_oss_kv_answer(kv: int, tp: int) -> Answer:
    """QKVParallelLinear divides first; only a number that it takes gets as far as the modulo."""
    larger, smaller = max(kv, tp), min(kv, tp)
    if larger % smaller:
        return "error", f"{larger} is not divisible by {smaller}"
    return refused(kv < tp, "integer modulo by zero")


def vocab_answer(vocab: int, tp: int) -> Answer:
    padded = ceil(vocab, 64) * 64
    if padded % tp:
        return "error", f"{padded} is not divisible by {tp}"
    return ("pad" if padded != vocab else "ok"), None


def fp8(block: int) -> dict[str, Any]:
    return {"quant": "fp8", "weight_block_size": [block, block]}


def one_weight(k: int, n: int, style: str, **quant: Any) -> dict[str, Any]:
    return {"K": k, "N": n, "style": style, **quant}


def merged_answer(kv: int, head: int, block: int, tp: int) -> Answer:
    """Play loading through row by row: q of 24 heads a rank, then kv heads, k and v."""
    local = [24 * head, max(1, kv // tp) * head, max(1, kv // tp) * head]
    whole = [24 * tp * head, kv * head, kv * head]
    if all(size % block == 0 for size in local) or (kv % tp and tp % kv):
        return kv_answer(kv, tp)
    rows = ceil(sum(local), block)
    wrong = False
    for rank in range(tp):
        scales: list[Any] = [None] * rows
        offset = 0
        for part, (mine, all_rows) in enumerate(zip(local, whole, strict=True)):
            start, length = ceil(offset, block), ceil(mine, block)
            shard = rank if part == 0 else rank // max(1, tp // kv)
            if start + length > rows:
                return (
                    "error",
                    f"start ({start}) + length ({length}) exceeds dimension size ({rows}).",
                )
            stored = ceil(all_rows, block)
            if (shard + 1) * length > stored:
                return "error", BEYOND.format(shard * length, length, stored)
            scales[start : start + length] = [(part, shard * length + k) for k in range(length)]
            offset += mine
        offset = 0
        for part, mine in enumerate(local):
            shard = rank if part == 0 else rank // max(1, tp // kv)
            for row in range(mine):
                true = part, (shard * mine + row) // block
                wrong |= scales[(offset + row) // block] != true
            offset += mine
    return ("silent_wrong", None) if wrong else kv_answer(kv, tp)


def merged_config(kv: int, head: int, block: int, tp: int) -> dict[str, Any]:
    heads = {"num_attention_heads": 24 * tp, "num_key_value_heads": kv, "head_dim": head}
    return {**heads, "hidden_size": 512, "tensor": "qkv_proj", **fp8(block)}


def experts_answer(width: int, hidden: int, block: int, backend: str | None, tp: int) -> Answer:
    local = width // tp
    if width % tp:
        return "error", ""
    if local % block == 0:
        return "ok", None
    if backend is not None:
        said = (
            f"Block-aligned FP8 TP sharding requires {block}-aligned global expert dimensions,"
            " pure TP, and no LoRA or expert bias."
        )
        return refused(width % block or hidden % block, said, "pad")
    said = f"weight = {local} is not divisible by weight quantization block_n = {block}."
    return refused(
        math.gcd(block, local, hidden) < 32,
        f"The output_size of gate's and up's {said}",
        "fallback",
    )


VLLM = [
    restated(
        "vllm.heads",
        "vllm",
        lambda heads, tp: {"num_attention_heads": heads},
        lambda heads, tp: refused(
            heads % tp,
            f"Total number of attention heads ({heads}) must be divisible by tensor parallel size"
            f" ({tp}).",
        ),
        heads=HEADS,
    ),
    restated(
        "vllm.divide",
        "vllm",
        lambda heads, tp: {"vision_config": {"num_heads": heads}},
        lambda heads, tp: refused(heads % tp, f"{heads} is not divisible by {tp}"),
        heads=HEADS,
    ),
    restated(
        "vllm.kv_shard vllm.kv_replicate vllm.kv_replicate_err",
        "vllm",
        lambda kv, tp: {"num_key_value_heads": kv},
        kv_answer,
        kv=range(1, 17),
    ),
    restated(
        "vllm.gpt_oss_kv",
        "vllm",
        lambda kv, tp: {"model_type": "gpt_oss", "num_key_value_heads": kv},
        gpt_oss_kv_answer,
        kv=range(1, 17),
    ),
    restated(
        "vllm.sinks",  # its own text comes after that of the config, which has the same condition
        "vllm",
        lambda heads, tp: {"model_type": "gpt_oss", "num_attention_heads": heads},
        lambda heads, tp: ("error" if heads % tp or 8 % tp else "ok", None),
        heads=range(8, 130, 8),
        tp=range(1, 9),
    ),
    restated(
        "vllm.dcp_gqa",
        "vllm",
        lambda kv, tp: {"num_key_value_heads": kv, "decode_context_parallel_size": 2},
        lambda kv, tp: refused(
            tp <= kv,
            "Decode context parallelism for GQA/MQA requires `--tensor-parallel-size` ("
            f"{tp}) to be greater than the model's total number of KV heads ({kv}).",
            "replicate",
        ),
        kv=[1, 2, 4],
        tp=[1, 2, 4, 8, 16],
    ),
    restated(
        "vllm.vocab vllm.vocab_pad",
        "vllm",
        lambda vocab, tp: {"vocab_size": vocab},
        vocab_answer,
        vocab=VOCABS,
    ),
    restated(
        "vllm.mlp_gate_up",
        "vllm",
        lambda width, tp: {"intermediate_size": width},
        lambda width, tp: refused(width % tp),
        width=WIDTHS,
    ),
    restated(
        "vllm.mlp_down",
        "vllm",
        lambda width, tp: {"intermediate_size": width, "tensor": "down_proj"},
        lambda width, tp: refused(width % tp, f"{width} is not divisible by {tp}"),
        width=WIDTHS,
    ),
    restated(
        "vllm.moe",
        "vllm",
        lambda width, tp: {"moe_intermediate_size": width},
        lambda width, tp: refused(width % tp),
        width=WIDTHS,
    ),
    restated(
        "vllm.moe_experts",
        "vllm",
        lambda experts, tp: {"num_experts": experts},
        lambda experts, tp: refused(
            tp > experts,
            f"Tensor parallel size {tp} is greater than the number of experts {experts}.",
        ),
        experts=range(1, 17),
    ),
    restated(
        "vllm.fp8_block_row",
        "vllm",
        lambda local, block, tp: one_weight(local * tp, 512, "rows", **fp8(block)),
        lambda local, block, tp: refused(
            tp > 1 and local % block,
            f"Weight input_size_per_partition = {local} is not divisible by weight quantization"
            f" block_k = {block}.",
        ),
        local=WIDTHS,
        block=BLOCKS,
    ),
    restated(
        "vllm.fp8_block_col",
        "vllm",
        lambda local, block, tp: one_weight(512, local * tp, "columns", **fp8(block)),
        lambda local, block, tp: refused(
            tp > 1 and local % block,
            f"Weight output_partition_size = {local} is not divisible by weight quantization"
            f" block_n = {block}.",
        ),
        local=WIDTHS,
        block=BLOCKS,
    ),
    restated(
        "vllm.fp8_block_merged_allowance",
        "vllm",
        merged_config,
        merged_answer,
        kv=[1, 2, 3, 4, 8],
        head=[64, 80, 96, 128, 192],
        block=BLOCKS,
        tp=[1, 2, 4, 8],
    ),
    restated(
        "vllm.fp8_block_moe vllm.fp8_block_moe_refine vllm.fp8_block_moe_pad",
        "vllm",
        lambda width, hidden, block, backend, tp: {
            **{"moe_intermediate_size": width, "hidden_size": hidden, "moe_backend": backend},
            **fp8(block),
        },
        experts_answer,
        width=[768, 1408, 1536, 2048, 720, 1056],
        hidden=[2048, 2080, 4096],
        block=[64, 128],
        backend=[None, None, "flashinfer_cutlass", "cutlass"],
    ),
]


@pytest.mark.parametrize("one", VLLM, ids=lambda one: one.rules[0])
def test_a_rule_of_vllm_is_what_its_text_says_at_any_size(one: Restated) -> None:
    hold_to_its_text(one)
