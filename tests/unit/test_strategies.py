"""Strategies construct both sides of the plan's rules, reach what they promise, shrink small."""

from __future__ import annotations

import dataclasses
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.statistics import collector

import tpcheck
from tpcheck import run_plan, spec, strategies
from tpcheck.errors import IllegalDegreeError, PlanError, SubjectError, TPCheckError
from tpcheck.quantization import FORMATS, Quantization
from tpcheck.reference.decoder import build_decoder
from tpcheck.shard_plan import legal_tp_sizes, make_shard_plan
from tpcheck.spec import ModelSpec, RopeScaling
from tpcheck.strategies import Point, fill, model_specs, points, quant_blocks
from tpcheck.strategies.quantizations import ACTIVATIONS, KV_CACHES

DEGREES = (2, 3, 4, 6, 8)
SEARCH = settings(database=None, phases=[Phase.generate, Phase.shrink], max_examples=2000)


def drawn(strategy: st.SearchStrategy[Any], many: int) -> list[Any]:
    """Return what a property is given; every health check is on."""
    found: list[Any] = []

    @settings(max_examples=many, database=None, phases=[Phase.generate], derandomize=True)
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def minimal(strategy: st.SearchStrategy[Any], condition: Callable[[Any], bool], seed: int) -> Any:
    return find(strategy, condition, settings=SEARCH, random=random.Random(seed))


def rules_broken(model: ModelSpec, tp_size: int) -> set[str]:
    """Return the fields that the plan refuses this degree for."""
    try:
        make_shard_plan(model, tp_size)
    except IllegalDegreeError as error:
        fields = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        broken = {name for name in fields if f"{name}={getattr(model, name)}," in str(error)}
        return broken | ({"quantization"} if "(quantization:" in str(error) else set())
    return set()


# Both sides of the rules.


SIDES = [
    pytest.param(tp_size, legal, id=f"tp={tp_size} legal={legal}")
    for tp_size in (*DEGREES, 1, 5, 64, (2, 4, 8), (2, 3))
    for legal in (True, False)
    if (tp_size, legal) != (1, False)
]


@pytest.mark.parametrize(("tp_size", "legal"), SIDES)
def test_a_spec_is_on_the_side_it_was_asked_for_at_every_degree(
    tp_size: int | tuple[int, ...], legal: bool
) -> None:
    sizes = tp_size if isinstance(tp_size, tuple) else (tp_size,)
    models = drawn(model_specs(tp_size, legal), 60)
    assert len(models) == 60
    for model in models:
        for size in sizes:
            assert (not rules_broken(model, size)) == legal, (model, size)


@pytest.mark.parametrize(("tp_size", "legal"), SIDES)
def test_heads_widths_and_layers_are_on_their_side(
    tp_size: int | tuple[int, ...], legal: bool
) -> None:
    sizes = tp_size if isinstance(tp_size, tuple) else (tp_size,)
    least = math.lcm(*sizes)
    whole = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1}
    for strategy, rest in (
        (strategies.head_counts(tp_size, legal), {"intermediate_size": least}),
        (strategies.mlp_shapes(tp_size, legal), {"num_attention_heads": least, "head_dim": 2}),
        (strategies.layer_shapes(tp_size, legal), {}),
    ):
        for shape in drawn(strategy, 40):
            model = ModelSpec.from_fields(whole | rest | shape._asdict())
            assert all((not rules_broken(model, size)) == legal for size in sizes), shape


def test_either_side_means_both() -> None:
    legal = Counter(not rules_broken(model, 4) for model in drawn(model_specs(4), 300))
    assert min(legal.values()) > 75
    mixed = Counter(
        sum(not rules_broken(model, size) for size in (2, 4, 8))
        for model in drawn(model_specs((2, 4, 8)), 500)
    )
    assert set(mixed) == {0, 1, 2, 3}


@pytest.mark.parametrize("tp_size", DEGREES)
def test_every_rule_is_broken_alone_and_together(tp_size: int) -> None:
    models = drawn(model_specs(tp_size, legal=False), 400)
    broken = Counter(frozenset(rules_broken(model, tp_size)) for model in models)
    heads, kv, mlp = "num_attention_heads", "num_key_value_heads", "intermediate_size"
    for rules in ({heads}, {kv}, {mlp}, {heads, mlp}, {kv, mlp}, {"quantization"}):
        assert broken[frozenset(rules)] >= 10, (rules, broken)


