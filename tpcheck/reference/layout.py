"""The decoder's weights and their cuts, as the plan says them: where the decoder looks them up.

Requirement: what splits which weight is said once, beside the plan, because costs are counted from
it without a decoder (shard_plan: `tensors`, `cuts`). Torch-free.
"""

from __future__ import annotations

from tpcheck.shard_plan.cuts import (
    Cut,
    activation_placement,
    attended_places,
    counted_places,
    cut,
    is_even,
)
from tpcheck.shard_plan.tensors import LogicalTensor, logical_tensors

__all__ = [
    "Cut",
    "LogicalTensor",
    "activation_placement",
    "attended_places",
    "counted_places",
    "cut",
    "is_even",
    "logical_tensors",
]
