"""Where a rank's weights come from, and the one place where they are cut.

Requirement: generated weights and a checkpoint's look the same to the decoder, and so do quantized
ones. A source is asked for a slice, never for a whole tensor that it would have to read: that is
what lets every rank of a 70B checkpoint read its own bytes only.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

from tpcheck.groups.base import TPGroup
from tpcheck.placement import Placement
from tpcheck.reference.layout import Cut, cut, logical_tensors
from tpcheck.reference.quantized_weights import QuantizedWeights
from tpcheck.reference.rounding import InputRounding
from tpcheck.reference.sources import GeneratedWeights, Weights, joined
from tpcheck.shard_plan import ShardPlan
from tpcheck.spec import ModelSpec

__all__ = ["GeneratedWeights", "RankWeights", "Weights"]


class RankWeights:
    """One rank's cut of every weight; `shards` notes each with its placement as it is loaded.

    `late`: modules that come in numbers, experts, read their weights when they run (transient).
    """

    late = False

    def __init__(self, spec: ModelSpec, plan: ShardPlan, tp: TPGroup, source: Weights) -> None:
        self._spec, self._plan, self._rank = spec, plan, tp.rank
        self._source = source
        self._tensors = logical_tensors(spec)
        self._quantized = QuantizedWeights(spec, plan, tp, source)
        self.shards: dict[str, tuple[torch.Tensor, Placement]] = {}

    def load(self, name: str) -> torch.Tensor:
        """Return this rank's part of a weight, with zeros where it is padded."""
        tensor, part = self._tensors[name], self.cut(name)
        if self._quantized.holds(name):
            local, stored = self._quantized.load(name, part)
            self.shards |= stored
            return _padded(local, part)
        local = _padded(joined(part, partial(self._source.slice, name, tensor.shape)), part)
        self.shards[name] = (local, part.placement)
        return local

    def input_rounding(self, name: str) -> InputRounding | None:
        """Return how the inputs that meet a weight are rounded; None where they are not."""
        return self._quantized.input_rounding(name) if self._quantized.holds(name) else None

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


def _padded(local: torch.Tensor, part: Cut) -> torch.Tensor:
    """Return a rank's real part with its zeros behind it."""
    if not part.pads:
        return local
    behind = [0, 0] * (local.ndim - 1 - part.dim)
    return functional.pad(local, (*behind, 0, part.pads))
