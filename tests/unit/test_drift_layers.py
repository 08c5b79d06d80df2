"""What a drift profile says of layers: depth, exact terms, the reduction, the rank that is off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.judging import trace, values
from tpcheck.drift_profiles.layers import (
    RowParallel,
    depth,
    observed_sums,
    row_parallel,
    split_inputs,
    summed_elsewhere,
)
from tpcheck.drift_profiles.reductions import layers_json
from tpcheck.numerics.reduction import reduce_sum
from tpcheck.numerics.ulp import eps
from tpcheck.observation.modules import PointRecord
from tpcheck.placement import Partial, Replicate, Shard
from tpcheck.trace import Collective, Trace

RANKS, TOKENS, WIDTH, HIDDEN = 4, 12, 32, 48
CALL = Collective(0, "all_reduce", (2, TOKENS, HIDDEN), "bfloat16", "sum", "down")


def record(output: Tensor | None, input_: Tensor | None = None, **fields: Any) -> PointRecord:
    return PointRecord(input_, output, **fields)


def traced(**points: PointRecord) -> Trace:
    return trace(0, {}, extras={"points": points})


def weights() -> Tensor:
    return torch.div(values(HIDDEN, WIDTH, seed=5), WIDTH**0.5)


def run(
    kind: str, *, bias: float = 0.0, scaled: int | None = None, stored: Any = torch.float64
) -> list[Trace]:
    """Return all ranks' traces of a row-parallel layer summed in bfloat16 by a kind."""
    pieces = values(2, TOKENS, WIDTH, seed=6).bfloat16().chunk(RANKS, -1)
    parts = weights().to(stored).double().chunk(RANKS, 1)
    terms = [x.double() @ w.T for x, w in zip(pieces, parts, strict=True)]
    if scaled is not None:
        terms[scaled] = terms[scaled] * (1 + 2**-5)
    sent = [term.bfloat16() for term in terms]
    total = reduce_sum(sent, kind)
    return [
        traced(
            down=record(
                total + bias,
                pieces[rank],
                in_placement=Shard(-1),
                out_placement=Replicate(),
                finished=3,
                partials=[(CALL, sent[rank], total)],
            ),
        )
        for rank in range(RANKS)
    ]


def alone(native: list[Trace], bias: float = 0.0, stored: Any = torch.float64) -> Trace:
    """Return TP=1's trace: its weights rounded to what they are stored in, its product once."""
    whole = torch.cat([t.extras["points"]["down"].input for t in native], -1)
    product = (whole.double() @ weights().to(stored).double().T).bfloat16()
    return traced(down=record(product + bias, whole, finished=0))


def answered(native: list[Trace], bias: float = 0.0, power: int = 1) -> dict[str, PointRecord]:
    """Return what TP=1 gives in float64 for the layer's inputs."""
    asked = split_inputs(alone(native), native)
    return {fqn: record((x @ weights().T) ** power + bias, finished=0) for fqn, x in asked.items()}


def layers_of(native: list[Trace], bias: float = 0.0, **fields: Any) -> list[RowParallel]:
    base = alone(native, bias, **fields)
    return row_parallel(answered(native, bias), base, native, "bfloat16")[0]


# -- exact terms


def test_each_ranks_term_is_exact() -> None:
    native = run("ring")
    (layer,) = layers_of(native)
    pieces = [t.extras["points"]["down"].input.double() for t in native]
    for rank, (x, w) in enumerate(zip(pieces, weights().chunk(RANKS, 1), strict=True)):
        torch.testing.assert_close(layer.terms[rank], x @ w.T, rtol=1e-12, atol=1e-12)


def test_a_bias_is_in_no_ranks_term() -> None:
    native = run("ring", bias=3.0)
    (layer,) = layers_of(native, bias=3.0)
    (without,) = layers_of(run("ring"))
    torch.testing.assert_close(layer.terms, without.terms, rtol=0, atol=1e-12)
    assert torch.equal(layer.actual, without.actual)  # the sum, before the bias was added


