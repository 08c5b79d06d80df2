"""Every rule of TGI and TensorRT-LLM, held to its own text at sizes that no recorded case has."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine_rules import Answer, Restated, hold_to_its_text, refused, restated

HEADS = [*range(1, 40), 48, 64, 71, 96, 128]
WIDTHS = [96 * one for one in range(1, 60)] + [11008, 14336, 27648, 29568, 10944, 9728]
VOCABS = [*range(32000, 32200, 7), 50257, 100352, 128256, 129280, 152064]
LLAMA = {"model_type": "llama"}
SHARDED = "The choosen size {} is not compatible with sharding on {} shards"


def stored(method: str, **fields: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **fields}}


def chunk(total: int, parts: int) -> list[int]:
    """Return the sizes of torch.chunk, one rank after the other."""
    size, sizes = -(-total // parts), []
    for _ in range(parts):
        sizes.append(min(size, total - sum(sizes)))
    return sizes


def fp8(block: int) -> dict[str, Any]:
    return stored("fp8", weight_block_size=[block, block])


# -- Text Generation Inference


def blocks_answer(blocks: int, rest: int, tp: int) -> Answer:
    size = 128 * blocks - 16 * rest
    stored_blocks = -(-size // 128)
    if size % tp:
        return "error", SHARDED.format(size, tp)
    if stored_blocks % tp:
        return "error", SHARDED.format(stored_blocks, tp)
    return ("silent_wrong" if tp > 1 and size // tp % 128 else "ok"), None


def groups_row_answer(groups: int, group: int, tp: int) -> Answer:
    if groups % tp:
        return "error", SHARDED.format(groups, tp)
    k = groups * group // tp
    if not ((512 % 128 == 0 and k % 64 == 0) or k % 128 == 0):
        return "error", None
    return "ok", None


def falcon_answer(groups: int, tp: int) -> Answer:
    said = "Tensor Parallelism is not implemented for"
    if tp > groups:
        return "error", f"{said} world_size > n groups"
    return refused(groups % tp, f"{said} {groups} not divisible by {tp}")


TGI = [
    restated(
        "tgi.sharded",
        "tgi",
        lambda width, tp: {"intermediate_size": width},
        lambda width, tp: refused(width % tp, SHARDED.format(width, tp)),
        width=WIDTHS,
    ),
    restated(
        "tgi.packed",
        "tgi",
        lambda width, tp: {"model_type": "phi3", "hidden_size": 64, "intermediate_size": width},
        lambda width, tp: refused(
            width % tp, f"Prepacked tensor cannot be sharded across {tp} shards"
        ),
        width=WIDTHS,
    ),
    restated(
        "tgi.heads",
        "tgi",
        lambda heads, tp: {"num_attention_heads": heads},
        lambda heads, tp: refused(
            heads % tp,
            f"`num_heads` must be divisible by `num_shards` (got `num_heads`: {heads} and"
            f" `num_shards`: {tp}",
        ),
        heads=HEADS,
    ),
    restated(
        "tgi.kv_heads",
        "tgi",
        lambda kv, tp: {**LLAMA, "num_key_value_heads": kv},
        lambda kv, tp: refused(
            kv % tp,
            "`num_key_value_heads` must be divisible by `num_shards` (got `num_key_value_heads`:"
            f" {kv} and `num_shards`: {tp}",
        ),
        kv=range(1, 17),
    ),
    restated(
        "tgi.kv_zero",
        "tgi",
        lambda kv, kind, tp: {"model_type": kind, "num_key_value_heads": kv},
        lambda kv, kind, tp: ("error" if kv % tp else "ok", None),
        kv=range(1, 17),
        kind=["qwen2", "mistral"],
    ),
    restated(
        "tgi.falcon_groups",
        "tgi",
        lambda groups, tp: {"model_type": "falcon", "num_kv_heads": groups},
        falcon_answer,
        groups=range(2, 17),
    ),
    restated(
        "tgi.lm_head tgi.embedding",
        "tgi",
        lambda vocab, tp: {"vocab_size": vocab},
        lambda vocab, tp: ("replicate" if vocab % tp else "ok", None),
        vocab=VOCABS,
    ),
    restated(
        "tgi.gptq_row tgi.marlin_tile",
        "tgi",
        lambda groups, group, tp: {
            **{"K": groups * group, "N": 512, "style": "rows"},
            **stored("gptq", group_size=group),
        },
        groups_row_answer,
        groups=range(1, 65),
        group=[32, 64, 128],
    ),
    restated(
        "tgi.marlin",
        "tgi",
        lambda local, tp: {
            **{"K": local * tp, "N": 512, "style": "rows"},
            **stored("gptq", group_size=128),
        },
        # 8 * 64 inputs are 4 groups: as many as ranks, and every one cut in two
        lambda local, tp: (
            (
                "error",
                f"Number of input features ({local}) not divisible by group size (128)",
            )
            if local % 128 and (local * tp // 128) % tp == 0
            else (("error", None) if (local * tp // 128) % tp else ("ok", None))
        ),
        local=[64, 128, 192, 256, 320],
        tp=[1, 2, 4],
    ),
    restated(
        "tgi.fp8_block tgi.fp8_block_silent",
        "tgi",
        lambda blocks, rest, tp: {
            **{"intermediate_size": 128 * blocks - 16 * rest, "hidden_size": 128 * 720720},
            **fp8(128),
        },
        blocks_answer,
        blocks=range(1, 100),
        rest=range(8),
        tp=[1, 2, 3, 4, 5, 6, 8],
    ),
    restated(
        "tgi.exl2",
        "tgi",
        lambda tp: stored("exl2"),
        lambda tp: refused(tp > 1, "Column-packed weights are not supported for exl"),
    ),
]

# -- TensorRT-LLM


def trt_kv_answer(kv: int, tp: int) -> Answer:
    return refused(kv % tp and tp % kv, "", "replicate" if kv < tp else "ok")


def linear_answer(width: int, tp: int) -> Answer:
    if 2 * width % tp:
        return "error", f"out_features {2 * width} must be divisible by tp_size {tp}"
    return refused(width % tp, f"in_features {width} must be divisible by tp_size {tp}")


def trt_blocks_answer(size: int, tp: int) -> Answer:
    local = max(chunk(size, tp))
    needed = -(-local // 128)
    loaded = chunk(-(-size // 128), tp)
    if any(count != needed for count in loaded):
        return "error", None
    return ("silent_wrong" if tp > 1 and local % 128 else "ok"), None


TENSORRT_LLM = [
    restated(
        "trtllm.heads",
        "tensorrt-llm",
        lambda heads, tp: {"num_attention_heads": heads},
        lambda heads, tp: refused(heads % tp),
        heads=HEADS,
    ),
    restated(
        "trtllm.kv trtllm.kv_replicate",
        "tensorrt-llm",
        lambda kv, tp: {"num_key_value_heads": kv},
        trt_kv_answer,
        kv=range(1, 17),
    ),
    restated(
        "trtllm.linear_in trtllm.linear_out",
        "tensorrt-llm",
        lambda width, tp: {"intermediate_size": width},
        linear_answer,
        width=[*range(1, 40), *WIDTHS],
    ),
    restated(
        "trtllm.vocab",
        "tensorrt-llm",
        lambda vocab, tp: {"vocab_size": vocab},
        lambda vocab, tp: ("pad" if vocab % tp else "ok", None),
        vocab=VOCABS,
    ),
    restated(
        "trtllm.fp8_block",
        "tensorrt-llm",
        lambda size, tp: {"sharded_dim": size, **fp8(128)},
        trt_blocks_answer,
        size=WIDTHS,
    ),
    restated(
        "trtllm.nvfp4",
        "tensorrt-llm",
        lambda local, tp: {"K": local * tp, "N": 512, "style": "rows", **stored("nvfp4")},
        lambda local, tp: refused(
            local % 16, f"in_features {local} must be divisible by scaling_vector_size 16"
        ),
        local=range(8, 200, 8),
    ),
    restated(
        "trtllm.w4a8_moe",
        "tensorrt-llm",
        lambda local, tp: {
            "moe_intermediate_size": local * tp,
            "quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
        },
        lambda local, tp: refused(
            local % 128, f"K shape is required to be multiple of 128, received {local}."
        ),
        local=range(32, 1000, 32),
    ),
    restated(
        "trtllm.moe_floor",
        "tensorrt-llm",
        lambda width, tp: {"moe_intermediate_size": width},
        lambda width, tp: ("silent_wrong" if width % tp else "ok", None),
        width=WIDTHS,
    ),
]


@pytest.mark.parametrize("one", [*TGI, *TENSORRT_LLM], ids=lambda one: one.rules[0])
def test_a_rule_of_a_serving_engine_is_what_its_text_says(one: Restated) -> None:
    hold_to_its_text(one)
