"""The first module that leaves its reference, the rank to blame, and what is wrong with it."""

import math

import pytest
import torch

import tpcheck
from tests.judging import values
from tpcheck.localization import locate
from tpcheck.observation.modules import PointRecord
from tpcheck.placement import Partial, Replicate, Shard, Slices
from tpcheck.trace import Collective, Trace

torch.set_num_threads(1)
SUM = Collective(0, "all_reduce", (4, 8), "float64", "sum")
WANT = values(4, 8)


def record(output, finished=0, **fields):
    return PointRecord(input=None, output=output, finished=finished, **fields)


def traced(*points, replayed=None):
    """One Trace per dict of points, rank by rank."""
    replayed = replayed or [{}] * len(points)
    return [
        Trace(rank, {}, {}, {}, extras={"points": held, "replayed": again})
        for rank, (held, again) in enumerate(zip(points, replayed, strict=True))
    ]


def found(want, outputs, placement=None, partials=None, **options):
    """Locate in one module `m`, given each rank's output."""
    partials = partials or [[]] * len(outputs)
    held = [
        {"m": record(out, out_placement=placement, partials=own)}
        for out, own in zip(outputs, partials, strict=True)
    ]
    (reference,) = traced({"m": record(want)})
    return locate(reference, traced(*held), **({"limit": 1e-12} | options))


def changed(x, index, value=7.0):
    x = x.clone()
    x[index] = value
    return x


def test_modules_that_agree_are_not_blamed():
    assert found(WANT, [WANT, WANT]) is None
    assert found(WANT, [WANT * (1 + 1e-14), WANT]) is None


def test_the_first_module_to_return_is_blamed_before_the_one_around_it_and_after_it():
    order = {"block": 2, "block.up": 0, "block.down": 1, "head": 3}
    (reference,) = traced({fqn: record(WANT, at) for fqn, at in order.items()})
    wrong = {fqn: record(WANT * (1 if fqn == "block.up" else 2), at) for fqn, at in order.items()}
    first = locate(reference, traced(wrong, wrong), limit=1e-12)
    assert first.fqn == "block.down"


def test_a_replay_on_the_references_input_clears_what_only_passes_an_error_on():
    (reference,) = traced({"a": record(WANT, 0), "b": record(WANT, 1)})
    bad = {"a": record(WANT, 0), "b": record(WANT * 2, 1)}
    again = {"a": record(WANT, 0), "b": record(WANT, 1)}
    assert locate(reference, traced(bad, bad), limit=1e-12).fqn == "b"
    assert locate(reference, traced(bad, bad, replayed=[again, again]), limit=1e-12) is None


@pytest.mark.parametrize(
    ("outputs", "placement", "rank", "index"),
    [
        ([WANT, changed(WANT, (2, 3))], Replicate(), 1, "[2, 3]"),
        ([changed(WANT, (2, 3)), WANT], Replicate(), 0, "[2, 3]"),
        ([changed(WANT, (2, 3))] * 2, Replicate(), None, "[2, 3]"),
        ([WANT[:, :4], WANT[:, 4:] * 2], Shard(1), 1, "[0:4, 4:8]"),
        ([WANT[:3], changed(WANT[3:], (0, 5))], Shard(0), 1, "[3, 5]"),
        ([WANT[:, :4] * 2, WANT[:, 4:] * 2], Shard(1), None, "[0:4, 0:8]"),
        ([WANT / 2, WANT / 2 + 1], Partial(), None, "[0:4, 0:8]"),
        ([WANT, WANT * 3], Partial(), 1, "[0:4, 0:8]"),
    ],
)
def test_the_rank_and_the_place_are_named(outputs, placement, rank, index):
    first = found(WANT, outputs, placement)
    assert (first.fqn, first.rank, first.index) == ("m", rank, index)
    assert first.ulp > 0
    assert "relative rms" in first.detail


def test_partials_that_sum_up_are_right():
    assert found(WANT, [WANT / 4, WANT * 3 / 4], Partial()) is None