def test_a_layer_that_is_not_linear_is_left_out_and_says_so() -> None:
    native = run("ring")
    found, left_out = row_parallel(answered(native, power=2), alone(native), native, "bfloat16")
    assert found == []
    assert left_out == {"down": "it is not linear: no rank has a term of its own"}


@pytest.mark.parametrize(
    "placements",
    [
        {"in_placement": Replicate(), "out_placement": Replicate()},
        {"in_placement": Shard(-1), "out_placement": Partial()},
        {"in_placement": None, "out_placement": Replicate()},
    ],
)
def test_only_layers_that_take_pieces_and_give_the_whole_are_asked(placements: Any) -> None:
    native = run("ring")
    for one in native:
        for name, value in placements.items():
            setattr(one.extras["points"]["down"], name, value)
    assert answered(native) == {}


def test_layers_beyond_the_bound_are_not_sent() -> None:
    native = run("ring")
    base = alone(native)
    needed = (RANKS + 3) * base.extras["points"]["down"].input.numel() * 8
    assert list(split_inputs(base, native, needed)) == ["down"]
    assert split_inputs(base, native, needed - 1) == {}


def test_a_layer_whose_sum_was_not_seen_is_named() -> None:
    native = run("ring")
    assert summed_elsewhere(["down"], native) == ""
    native[2].extras["points"]["down"].partials = []
    assert summed_elsewhere(["down"], native) == "down"


# -- which reduction


@pytest.mark.parametrize("kind", ["ring", "tree", "wide"])
def test_the_kind_that_summed_is_identified(kind: str) -> None:
    found = layers_json(layers_of(run(kind)), kind, "bfloat16")
    expected = f"{kind} in bfloat16"
    assert expected in found["reduction"]["identified"].split(" = ")
    assert found["layers"][0]["findings"][0]["reproduced"] > 0.99
    assert found["reduction"]["alarm"]["raised"] == ""


def test_another_kind_than_the_declared_one_is_an_alarm() -> None:
    layers = layers_of(run("ring"))
    found = layers_json([*layers, *layers_of(run("ring"))], "wide", "bfloat16")["reduction"]
    assert found["alarm"]["raised"] == "wider"
    assert found["alarm"]["count"] == 2 * layers[0].actual.numel() == found["outputs"]


def test_layers_together_are_surer_than_one() -> None:
    layers = layers_of(run("tree"))
    one = layers_json(layers, "tree", "bfloat16")["reduction"]
    two = layers_json(layers * 2, "tree", "bfloat16")["reduction"]
    assert two["identified"] == one["identified"]
    assert two["findings"][0]["probability"] >= one["findings"][0]["probability"]
    assert two["alarm"]["squares"] == pytest.approx(2 * one["alarm"]["squares"])


def test_a_kind_that_the_law_does_not_cover_has_no_alarm_and_says_so() -> None:
    found = layers_json(layers_of(run("ring")), "int8_wire", "bfloat16")["reduction"]
    assert found["alarm"] is None
    assert "not int8_wire" in found["alarm_reason"]


def test_a_rank_that_is_counted_wrongly_stands_out() -> None:
    clean = layers_json(layers_of(run("ring")), "ring", "bfloat16")["layers"][0]
    assert not clean["scaled_rank"]["significant"]
    found = layers_json(layers_of(run("ring", scaled=2)), "ring", "bfloat16")["layers"][0]
    assert found["scaled_rank"]["significant"]
    assert found["scaled_rank"]["rank"] == 2
    assert found["scaled_rank"]["factor"] == pytest.approx(1 + 2**-5, rel=5e-3)
    for one in (clean, found):
        assert len(one["rank_z"]) == len(one["term_energy"])
        assert max(one["rank_z"], key=abs) == one["scaled_rank"]["z"]
        assert one["rank_z"][one["scaled_rank"]["rank"]] == one["scaled_rank"]["z"]


def test_the_energy_of_the_terms_is_shared_out() -> None:
    found = layers_json(layers_of(run("ring")), "ring", "bfloat16")["layers"][0]["term_energy"]
    (layer,) = layers_of(run("ring"))
    energy = layer.terms.flatten(1).square().sum(1)
    assert found == pytest.approx((energy / energy.sum()).tolist())
    assert sum(found) == pytest.approx(1)


