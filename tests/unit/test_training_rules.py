"""Every rule of Megatron-LM, DeepSpeed and NeuronX, held to its own text at any size."""

from __future__ import annotations

import pytest

from tests.engine_rules import Answer, Restated, hold_to_its_text, refused, restated

HEADS = [*range(1, 40), 48, 64, 71, 96, 128]
WIDTHS = [96 * one for one in range(1, 60)] + [11008, 14336, 27648, 29568, 10944, 9728]
FIRST_DIM = "First dimension of the tensor should be divisible by tensor parallel size"
VOCABS = [*range(32000, 32200, 7), 50257, 100352, 128256, 129280, 152064]


# -- Megatron-LM


def groups_answer(groups: int, tp: int) -> Answer:
    text = (
        f"num_query_groups ({groups}) must be a multiple or divisor of tensor_model_parallel_size"
        f" ({tp})."
    )
    way = "allgather_kv" if groups < tp else "ok"
    return refused(groups % tp and tp % groups, text, way)


def inference_answer(width: int, tp: int) -> Answer:
    for side, size in (("output", 2 * width), ("input", width)):
        if size % tp:
            return "error", f"{side}_size ({size}) must be divisible by tp_size ({tp})"
    return "ok", None


MEGATRON = [
    restated(
        "megatron.heads",
        "megatron",
        lambda heads, tp: {"num_attention_heads": heads},
        lambda heads, tp: refused(
            heads % tp,
            f"num_attention_heads ({heads}) must be a multiple of tensor_model_parallel_size"
            f" ({tp}).",
        ),
        heads=HEADS,
    ),
    restated(
        "megatron.groups megatron.kv_allgather",
        "megatron",
        lambda groups, tp: {"num_query_groups": groups},
        groups_answer,
        groups=range(1, 17),
    ),
    restated(
        "megatron.vocab",
        "megatron",
        lambda vocab, by, tp: {"vocab_size": vocab, "make_vocab_size_divisible_by": by},
        lambda vocab, by, tp: ("pad" if vocab % (by * tp) else "ok", None),
        vocab=[50304, 51200, *VOCABS],
        by=[1, 64, 128],
    ),
    restated(
        "megatron.divide",
        "megatron",
        lambda width, tp: {"moe_intermediate_size": width},
        lambda width, tp: refused(width % tp, f"{width} is not divisible by {tp}"),
        width=WIDTHS,
    ),
    restated(
        "megatron.inference_linear",
        "megatron",
        lambda width, tp: {
            **{"intermediate_size": width, "inference_layers": True},
            "tensor": "gate_up_proj",
        },
        lambda width, tp: inference_answer(width, tp),
        width=[*range(1, 40), *WIDTHS],
    ),
    restated(
        "megatron.sp",
        "megatron",
        lambda length, tp: {"sequence_parallel": True, "seq_len": length},
        lambda length, tp: (
            (
                "late_error",
                "First dimension of the tensor should be divisible by tensor parallel size",
            )
            if length % tp
            else ("ok", None)
        ),
        length=range(1, 200),
    ),
]

# -- DeepSpeed


def kv_slices_answer(kv: int, tp: int) -> Answer:
    if kv < tp:
        return "uneven_empty_rank", None
    return ("uneven" if kv % tp else "ok"), None