def test_slices_are_put_together():
    first_half = Slices([(slice(0, 2), slice(0, 2))])
    (reference,) = traced({"m": record(WANT)})
    second_half = Slices([(slice(1, 3), slice(2, 4))])
    padded = torch.cat([torch.full((1, 8), math.nan).double(), WANT[2:]])
    held = [
        {"m": record(WANT[:2], out_placement=first_half)},
        {"m": record(padded, out_placement=second_half)},
    ]
    assert locate(reference, traced(*held), limit=1e-12) is None
    held[1]["m"].output[2, 5] = 9
    assert locate(reference, traced(*held), limit=1e-12).index == "[3, 5]"


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ([WANT * 2, WANT * 2], "Replicate()"),
        ([WANT[:1], WANT[1:] * 2], "Shard(dim=0)"),
        ([WANT[:, :2], WANT[:, 2:] * 2], "Shard(dim=1)"),
        ([WANT / 2, WANT * 2], "Partial(op='sum'), since the ranks differ and none is right"),
        ([WANT / 2, WANT], "Replicate()"),  # one of them is right: copies
    ],
)
def test_an_undeclared_placement_is_guessed_and_the_guess_is_told(outputs, said):
    assert f"read as {said}" in found(WANT, outputs).detail


def test_undeclared_partials_and_shards_that_are_right_pass():
    assert found(WANT, [WANT / 4, WANT * 3 / 4]) is None
    assert found(WANT, [WANT[:1], WANT[1:]]) is None


Q, K, V = values(6, 12), values(6, 6, seed=1), values(6, 6, seed=2)
FUSED = torch.cat([Q, K, V], 1)


def cut(rank, *parts, size=3):
    return torch.cat([part.chunk(size, 1)[rank] for part in parts], 1)


def test_a_fused_layer_that_is_cut_part_by_part_is_right():
    assert found(FUSED, [cut(rank, Q, K, V) for rank in range(3)]) is None
    assert found(torch.cat([Q, K], 1), [cut(rank, Q, K) for rank in range(3)]) is None


def test_a_fused_layer_is_right_as_far_as_rounding_explains():
    (reference,) = traced({"m": record(FUSED)})
    (base,) = traced({"m": record(FUSED * (1 + 2**-9))})
    held = traced(*({"m": record(cut(rank, Q, K, V) * (1 - 2**-9))} for rank in range(3)))
    assert locate(reference, held, limit=2**-20, base=base, ratio_limit=3.0) is None


@pytest.mark.parametrize(
    "outputs",
    [
        [cut(1, Q, K, V), cut(0, Q, K, V), cut(2, Q, K, V)],  # of other ranks
        [cut(rank, FUSED).roll(5, 1) for rank in range(3)],
    ],
)
def test_a_fused_layer_that_is_cut_otherwise_is_blamed(outputs):
    assert "Shard(dim=1)" in found(FUSED, outputs).detail


@pytest.mark.parametrize(
    ("odd", "index"),
    [
        (cut(2, Q, V, K), "[0:6, 16:24]"),  # parts in another order
        (cut(1, Q, K, V), "[0:6, 8:24]"),  # of another rank
        (cut(2, Q, K, V).flip(1), "[0:6, 8:24]"),
        (changed(cut(2, Q, K, V), (0, 5)), "[0, 17]"),
    ],
)
def test_the_rank_that_cuts_a_fused_layer_otherwise_is_named(odd, index):
    first = found(FUSED, [cut(0, Q, K, V), cut(1, Q, K, V), odd])
    assert (first.rank, first.index) == (2, index)
    assert "read as parts, each cut in rank order" in first.detail


def test_shards_of_other_ranks_are_no_fused_layer():
    outputs = [K.chunk(3, 1)[(rank + 1) % 3] for rank in range(3)]
    assert "Shard(dim=1)" in found(K, outputs).detail