# -- TP=1 as control: a layer that rounds more than its output, whoever sums


def dequantized() -> list[Trace]:
    """Return traces of a layer whose weights are rounded to bfloat16, as codes of 4 bits are."""
    return run("ring", stored=torch.bfloat16)


def test_a_clean_layer_at_tp1_rounds_its_output_once() -> None:
    for bias in (0.0, 3.0):
        (layer,) = layers_of(run("ring", bias=bias), bias)
        assert layer.tp1_excess == pytest.approx(1.0, abs=1e-3)


def test_rounded_weights_are_no_alarm_on_the_sum() -> None:
    layers = layers_of(dequantized(), stored=torch.bfloat16) * 8
    assert layers[0].tp1_excess > 1.05
    found = layers_json(layers, "ring", "bfloat16")
    assert found["reduction"]["alarm"]["raised"] == ""
    assert found["reduction"]["identified"] == "ring in bfloat16"
    assert {one["terms"] for one in found["layers"]} == {"sent"}


def test_what_tp1_does_not_do_is_an_alarm() -> None:
    found = layers_json(layers_of(dequantized()) * 8, "ring", "bfloat16")
    assert found["reduction"]["alarm"]["raised"] == "wider"
    assert {one["terms"] for one in found["layers"]} == {"exact"}


def unseen(native: list[Trace]) -> list[Trace]:
    for one in native:
        one.extras["points"]["down"].partials = []
    return native


def test_where_no_sent_term_was_seen_tp1s_own_errors_are_allowed_besides() -> None:
    layers = layers_of(unseen(dequantized()), stored=torch.bfloat16) * 8
    found = layers_json(layers, "ring", "bfloat16")["reduction"]["alarm"]
    assert found["raised"] == ""
    assert found["narrower"] == 0.0  # of a bound: less is no finding
    coarse = layers_of(unseen(run("ring", scaled=2, stored=torch.bfloat16)), stored=torch.bfloat16)
    found = layers_json(coarse * 8, "ring", "bfloat16")["reduction"]["alarm"]
    assert found["raised"] == "wider"


def test_a_layer_that_tp1_blurs_says_nothing_of_the_others() -> None:
    layers = [*layers_of(run("ring")), *layers_of(dequantized(), stored=torch.bfloat16)]
    found = layers_json(layers, "ring", "bfloat16")
    assert found["reduction"]["alarm"]["raised"] == ""
    assert [one["terms"] for one in found["layers"]] == ["exact", "sent"]


# -- depth


def stream(size: float, **more: PointRecord) -> Trace:
    """Return a trace of two layers, off by so many eps, and a module between them."""
    points = {
        f"layers.{i}": record(values(2, 4, 8, seed=i) * (1 + (i + 1) * size), finished=2 * i + 1)
        for i in range(2)
    }
    points["layers.1.mlp"] = record(values(2, 4, 8, seed=9) * (1 + size), finished=2)
    return traced(**{**points, **more})


def test_the_residual_stream_is_measured_after_each_layer() -> None:
    step = eps("bfloat16")
    found = depth(stream(step), stream(3 * step), stream(0.0), "bfloat16")
    assert [point["fqn"] for point in found["points"]] == ["layers.0", "layers.1"]
    for i, point in enumerate(found["points"]):
        assert point["tp1_epsilons"] == pytest.approx(i + 1)
        assert point["epsilons"] == pytest.approx(3 * (i + 1))
        assert point["ratio"] == pytest.approx(3)


def test_values_that_are_lost_are_no_error_of_zero() -> None:
    step = eps("bfloat16")
    lost = record(values(2, 4, 8, seed=0).where(torch.arange(8) > 2, torch.nan), finished=1)
    native = stream(step, **{"layers.0": lost})
    first, second = depth(stream(step), native, stream(0.0), "bfloat16")["points"]
    assert (first["epsilons"], first["ratio"], first["not_finite"]) == (None, None, 24)
    assert first["tp1_epsilons"] == pytest.approx(1)
    assert (second["ratio"], second["not_finite"]) == (pytest.approx(1), 0)


