"""What a quantized weight is stored as, and which part of each stored tensor a rank holds.

Requirement: codes, scales, zero points and g_idx are cut by the weight's own cut. Each index of a
stored dim serves some number of the weight's features, its unit: a group, a block, or the codes in
one word. A rank holds every index that serves a feature of its own, and knows for each feature
which of them it is. A scale cut by itself is the neighbour's scale. Torch-free.

[Straddling] Where a cut goes through a unit, two ranks hold a copy of that scale ("replicate"), or
each holds it once per piece of a finer unit that no cut goes through ("finer"); words of packed
codes are always copied. A plan whose policy says "refuse" has no such cut.

[Act Order] Under desc_act any input feature may use any group: every rank holds all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tpcheck.placement import Placement, Replicate, Shard
from tpcheck.quantization import Quantization
from tpcheck.shard_plan.cuts import Cut, Run, moved, slices_of, tensor_cuts
from tpcheck.shard_plan.records import ShardPlan, Span
from tpcheck.shard_plan.tensors import LogicalTensor, logical_tensors
from tpcheck.spec import ModelSpec

OUT, IN = 0, 1
"""The dims of a linear's weight."""

ALL = 0
"""The unit of a dim of length 1 that serves every feature."""


class Axis(NamedTuple):
    """A stored dim: which dim of the weight it follows, and how many features an index serves."""

    side: int
    unit: int


class Component(NamedTuple):
    """One stored tensor of a quantized weight.

    `axes` has None for a dim held whole by all. `packed` is the dim whose indices are words of
    several codes, None where codes are not packed.
    """

    dtype: str
    shape: tuple[int, ...]
    axes: tuple[Axis | None, ...]
    packed: int | None = None


class Held(NamedTuple):
    """What one rank holds of a stored tensor.

    `serving`: for each of the rank's features along the weight's cut dim the local index that
    serves it, in codes where they are packed; None where no stored dim follows that dim.
    """

    cut: Cut
    serving: tuple[int, ...] | None


class StoredAs(NamedTuple):
    """The tensor [out, in] that a weight is quantized as; the weight begins at row `offset`."""

    name: str
    shape: tuple[int, int]
    offset: int = 0


_FUSED = {
    part: (whole, parts)
    for whole, parts in (
        ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
        ("gate_up_proj", ("gate_proj", "up_proj")),
    )
    for part in parts
}


def stored_as(
    quantization: Quantization, tensors: Mapping[str, LogicalTensor], name: str
) -> StoredAs:
    """Return which tensor a weight's codes and scales belong to: its own, or one fused of parts."""
    rows, columns = tensors[name].shape
    module = name.removesuffix(".weight")
    where, _, part = module.rpartition(".")
    if not quantization.fused or part not in _FUSED:
        return StoredAs(module, (rows, columns))
    whole, parts = _FUSED[part]
    if any(f"{where}.{one}.weight" not in tensors for one in parts):
        return StoredAs(module, (rows, columns))  # a plain MLP has an up_proj and no gate
    sizes = {one: tensors[f"{where}.{one}.weight"].shape[0] for one in parts}
    before = parts[: parts.index(part)]
    shape = (sum(sizes.values()), columns)
    return StoredAs(f"{where}.{whole}", shape, sum(sizes[one] for one in before))


def quantized(spec: ModelSpec, name: str, tensor: LogicalTensor) -> bool:
    """Return whether a weight is stored quantized: those of linear layers that ranks split."""
    linear = len(tensor.shape) == 2 and tensor.split not in ("", "vocab")
    return linear and spec.quantization is not None and spec.quantization.converts(name)


def components(quantization: Quantization, shape: tuple[int, int]) -> dict[str, Component]:
    """Return the stored tensors of a weight [out, in] by the suffix of their names.

    Source: the layouts that DeepSeek-V3 (fp8 blocks), GPTQ, AWQ and compressed-tensors publish
        (reference/packing: [Layouts]).
    """
    return {
        suffix: _component(quantization, shape, layout)
        for suffix, layout in _layouts(quantization).items()
    }


class _Layout(NamedTuple):
    dtype: str
    axes: tuple[Axis, ...]
    packed: int | None = None


def _layouts(quantization: Quantization) -> dict[str, _Layout]:
    rows, group, pack = quantization.block_rows, quantization.group_size, quantization.pack
    each, scale = (Axis(OUT, 1), Axis(IN, 1)), (Axis(OUT, rows), Axis(IN, group))
    scale_T, zero_T = (Axis(IN, group), Axis(OUT, 1)), (Axis(IN, group), Axis(OUT, pack))
    match quantization.format:
        case "fp8" | "int8":
            suffix = "weight_scale_inv" if rows > 1 and group else "weight_scale"
            dtype = "float8_e4m3fn" if quantization.format == "fp8" else "int8"
            return {"weight": _Layout(dtype, each), suffix: _Layout("float32", scale)}
        case "gptq":
            return {
                "qweight": _Layout("int32", (Axis(IN, pack), Axis(OUT, 1)), 0),
                "qzeros": _Layout("int32", zero_T, 1),
                "scales": _Layout("float16", scale_T),
                "g_idx": _Layout("int32", (Axis(IN, 1),)),
            }
        case "awq":
            return {
                "qweight": _Layout("int32", (Axis(IN, 1), Axis(OUT, pack)), 1),
                "qzeros": _Layout("int32", zero_T, 1),
                "scales": _Layout("float16", scale_T),
            }
        case "pack-quantized":
            stored = {
                "weight_packed": _Layout("int32", (Axis(OUT, 1), Axis(IN, pack)), 1),
                "weight_scale": _Layout("bfloat16", scale),
            }
            if not quantization.symmetric:
                axes = (Axis(OUT, pack), Axis(IN, group))
                stored["weight_zero_point"] = _Layout("int32", axes, 0)
            if quantization.desc_act:
                stored["weight_g_idx"] = _Layout("int32", (Axis(IN, 1),))
            return stored
    stored = {"weight_packed": _Layout("uint8", (Axis(OUT, 1), Axis(IN, pack)), 1)}
    if quantization.format == "mxfp4":
        return stored | {"weight_scale": _Layout("uint8", scale)}
    return stored | {
        "weight_scale": _Layout("float8_e4m3fn", scale),
        "weight_global_scale": _Layout("float32", (Axis(OUT, ALL),)),
    }