def tokens(total, size):
    """A sequence that is cut into equal pieces, the last of them padded."""
    whole = values(2, total, 4)
    share = -(-total // size)
    pads = torch.full((2, share * size - total, 4), 9.0).double()
    return whole, list(torch.cat([whole, pads], 1).split(share, 1))


@pytest.mark.parametrize(("total", "size"), [(7, 2), (5, 4), (2, 3), (1, 4)])
def test_pads_after_the_last_token_are_not_judged(total, size):
    assert found(*tokens(total, size)) is None


def test_the_rank_whose_tokens_are_off_is_named_beside_pads():
    whole, pieces = tokens(7, 3)
    pieces[1] = changed(pieces[1], (0, 2, 1))
    first = found(whole, pieces)
    assert (first.rank, first.index) == (1, "[0, 5, 1]")
    assert "read as padded shards" in first.detail


def test_pads_of_a_declared_placement_are_no_divergence():
    whole, pieces = tokens(7, 3)
    gathered = torch.cat(pieces, 1)
    assert found(whole, pieces, Shard(1)) is None
    assert found(whole, [gathered] * 3, Replicate()) is None
    pieces[1] = changed(pieces[1], (0, 2, 1))
    assert (found(whole, pieces, Shard(1)).rank, found(whole, pieces, Shard(1)).index) == (
        1,
        "[0, 5, 1]",
    )
    assert found(whole, [torch.cat(pieces, 1)] * 3, Replicate()).index == "[0, 5, 1]"


@pytest.mark.parametrize(
    ("inputs", "rank", "said"),
    [
        ([WANT, WANT], None, ""),
        ([WANT[:, :4], WANT[:, 4:]], None, ""),
        ([WANT[:, :4], WANT[:, 4:] * 2], 1, "its input is off already on rank 1"),
        ([WANT * 2, WANT * 2], None, "its input is off already: look at what comes before"),
        ([WANT / 4, WANT * 3 / 4], None, "its input is partial sums, not reduced over ranks"),
        ([WANT[:1], WANT[:1]], None, ""),  # it fits nothing
        ([None, WANT * 2], None, ""),
    ],
)
def test_an_input_that_is_off_already_is_told(inputs, rank, said):
    (reference,) = traced({"m": PointRecord(WANT, WANT, finished=0)})
    held = traced(*({"m": PointRecord(one, WANT * 3, finished=0)} for one in inputs))
    first = locate(reference, held, limit=1e-12)
    assert first.rank == rank
    assert said in first.detail
    assert ("its input" in first.detail) == bool(said)


def test_an_output_that_fits_nothing_is_passed_over():
    assert found(WANT, [WANT[:1], WANT[:1]]) is None
    assert found(WANT, [WANT[0], WANT[0]]) is None


def test_a_module_that_is_not_traced_on_every_rank_is_passed_over():
    (reference,) = traced({"m": record(WANT)})
    assert locate(reference, traced({"m": record(WANT * 2)}, {}), limit=1e-12) is None


@pytest.mark.parametrize(
    ("given", "output", "rank"),
    [
        (WANT, changed(WANT, (1, 2)), 1),
        (WANT, WANT, None),
        (WANT * 2, WANT * 2, None),  # another input may well give another output
        (WANT[:2], WANT[:2] * 2, None),
        (WANT, WANT[:2], None),  # a piece of it
        (None, WANT * 2, None),
    ],
)
def test_an_expert_that_one_rank_holds_gives_the_same_when_given_the_same(given, output, rank):
    (reference,) = traced({"m": PointRecord(WANT, WANT, finished=0)})
    traces = traced({}, {"m": PointRecord(given, output, finished=0)}, {})
    first = locate(reference, traces, limit=1e-12)
    assert (first and first.rank) == rank
    if first is not None:
        assert first.index == "[1, 2]"
        assert "on the same input" in first.detail


def test_another_shape_is_named():
    first = found(WANT, [torch.cat([WANT, WANT])] * 2, Replicate())
    assert first.detail == "shape=[8, 8], but should be [4, 8] as at TP=1"


def test_nan_is_found_with_its_place():
    first = found(WANT, [changed(WANT, (1, 2), math.nan)] * 2, Replicate())
    assert first.index == "[1, 2]"


def test_in_the_deployed_dtype_a_module_may_be_off_as_far_as_tp1_explains():
    (reference,) = traced({"m": record(WANT)})
    (base,) = traced({"m": record(WANT * (1 + 2**-9))})
    deployed = traced({"m": record(WANT * (1 + 2**-8))}, {"m": record(WANT * (1 + 2**-8))})
    options = {"limit": 2**-20, "base": base}
    assert locate(reference, deployed, **options, ratio_limit=3.0) is None
    assert locate(reference, deployed, **options, ratio_limit=1.5).fqn == "m"


# Attribution at a row-parallel layer.

TERMS = [values(4, 8, seed=seed) for seed in (1, 2, 3)]
TOTAL = sum(TERMS)


def reduced(operands, result):
    return found(TOTAL, [result] * 3, Replicate(), [[(SUM, x, result)] for x in operands])


def test_a_scaled_partial_is_named_with_rank_and_factor():
    operands = [TERMS[0], TERMS[1], TERMS[2] * (1 + 2**-7)]
    first = reduced(operands, sum(operands))
    assert first.rank == 2
    assert "rank 2's partial is off by a factor of 1.00781" in first.detail


@pytest.mark.parametrize("dim", [0, 1])
def test_a_scaled_partial_of_a_sum_that_is_dealt_out_is_named(dim):
    scatter = Collective(0, "reduce_scatter", (6, 9), "float64", f"dim={dim}")
    terms = [values(6, 9, seed=seed) for seed in (1, 2, 3)]
    operands = [terms[0], terms[1] * (1 + 2**-7), terms[2]]
    pieces = sum(operands).chunk(3, dim)
    partials = [[(scatter, x, piece)] for x, piece in zip(operands, pieces, strict=True)]
    first = found(sum(terms), pieces, Shard(dim), partials)
    assert first.rank == 1
    assert "rank 1's partial is off by a factor of 1.00781" in first.detail


def test_a_scaled_partial_is_named_where_a_bias_is_added_after_the_sum():
    bias = values(8, seed=9)
    operands = [TERMS[0], TERMS[1] * 3, TERMS[2]]
    total = sum(operands)
    held = [record(total + bias, partials=[(SUM, x, total)]) for x in operands]
    (reference,) = traced({"m": record(TOTAL + bias, partials=[(SUM, TOTAL, TOTAL)])})
    first = locate(reference, traced(*({"m": one} for one in held)), limit=1e-12)
    assert first.rank == 1
    assert "rank 1's partial is off by a factor of 3" in first.detail


def test_a_partial_that_is_scaled_at_one_token_is_named():
    operands = [TERMS[0], TERMS[1].clone(), TERMS[2]]
    operands[1][3] *= 1.5
    first = reduced(operands, sum(operands))
    assert (first.rank, first.index) == (1, "[3, 0:8]")
    assert "where it differs, rank 1's partial is off by a factor of 1.5" in first.detail


def test_a_partial_that_lacks_a_channel_is_named():
    operands = [TERMS[0], TERMS[1], TERMS[2].clone()]
    operands[2][:, 5] = 0
    first = reduced(operands, sum(operands))
    assert first.rank == 2
    assert "rank 2's partial is zero where it differs" in first.detail


def embedded(odd):
    """Locate in a vocab-parallel embedding of two ranks where rank 1 gives `odd` of what it has."""
    mine = torch.tensor([1.0, 0, 1, 0]).double()[:, None]
    operands = [mine * WANT, odd((1 - mine) * WANT)]
    result = sum(operands)
    return found(WANT, [result] * 2, Replicate(), [[(SUM, x, result)] for x in operands])


def test_a_rank_that_lacks_a_token_is_not_blamed_for_the_rank_that_has_it():
    first = embedded(lambda term: changed(term, (1, slice(4)), 3.0))
    assert first.rank == 1
    assert "where it differs, only rank 1's partial is not zero" in first.detail


def test_a_token_that_no_rank_has_is_called_that():
    first = embedded(lambda term: changed(term, (1, slice(None)), 0.0))
    assert first.rank is None
    assert "every rank's partial is zero where it differs" in first.detail


def test_a_term_that_should_not_be_there_is_told_from_a_factor():
    first = embedded(lambda term: changed(term, (0, slice(None))))
    assert first.rank == 1
    assert "where it differs, rank 1's partial is one too many" in first.detail


def test_partials_that_are_summed_beside_the_module_are_held_against_tp1():
    terms = [values(4, 8, seed=seed) for seed in (1, 2)]
    first = found(sum(terms), [terms[0], terms[1] * 2])
    assert (first.rank, "rank 1's partial is off by a factor of 2" in first.detail) == (1, True)


def test_a_bias_on_every_rank_is_told_where_no_sum_was_seen():
    bias = values(8, seed=5)
    assert "the same vector at every token" in found(WANT, [WANT + bias] * 2).detail


def test_who_holds_a_sum_that_is_dealt_out_is_not_blamed_for_a_term():
    scatter = Collective(0, "reduce_scatter", (6, 9), "float64", "dim=0")
    terms = [values(6, 9, seed=seed) for seed in (1, 2, 3)]
    operands = [terms[0], changed(terms[1], (5, slice(None)), values(9, seed=7)), terms[2]]
    pieces = sum(operands).chunk(3, 0)
    held = [
        record(piece, out_placement=Shard(0), partials=[(scatter, x, piece)])
        for x, piece in zip(operands, pieces, strict=True)
    ]
    want = sum(terms)
    reference = record(want, partials=[(scatter, want, want)])
    (at_1,) = traced({"m": reference})
    first = locate(at_1, traced(*({"m": one} for one in held)), limit=1e-12)
    assert (first.rank, first.index) == (None, "[5, 0:9]")


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_terms_that_are_multiples_of_each_other_name_no_rank(odd):
    operands = [TOTAL / 3 * (1 + 2**-7 * (rank == odd)) for rank in range(3)]
    first = reduced(operands, sum(operands))
    assert first.rank is None
    assert "off by a factor of" not in first.detail


def test_a_partial_that_is_something_else_is_not_explained():
    operands = [TERMS[0], TERMS[1], values(4, 8, seed=7)]
    assert "but not by a factor on any rank" in reduced(operands, sum(operands)).detail


def test_a_reduction_that_drops_a_rank_is_named():
    first = reduced(TERMS, TERMS[0] + TERMS[2])
    assert first.rank == 1
    assert "the reduction counted rank 1's partial" in first.detail


def test_a_reduction_that_counts_a_rank_twice_is_named():
    first = reduced(TERMS, TOTAL + TERMS[0])
    assert first.rank == 0
    assert "the reduction counted rank 0's partial 2 times" in first.detail


def test_a_reduction_that_is_no_sum_is_named():
    first = reduced(TERMS, torch.stack(TERMS).amax(0))
    assert first.rank is None
    assert "the reduction did not return the sum of the partials" in first.detail


def test_a_missing_reduction_is_named():
    first = found(TOTAL, TERMS, Replicate())
    assert "the ranks' outputs are partial sums: a reduction is missing" in first.detail


def test_an_average_in_place_of_a_sum_is_no_missing_reduction():
    first = reduced(TERMS, TOTAL / 3)
    assert "every rank gives 1/3 of TP=1's: an average, not a sum" in first.detail
    assert "missing" not in first.detail


def test_a_bias_on_every_rank_is_told_from_a_factor():
    bias = values(8, seed=9)
    operands = [x + bias for x in TERMS]
    assert "the same vector at every token" in reduced(operands, sum(operands)).detail


@pytest.mark.parametrize("dealt_out", [False, True])
def test_regression_in_bfloat16_names_the_rank_that_a_ratio_cannot_see(dealt_out):
    call = Collective(0, "reduce_scatter", (64, 64), "bfloat16", "dim=1") if dealt_out else SUM
    placement = Shard(1) if dealt_out else Replicate()
    generator = torch.Generator().manual_seed(0)
    terms = [torch.randn(64, 64, generator=generator).double() for _ in range(4)]
    want = sum(terms)

    def first(scale):
        operands = [x.bfloat16() for x in terms]
        operands[2] = (terms[2] * scale).bfloat16()
        result = sum(x.double() for x in operands).bfloat16()
        results = result.chunk(4, 1) if dealt_out else [result] * 4
        held = [
            {"m": record(own, out_placement=placement, partials=[(call, x, own)])}
            for x, own in zip(operands, results, strict=True)
        ]
        (reference,) = traced({"m": record(want)})
        (base,) = traced({"m": record(want.bfloat16())})
        return locate(reference, traced(*held), limit=1e-9, base=base, ratio_limit=0.5)

    assert first(1 + 2**-7).rank == 2
    assert "rank 2's partial counts 1.00" in first(1 + 2**-7).detail
    assert first(1.0).rank is None


# Slices in the wrong place.


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ([WANT[:, 4:], WANT[:, :4]], "of TP=1's dim 1, rank 0 holds 4:8, rank 1 holds 0:4"),
        ([WANT[:, :4], WANT[:, :4]], "of TP=1's dim 1, rank 1 holds 0:4"),
        ([WANT[2:], WANT[:2]], "of TP=1's dim 0, rank 0 holds 2:4, rank 1 holds 0:2"),
        ([WANT[:, [0, 1, 4, 5]], WANT[:, [0, 1, 4, 5]]], "rank 0 holds 0:2 + 4:6, rank 1 holds"),
        ([WANT.roll(4, 1)] * 2, "it is made of 4:8 + 0:4 of TP=1's dim 1"),
        ([WANT, WANT[:, [7, 6, 5, 4, 3, 2, 1, 0]]], "made of 7:8 + 6:7 + 5:6 + ... of TP=1's dim"),
        ([WANT[[1, 0, 2, 3]]] * 2, "it is made of 1:2 + 0:1 + 2:4 of TP=1's dim 0"),
    ],
)
def test_slices_in_the_wrong_place_are_told_from_wrong_numbers(outputs, said):
    assert said in found(WANT, outputs).detail