def test_refused_everywhere_may_be_for_another_reason_at_each_degree() -> None:
    models = drawn(model_specs((2, 3), legal=False), 400)
    reasons = [(rules_broken(model, 2), rules_broken(model, 3)) for model in models]
    assert any(at_2.isdisjoint(at_3) for at_2, at_3 in reasons)


# What is reached.


def test_two_thousand_legal_points_reach_every_family() -> None:
    found = drawn(points(), 2000)
    seen = {
        "mha": lambda p: p.spec.num_key_value_heads == p.spec.num_attention_heads > 1,
        "gqa": lambda p: 1 < p.spec.num_key_value_heads < p.spec.num_attention_heads,
        "mqa": lambda p: p.spec.num_key_value_heads == 1 < p.spec.num_attention_heads,
        "kv < tp": lambda p: 1 < p.spec.num_key_value_heads < p.tp_size,
        "kv == tp": lambda p: p.spec.num_key_value_heads == p.tp_size,
        "kv > tp": lambda p: p.spec.num_key_value_heads > p.tp_size,
        "odd heads per rank": lambda p: p.spec.num_attention_heads // p.tp_size % 2,
        "odd width per rank": lambda p: p.spec.intermediate_size // p.tp_size % 2,
        "prime vocab": lambda p: p.spec.vocab_size in (11, 13, 31, 127, 131),
        "vocab that fits": lambda p: p.spec.vocab_size % p.tp_size == 0,
        "ranks without vocab": lambda p: (
            make_shard_plan(p.spec, p.tp_size).ranks[-1].vocab.size == 0
        ),
        "hidden is heads": lambda p: (
            p.spec.hidden_size == p.spec.num_attention_heads * p.spec.head_dim
        ),
        "hidden is odd": lambda p: p.spec.hidden_size % 2,
        "odd head_dim": lambda p: p.spec.head_dim % 2,
        "window inside the tokens": lambda p: 0 < p.spec.sliding_window < p.seq_len,
        "fewer tokens than ranks": lambda p: p.seq_len < p.tp_size,
        "one token more": lambda p: p.seq_len == p.tp_size + 1,
        "one row": lambda p: p.batch == 1,
        "rows": lambda p: p.batch > 1,
    }
    for heads in (28, 36, 40, 52):
        seen[f"{heads} heads"] = lambda p, heads=heads: p.spec.num_attention_heads == heads
    counts = {name: sum(map(bool, map(condition, found))) for name, condition in seen.items()}
    assert min(counts.values()) >= 10, counts
    assert {p.tp_size for p in found} == set(DEGREES)
    assert {p.dtype for p in found} == set(strategies.DTYPES)
    assert {p.spec.num_hidden_layers for p in found} == {1, 2, 3}


KEPT_AT_DEFAULT = {
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "router_bias",
    "router_scoring",
    "shared_expert_intermediate_size",
    "model_type",
    "max_position_embeddings",
}


def test_every_field_of_a_spec_varies_or_is_known_not_to() -> None:
    models = drawn(model_specs(4, legal=True), 500)
    varied = {
        field.name
        for field in dataclasses.fields(ModelSpec)
        if len({getattr(model, field.name) for model in models}) > 1
    }
    assert varied == {field.name for field in dataclasses.fields(ModelSpec)} - KEPT_AT_DEFAULT
    for name in set(spec._CHOICES) - KEPT_AT_DEFAULT:
        assert {getattr(model, name) for model in models} == set(spec._CHOICES[name])
    for name in set(spec._FLAGS) - KEPT_AT_DEFAULT:
        share = sum(getattr(model, name) for model in models) / len(models)
        assert 0.25 < share < 0.75, name
    assert {getattr(model.rope_scaling, "rope_type", None) for model in models} == {
        None,
        "linear",
        "llama3",
        "yarn",
    }
    assert not any(model.rope_scaling for model in models if model.position == "learned")


