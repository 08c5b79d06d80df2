"""Plans that accept a degree they should refuse, and what the ranks then run with.

Requirement: an illegal degree that runs is the quietest of all bugs, since every shape fits. The
specs are illegal at degrees 2, 3, 4 and 8, so that one of each is enough.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tpcheck.faults.planting import plan_fault

if TYPE_CHECKING:
    from tpcheck.spec import ModelSpec

_FIVE_HEADS = {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 48}


@plan_fault(
    "gpustack/gpustack#885",
    "the degree is held against sizes and not heads: 5 heads of 48 become tp heads of 240 / tp",
    needs=_FIVE_HEADS,
)
def heads_sliced_by_size(spec: ModelSpec, tp_size: int) -> ModelSpec:
    head_dim = spec.num_attention_heads * spec.head_dim // tp_size
    return replace(
        spec, num_attention_heads=tp_size, num_key_value_heads=tp_size, head_dim=head_dim
    )


@plan_fault(
    "vipshop/cache-dit#581",
    "heads are divided by tp without a look at the remainder, whose heads are lost",
    needs={"num_attention_heads": 13, "num_key_value_heads": 13, "head_dim": 8},
)
def heads_floor_divided(spec: ModelSpec, tp_size: int) -> ModelSpec:
    heads = spec.num_attention_heads // tp_size * tp_size
    return replace(spec, num_attention_heads=heads, num_key_value_heads=heads)


@plan_fault(
    "pytorch/torchtitan#2577",
    "KV heads are not held against the degree: a rank's query heads need parts of two groups",
    needs={"num_attention_heads": 120, "num_key_value_heads": 5, "head_dim": 2},
)
def kv_groups_not_validated(spec: ModelSpec, tp_size: int) -> ModelSpec:
    return replace(spec, num_key_value_heads=tp_size)


@plan_fault(
    "ai-dynamo/aiconfigurator#729",
    "the FFN's width is divided by tp without a look at the remainder, which is dropped",
    needs={"intermediate_size": 97},
)
def channels_floor_divided(spec: ModelSpec, tp_size: int) -> ModelSpec:
    return replace(spec, intermediate_size=spec.intermediate_size // tp_size * tp_size)
