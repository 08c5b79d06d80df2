"""Cuts through quantization blocks, groups and words that are run, with scales of other features.

Requirement: each is a degree that the plan refuses, and an engine that runs it is caught there. A
subject that declares no spec has no plan: then the same fault has to show in the numbers
(tests/faults/test_straddling_faults.py). Scales are copied to the ranks that share them, as
SplitPolicy(scales="replicate") has it, until a fault takes others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tpcheck.faults.planting import Decoder, Plant, fault
from tpcheck.faults.quant_parts import DOWN, GATE, IN, KEY, OUT, UP, VALUE, reread
from tpcheck.quantization import Quantization
from tpcheck.shard_plan import SplitPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    from tpcheck.groups.base import TPGroup


def straddling(
    thread: str, description: str, how: Quantization, **fields: Any
) -> Callable[[Plant], Plant]:
    """Register a fault of a plan that gives two ranks parts of one unit: 408 are 25.5 of 16."""
    return fault(
        thread,
        description,
        "plan",
        needs={"intermediate_size": 408, "quantization": how, **fields},
        policy=SplitPolicy(scales="replicate", intermediate="uneven"),
        drift=False,
        reason="a degree that should have been refused is not compared",
    )


def _only_mlp(format_: str, group_size: int, **fields: Any) -> Quantization:
    return Quantization(format_, group_size, skip=("self_attn",), **fields)


@straddling(
    "vllm-project/vllm#1258",
    "a rank gets its width over the group, rounded down, of scales: its groups become wider",
    _only_mlp("gptq", 16, symmetric=False),
)
def scale_rows_rounded_down(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    with reread(decoder, tp, DOWN) as one:
        width = len(one.features(tp.rank))
        rows = width // one.quantization.group_size
        for suffix in ("scales", "qzeros"):
            one.parts[suffix] = one.whole(suffix)[tp.rank * rows :][:rows]
            served = torch.arange(width) // (width // rows)
            one.serving[suffix, IN] = served.clamp_max(rows - 1)


@straddling(
    "modelscope/mcore-bridge#32",
    "a rank rounds its own blocks up, so that every rank's begin at its first feature",
    _only_mlp("fp8", 16),
)
def blocks_of_each_rank(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    with reread(decoder, tp, DOWN) as one:
        whole, width = one.whole("weight_scale"), len(one.features(tp.rank))
        blocks = torch.arange(width) // one.quantization.group_size
        first = tp.rank * (int(blocks[-1]) + 1)
        one.parts["weight_scale"] = whole
        one.serving["weight_scale", IN] = (first + blocks).clamp_max(whole.shape[1] - 1)


@straddling(
    "vllm-project/vllm#52997",
    "where a rank's scales begin is rounded up by itself, and so is how many they are",
    _only_mlp("fp8", 16, block_rows=16),
)
def scale_offsets_rounded_up(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    for name in (GATE, UP):
        with reread(decoder, tp, name) as one:
            whole, features = one.whole("weight_scale_inv"), one.features(tp.rank)
            rows = one.quantization.block_rows
            blocks = -(-features[0] // rows) + torch.arange(len(features)) // rows
            one.parts["weight_scale_inv"] = whole
            one.serving["weight_scale_inv", OUT] = blocks.clamp_max(len(whole) - 1)


@straddling(
    "vllm-project/vllm#53242",
    "the scales of blocks are dealt out evenly by KV head, which ends within a block",
    Quantization("fp8", 0, 20, skip=("mlp",)),
    num_attention_heads=24,
    num_key_value_heads=24,
    head_dim=26,
)
def scales_by_kv_head(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    head_dim = decoder.spec.head_dim
    for name in (KEY, VALUE):
        with reread(decoder, tp, name) as one:
            one.parts["weight_scale"] = one.whole("weight_scale")
            heads = torch.tensor(one.features(tp.rank)) // head_dim
            one.serving["weight_scale", OUT] = heads  # one block of 20 rows for each head of 26


@straddling(
    "InternLM/lmdeploy#4911",
    "a rank's codes begin within a word, and are read from where the word begins",
    _only_mlp("awq", 4, symmetric=False),
    intermediate_size=100,
)
def codes_from_where_words_begin(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    for name in (GATE, UP):
        with reread(decoder, tp, name) as one:
            for suffix in ("qweight", "qzeros"):
                one.serving[suffix, OUT] = torch.arange(len(one.features(tp.rank)))


@straddling(
    "pytorch/ao#2434",
    "groups of activations are counted from a rank's first feature, not from the first of all",
    _only_mlp("fp8", 16, activations="group"),
)
def activation_groups_of_each_rank(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    rounding = decoder.layers[0].mlp.down_proj.round_input
    rounding.groups = torch.arange(len(rounding.groups)) // 16
    rounding.tp = None