def test_parts_of_a_fused_layer_in_another_order_than_at_tp_1_are_wrong():
    gate_up, up_gate = [0, 1, 4, 5], [4, 5, 0, 1]
    assert found(WANT, [WANT[:, gate_up], WANT[:, [2, 3, 6, 7]]]) is None
    first = found(WANT, [WANT[:, up_gate], WANT[:, [6, 7, 2, 3]]])
    assert "of TP=1's dim 1, rank 0 holds 4:6 + 0:2, rank 1 holds 6:8 + 2:4" in first.detail


@pytest.mark.parametrize(
    "outputs", [[WANT, WANT * (1 + 3e-12)], [WANT[:2], WANT[2:] * (1 + 3e-12)]]
)
def test_numbers_that_are_hardly_off_are_in_their_place(outputs):
    detail = found(WANT, outputs).detail
    assert "holds" not in detail
    assert "made of" not in detail


def test_channels_of_nothing_but_zeros_are_in_their_place():
    want = WANT.clone()
    want[:, 3:7] = 0
    first = found(want, [want[:, :4] * 2, want[:, 4:]])
    assert first.rank == 0
    assert "holds" not in first.detail


# The whole way.


@pytest.mark.parametrize(
    ("fault", "fqn", "rank"),
    [
        ("missing_all_reduce", "layers.0.mlp.down_proj", None),
        ("scaled_rank", "layers.0.self_attn.o_proj", 3),
        ("shard_of_rank_0", "layers.0.mlp.gate_proj", 1),
        ("tied_head_of_rank_0", "lm_head", None),
        ("residual_before_reduce", "layers.0.mlp.down_proj", None),
    ],
)
def test_a_planted_fault_is_found_where_it_was_planted(fault, fqn, rank):
    report = tpcheck.run(f"builtin:llama-tiny+{fault}", (4,), backend="sim", confirm=False)
    (verdict,) = report.verdicts
    assert verdict.first_divergence.fqn == fqn
    if rank is not None:
        assert verdict.first_divergence.rank == rank