def _component(quantization: Quantization, shape: tuple[int, int], layout: _Layout) -> Component:
    sizes = tuple(-(-shape[side] // unit) if unit else 1 for side, unit in layout.axes)
    axes: list[Axis | None] = list(layout.axes)
    for dim, (side, unit) in enumerate(layout.axes):
        grouped = quantization.desc_act and side == IN and unit == quantization.group_size
        if unit == ALL or (grouped and dim != layout.packed and len(axes) > 1):
            axes[dim] = None
    return Component(layout.dtype, sizes, tuple(axes), layout.packed)


def held(part: Cut, component: Component, way: str = "replicate", offset: int = 0) -> Held:
    """Return what a rank with `part` of a weight holds of one of its stored tensors.

    Whole indices are counted from the first that serves the weight.

    Args:
        way: "replicate" or "finer" (above: [Straddling]).
        offset: where the weight begins, along its cut dim, in the tensor it is quantized as.
    """
    found = [
        (dim, axis) for dim, axis in enumerate(component.axes) if axis and axis.side == part.dim
    ]
    if not found:
        whole = Span(0, component.shape[0])
        return Held(Cut(0, (Run(whole, whole),), whole.size, Replicate()), None)
    (dim, axis), features = found[0], [moved(run.whole, offset) for run in part.runs]
    packed = dim == component.packed
    unit = _finer(features, axis.unit) if way == "finer" and not packed else axis.unit
    runs: list[Run] = []
    serving: list[int] = []
    at = 0
    for start, stop in features:
        if packed:
            base = (at - start // unit) * unit
            serving += range(base + start, base + stop)
        else:
            serving += [at + feature // unit - start // unit for feature in range(start, stop)]
        for served in _served(start, stop, axis.unit, unit):
            whole = moved(served, -(offset // axis.unit))
            runs.append(Run(Span(at, at + served.size), whole))
            at += served.size
    placement = _placement(part, dim, axis, runs, offset)
    return Held(Cut(dim, tuple(runs), at, placement), tuple(serving))


def first_index(component: Component, dim: int, offset: int) -> int:
    """Return the first index of a stored dim that serves a weight which begins at row `offset`."""
    axis = component.axes[dim]
    return offset // axis.unit if axis and axis.side == OUT else 0


def stored_cuts(spec: ModelSpec, plan: ShardPlan) -> dict[str, tuple[Cut, ...]]:
    """Return every rank's part of every stored tensor, by its name: codes and scales where there
    are some, and the weights that are not quantized."""
    tensors, whole = logical_tensors(spec), tensor_cuts(spec, plan)
    stored: dict[str, tuple[Cut, ...]] = {}
    for name, parts in whole.items():
        if not quantized(spec, name, tensors[name]):
            stored[name] = parts
            continue
        assert spec.quantization is not None
        weight = stored_as(spec.quantization, tensors, name)
        for suffix, component in components(spec.quantization, weight.shape).items():
            held_by = (held(part, component, plan.policy.scales, weight.offset) for part in parts)
            stored[f"{name.removesuffix('weight')}{suffix}"] = tuple(one.cut for one in held_by)
    return stored


def serving(component: Component, holding: Held, part: Cut, side: int, size: int) -> Sequence[int]:
    """Return for each feature that a rank has along a side the held index that serves it.

    Args:
        size: the features of the whole weight along `side`.
    """
    if side == part.dim:
        return holding.serving if holding.serving is not None else [0] * part.real
    for dim, axis in enumerate(component.axes):
        if axis and axis.side == side:
            unit = 1 if dim == component.packed else axis.unit
            return [feature // unit for feature in range(size)]
    return [0] * size


def _finer(features: Sequence[Span], unit: int) -> int:
    """Return the greatest divisor of a unit that no cut of this rank goes through."""
    return math.gcd(unit, *(edge for span in features for edge in span))


def _served(start: int, stop: int, unit: int, finer: int) -> Iterator[Span]:
    """Yield the stored indices that features `start` to `stop` use, one by one where finer."""
    if start == stop:
        return
    if finer == unit:
        yield Span(start // unit, -(-stop // unit))
        return
    for feature in range(start, stop, finer):
        yield Span(feature // unit, feature // unit + 1)


def _placement(part: Cut, dim: int, axis: Axis, runs: Sequence[Run], offset: int) -> Placement:
    aligned = all((edge + offset) % axis.unit == 0 for run in part.runs for edge in run.whole)
    if isinstance(part.placement, Shard) and aligned:
        return Shard(dim)
    return slices_of(dim, runs)
