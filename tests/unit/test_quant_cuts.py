"""Which stored index serves which feature, against elements that carry their own labels.

Every size is small and every cut of it is tried. The oracle knows nothing of runs: a stored index
is labelled with itself, a code with its feature, and what a rank reads must carry the right label.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch

from tests.groups import single_group
from tpcheck.placement import Replicate, Shard
from tpcheck.quantization import FORMATS, Quantization
from tpcheck.reference.layout import logical_tensors
from tpcheck.reference.quant import dequantize
from tpcheck.reference.weights import GeneratedWeights, RankWeights
from tpcheck.shard_plan import STRICT, make_shard_plan
from tpcheck.shard_plan.cuts import Cut, Run
from tpcheck.shard_plan.quant import (
    IN,
    OUT,
    Axis,
    Component,
    components,
    first_index,
    held,
    serving,
    stored_as,
)
from tpcheck.shard_plan.records import Span
from tpcheck.spec import ModelSpec

SIZE = 12


def part_of(spans: Sequence[tuple[int, int]], dim: int = OUT) -> Cut:
    """A rank's cut that holds these features, one span behind the other."""
    runs, at = [], 0
    for start, stop in spans:
        runs.append(Run(Span(at, at + stop - start), Span(start, stop)))
        at += stop - start
    return Cut(dim, tuple(runs), at, Shard(dim))


def features_of(part: Cut) -> list[int]:
    return [feature for run in part.runs for feature in range(*run.whole)]


def labels_held(part: Cut, component: Component, way: str, offset: int) -> list[int]:
    """The label of each index that a rank holds; of each code where they are packed."""
    holding = held(part, component, way, offset)
    first = first_index(component, 0, offset)
    labels: list[int] = []
    for local, whole in holding.cut.runs:
        assert local.start == len(labels), "runs lie one behind the other"
        assert local.size == whole.size
        labels += range(first + whole.start, first + whole.stop)
    assert holding.cut.size == len(labels)
    if component.packed == 0:
        unit = component.axes[0].unit if component.axes[0] else 1
        return [word * unit + code for word in labels for code in range(unit)]
    return labels


def every_span(size: int = SIZE) -> Iterator[tuple[int, int]]:
    return ((start, stop) for start in range(size + 1) for stop in range(start, size + 1))


