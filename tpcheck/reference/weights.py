"""Where a rank's weights come from, and the one place where they are cut.

Requirement: generated weights and a checkpoint's look the same to the decoder. A source is asked
for a slice, never for a whole tensor that it would have to read: that is what lets every rank of a
70B checkpoint read its own bytes only.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

from tpcheck.groups.base import TPGroup
from tpcheck.placement import Placement
from tpcheck.reference.layout import cut, logical_tensors
from tpcheck.shard_plan import ShardPlan
from tpcheck.spec import ModelSpec


class Weights(Protocol):
    """A source of weights, rounded to the storage dtype and cast to the compute dtype."""

    def slice(
        self, name: str, shape: tuple[int, ...], dim: int, start: int, stop: int
    ) -> torch.Tensor:
        """Return indices start to stop of `dim` of the whole tensor `name`, of `shape`."""
        ...


class GeneratedWeights:
    """Weights made from the case's seed by `tp.weight`."""

    def __init__(self, tp: TPGroup) -> None:
        self._tp = tp

    def slice(
        self, name: str, shape: tuple[int, ...], dim: int, start: int, stop: int
    ) -> torch.Tensor:
        """Return a slice of the generated tensor `name`."""
        return self._tp.weight(name, *shape).narrow(dim, start, stop - start)


class RankWeights:
    """One rank's cut of every weight; `shards` notes each with its placement as it is loaded."""

    def __init__(self, spec: ModelSpec, plan: ShardPlan, rank: int, source: Weights) -> None:
        self._spec, self._plan, self._rank = spec, plan, rank
        self._source = source
        self._tensors = logical_tensors(spec)
        self.shards: dict[str, tuple[torch.Tensor, Placement]] = {}

    def load(self, name: str) -> torch.Tensor:
        """Return this rank's part of a weight, with zero rows where its vocabulary is padded."""
        tensor = self._tensors[name]
        part = cut(self._spec, self._plan, self._rank, tensor)
        local = self._source.slice(name, tensor.shape, part.dim, part.span.start, part.span.stop)
        if part.pads:
            behind = [0, 0] * (local.ndim - 1 - part.dim)
            local = functional.pad(local, (*behind, 0, part.pads))
        local = local.contiguous()
        self.shards[name] = (local, part.placement)
        return local

    def load_optional(self, name: str) -> torch.Tensor | None:
        """Return this rank's part of a weight, None where the spec has no such weight."""
        return self.load(name) if name in self._tensors else None
