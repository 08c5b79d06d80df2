"""A TPGroup of one rank, for tests that need no other ranks."""

from __future__ import annotations

import torch

from tpcheck.groups.base import RecordedGroup, Recorder
from tpcheck.groups.weights import MemoryStore, WeightSource


def single_group(
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    weight_dtype: torch.dtype = torch.bfloat16,
    rank: int = 0,
    size: int = 1,
) -> RecordedGroup:
    """Return a group whose collectives are the identity; at size > 1 it can build, not reduce."""
    weights = WeightSource(seed=seed, dtype=dtype, weight_dtype=weight_dtype, store=MemoryStore())
    return RecordedGroup(
        rank=rank,
        size=size,
        device=torch.device("cpu"),
        dtype=dtype,
        weight_dtype=weight_dtype,
        weights=weights,
        recorder=Recorder(),
    )
