"""Every rule of transformers, DTensor and ExLlama, held to its own text at any size."""

from __future__ import annotations

from typing import Any

import pytest

import tpcheck
from tests.engine_rules import Answer, Restated, hold_to_its_text, refused, restated

HEADS = [*range(1, 40), 48, 64, 71, 96, 128]
WIDTHS = [96 * one for one in range(1, 60)] + [11008, 14336, 27648, 29568, 10944, 9728]
LLAMA = {"model_type": "llama"}


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


# -- ExLlama


def grouped_answer(kv: int, head: int, tp: int) -> Answer:
    pairs = kv
    while head < 128 and pairs % 2 == 0:
        head, pairs = 2 * head, pairs // 2
    text = "Model's K/V heads cannot divide into 128-channel tensors"
    return refused(tp > 1 and head % 128, text)


EXLLAMA = [
    restated(
        "exllamav2.mlp",
        "exllamav2",
        lambda width, tp: {"intermediate_size": width},
        lambda width, tp: refused(
            tp > 1 and width % 128, "Model intermediate size must be divisible by 128"
        ),
        width=range(32, 4000, 32),
    ),
    restated(
        "exllamav2.arch",
        "exllamav2",
        lambda kind, tp: {"model_type": kind},
        lambda kind, tp: refused(
            tp > 1 and kind != "llama", f"Tensor-parallel is not supported for {kind}"
        ),
        kind=["llama", "mixtral", "phi3", "gemma2"],
    ),
    restated(
        "exllamav3.arch",
        "exllamav3",
        lambda kind, tp: {"model_type": kind},
        lambda kind, tp: refused(
            tp > 1 and kind != "llama", f"Tensor-parallel is not currently implemented for {kind}"
        ),
        kind=["llama", "deepseek_v3", "olmo3", "qwen3_next"],
    ),
    restated(
        "exllamav3.kv128",
        "exllamav3",
        lambda kv, head, tp: {"num_key_value_heads": kv, "head_dim": head},
        grouped_answer,
        kv=range(1, 17),
        head=[32, 48, 64, 80, 96, 128, 256],
    ),
]

# -- transformers


def late_heads_answer(heads: int, tp: int) -> Answer:
    if heads % tp == 0:
        return "ok", None
    width = next(one for one in chunk(heads * 64, tp) if one % 64)
    return "late_error", f"shape '[1, 7, -1, 64]' is invalid for input of size {7 * width}"


