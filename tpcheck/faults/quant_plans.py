"""Plans that give two ranks parts of one quantization block, group or word.

Requirement: such a degree mostly runs, with scales that belong to other features. What ranks run
with here is the model that the plan took this one for, illegal degrees of it being 2, 3, 4 and 8.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tpcheck.faults.planting import plan_fault
from tpcheck.quantization import Quantization

if TYPE_CHECKING:
    from tpcheck.spec import ModelSpec

_HEADS = {"num_attention_heads": 24, "num_key_value_heads": 24, "head_dim": 16}


def _read_with(spec: ModelSpec, **fields: object) -> ModelSpec:
    assert spec.quantization is not None
    return replace(spec, quantization=replace(spec.quantization, **fields))  # type: ignore[arg-type]


@plan_fault(
    "vllm-project/vllm#54178",
    "blocks are held against the fused width 2 * 120, of which a rank's half ends within one",
    needs={**_HEADS, "intermediate_size": 120, "quantization": Quantization("fp8", 16, 16)},
)
def blocks_of_the_fused_width(spec: ModelSpec, tp_size: int) -> ModelSpec:
    return _read_with(spec, group_size=1, block_rows=1)


@plan_fault(
    "ROCm/ATOM#442",
    "blocks are held against the rows that a rank gets, and not against its columns",
    needs={**_HEADS, "intermediate_size": 120, "quantization": Quantization("fp8", 16, 1)},
)
def blocks_of_rows_only(spec: ModelSpec, tp_size: int) -> ModelSpec:
    return _read_with(spec, group_size=0)


@plan_fault(
    "vllm-project/vllm#21695",
    "groups are divided by tp without a look at the remainder, whose features are lost",
    needs={**_HEADS, "intermediate_size": 31 * 16, "quantization": Quantization("awq", 16)},
)
def groups_floor_divided(spec: ModelSpec, tp_size: int) -> ModelSpec:
    return replace(spec, intermediate_size=31 // tp_size * tp_size * 16)


@plan_fault(
    "vllm-project/vllm#53242",
    "the scales of q, k and v are dealt out by KV head, which ends within a block",
    needs={
        "num_attention_heads": 24,
        "num_key_value_heads": 24,
        "head_dim": 8,
        "quantization": Quantization("fp8", 0, 128, skip=("mlp",)),
    },
)
def blocks_by_kv_head(spec: ModelSpec, tp_size: int) -> ModelSpec:
    return _read_with(spec, block_rows=spec.head_dim)


@plan_fault(
    "modelscope/mcore-bridge#32",
    "a rank rounds its own blocks up: together they have more scales than the weight",
    needs={**_HEADS, "intermediate_size": 24 * 17, "quantization": Quantization("fp8", 16)},
)
def blocks_rounded_up_per_rank(spec: ModelSpec, tp_size: int) -> ModelSpec:
    blocks = -(-spec.intermediate_size // tp_size // 16)
    return replace(spec, intermediate_size=16 * blocks * tp_size)


@plan_fault(
    "InternLM/lmdeploy#4911",
    "a rank's width is held against groups of 4, and not against the 8 codes of a word",
    needs={**_HEADS, "intermediate_size": 12 * 8 + 12, "quantization": Quantization("awq", 4)},
)
def words_taken_apart(spec: ModelSpec, tp_size: int) -> ModelSpec:
    return replace(spec, intermediate_size=-(-spec.intermediate_size // 8 // tp_size) * 8 * tp_size)