def test_drift_begins_where_bits_first_differ() -> None:
    step = eps("bfloat16")
    base, native = stream(step), stream(step)
    assert depth(base, native, stream(0.0), "bfloat16")["begins"] is None
    changed = record(values(2, 4, 8, seed=9), finished=2)
    native = stream(step, **{"layers.1.mlp": changed})
    assert depth(base, native, stream(0.0), "bfloat16")["begins"] == "layers.1.mlp"


def test_without_layers_every_whole_module_is_shown_and_pieces_are_not() -> None:
    points = {
        "embed": record(values(2, 4, 8), finished=0),
        "up": record(values(2, 4, 8), finished=1),
    }
    base, oracle = traced(**points), traced(**points)
    native = traced(embed=points["embed"], up=record(values(2, 4, 2), finished=1))
    found = depth(base, native, oracle, "bfloat16")
    assert [point["fqn"] for point in found["points"]] == ["embed"]


# -- sums that were seen, where no layer declares its placements


def undeclared(kind: str, **fields: Any) -> list[Trace]:
    native = run(kind, **fields)
    for one in native:
        one.extras["points"]["down"].in_placement = None
    return native


@pytest.mark.parametrize("kind", ["ring", "tree"])
def test_a_sum_names_its_reduction_from_the_terms_that_were_sent(kind: str) -> None:
    sums = observed_sums(undeclared(kind), "bfloat16")
    found = layers_json(sums, kind, "bfloat16", terms="sent")
    assert [one["fqn"] for one in found["layers"]] == ["down"]
    assert found["reduction"]["identified"] == f"{kind} in bfloat16"
    assert found["reduction"]["findings"][0]["reproduced"] == 1.0
    assert found["reduction"]["alarm"]["raised"] == ""
    assert found["terms"] == "sent"


def test_a_sum_outside_of_every_module_is_seen_as_the_forwards() -> None:
    native = undeclared("ring")
    for one in native:
        (partial,) = one.extras["points"].pop("down").partials
        one.extras["outside"] = [partial, partial]
    found = observed_sums(native, "bfloat16")
    assert [one.fqn for one in found] == ["forward, sum 1", "forward, sum 2"]


def test_pieces_of_a_scattered_sum_are_put_together() -> None:
    native = undeclared("ring")
    (whole,) = observed_sums(native, "bfloat16")
    for rank, one in enumerate(native):
        point = one.extras["points"]["down"]
        (_, sent, total) = point.partials[0]
        call = Collective(0, "reduce_scatter", tuple(sent.shape), "bfloat16", "dim=0", "down")
        point.partials[0] = (call, sent.flatten(), total.flatten().chunk(RANKS)[rank])
    (pieces,) = observed_sums(native, "bfloat16")
    assert torch.equal(pieces.actual, whole.actual.flatten())


@pytest.mark.parametrize(
    "call",
    [
        Collective(0, "all_reduce", (), "bfloat16", "avg"),
        Collective(0, "reduce_scatter", (), "bfloat16", "dim=1"),
    ],
)
def test_sums_that_are_divided_or_cut_elsewhere_are_left_out(call: Collective) -> None:
    native = undeclared("ring")
    for one in native:
        point = one.extras["points"]["down"]
        point.partials[0] = (call, *point.partials[0][1:])
    assert observed_sums(native, "bfloat16") == []


def test_what_one_rank_alone_holds_and_what_ranks_disagree_on_is_no_sum() -> None:
    alone = undeclared("ring")
    for one in alone[1:]:
        one.extras["points"]["down"].partials[0][1].zero_()
    assert observed_sums(alone, "bfloat16") == []
    apart = undeclared("ring")
    apart[1].extras["points"]["down"].partials.clear()
    assert observed_sums(apart, "bfloat16") == []


def test_sums_beyond_the_bound_are_left_out() -> None:
    native = undeclared("ring")
    needed = RANKS * 2 * TOKENS * HIDDEN * 8
    assert len(observed_sums(native, "bfloat16", needed)) == 1
    assert observed_sums(native, "bfloat16", needed - 1) == []
