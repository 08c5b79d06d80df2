"""Every rule of SGLang, held to its own text at sizes that no recorded case has."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine_rules import Answer, Restated, hold_to_its_text, refused, restated

HEADS = [*range(1, 40), 48, 64, 71, 96, 128]
WIDTHS = [96 * one for one in range(1, 60)] + [11008, 14336, 27648, 29568, 10944, 9728]
VOCABS = [*range(32000, 32200, 7), 50257, 100352, 128256, 129280, 152064]
BLOCKS = [32, 64, 128]
INPUT = (
    "The input size is not aligned with the quantized weight shape. This can be caused by too large"
    " tensor parallel size."
)


def up(number: int, step: int) -> int:
    return -(-number // step) * step


def fp8(block: int) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": [block, block]}}


def stored(method: str, **fields: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **fields}}


def kv_answer(kv: int, tp: int) -> Answer:
    if kv % tp == 0:
        return "ok", None
    return ("replicate", None) if tp % kv == 0 else ("error", "")


def vocab_answer(vocab: int, tp: int) -> Answer:
    padded = up(vocab, 64) if up(vocab, 64) % tp == 0 else up(vocab, 64 * tp)
    assert padded % tp == 0
    return ("pad" if padded != vocab else "ok"), None


def columns_answer(kv: int, head: int, block: int, tp: int) -> Answer:
    for local in (2 * head, max(1, kv // tp) * head, max(1, kv // tp) * head):
        if local % block:
            return (
                "error",
                f"Weight output_partition_size = {local} is not divisible by weight quantization"
                f" block_n = {block}.",
            )
    return kv_answer(kv, tp)


def moe_answer(width: int, ep: int, dp: int, block: int, tp: int) -> Answer:
    if tp % ep:
        return "error", f"tp_size {tp} must be divisible by ep_size {ep}"
    split = tp // ep // dp
    if width % split:
        return (
            "error",
            f"moe_intermediate_size {width} must be divisible by moe_tp_size ({split}) which is"
            f" tp_size ({tp}) divided by moe_ep_size ({ep}).",
        )
    text = (
        f"For quantized MoE models, please make sure (moe_intermediate_size={width} /"
        f" moe_tp_size={split}) % weight_block_size_n={block} == 0 where moe_tp_size is equal to"
        f" tp_size ({tp}) divided by ep_size ({ep}). You can fix this by setting arguments `--tp`"
        " and `--ep` correctly."
    )
    return refused(width // split % block, text)


def awq_answer(local: int, n: int, group: int, tp: int) -> Answer:
    straddles = group < local * tp and local % group
    fits = n % 64 == 0 and local % 128 == 0 and not straddles
    if fits:
        return "ok", None
    return refused(local % group, INPUT, "fallback")


def mxfp4_answer(width: int, tp: int) -> Answer:
    if width % 32:
        return "error", f"intermediate_size={width} must be divisible by mxfp4_block=32"
    # what the last rank lacks is padding: recorded as pad
    return ("pad" if (width // 32) % tp else "ok"), None


def cpu_answer(heads: int, group: int, tp: int) -> Answer:
    kv = heads // group
    return ("pad" if heads % tp or kv % tp else "ok"), None


SGLANG = [
    restated(
        "sglang.heads",
        "sglang",
        lambda heads, tp: {"num_attention_heads": heads, "num_key_value_heads": 1},
        lambda heads, tp: refused(heads % tp, "", "replicate" if tp > 1 else "ok"),
        heads=HEADS,
    ),
    restated(
        "sglang.kv sglang.kv_replicate",
        "sglang",
        lambda kv, tp: {"num_key_value_heads": kv},
        kv_answer,
        kv=range(1, 17),
    ),
    restated(
        "sglang.vocab sglang.vocab64",
        "sglang",
        lambda vocab, tp: {"vocab_size": vocab},
        vocab_answer,
        vocab=VOCABS,
    ),
    restated(
        "sglang.mlp",
        "sglang",
        lambda width, tp: {"intermediate_size": width},
        lambda width, tp: refused(width % tp),
        width=WIDTHS,
    ),
    restated(
        "sglang.fp8_block_row",
        "sglang",
        lambda local, block, tp: {"K": local * tp, "N": 512, "style": "rows", **fp8(block)},
        lambda local, block, tp: refused(
            tp > 1 and local % block,
            f"Weight input_size_per_partition = {local} is not divisible by weight quantization"
            f" block_k = {block}.",
        ),
        local=WIDTHS,
        block=BLOCKS,
    ),
    restated(
        "sglang.fp8_block_col",
        "sglang",
        lambda kv, head, block, tp: {
            **{"num_attention_heads": 2 * tp, "num_key_value_heads": kv, "head_dim": head},
            **{"hidden_size": 512, "tensor": "qkv_proj", **fp8(block)},
        },
        columns_answer,
        kv=[1, 2],
        head=[64, 80, 96, 128, 192],
        block=BLOCKS,
        tp=[1, 2, 4, 8],
    ),
    restated(
        "sglang.fp8_block_moe_preflight sglang.moe_div sglang.ep_div",
        "sglang",
        lambda width, ep, dp, block, tp: {
            **{"moe_intermediate_size": width, "ep_size": ep, "moe_dp_size": dp},
            **fp8(block),
        },
        moe_answer,
        width=[768, 1408, 1536, 2048],
        ep=[2, 4],
        dp=[1, 2],
        block=[64, 128],
        tp=[*range(8, 17), 24],
    ),
    restated(
        "sglang.moe",
        "sglang",
        lambda width, tp: {"moe_intermediate_size": width},
        lambda width, tp: refused(width % tp),
        width=WIDTHS,
    ),
    restated(
        "sglang.moe_experts",
        "sglang",
        lambda experts, tp: {"num_experts": experts},
        lambda experts, tp: refused(
            tp > experts,
            f"Tensor parallel size {tp} is greater than the number of experts {experts}.",
        ),
        experts=range(1, 17),
    ),
    restated(
        "sglang.marlin_shape sglang.awq",
        "sglang",
        lambda local, n, group, tp: {
            **{"K": local * tp, "N": n, "style": "rows"},
            **stored("awq", group_size=group),
        },
        awq_answer,
        local=[64, 128, 192, 256, 384],
        n=[64, 96, 128],
        group=[32, 64, 128],
    ),
    restated(
        "sglang.gptq_marlin_ignored",
        "sglang",
        lambda local, group, tp: {
            **{"K": local * tp, "N": 512, "style": "rows"},
            **stored("gptq", group_size=group),
        },
        lambda local, group, tp: (
            "silent_wrong" if group < local * tp and local % group else "ok",
            None,
        ),
        local=[64, 96, 128, 192, 320],
        group=[32, 64, 128],
    ),
    restated(
        "sglang.gptq_actorder",
        "sglang",
        lambda group, act, tp: stored("gptq", group_size=group, desc_act=act),
        lambda group, act, tp: ("replicate" if act and group > 0 and tp > 1 else "ok", None),
        group=[-1, 32, 128],
        act=[False, True],
    ),
    restated(
        "sglang.gptq_removed",
        "sglang",
        lambda group, tp: {"quant": "gptq", "group_size": group},
        lambda group, tp: refused(
            group is None, "The non-Marlin GPTQ CUDA kernel has been removed. Use ..."
        ),
        group=[None, 32, 128],
    ),
    restated(
        "sglang.mxfp4_block sglang.mxfp4_uneven",
        "sglang",
        lambda width, tp: {"moe_intermediate_size": width, **stored("mxfp4")},
        mxfp4_answer,
        width=range(16, 4000, 16),
    ),
    restated(
        "sglang.bnb",
        "sglang",
        lambda local, n, dtype, tp: {
            **{"K": local * tp, "N": n, "style": "rows", "quant": "bitsandbytes"},
            "torch_dtype": dtype,
        },
        # SGLang packs as many values into a byte as a value of the dtype has bytes
        lambda local, n, dtype, tp: (
            "error" if local * n % (4 if dtype == "float32" else 2) else "ok",
            None,
        ),
        local=range(1, 60),
        n=range(1, 60),
        dtype=["bfloat16", "float32"],
    ),
    restated(
        "sglang.bnb",
        "sglang",
        lambda bits, tp: stored("bitsandbytes", load_in_8bit=bits == 8),
        lambda bits, tp: refused(
            tp > 1, "Prequant BitsAndBytes models with TP is not supported.Please try with PP."
        ),
        bits=[4, 8],
        tp=[1, 2, 3],
    ),
    restated(
        "sglang.cpu_heads_pad",
        "sglang",
        lambda heads, group, tp: {
            **{"num_attention_heads": heads, "num_key_value_heads": heads // group},
            "device": "cpu",
        },
        cpu_answer,
        heads=range(8, 130, 8),
        group=[1, 2, 4, 8],
    ),
]


@pytest.mark.parametrize("one", SGLANG, ids=lambda one: one.rules[0])
def test_a_rule_of_sglang_is_what_its_text_says_at_any_size(one: Restated) -> None:
    hold_to_its_text(one)
