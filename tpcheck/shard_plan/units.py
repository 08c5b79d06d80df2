"""How many features must stay together: kernel blocks, quantization blocks, groups, packed words.

Requirement: all of them hold jointly. A width of experts is rows to gate and up and columns to
down, a query head is rows to q and columns to o, and a KV group is query heads too, so that what
fits one of them alone does not fit the model.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from tpcheck.quantization import Quantization
from tpcheck.shard_plan.policy import SplitPolicy
from tpcheck.shard_plan.quant import IN, OUT, components, quantized
from tpcheck.shard_plan.tensors import logical_tensors
from tpcheck.spec import ModelSpec


class HeadUnits(NamedTuple):
    """In which counts query heads, KV heads, and whole KV groups keep units whole."""

    query: int
    kv: int
    group: int


def head_units(spec: ModelSpec, policy: SplitPolicy) -> HeadUnits:
    """Return in which counts heads are dealt out."""
    width, group = spec.head_dim, spec.num_attention_heads // spec.num_key_value_heads
    queries = math.lcm(policy.block, scale_unit(spec, policy, "query"))
    keys = math.lcm(policy.block, scale_unit(spec, policy, "kv"))
    kv = _times(keys, width)
    return HeadUnits(_times(queries, width), kv, math.lcm(kv, _times(queries, width * group)))


def width_unit(spec: ModelSpec, policy: SplitPolicy, split: str) -> int:
    """Return in which counts the features of a width are dealt out."""
    return math.lcm(policy.block, scale_unit(spec, policy, split))


def scale_unit(spec: ModelSpec, policy: SplitPolicy, split: str) -> int:
    """Return how many features of a `split` no cut may go between, because they share a scale."""
    if spec.quantization is None or policy.scales != "refuse":
        return 1
    return _scale_units(spec).get(split, 1)


def shared_features(quantization: Quantization, side: int) -> int:
    """Return how many features along a dim of the weight share a scale or a word, at least 1."""
    stored = components(quantization, (1, 1)).values()
    axes = [axis for component in stored for axis in component.axes]
    return math.lcm(*(axis.unit for axis in axes if axis and axis.side == side and axis.unit))


@lru_cache(maxsize=256)
def _scale_units(spec: ModelSpec) -> dict[str, int]:
    quantization = spec.quantization
    assert quantization is not None
    spec = one_of_each(spec)
    sides = {side: shared_features(quantization, side) for side in (OUT, IN)}
    units: dict[str, int] = {}
    for name, tensor in logical_tensors(spec).items():
        if quantized(spec, name, tensor):
            units[tensor.split] = math.lcm(units.get(tensor.split, 1), sides[tensor.dim])
    return units


def one_of_each(spec: ModelSpec) -> ModelSpec:
    """Return a spec with every kind of weight once: layers are alike, and so are experts.

    Where the quantization skips some by their numbers they are not, and all are left in.
    """
    skip = spec.quantization.skip if spec.quantization else ()
    if any(character.isdigit() for name in skip for character in name):
        return spec
    spec = replace(spec, num_hidden_layers=1)
    return replace(spec, num_experts=1, num_experts_per_tok=1) if spec.num_experts else spec


def _times(features: int, width: int) -> int:
    """Return how many things of `width` make up whole units of `features`."""
    return features // math.gcd(features, width)
