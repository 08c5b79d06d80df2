"""Which cuts go through a quantization block, group or word, and what would be legal instead.

Requirement: a degree that gives two ranks one scale is refused with the block, the size and the
degree, and with each way out: another degree, another width, a finer block, or copied scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

from tpcheck.quantization import Quantization
from tpcheck.shard_plan.dividing import Division, round_up
from tpcheck.shard_plan.policy import SplitPolicy
from tpcheck.shard_plan.quant import quantized, stored_as
from tpcheck.shard_plan.tensors import logical_tensors
from tpcheck.shard_plan.units import one_of_each, scale_unit
from tpcheck.shard_plan.words import Problem, Width
from tpcheck.spec import ModelSpec


def scale_problems(
    spec: ModelSpec, policy: SplitPolicy, width: Width, division: Division
) -> list[Problem]:
    """Return the rule of scales that a division of heads or features breaks, if it does."""
    unit = scale_unit(spec, policy, width.split)
    if unit == 1:
        return []
    assert spec.quantization is not None
    each = spec.head_dim if width.split in ("query", "kv") else 1
    total = width.size * each
    for rank, (start, stop) in enumerate(division.spans):
        cuts = {edge * each for edge in (start, stop) if stop > start and edge != width.size}
        if any(cut % unit for cut in cuts):
            held = (stop - start) * each
            line = (
                f"{width.where}: {width.name}={width.size}: rank {rank} gets {held} of {total}"
                f" features, but should get whole blocks of {unit}"
                f" (quantization: {spec.quantization.describe()})"
            )
            ways = _ways_out(spec.quantization, width, each, unit, division)
            return [Problem(line, tuple(ways))]
    return []


def _ways_out(
    quantization: Quantization, width: Width, each: int, unit: int, division: Division
) -> Iterator[str]:
    tp_size, total = len(division.spans), width.size * each
    padded = round_up(total, math.lcm(unit, each) * tp_size)
    yield (
        f"{total} features padded to {padded} would split into {padded // tp_size} per rank:"
        f" {width.name}={padded // each}"
    )
    edges = {edge * each for span in division.spans if span.size for edge in span}
    finer = math.gcd(unit, *(edge for edge in edges if edge != total))
    if finer > 1 and finer % quantization.pack == 0:  # words are no finer than they are
        first = division.spans[0].size * each
        yield f"so would blocks of {finer}: {first} per rank, {finer} divides {unit}"
    yield f"so would {_COPIES}"


_COPIES = 'copies of the scales that two ranks need: SplitPolicy(scales="replicate")'


def fused_problems(spec: ModelSpec, tp_size: int, policy: SplitPolicy) -> list[Problem]:
    """Return where a part of a fused tensor begins within a block that it shares with another."""
    if tp_size == 1 or spec.quantization is None or not spec.quantization.fused:
        return []
    found = []
    for name, offset, split in _parts(spec):
        unit = scale_unit(spec, policy, split)
        if offset % unit:
            layer = name.replace("model.layers.0", "layers.*").removesuffix(".weight")
            line = (
                f"{layer}: begins at feature {offset} of the fused tensor,"
                f" but should begin at a block of {unit}"
                f" (quantization: {spec.quantization.describe()})"
            )
            found.append(Problem(line, (f"it may with {_COPIES}",)))
    return found


@lru_cache(maxsize=256)
def _parts(spec: ModelSpec) -> tuple[tuple[str, int, str], ...]:
    """Return the name, place in its fused tensor and split of each part in the first layer."""
    alike, quantization = one_of_each(spec), spec.quantization
    assert quantization is not None
    tensors = logical_tensors(alike)
    return tuple(
        (name, stored_as(quantization, tensors, name).offset, tensor.split)
        for name, tensor in tensors.items()
        if name.startswith("model.layers.0.") and quantized(alike, name, tensor)
    )