def grains_answer(grains: int, grain: int, rest: int, tp: int) -> Answer:
    sizes = [(grains // tp + (rank < grains % tp)) * grain for rank in range(tp)]
    sizes[-1] += rest
    assert sum(sizes) == grains * grain + rest
    if min(sizes) == max(sizes):
        return "ok", None
    return ("uneven" if min(sizes) else "uneven_empty_rank"), None


def v2_answer(kv: int, tp: int) -> Answer:
    uneven = "Currently do not support uneven partitioning of KV heads for GQA."
    apart = "Currently do not support distributing KV heads across different numbers of shards."
    if kv >= tp:
        return refused(kv % tp, uneven)
    return refused(tp % kv, apart, "uneven_empty_rank")


DEEPSPEED = [
    restated(
        "deepspeed.kv_slices deepspeed.kv_empty",
        "deepspeed",
        lambda kv, tp: {"num_attention_heads": 4 * kv, "num_key_value_heads": kv, "head_dim": 64},
        kv_slices_answer,
        kv=range(1, 17),
    ),
    restated(
        "deepspeed.grain deepspeed.sum",
        "deepspeed",
        lambda grains, grain, rest, tp: {
            "intermediate_size": grains * grain + rest,
            "tp_grain_size": grain,
        },
        grains_answer,
        grains=range(1, 100),
        grain=[64],
        rest=[0, 1, 17],
    ),
    restated(
        "deepspeed.lm_head",
        "deepspeed",
        # the head is cut by hidden_size, so no vocabulary is uneven
        lambda vocab, hidden, tp: {
            **{"vocab_size": vocab, "hidden_size": 64 * hidden, "num_attention_heads": tp},
            "tensor": "lm_head",
        },
        lambda vocab, hidden, tp: grains_answer(hidden, 64, 0, tp),
        vocab=VOCABS,
        hidden=range(1, 100),
    ),
    restated(
        "deepspeed.codegen",
        "deepspeed",
        lambda kv, tp: {"model_type": "codegen", "num_key_value_heads": kv},
        lambda kv, tp: refused(
            tp > 1 and kv % (4 * tp),
            "codgen autoTP requires num_kv_heads % (mp_size*codegen_mp_num) == 0",
        ),
        kv=range(4, 65, 4),
        tp=[1, 2, 3, 4],
    ),
    restated(
        "deepspeed.yuan",
        "deepspeed",
        lambda heads, tp: {"model_type": "yuan", "num_attention_heads": heads},
        lambda heads, tp: (
            ("error", f"world_size {tp} is larger than half of num_heads {heads}")
            if 2 * tp > heads
            else kv_slices_answer(heads, tp)
        ),
        heads=range(1, 40),
    ),
    restated(
        "deepspeed.v2_heads",
        "deepspeed",
        lambda heads, tp: {"num_attention_heads": heads, "num_key_value_heads": 1, "mode": "v2"},
        lambda heads, tp: refused(
            heads < tp,
            "There must be at least as many query heads as there are shards.",
            "uneven_empty_rank" if tp > 1 else "ok",
        ),
        heads=range(1, 17),
    ),
    restated(
        "deepspeed.v2_kv deepspeed.v2_kv_rep",
        "deepspeed",
        lambda kv, tp: {
            **{"num_key_value_heads": kv, "mode": "v2"},
            **{"num_attention_heads": 720720 * kv, "head_dim": 1},
        },
        v2_answer,
        kv=range(1, 17),
    ),
]

# -- NeuronX Distributed

NEURONX = [
    restated(
        "nxd.heads",
        "neuronx-distributed",
        lambda heads, tp: {"num_attention_heads": heads},
        lambda heads, tp: ("pad" if heads % tp else "ok", None),
        heads=HEADS,
    ),
    restated(
        "nxd.kv_replicate nxd.kv_mha",
        "neuronx-distributed",
        lambda kv, tp: {"num_attention_heads": kv * tp, "num_key_value_heads": kv},
        # both copy heads until every rank has whole ones, which is recorded as pad
        lambda kv, tp: ("ok" if kv % tp == 0 else "pad", None),
        kv=range(2, 17),
        tp=range(2, 17),
    ),
    restated(
        "nxd.qkv_linear nxd.qkv_linear2",
        "neuronx-distributed",
        lambda kv, times, tp: {
            **{"num_key_value_heads": kv, "head_dim": 1, "kv_size_multiplier": times},
            "tensor": "qkv_proj",
        },
        lambda kv, times, tp: refused(
            tp % times or kv * times % tp,
            "tp_world_size should be divisible by kv_size_multiplier"
            if tp % times
            else "kv_output_dim*kv_size_multiplier should be divisible by tp_world_size",
        ),
        kv=range(1, 9),
        times=[1, 2, 3, 4, 8],
    ),
    restated(
        "nxd.linear_pad",
        "neuronx-distributed",
        lambda width, grain, tp: {
            **{"intermediate_size": width, "pad_alignment_size_per_rank": grain},
        },
        lambda width, grain, tp: ("pad" if width % (tp * grain) else "ok", None),
        width=WIDTHS,
        grain=[1, 8, 32],
    ),
]


@pytest.mark.parametrize("one", [*MEGATRON, *DEEPSPEED, *NEURONX], ids=lambda one: one.rules[0])
def test_a_rule_of_a_training_framework_is_what_its_text_says(one: Restated) -> None:
    hold_to_its_text(one)
