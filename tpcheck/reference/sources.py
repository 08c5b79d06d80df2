"""Where slices of weights come from: what a source is, and the one that generates them.

Requirement: a quantized weight is asked for by its stored tensors, slice by slice as any other, and
given as stored: rounding a scale to the dtype of the activations makes another weight of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from tpcheck.groups.base import TPGroup
from tpcheck.quantization import Quantization
from tpcheck.reference.layout import Cut
from tpcheck.reference.quantizing import quantize
from tpcheck.shard_plan.quant import Component, StoredAs, first_index


class Weights(Protocol):
    """A source of weights, rounded to the storage dtype and cast to the compute dtype."""

    def slice(
        self, name: str, shape: tuple[int, ...], dim: int, start: int, stop: int
    ) -> torch.Tensor:
        """Return indices start to stop of `dim` of the whole tensor `name`, of `shape`."""
        ...

    def stored(
        self, weight: StoredAs, suffix: str, dim: int, start: int, stop: int
    ) -> torch.Tensor:
        """Return a slice of one stored tensor of a quantized weight, as it is stored."""
        ...


class GeneratedWeights:
    """Weights made from the case's seed by `tp.weight`, and quantized as a whole."""

    def __init__(self, tp: TPGroup, quantization: Quantization | None = None) -> None:
        self._tp = tp
        self._quantization = quantization
        self._parts: dict[str, dict[str, torch.Tensor]] = {}

    def slice(
        self, name: str, shape: tuple[int, ...], dim: int, start: int, stop: int
    ) -> torch.Tensor:
        """Return a slice of the generated tensor `name`. Scales are positive, and not alike."""
        whole = self._tp.weight(name, *shape)
        if name.endswith("_scale"):
            whole = (1 + whole.abs()) / 64
        return whole.narrow(dim, start, stop - start)

    def stored(
        self, weight: StoredAs, suffix: str, dim: int, start: int, stop: int
    ) -> torch.Tensor:
        """Return a slice of a stored tensor of the generated weight, quantized."""
        if weight.name not in self._parts:
            assert self._quantization is not None
            whole = self._tp.weight(f"{weight.name}.weight", *weight.shape)
            self._parts[weight.name] = quantize(whole, self._quantization)
        return self._parts[weight.name][suffix].narrow(dim, start, stop - start)


def stored_part(
    read: Callable[[StoredAs, str, int, int, int], torch.Tensor],
    weight: StoredAs,
    suffix: str,
    component: Component,
    part: Cut,
) -> torch.Tensor:
    """Return what a rank holds of a stored tensor: `part` counts from where the weight begins."""
    first = first_index(component, part.dim, weight.offset)
    return joined(
        part, lambda dim, start, stop: read(weight, suffix, dim, first + start, first + stop)
    )


def joined(part: Cut, read: Callable[[int, int, int], torch.Tensor]) -> torch.Tensor:
    """Return the runs of a cut, one behind the other; `read` takes dim, start and stop."""
    runs = [read(part.dim, *run.whole) for run in part.runs] or [read(part.dim, 0, 0)]
    return (runs[0] if len(runs) == 1 else torch.cat(runs, part.dim)).contiguous()
