"""One rank's part of quantized weights: cut as the plan says, then dequantized.

Requirement: nothing here knows a format. What a rank holds of each stored tensor, and which of it
serves which feature, comes from the plan (shard_plan: quant); the arithmetic is quant's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from tpcheck.groups.base import TPGroup
from tpcheck.placement import Placement, Replicate
from tpcheck.quantization import Quantization
from tpcheck.reference.layout import Cut, cut, logical_tensors
from tpcheck.reference.quant import dequantize
from tpcheck.reference.quantizing import Shared, quantize_part
from tpcheck.reference.rounding import InputRounding
from tpcheck.reference.sources import Weights, joined, stored_part
from tpcheck.shard_plan import ShardPlan
from tpcheck.shard_plan.quant import components, held, quantized, serving, stored_as
from tpcheck.spec import ModelSpec

Shards = dict[str, tuple[torch.Tensor, Placement]]


class QuantizedWeights:
    """The quantized weights of a spec, as far as one rank holds them."""

    def __init__(self, spec: ModelSpec, plan: ShardPlan, tp: TPGroup, source: Weights) -> None:
        self._spec, self._plan, self._tp, self._source = spec, plan, tp, source
        self._tensors = logical_tensors(spec)

    def holds(self, name: str) -> bool:
        """Return whether a weight is quantized."""
        return quantized(self._spec, name, self._tensors[name])

    def load(self, name: str, part: Cut) -> tuple[torch.Tensor, Shards]:
        """Return a weight's real part in the compute dtype, and the stored tensors behind it."""
        if self._quantization.online:
            return self._load_online(name, part)
        weight = stored_as(self._quantization, self._tensors, name)
        stored = components(self._quantization, weight.shape)
        holdings = {
            suffix: held(part, component, self._plan.policy.scales, weight.offset)
            for suffix, component in stored.items()
        }
        parts = {
            suffix: stored_part(self._source.stored, weight, suffix, stored[suffix], holding.cut)
            for suffix, holding in holdings.items()
        }

        def served(suffix: str, side: int) -> torch.Tensor:
            component, holding = stored[suffix], holdings[suffix]
            indices = serving(component, holding, part, side, weight.shape[side])
            return torch.tensor(indices, dtype=torch.int64)

        local = dequantize(parts, self._quantization, served, self._tp.dtype).to(self._tp.device)
        module = name.removesuffix(".weight")
        return local, {
            f"{module}.{suffix}": (parts[suffix], holding.cut.placement)
            for suffix, holding in holdings.items()
        }

    def _load_online(self, name: str, part: Cut) -> tuple[torch.Tensor, Shards]:
        """Quantize now: a scale that ranks share is made of the largest magnitude on any."""
        shape = self._tensors[name].shape
        dense = joined(part, partial(self._source.slice, name, shape))
        features: list[Sequence[int]] = [range(size) for size in shape]
        features[part.dim] = [index for run in part.runs for index in range(*run.whole)]
        largest_on_any = partial(self._tp.all_reduce, op="max")
        shared = Shared(features[0], features[1], shape, largest_on_any)
        parts, numbers = quantize_part(dense, self._quantization, shared)
        module = name.removesuffix(".weight")
        codes, scales = parts.items()
        return numbers.to(self._tp.dtype), {
            f"{module}.{codes[0]}": (codes[1], part.placement),
            f"{module}.{scales[0]}": (scales[1], Replicate()),
        }

    def input_rounding(self, name: str) -> InputRounding | None:
        """Return how the inputs that meet a weight are rounded; None where they are not."""
        quantization, tensor = self._quantization, self._tensors[name]
        if not quantization.activation_grid:
            return None
        size, ranks = tensor.shape[1], range(self._plan.tp_size)
        group = quantization.group_size if quantization.activations == "group" else size
        held_features, tp = [range(size)], None
        if tensor.dim == 1:
            cuts = [cut(self._spec, self._plan, rank, tensor) for rank in ranks]
            held_features = [range(*run.whole) for run in cuts[self._tp.rank].runs]
            edges = {edge for part in cuts for run in part.runs for edge in run.whole}
            tp = self._tp if any(edge % group for edge in edges - {size}) else None
        groups = [feature // group for features in held_features for feature in features]
        count = -(-size // group)
        grid = quantization.activation_grid
        return InputRounding(grid, groups, count, tp, self._tp.device)

    @property
    def _quantization(self) -> Quantization:
        assert self._spec.quantization is not None
        return self._spec.quantization