def test_illegal_heads_hold_the_awkward_ones() -> None:
    heads = {counts.num_attention_heads for counts in drawn(strategies.head_counts(8, False), 500)}
    assert {25, 28, 36, 52} <= heads


def test_widths_that_divide_only_when_doubled_are_drawn_on_purpose() -> None:
    for tp_size in (2, 4, 6, 8):
        widths = [
            shape.intermediate_size for shape in drawn(strategies.mlp_shapes(tp_size, False), 200)
        ]
        assert sum(2 * width % tp_size == 0 for width in widths) >= 20
        assert sum(2 * width % tp_size != 0 for width in widths) >= (20 if tp_size > 2 else 0)


def test_vocabularies_hold_the_published_primes_and_one_off_powers() -> None:
    sizes = set(drawn(strategies.vocab_sizes(), 1000))
    assert {49159, 50257, 129280} <= sizes
    assert sizes & {127, 257, 509, 521, 1021}
    assert sizes & {255, 513, 1023}
    assert min(sizes) >= 8
    assert max(drawn(strategies.vocab_sizes(100), 200)) <= 100


def test_token_counts_hold_the_edges_of_the_degree() -> None:
    assert {1, 3, 4, 5, 7, 8, 9, 13} <= set(drawn(strategies.token_counts(4), 300))
    assert set(drawn(strategies.token_counts(8, max_size=3), 50)) == {1, 2, 3}


def test_degrees_are_the_uneven_ones_too_and_end_at_the_largest() -> None:
    assert set(drawn(strategies.tp_degrees(), 100)) == {2, 3, 4, 6, 8}
    assert set(drawn(strategies.tp_degrees(7, 1), 100)) == {1, 2, 3, 4, 6, 7}
    assert set(drawn(strategies.tp_degrees(sizes=(5, 2)), 50)) == {2, 5}


# Quantization blocks.