def split_scales_answer(width: int, tp: int) -> Answer:
    local = -(-width // tp)
    held = chunk(-(-width // 128), tp)
    if tp == 1 or local % 128 == 0:
        return ("uneven" if width % tp else "ok"), None
    return ("late_error" if any(one != -(-local // 128) for one in held) else "silent_wrong"), None


TRANSFORMERS = [
    restated(
        "hf.no_plan",
        "transformers",
        lambda kind, tp: {"model_type": kind},
        lambda kind, tp: refused(
            tp > 1 and kind != "llama",
            f"`tp_size={tp}` was requested, but `{'OPT' if kind == 'opt' else 'Falcon'}ForCausalLM`"
            " has no `tp_plan`. Pass `tp_plan` in `DistributedConfig`, add `base_model_tp_plan` to"
            " the model's config, or set `tp_size=1`.",
        ),
        kind=["llama", "opt", "falcon"],
    ),
    restated(
        "hf.heads",
        "transformers",
        lambda heads, tp: {**LLAMA, "num_attention_heads": heads, "head_dim": 64},
        late_heads_answer,
        heads=[one for one in HEADS if one > 16],
        tp=[1, 2, 3, 4, 5, 6, 8],
    ),
    restated(
        "hf.gathered_qkv",
        "transformers",
        lambda heads, tp: {
            **{"model_type": "phi3", "num_attention_heads": heads, "num_key_value_heads": heads},
        },
        lambda heads, tp: ("ok", None),
        heads=HEADS,
        constant=True,
    ),
    restated(
        "hf.uneven",
        "transformers",
        lambda width, tp: {**LLAMA, "intermediate_size": width},
        lambda width, tp: ("uneven" if width % tp else "ok", None),
        width=WIDTHS,
    ),
    restated(
        "hf.moe_stride",
        "transformers",
        lambda width, dtype, tp: {
            **{"model_type": "qwen3_moe", "moe_intermediate_size": width, "torch_dtype": dtype},
            "tensor": "experts",
        },
        lambda width, dtype, tp: (
            ("late_error", "strides should be multiple of 16 bytes")
            if width // tp * (4 if dtype == "float32" else 2) % 16
            else ("ok", None)
        ),
        width=range(240, 4000, 240),
        dtype=["float32", "bfloat16"],
        tp=[1, 2, 3, 4, 5, 6],
    ),
    restated(
        "hf.nvfp4",
        "transformers",
        lambda tp: {**LLAMA, **stored("nvfp4")},
        lambda tp: refused(
            tp > 1,
            "NVFP4 quantization does not support tensor parallelism yet because its scale metadata"
            " does not have a sharding plan.",
        ),
        tp=[1, 2, 3, 8],
    ),
    restated(
        "hf.fp8_block",
        "transformers",
        lambda width, tp: {**LLAMA, "intermediate_size": width, "hidden_size": 128, **fp8(128)},
        split_scales_answer,
        width=WIDTHS,
    ),
]

# -- torch DTensor


def shard_answer(size: int, tp: int) -> Answer:
    return ("uneven" if size % tp else "ok"), None


def embedding_answer(vocab: int, tp: int) -> Answer:
    if -(-vocab // tp) * (tp - 1) >= vocab and tp > 1:
        return "late_error", "index_select(): self indexing axis dim should be positive"
    return shard_answer(vocab, tp)


DTENSOR = [
    restated(
        "dtensor.shard",
        "pytorch-dtensor",
        lambda size, tp: {"sharded_dim": size},
        shard_answer,
        size=range(1, 200),
    ),
    restated(
        "dtensor.local_output",
        "pytorch-dtensor",
        lambda width, local, tp: {"intermediate_size": width, "use_local_output": local},
        lambda width, local, tp: (
            (("late_error" if local else "uneven"), None) if width % tp else ("ok", None)
        ),
        width=range(1, 200),
        local=[True, False],
    ),
    restated(
        "dtensor.view_heads",
        "pytorch-dtensor",
        lambda heads, tp: {
            **{"num_attention_heads": heads, "head_dim": 64, "num_key_value_heads": heads},
        },
        lambda heads, tp: ("late_error" if heads % tp else "ok", None),
        heads=HEADS,
    ),
    restated(
        "dtensor.embed_empty",
        "pytorch-dtensor",
        lambda vocab, tp: {"vocab_size": vocab},
        embedding_answer,
        vocab=[*range(1, 60), 32000],
    ),
]


@pytest.mark.parametrize("one", [*EXLLAMA, *TRANSFORMERS, *DTENSOR], ids=lambda one: one.rules[0])
def test_a_rule_of_a_library_is_what_its_text_says(one: Restated) -> None:
    hold_to_its_text(one)


@pytest.mark.parametrize(
    ("kind", "tp_size", "outcome"),
    [
        ("hrm_text", 1, "ok"),
        ("hrm_text", 2, "silent_wrong"),
        ("hrm_text", 4, "silent_wrong"),
        ("llama", 2, "ok"),
    ],
)
def test_what_is_cut_before_it_is_taken_apart_is_silently_wrong(kind, tp_size, outcome):
    # not among the recorded rules: tests/real/test_hf_adapter.py shows it
    config = {"model_type": kind, "num_attention_heads": 4, "num_key_value_heads": 4}
    (found,) = tpcheck.plan(config, engine="transformers", tp_sizes=(tp_size,))
    assert found.outcome == outcome
