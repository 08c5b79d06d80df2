"""vLLM's rules of groups, tiles and small blocks, held to their own text at any size."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine_rules import Answer, Restated, hold_to_its_text, refused, restated

WIDTHS = [96 * one for one in range(1, 60)] + [11008, 14336, 27648, 29568, 10944, 9728]


def one_weight(k: int, n: int, style: str, **quant: Any) -> dict[str, Any]:
    return {"K": k, "N": n, "style": style, **quant}


def gptq(group: int, **fields: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "gptq", "group_size": group, **fields}}


def ct(group: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "group_size": group}
    groups = {"group_0": {"weights": weights}}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


def wna16_answer(k: int, group: int, tp: int, act: str) -> Answer:
    if k % group == 0 and k % tp == 0 and (k // tp) % group == 0:
        tiles = (k // tp) % 128 == 0  # N is 512, whole in both tile shapes
        return ("ok" if tiles or (k // tp) % 64 == 0 else "pad"), None
    return ("silent_wrong", None) if act == "float16" else ("error", None)


def machete_answer(k: int, group: int, tp: int) -> Answer:
    local = k // tp
    if local % group == 0:
        # Machete's K tile is 64; Marlin takes the others, and pads
        return ("ok" if local % 64 == 0 else "pad"), None
    return ("late_error" if local % 64 == 0 else "error"), None


def marlin_text(n: int, k: int) -> str | None:
    advice = "Consider reducing tensor_parallel_size or running with --quantization gptq."
    for size, name, tile in ((n, "output", "n = 64"), (k, "input", "k = 128")):
        if size % int(tile.split()[-1]):
            space = "  " if name == "output" else " "
            return (
                f"Weight {name}_size_per_partition = {size} is not divisible by{space}min_thread_"
                f"{tile}. {advice}"
            )
    return None


def marlin_experts_answer(local: int, group: int, tp: int) -> Answer:
    """Tiles of 64 in whole groups fit Marlin; others are padded, or their groups cut."""
    if local % group == 0 and local % 64 == 0:
        return "ok", None
    return ("pad", None) if local % group == 0 else gcd_group(local, group)


def gcd_group(local: int, group: int) -> Answer:
    while local % group and group >= 32:
        group //= 2
    return ("fallback", None) if group >= 32 else ("error", "")


ALIGNED = (
    "The {} size is not aligned with the quantized weight shape. This can be caused by too large"
    " tensor parallel size."
)
CT_TEXT = (
    "Weight input_size_per_partition={} for layer 'model.layers.0.mlp.down_proj' is not divisible"
    " by group_size={}. This happens when tensor_parallel_size splits the layer input into shards"
    " that are not a whole number of quant groups. Consider reducing tensor_parallel_size."
)
CT_MOE_TEXT = (
    "CompressedTensors WNA16 MoE with static group scales requires the MoE intermediate size per"
    " tensor-parallel partition ({}) to be divisible by group_size ({}). Scale groups would"
    " otherwise cross TP shard boundaries; use a compatible TP size or enable expert parallelism."
)

VLLM_GROUPS = [
    restated(
        "vllm.moe_wna16",
        "vllm",
        lambda local, group, tp: {
            **{"moe_intermediate_size": local * tp, "hidden_size": 2048},
            "quantization_config": {"quant_method": "awq", "group_size": group},
        },
        marlin_experts_answer,
        local=[32, 64, 96, 128, 160, 192, 208, 352],
        group=[32, 64, 128],
    ),
    restated(
        "vllm.gptq_desc_act",
        "vllm",
        lambda group, act, tp: gptq(group, desc_act=act),
        lambda group, act, tp: refused(
            act and group != -1,
            "GPTQ group activation ordering (desc_act=True) is no longer supported. Use a"
            " checkpoint with static activation ordering or desc_act=False.",
        ),
        group=[-1, 32, 128],
        act=[False, True],
    ),
    restated(
        "vllm.wna16_group vllm.wna16_exllama_straddle vllm.wna16_tile",
        "vllm",
        lambda k, group, act, tp: {
            **one_weight(k, 512, "rows", **gptq(group)),
            **{"torch_dtype": act, "compute_capability": "8.0"},
        },
        wna16_answer,
        k=[128 * 12 * one for one in range(1, 40)],
        group=[32, 64, 128],
        act=["float16", "bfloat16"],
        tp=[1, 2, 3, 4, 6, 8, 12],
    ),
    restated(
        "vllm.wna16_machete_straddle",
        "vllm",
        lambda k, group, tp: {
            **one_weight(k, 512, "rows", **gptq(group)),
            **{"torch_dtype": "bfloat16", "compute_capability": "9.0"},
        },
        machete_answer,
        k=[128 * 12 * one for one in range(1, 40)],
        group=[64, 128],
        tp=[1, 2, 3, 4, 6, 8, 12],
    ),
    restated(
        "vllm.marlin_legacy",
        "vllm",
        lambda local, n, tp: one_weight(
            local * tp, n, "rows", quant="fp8", linear_backend="marlin"
        ),
        lambda local, n, tp: refused(marlin_text(n, local), marlin_text(n, local) or ""),
        local=[64, 96, 128, 256, 320, 384],
        n=[32, 64, 100, 256],
    ),
    restated(
        "vllm.marlin_legacy",
        "vllm",
        lambda local, hidden, tp: {
            **{"moe_intermediate_size": local * tp, "hidden_size": hidden},
            **{"quant": "nvfp4", "moe_backend": "marlin"},
        },
        lambda local, hidden, tp: refused(
            marlin_text(2 * local, hidden) or marlin_text(hidden, local),
            marlin_text(2 * local, hidden) or marlin_text(hidden, local) or "",
        ),
        local=[16, 32, 64, 96, 128, 256],
        hidden=[2048, 2880, 2112],
    ),
    restated(
        "vllm.awq vllm.awq_out",
        "vllm",
        lambda local, n, tp: one_weight(local * tp, n, "rows", quant="awq", group_size=64),
        lambda local, n, tp: refused(
            local % 64 or n % 8, ALIGNED.format("input" if local % 64 else "output")
        ),
        local=[32, 64, 96, 128, 192, 256],
        n=[8, 12, 64, 100],
    ),
    restated(
        "vllm.ct_wna16",
        "vllm",
        lambda local, group, tp: one_weight(local * tp, 512, "rows", **ct(group)),
        lambda local, group, tp: refused(local % group, CT_TEXT.format(local, group)),
        local=[128, 192, 256, 320, 448],
        group=[64, 128],
        constant=False,
    ),
    restated(
        "vllm.ct_wna16_moe",
        "vllm",
        lambda local, group, tp: {"moe_intermediate_size": local * tp, **ct(group)},
        lambda local, group, tp: refused(local % group, CT_MOE_TEXT.format(local, group)),
        local=WIDTHS,
        group=[32, 64, 128],
    ),
    restated(
        "vllm.moe_wna16",
        "vllm",
        lambda local, group, tp: {
            "moe_intermediate_size": local * tp,
            "quantization_config": {"quant_method": "moe_wna16", "group_size": group},
        },
        lambda local, group, tp: gcd_group(local, group) if local % group else ("ok", None),
        local=[32, 48, 64, 96, 128, 160, 208],
        group=[64, 128],
    ),
    restated(
        "vllm.nvfp4",
        "vllm",
        lambda local, tp: one_weight(local * tp, 512, "rows", quant="modelopt_fp4"),
        lambda local, tp: refused(
            local % 16, "Unsupported model when in features size is not multiple of 16"
        ),
        local=range(8, 200, 8),
    ),
    restated(
        "vllm.nvfp4_pad",
        "vllm",
        lambda local, n, tp: one_weight(16 * local * tp, n, "rows", quant="nvfp4"),
        lambda local, n, tp: ("pad" if (16 * local) % 32 or n % 32 else "ok", None),
        local=range(1, 20),
        n=[64, 80, 96],
    ),
    restated(
        "vllm.nvfp4_quark",
        "vllm",
        lambda local, tp: one_weight(local * tp, 512, "rows", quant="quark_nvfp4"),
        lambda local, tp: refused(
            local % 16, f"Input size per partition ({local}) must be divisible by group size (16)"
        ),
        local=range(8, 200, 8),
    ),
    restated(
        "vllm.mxfp4_online",
        "vllm",
        lambda local, tp: one_weight(local * tp, 512, "rows", quant="mxfp4_online"),
        lambda local, tp: refused(
            local % 32, f"MXFP4 requires input_size_per_partition ({local}) to be divisible by 32."
        ),
        local=range(16, 400, 16),
    ),
    restated(
        "vllm.mxfp4_gpt_oss",
        "vllm",
        lambda blocks, tp: {"moe_intermediate_size": 32 * blocks, "quant": "mxfp4"},
        # the last rank's missing blocks are padding: recorded as pad, 2880 over 8 ranks
        lambda blocks, tp: ("pad" if blocks % tp else "ok", None),
        blocks=range(1, 100),
    ),
    restated(
        "vllm.removed_quant",
        "vllm",
        lambda method, tp: {"quantization_config": {"quant_method": method}},
        lambda method, tp: refused(
            method in ("bitsandbytes", "gguf", "exl2"),
            f"Unknown quantization method: {method}. Must be one of [...]",
        ),
        method=["bitsandbytes", "gguf", "exl2", "awq", "fp8"],
    ),
]


@pytest.mark.parametrize("one", VLLM_GROUPS, ids=lambda one: one.rules[0])
def test_a_rule_of_quantized_vllm_is_what_its_text_says_at_any_size(one: Restated) -> None:
    hold_to_its_text(one)
