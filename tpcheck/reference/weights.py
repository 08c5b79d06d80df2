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
from tpcheck.reference.layout import Cut, cut, logical_tensors
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
        """Return this rank's part of a weight, with zeros where it is padded."""
        tensor = self._tensors[name]
        part = self.cut(name)
        runs = [
            self._source.slice(name, tensor.shape, part.dim, run.whole.start, run.whole.stop)
            for run in part.runs
        ]
        local = runs[0] if len(runs) == 1 else torch.cat(runs, part.dim)
        if part.pads:
            behind = [0, 0] * (local.ndim - 1 - part.dim)
            local = functional.pad(local, (*behind, 0, part.pads))
        local = local.contiguous()
        self.shards[name] = (local, part.placement)
        return local

    def cut(self, name: str) -> Cut:
        """Return which part of a weight this rank holds."""
        return cut(self._spec, self._plan, self._rank, self._tensors[name])

    def real(self, name: str) -> int | None:
        """Return how many indices of a weight's split dim are real; None where all are."""
        part = self.cut(name)
        return part.real if part.pads else None

    def load_optional(self, name: str) -> torch.Tensor | None:
        """Return this rank's part of a weight, None where the spec has no such weight."""
        return self.load(name) if name in self._tensors else None