def test_until_stops_the_search_and_is_checked():
    found = tpcheck.run(
        "builtin:llama-tiny+average_for_sum",
        (2,),
        backend="sim",
        confirm=False,
        until="layers.0.mlp.down_proj",
    )
    assert found.verdicts[0].first_divergence is None
    with pytest.raises(tpcheck.TPCheckError, match="until='nope' is not a traced module"):
        tpcheck.run("builtin:llama-tiny", (2,), backend="sim", until="nope")


def beside(given, *, want_before=WANT, sums=((), ())):
    """Locate where `add` doubles what it should give, after a `row` that gives `given` by rank."""
    (reference,) = traced({"row": record(want_before, 0), "add": record(WANT, 1)})
    held = [
        {"row": record(out, 0), "add": record(WANT * 2, 1, partials=list(own))}
        for out, own in zip(given, sums, strict=True)
    ]
    return locate(reference, traced(*held), limit=1e-12)


def test_partial_sums_that_nothing_adds_up_are_told_where_they_first_show():
    half = WANT / 2
    uneven = [half + 1, half - 1]
    first = beside(uneven)
    assert first.fqn == "add"
    assert first.detail.endswith("row, before it, gives partial sums that no all-reduce adds up")
    summed = [[(SUM, out, WANT)] for out in uneven]
    assert "before it" not in beside(uneven, sums=summed).detail


def test_a_shape_that_is_none_of_tp1s_is_told_where_it_first_shows():
    first = beside([WANT[0], WANT[0]])
    assert first.fqn == "add"
    assert first.detail.endswith("row, before it, gives shape=[8], and [4, 8] at TP=1")
    assert "before it" not in beside([WANT[:2], WANT[2:]]).detail


def test_what_one_rank_alone_returns_is_judged_on_what_it_was_given():
    points = [PointRecord(WANT, out, finished=0) for out in (WANT * 2, None)]
    (reference,) = traced({"head": PointRecord(WANT, WANT, finished=0)})
    first = locate(reference, traced(*({"head": point} for point in points)), limit=1e-12)
    assert (first.fqn, first.rank) == ("head", 0)
    assert "on the same input" in first.detail