@pytest.mark.parametrize("tp_size", [*DEGREES, (2, 4)])
def test_blocks_are_whole_on_every_rank_or_on_none(tp_size: int | tuple[int, ...]) -> None:
    sizes = tp_size if isinstance(tp_size, tuple) else (tp_size,)
    for legal in (True, False):
        for block in drawn(quant_blocks(tp_size, legal), 300):
            for size in sizes:
                shares = [
                    range(r * block.dim // size, (r + 1) * block.dim // size) for r in range(size)
                ]
                whole = block.dim % size == 0 and all(
                    edge % block.size == 0 for share in shares for edge in (share.start, share.stop)
                )
                assert (whole and len(shares[0]) > 0) == legal, block


def test_blocks_reach_odd_counts_small_shards_and_published_dims() -> None:
    found = drawn(quant_blocks(legal=False), 1500)
    assert {29, 231} <= {block.scales for block in found if block.dim % block.size == 0}
    assert {(64, 1856), (128, 29568), (128, 258)} <= {(block.size, block.dim) for block in found}
    assert any(block.dim % 2 == 0 and block.dim // 2 < block.size for block in found)
    assert any(block.dim % block.size for block in found)
    assert {block.kind for block in found} == {"block", "group"}
    whole = drawn(quant_blocks(2, True), 500)
    assert {29, 231} <= {block.dim // 2 // block.size for block in whole}
    assert max(block.dim for block in drawn(quant_blocks(2, max_dim=64), 200)) <= 64


# Quantizations.


SPEC = ModelSpec(64, 64, 96, 1, 8, 4)


def test_every_option_of_every_format_is_drawn() -> None:
    every = strategies.quantizations()
    found = drawn(every, 2500)
    for field in dataclasses.fields(Quantization):
        assert len({getattr(one, field.name) for one in found}) > 1, field.name
    assert {one.format for one in found} == set(FORMATS)
    assert {one.kv_cache for one in found} == set(KV_CACHES)
    for name in FORMATS:
        mine = [one for one in found if one.format == name]
        assert {one.fused for one in mine} == {False, True}
        assert any(one.skip for one in mine)
        published = {"mxfp4": 32, "nvfp4": 16}.get(name, 128)
        assert {published, 3, 12} <= {one.group_size for one in mine}
        if name in ("gptq", "awq", "pack-quantized"):
            assert 0 in {one.group_size for one in mine}, "-1: one group for all features"
            assert {one.symmetric for one in mine} == {False, True}
        if name in ("gptq", "pack-quantized"):
            assert {one.desc_act for one in mine} == {False, True}
            assert {one.bits for one in mine} == {4, 8}
        if name in ("fp8", "int8", "mxfp4"):
            assert {one.activations for one in mine} == set(ACTIVATIONS)
        if name in ("fp8", "int8"):
            blocks = {(one.block_rows, one.group_size) for one in mine}
            assert {(1, 0), (0, 0), (128, 128), (8, 8), (4, 8), (64, 64)} <= blocks


@pytest.mark.parametrize("legal", [True, False])
@pytest.mark.parametrize("tp_size", [2, 4, (2, 4)])
@pytest.mark.parametrize("format_", FORMATS)
def test_a_quantization_is_on_the_side_of_the_plan_that_was_asked_for(
    format_: str, tp_size: int | tuple[int, ...], legal: bool
) -> None:
    sizes = tp_size if isinstance(tp_size, tuple) else (tp_size,)
    for one in drawn(strategies.quantizations(SPEC, tp_size, legal, formats=[format_]), 40):
        assert one.format == format_
        model = dataclasses.replace(SPEC, quantization=one)
        assert all((not rules_broken(model, size)) == legal for size in sizes), one


def test_a_third_of_all_models_is_quantized_on_both_sides_and_in_more_than_channels() -> None:
    for legal in (True, False, None):
        found = [model.quantization for model in drawn(model_specs(4, legal), 1200)]
        stored = [one for one in found if one is not None]
        assert 200 < len(stored) < 800
        counts = Counter(one.format for one in stored)
        assert min(counts[name] for name in FORMATS) >= 5, counts
        assert sum(one.group_size > 1 for one in stored) > len(stored) / 2
        assert sum(one.fused for one in stored) > 15
        assert sum(bool(one.skip) for one in stored) > 30
    assert {model.quantization for model in drawn(model_specs(4, quantization=None), 50)} == {None}


def test_sizes_follow_a_pinned_quantization() -> None:
    pinned = {"format": "fp8", "group_size": 128, "block_rows": 128}
    for legal in (True, False):
        models = drawn(model_specs(2, legal, quantization=pinned), 60)
        assert {model.quantization for model in models} == {Quantization(**pinned)}
        assert all((not rules_broken(model, 2)) == legal for model in models)
        assert len({model.intermediate_size for model in models}) > 3


# Efficiency.


EVERY_STRATEGY = {
    "tp_degrees": strategies.tp_degrees(),
    "vocab_sizes": strategies.vocab_sizes(),
    "token_counts": strategies.token_counts(8),
    "dtypes": strategies.dtypes(),
    "input_values": strategies.input_values(),
    "quantizations": strategies.quantizations(),
    "quantizations legal": strategies.quantizations(SPEC, 4, True),
    "quantizations illegal": strategies.quantizations(SPEC, (2, 4), False),
    "points None": points(legal=None),
    "points given": points(specs=model_specs(2, legal=True)),
} | {
    f"{make.__name__} {legal}": make(legal=legal)
    for make in (
        strategies.head_counts,
        strategies.mlp_shapes,
        strategies.layer_shapes,
        strategies.quant_blocks,
        model_specs,
        points,
    )
    for legal in (True, False)
}


@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_less_than_one_draw_in_a_hundred_is_filtered(name: str) -> None:
    statistics: list[Any] = []

    @settings(max_examples=150, database=None, phases=[Phase.generate])
    @given(EVERY_STRATEGY[name])
    def draw(value: Any) -> None:
        pass

    with collector.with_value(statistics.append):
        draw()
    statuses = Counter(case["status"] for case in statistics[0]["generate-phase"]["test-cases"])
    assert statuses["valid"] >= 2
    assert statuses.total() - statuses["valid"] <= statuses.total() / 100, statuses


# Shrinking.


SMALLEST = {
    "tp_size": 2,
    "dtype": "bfloat16",
    "batch": 1,
    "seq_len": 1,
    "seed": 0,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "hidden_size": 4,
    "intermediate_size": 2,
    "vocab_size": 8,
    "mlp": "gated",
    "norm_type": "rms",
    "norm_eps": 1e-6,
    "position": "rope",
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "qk_norm": "none",
    "sliding_window": 0,
    "attention_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}

FAILURES: dict[str, tuple[Callable[[Point], object], dict[str, Any]]] = {
    "anything": (lambda p: True, {}),
    "copied KV heads": (
        lambda p: p.spec.num_key_value_heads < p.tp_size,
        {"num_key_value_heads": 1},
    ),
    "KV heads copied in pairs": (
        lambda p: 1 < p.spec.num_key_value_heads < p.tp_size,
        {
            "tp_size": 4,
            "num_attention_heads": 4,
            "intermediate_size": 4,
        },
    ),
    "degree above two": (
        lambda p: p.tp_size > 2,
        {
            "tp_size": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 3,
            "vocab_size": 9,
        },
    ),
    "a bias, in fp16": (
        lambda p: p.spec.mlp_bias and p.dtype == "float16",
        {"mlp_bias": True, "dtype": "float16"},
    ),
    "padded vocabulary": (lambda p: p.spec.vocab_size % p.tp_size, {"vocab_size": 9}),
    "later layers, several tokens": (
        lambda p: p.spec.num_hidden_layers > 1 and p.seq_len > p.tp_size,
        {"num_hidden_layers": 2, "seq_len": 3},
    ),
    "learned positions": (
        lambda p: p.spec.position == "learned",
        {"position": "learned", "head_dim": 1},
    ),
    "llama3 rope": (
        lambda p: p.spec.rope_scaling and p.spec.rope_scaling.rope_type == "llama3",
        {"rope_scaling": RopeScaling("llama3", 8.0, original_max_position_embeddings=32)},
    ),
    "second row, window": (
        lambda p: p.batch > 1 and p.spec.sliding_window and p.seq_len > p.spec.sliding_window,
        {"batch": 2, "sliding_window": 1, "seq_len": 2},
    ),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("seed", range(2))
def test_a_failure_shrinks_to_what_causes_it(name: str, seed: int) -> None:
    fails, different = FAILURES[name]
    point = minimal(points(), lambda point: bool(fails(point)), seed)
    values = dataclasses.asdict(point) | {
        field.name: getattr(point.spec, field.name) for field in dataclasses.fields(point.spec)
    }
    assert {key: values[key] for key in SMALLEST} == SMALLEST | different


@pytest.mark.parametrize("seed", range(2))
def test_an_accepted_illegal_spec_shrinks_to_one_broken_rule(seed: int) -> None:
    point = minimal(points(legal=False), lambda point: True, seed)
    assert (point.tp_size, len(rules_broken(point.spec, 2))) == (2, 1)
    model = minimal(
        model_specs(4, legal=False), lambda m: "intermediate_size" in rules_broken(m, 4), seed
    )
    assert (model.num_attention_heads, model.intermediate_size) == (4, 1)


@pytest.mark.parametrize("seed", range(2))
def test_shapes_shrink_to_the_smallest_on_their_side(seed: int) -> None:
    always = lambda value: True  # noqa: E731
    heads = minimal(strategies.head_counts(6, legal=True), always, seed)
    assert heads == (6, 6, 2)
    assert minimal(strategies.mlp_shapes(6, legal=True), always, seed) == (4, 6, "gated")
    assert minimal(strategies.vocab_sizes(), always, seed) == 8
    assert minimal(quant_blocks(8, legal=True), always, seed) == ("block", 2, 16)
    assert minimal(quant_blocks(4, False), lambda block: block.size == 128, seed).dim <= 256


# Pinned fields.


def test_pinned_fields_hold_and_the_rest_follows_them() -> None:
    pins = {
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "intermediate_size": 29568,
        "hidden_size": 5120,
        "mlp_bias": True,
        "num_hidden_layers": 1,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "sliding_window": 4,
        "model_type": "qwen2",
    }
    for model in drawn(model_specs((1, 2), legal=True, **pins), 50):
        fields = model.to_fields() | {"rope_scaling": model.rope_scaling}
        expected = pins | {"rope_scaling": RopeScaling("linear", 2.0), "position": "rope"}
        assert {name: fields[name] for name in expected} == expected


def test_pins_leave_out_the_default_degrees_at_which_they_cannot_be() -> None:
    for point in drawn(points(num_attention_heads=6), 200):
        assert point.tp_size in (2, 3, 6)
        assert point.spec.num_attention_heads == 6
    for model in drawn(model_specs(None, True, num_attention_heads=6), 100):
        assert set(legal_tp_sizes(model)) & {2, 3, 6}


def test_an_odd_head_dim_or_experts_pin_what_they_need() -> None:
    assert {m.position for m in drawn(model_specs(2, head_dim=3), 50)} == {"learned"}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    models = drawn(model_specs(4, True, **experts), 50)
    assert {m.mlp for m in models} == {"gated"}
    assert not any(rules_broken(m, 4) for m in models)
    assert all(m.num_key_value_heads == m.num_attention_heads for m in models) is False
    multi = drawn(model_specs(4, True, num_key_value_heads=0), 50)
    assert all(m.num_key_value_heads == m.num_attention_heads for m in multi)


def test_bounds_and_the_vocabulary_are_kept() -> None:
    strategy = model_specs(
        2,
        max_layers=1,
        max_hidden=8,
        max_heads=4,
        max_intermediate=10,
        max_head_dim=4,
        vocab=st.just(17),
    )
    for m in drawn(strategy, 200):
        assert (m.num_hidden_layers, m.vocab_size) == (1, 17)
        assert 4 <= m.hidden_size <= 8
        assert m.num_attention_heads <= 4
        assert m.intermediate_size <= 10
        assert m.head_dim <= 4


WRONG: dict[str, tuple[Callable[[], object], type[TPCheckError], str]] = {
    "impossible pin": (
        lambda: model_specs(4, legal=True, num_attention_heads=6),
        PlanError,
        "model_specs: tp_size=4, but should be one at which something is legal"
        " [num_attention_heads=6]\n"
        "  give other values or bounds, or ask for other degrees",
    ),
    "illegal at one rank": (
        lambda: model_specs(1, legal=False),
        PlanError,
        "model_specs: tp_size=1, but should be one at which something is illegal\n"
        "  give other values or bounds, or ask for other degrees",
    ),
    "narrow bound": (
        lambda: strategies.head_counts((3, 8), True, max_heads=8),
        PlanError,
        "head_counts: tp_size=(3, 8), but should be one at which something is legal"
        " [max_heads=8]\n  give other values or bounds, or ask for other degrees",
    ),
    "asked degree of points": (
        lambda: points((2, 4), num_attention_heads=6),
        PlanError,
        "model_specs: tp_size=4, but should be one at which something is legal"
        " [num_attention_heads=6]\n"
        "  give other values or bounds, or ask for other degrees",
    ),
    "contradicting pins": (
        lambda: model_specs(2, num_attention_heads=6, num_key_value_heads=4),
        PlanError,
        "num_key_value_heads=4, but should divide num_attention_heads=6",
    ),
    "malformed pin": (
        lambda: model_specs(2, num_hidden_layers=[1]),
        PlanError,
        "num_hidden_layers=[1], but should be a whole number of at least 1",
    ),
    "derived head_dim": (
        lambda: model_specs(2, head_dim=0),
        PlanError,
        "model_specs: head_dim=0, but should be at least 1: 0 derives it, and a strategy draws it",
    ),
    "malformed degree": (
        lambda: model_specs("4"),  # type: ignore[arg-type]
        TPCheckError,
        "model_specs: tp_size='4', but should be a whole number of at least 1",
    ),
    "no degree": (
        lambda: points(()),
        TPCheckError,
        "tp_degrees: tp_size=None, but should be a whole number of at least 1",
    ),
    "malformed side": (
        lambda: strategies.mlp_shapes(2, "yes"),  # type: ignore[arg-type]
        TPCheckError,
        "mlp_shapes: legal='yes', but should be True, False or None",
    ),
    "blocks beyond the bound": (
        lambda: quant_blocks(8, legal=True, max_dim=15),
        PlanError,
        "quant_blocks: tp_size=8, but should be one at which something is legal [max_dim=15]\n"
        "  give other values or bounds, or ask for other degrees",
    ),
    "vocab that is no strategy": (
        lambda: model_specs(2, vocab=11),  # type: ignore[arg-type]
        TPCheckError,
        "model_specs: vocab=11, but should be a Hypothesis strategy",
    ),
    "specs that are no strategy": (
        lambda: points(specs=3),  # type: ignore[arg-type]
        TPCheckError,
        "points: specs=3, but should be a Hypothesis strategy",
    ),
    "specs and bounds": (
        lambda: points(specs=st.nothing(), max_layers=1),
        TPCheckError,
        "points: specs is given, so max_layers should be left out",
    ),
    "unknown dtype": (
        lambda: points(dtypes=["int8"]),
        TPCheckError,
        "dtypes: 'int8', but should be one of bfloat16, float16, float32",
    ),
    "small vocabulary": (
        lambda: strategies.vocab_sizes(4),
        TPCheckError,
        "vocab_sizes: max_size=4, but should be at least min_size=8",
    ),
    "no degree in between": (
        lambda: strategies.tp_degrees(1),
        TPCheckError,
        "tp_degrees: max_size=1, but should be at least min_size=2",
    ),
    "tiny bound": (
        lambda: strategies.layer_shapes(max_hidden=2),
        TPCheckError,
        "layer_shapes: max_hidden=2, but should be a whole number of at least 4",
    ),
    "unknown values": (
        lambda: fill("huge", (2,), 0),
        TPCheckError,
        "fill: 'huge', but should be one of normal, cancelling, coherent, massive, tiny, ties,"
        " integers",
    ),
    "unknown format": (
        lambda: strategies.quantizations(formats=["q4"]),
        TPCheckError,
        "quantizations: formats has 'q4', but should have some of fp8, int8, gptq, awq,"
        " pack-quantized, mxfp4, nvfp4",
    ),
    "a side of no spec": (
        lambda: strategies.quantizations(legal=True),
        TPCheckError,
        "quantizations: legal=True, but spec and tp_size should be given for that",
    ),
    "words wider than a shard": (
        lambda: strategies.quantizations(ModelSpec(64, 16, 12, 1, 2), 2, True, formats=["awq"]),
        PlanError,
        "quantizations: tp_size=2, but should be one at which some quantization plans"
        " [formats=awq]",
    ),
    "values of no dim": (
        lambda: fill("normal", (2,), 0, dim=1),
        TPCheckError,
        "fill: dim=1, but should be a dim of shape=(2,)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_clear_error_before_anything_is_drawn(name: str) -> None:
    make, kind, message = WRONG[name]
    with pytest.raises(kind) as caught:
        make()
    assert str(caught.value) == message


def test_an_unknown_field_is_named_with_the_known_ones() -> None:
    with pytest.raises(PlanError, match=r"unknown fields heads; known: \['attention_bias'"):
        model_specs(2, heads=4)


# Points.


def test_given_specs_are_drawn_at_a_degree_of_the_asked_side() -> None:
    fields = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 24, "num_hidden_layers": 1}
    specs = st.sampled_from([2, 6]).map(
        lambda heads: fields | {"num_attention_heads": heads, "head_dim": 2}
    )
    assert {(p.spec.num_attention_heads, p.tp_size) for p in drawn(points(specs=specs), 100)} == {
        (2, 2),
        (6, 2),
        (6, 3),
        (6, 6),
    }
    illegal = drawn(points((2, 3), False, specs=specs), 20)
    assert {(p.spec.num_attention_heads, p.tp_size) for p in illegal} == {(2, 3)}
    with pytest.raises(SubjectError, match="specs drew int, but should draw ModelSpec or a dict"):
        drawn(points(specs=st.integers()), 5)


def test_a_point_knows_its_case_and_its_tokens_fit_the_positions() -> None:
    for point in drawn(points(max_seq_len=40, max_position_embeddings=5), 100):
        assert point.seq_len <= 5
        assert tpcheck.Case.parse(point.case.id) == point.case
    longest = drawn(points((2,), max_seq_len=100), 300)
    assert max(point.seq_len for point in longest) > 64
    assert {point.spec.max_position_embeddings for point in longest} == {100}


@tpcheck.subject(specs=model_specs((2, 3), legal=True))
def decoder(tp: tpcheck.TPGroup, spec: ModelSpec) -> Any:
    return build_decoder(spec, tp)


def test_drawn_legal_decoders_are_the_same_function() -> None:
    report = tpcheck.run(decoder, (2, 3), backend="sim", cases=6, seq_len=3, confirm=False)
    assert report.outcome == "PASS"
    assert len(report.verdicts) >= 12


# Values.


def test_values_are_the_same_for_the_same_seed_only() -> None:
    for kind in strategies.KINDS:
        first = fill(kind, (3, 5), 7, dtype="bfloat16", tp_size=2)
        assert first.dtype == torch.bfloat16
        assert first.shape == (3, 5)
        assert first.is_contiguous()
        assert torch.equal(first, fill(kind, (3, 5), 7, dtype="bfloat16", tp_size=2))
        assert not torch.equal(first, fill(kind, (3, 5), 8, dtype="bfloat16", tp_size=2))


@pytest.mark.parametrize("tp_size", [2, 3, 4, 8])
def test_cancelling_partials_cancel_stacked_and_row_parallel(tp_size: int) -> None:
    stacked = fill("cancelling", (tp_size, 64), 0, dtype="float64", tp_size=tp_size, dim=0)
    assert stacked.sum(0).norm() < 0.1 * stacked.norm()
    assert stacked.norm(dim=1).min() > 0
    size = 8 * tp_size
    x = fill("cancelling", (4, size), 1, dtype="float64", tp_size=tp_size)
    weight = fill("coherent", (size, 16), 2, dtype="float64", tp_size=tp_size, dim=0)
    rows = zip(x.chunk(tp_size, 1), weight.chunk(tp_size, 0), strict=True)
    partials = torch.stack([x_r @ weight_r for x_r, weight_r in rows])
    assert partials.sum(0).norm() < 0.1 * partials.norm()
    assert all(torch.equal(piece, weight[:8]) for piece in weight.split(8))


def test_magnitudes_lie_at_both_ends() -> None:
    massive = fill("massive", (8, 32), 0)
    outliers = massive.abs().amax(0) > 1e5
    assert outliers.sum() == 2
    assert massive[:, ~outliers].abs().max() < 10
    assert 1.5e5 < massive.abs().max() <= 3e5
    assert fill("massive", (8, 32), 0, dtype="float16").isfinite().all()
    tiny = fill("tiny", (64, 64), 0, dtype="bfloat16")
    assert 0 < tiny.abs().min() < 1e-5
    assert 1e-3 < tiny.abs().max() < 2e-3


def test_ties_tie_and_integers_sum_exactly_in_any_order() -> None:
    ties = fill("ties", (16, 64), 0)
    assert ((ties == ties.amax(-1, keepdim=True)).sum(-1) > 1).all()
    x, weight = (fill("integers", (64, 64), seed, dtype="bfloat16") for seed in (0, 1))
    exact = x.double() @ weight.double()
    assert torch.equal((x @ weight).double(), exact)
    partials = [a @ b for a, b in zip(x.chunk(4, 1), weight.chunk(4, 0), strict=True)]
    assert torch.equal(sum(reversed(partials[1:]), partials[0]).double(), exact)
    assert x.unique().numel() == 5


def test_the_kinds_are_drawn_and_can_be_chosen() -> None:
    assert set(drawn(strategies.input_values(), 100)) == set(strategies.KINDS)
    assert set(drawn(strategies.input_values(["tiny", "ties"]), 30)) == {"tiny", "ties"}


# The package.


def test_dtypes_are_those_of_a_run() -> None:
    assert strategies.DTYPES == run_plan.DTYPES
    assert set(drawn(strategies.dtypes(), 30)) == set(run_plan.DTYPES)


def test_importing_and_drawing_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from hypothesis import given\n"
        "from tpcheck.strategies import points\n"
        "@given(points())\n"
        "def draw(point): pass\n"
        "draw()\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_public_strategy_has_an_example() -> None:
    for name in strategies.__all__:
        value = getattr(strategies, name)
        if callable(value) and value.__module__.startswith("tpcheck.strategies"):
            assert value.__doc__, name
            drawing = name in ("as_spec", "generated_cases") or isinstance(value, type)
            assert drawing or ">>>" in value.__doc__, name