def component_of(unit: int, packed: bool, size: int = SIZE) -> Component:
    """A stored dim that follows the output features, of a weight of `size` of them."""
    return Component("int32", (-(-size // unit),), (Axis(OUT, unit),), 0 if packed else None)


UNITS = (1, 2, 3, 4, 5, 8, 12, 16)


@pytest.mark.parametrize("way", ["refuse", "replicate", "finer"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_feature_is_served_by_its_own_index_wherever_a_weight_is_cut(
    packed: bool, way: str
) -> None:
    for unit, span, offset in itertools.product(UNITS, every_span(), range(6)):
        part, component = part_of([span]), component_of(unit, packed, SIZE + offset)
        labels = labels_held(part, component, way, offset)
        served = held(part, component, way, offset).serving
        assert served is not None
        whole = [offset + feature for feature in features_of(part)]
        wanted = whole if packed else [feature // unit for feature in whole]
        assert [labels[index] for index in served] == wanted, (unit, span, offset)


def test_copies_of_heads_are_served_span_by_span() -> None:
    spans = [span for span in every_span(6) if span[0] < span[1]]
    for unit, packed in itertools.product((1, 2, 3, 4, 8), (False, True)):
        for two, way in itertools.product(itertools.product(spans, spans), ("replicate", "finer")):
            part, component = part_of(two), component_of(unit, packed)
            labels = labels_held(part, component, way, 0)
            served = held(part, component, way).serving
            assert served is not None
            whole = features_of(part)
            wanted = whole if packed else [feature // unit for feature in whole]
            assert [labels[index] for index in served] == wanted, (unit, two)


def test_a_rank_holds_no_index_that_it_does_not_use_and_none_twice_but_where_it_is_finer() -> None:
    for unit, span in itertools.product(UNITS, every_span()):
        part, component = part_of([span]), component_of(unit, packed=False)
        copied = labels_held(part, component, "replicate", 0)
        assert copied == sorted({feature // unit for feature in features_of(part)})
        finer = held(part, component, "finer")
        assert finer.serving is not None
        sizes = set(Counter(finer.serving).values())
        assert len(sizes) <= 1, "blocks of one size again"
        assert all(unit % size == 0 for size in sizes)
        assert sorted(set(finer.serving)) == list(range(finer.cut.size))


def test_the_finest_block_that_is_needed_is_the_coarsest_that_no_cut_goes_through() -> None:
    part, component = part_of([(64, 128)]), component_of(128, False, 512)
    assert Counter(held(part, component, "finer").serving or ()) == {0: 64}
    assert len(labels_held(part_of([(96, 192)]), component, "finer", 0)) == 3
    assert labels_held(part_of([(96, 192)]), component, "replicate", 0) == [0, 1]


def test_ranks_without_features_hold_nothing() -> None:
    for unit, way, at in itertools.product(UNITS, ("replicate", "finer"), range(SIZE + 1)):
        holding = held(part_of([(at, at)]), component_of(unit, False), way)
        assert (holding.cut.size, holding.serving) == (0, ())


def test_words_are_held_whole_and_codes_are_counted_from_the_first_of_them() -> None:
    # features 6 to 11 lie in words 0 and 1 of eight codes: the first of them is code 6
    holding = held(part_of([(6, 12)]), component_of(8, packed=True), "finer")
    assert [run.whole for run in holding.cut.runs] == [Span(0, 2)]
    assert holding.serving == (6, 7, 8, 9, 10, 11)


def test_whole_units_are_a_shard_and_others_are_slices() -> None:
    component = component_of(4, packed=False)
    assert held(part_of([(4, 8)]), component).cut.placement == Shard(0)
    assert held(part_of([(4, 7)]), component).cut.placement != Shard(0)
    assert held(part_of([(4, 8)]), component, offset=2).cut.placement != Shard(0)


def test_the_dim_that_is_not_cut_is_served_as_in_the_whole() -> None:
    component = Component("float32", (3, 4), (Axis(OUT, 4), Axis(IN, 3)), None)
    part = part_of([(3, 9)], dim=OUT)
    holding = held(part, component)
    assert list(serving(component, holding, part, IN, 10)) == [
        feature // 3 for feature in range(10)
    ]
    assert list(serving(component, holding, part, OUT, 12)) == [0, 1, 1, 1, 1, 2]


def test_what_serves_every_feature_is_held_whole() -> None:
    for quantization, suffix in (
        (Quantization("fp8", 0, 0), "weight_scale"),
        (Quantization("nvfp4", 16), "weight_global_scale"),
    ):
        component = components(quantization, (8, 32))[suffix]
        for dim in (OUT, IN):
            part = part_of([(2, 5)], dim)
            holding = held(part, component)
            assert holding.cut.placement == Replicate()
            assert list(serving(component, holding, part, dim, 8)) == [0, 0, 0]


def test_under_act_order_every_rank_holds_all_groups_and_its_own_part_of_the_index() -> None:
    stored = components(Quantization("gptq", 8, desc_act=True), (16, 32))
    part = part_of([(8, 24)], IN)
    assert held(part, stored["scales"]).cut.placement == Replicate()
    assert held(part, stored["qzeros"]).cut.size == 4
    assert [run.whole for run in held(part, stored["g_idx"]).cut.runs] == [Span(8, 24)]


FUSABLE = ModelSpec(16, 32, 24, 1, 4, 2, head_dim=8, max_position_embeddings=8)


@pytest.mark.parametrize("format_", FORMATS)
def test_fused_parts_put_together_are_the_fused_tensor(format_: str) -> None:
    """Red when k and v are read from where q begins: TP=1 and TP=N would agree on that."""
    rows = 4 if format_ in ("fp8", "int8") else 1
    quantization = Quantization(format_, 4, rows, fused=True)
    tp = single_group(dtype=torch.float32)
    spec = ModelSpec(**(FUSABLE.to_fields() | {"quantization": quantization}))
    weights = RankWeights(
        spec, make_shard_plan(spec, 1, STRICT), tp, GeneratedWeights(tp, quantization)
    )
    for where, parts in (
        ("self_attn", ("q_proj", "k_proj", "v_proj")),
        ("mlp", ("gate_proj", "up_proj")),
    ):
        names = [f"model.layers.0.{where}.{part}.weight" for part in parts]
        fused = torch.cat([weights.load(name) for name in names])
        weight = stored_as(quantization, logical_tensors(spec), names[0])
        whole = quantized_whole(tp, quantization, weight.name, weight.shape)
        assert torch.equal(fused, whole)
        assert not torch.equal(fused[:16], fused[-16:])


def quantized_whole(
    tp: object, quantization: Quantization, name: str, shape: tuple[int, int]
) -> torch.Tensor:
    """A fused tensor as it dequantizes by itself, cut by nobody."""
    from tpcheck.reference.quantizing import quantize

    parts = quantize(tp.weight(f"{name}.weight", *shape), quantization)  # type: ignore[attr-defined]
    stored = components(quantization, shape)

    def served(suffix: str, side: int) -> torch.Tensor:
        for dim, axis in enumerate(stored[suffix].axes):
            if axis is not None and axis.side == side:
                unit = 1 if dim == stored[suffix].packed else axis.unit
                return torch.arange(shape[side]) // unit
        return torch.zeros(shape[side], dtype=torch.int64)

    return dequantize(parts, quantization, served, torch.float32)


def test_a_plain_mlp_has_nothing_to_fuse_its_up_projection_with() -> None:
    plain = ModelSpec(16, 32, 24, 1, 4, mlp="plain")
    name = "model.layers.0.mlp.up_proj.weight"
    weight = stored_as(Quantization("fp8", fused=True), logical_tensors(plain), name)
    assert weight == ("model.layers.0.mlp.up_proj", (24, 32), 0)
