"""The TP=1 fallback: what each level computes, when scoring falls back, and what that costs.

Ranks are simulated here; threads and DTensors need real ones (tests/real/test_fallback_gloo.py).
"""

import math
import warnings

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import tpcheck
from tests import fallback_jobs
from tests.fallback_jobs import Handwritten, Work
from tests.groups import single_group
from tpcheck.adapters.reference import BUILTINS
from tpcheck.errors import BackendError, SubjectError, TPCheckError
from tpcheck.fallback import decoders
from tpcheck.fallback.counting import Counters
from tpcheck.fallback.declared_shards import whole_shape
from tpcheck.fallback.gathering import Cost, Meter
from tpcheck.fallback.levels import LEVELS, parallel_model, parse_levels
from tpcheck.fallback.policy import Judgement, ScoringPolicy, judged
from tpcheck.fallback.products import Row, fixed_tree_product, fp32_product, tree_sum
from tpcheck.fallback.scoring import Score, ScoringFallback
from tpcheck.fallback.turns import Turns, key_of
from tpcheck.groups.jobs import Job
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.numerics.tolerance import Tolerance
from tpcheck.placement import Replicate, Shard, Slices
from tpcheck.records import Check, Path, Report, Verdict
from tpcheck.reference.decoder import build_decoder
from tpcheck.spec import ModelSpec

SPEC = ModelSpec(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=16,
)
MODELS = [
    "llama-tiny",
    "gpt2-tiny",
    "olmo2-tiny",
    "mixtral-tiny",
    "qwen2-moe-tiny",
    "fp8-small",
    "awq-small",
]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def replies(function, work, size):
    (result,) = SimulatedRanks().run([Job(f"tests.fallback_jobs:{function}", work, size)])
    assert result.failure is None, result.failure
    return result.replies


def logits(work, size):
    """Return every level's logits on rank 0; all ranks have them."""
    ranks = replies("level_job", work, size)
    names = ("tp", *work.levels, "tp again")
    for reply in ranks[1:]:
        for name in names:
            assert torch.equal(reply[name][0], ranks[0][name][0]), f"{name}: ranks do not agree"
    return {name: ranks[0][name][0] for name in names}


# Levels


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [2, 4])
def test_full_has_tp_1s_bits(model, size):
    alone = logits(Work(model), 1)["tp"]
    split = logits(Work(model, levels=("full",)), size)
    assert torch.equal(split["full"], alone)
    assert not torch.equal(split["tp"], alone), "TP=N does not round, so this shows nothing"


@pytest.mark.parametrize("model", MODELS[:5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_fixed_tree_has_the_same_bits_at_1_2_4_and_8(model, dtype):
    work = Work(model, dtype, levels=("fixed_tree",))
    expected = logits(work, 1)
    for size in (2, 4, 8):
        split = logits(work, size)
        assert torch.equal(split["fixed_tree"], expected["fixed_tree"]), size


@pytest.mark.parametrize("model", ["llama-tiny", "mixtral-tiny"])
def test_levels_that_keep_the_drift_out_are_as_far_from_float64_as_tp_1(model):
    levels = ("head", "rowwise", "fp32_wire", "fixed_tree")
    exact = logits(Work(model, torch.float64), 1)["tp"]
    work = Work(model, torch.float32, levels=levels)
    alone = error(logits(Work(model, torch.float32), 1)["tp"], exact)
    split = logits(work, 8)
    for name in levels:
        assert split[name].dtype == torch.float32
        assert error(split[name], exact) < 2 * alone, name


def test_rowwise_leaves_nothing_of_a_wrong_sum_and_head_leaves_all_of_it():
    levels = ("head", "rowwise", "full", "fp32_wire", "fixed_tree")
    exact = logits(Work(dtype=torch.float64), 1)["tp"]
    alone = error(logits(Work(dtype=torch.float16), 1)["tp"], exact)
    work = Work(dtype=torch.float16, levels=levels, fault="bfloat16_wire")
    found = logits(work, 8)
    assert error(found["tp"], exact) > 3 * alone
    assert error(found["head"], exact) > 3 * alone
    for name in levels[1:]:
        assert error(found[name], exact) < 1.5 * alone, name


def test_the_head_is_scored_in_float32():
    split = logits(Work(levels=("head",)), 2)
    assert split["head"].dtype == torch.float32
    rounded = split["head"].to(torch.bfloat16)
    assert error(rounded, split["tp"]) < 2**-8 * float(split["tp"].double().square().mean().sqrt())
    assert not torch.equal(split["head"], split["tp"].float())


def error(actual, expected):
    return float((actual.double() - expected.double()).square().mean().sqrt())


def test_a_level_leaves_the_served_model_alone():
    found = logits(Work(levels=tuple(LEVELS)), 2)
    assert torch.equal(found["tp again"], found["tp"])


def test_uneven_and_padded_shards_are_put_together():
    fields = {"num_attention_heads": 8, "vocab_size": 101, "intermediate_size": 96}
    alone = logits(Work(fields=fields), 1)["tp"]
    split = logits(Work(fields=fields, levels=("full", "head", "rowwise")), 4)
    assert torch.equal(split["full"], alone)
    assert split["head"].shape == alone.shape


# The arithmetic of a product


def test_a_tree_sums_neighbours_first():
    tiny = 2.0**-24  # lost beside 1 when added to it one by one in float32
    terms = [torch.tensor(x) for x in (1.0, tiny, tiny, tiny)]
    assert float(tree_sum(terms)) == 1 + 2 * tiny
    assert float(terms[0] + terms[1] + terms[2] + terms[3]) == 1.0


def test_the_float32_wire_rounds_once():
    x, w = torch.randn(64, 256).bfloat16(), torch.randn(8, 256).bfloat16()
    row = Row("mlp.down_proj", (256,), single_group(), Meter())
    exact = (x.double() @ w.double().T).float().bfloat16()
    assert torch.equal(fp32_product(x, w, row), exact)


def test_features_that_no_tree_can_be_made_of_are_refused():
    row = Row("mlp.down_proj", (28,), single_group(), Meter())
    with pytest.raises(SubjectError) as refused:
        fixed_tree_product(torch.ones(1, 28), torch.ones(4, 28), row)
    assert str(refused.value) == (
        "fixed_tree: mlp.down_proj: features=[28] at tp_size=1, but should be 8 equal blocks, none"
        " of them on two ranks; take level full"
    )


def test_a_model_that_no_tree_fits_is_refused_when_it_is_wrapped():
    for fields, said in (
        ({"intermediate_size": 92}, "layers.0.mlp.down_proj: features=[46, 46] at tp_size=2"),
        ({"num_attention_heads": 6, "head_dim": 6}, "o_proj: features=[18, 18] at tp_size=2"),
    ):
        work = Work(fields=fields, options={"level": "fixed_tree"})
        refused = replies("refusal_job", work, 2)[0]
        assert refused.startswith("SubjectError: fixed_tree: layers.0.")
        assert said in refused


# Memory


def test_weights_are_streamed_within_the_bound():
    alone = logits(Work(), 1)["tp"]
    unbounded = replies("level_job", Work(levels=("full",)), 2)
    cost = unbounded[0]["full"][1]
    layer = cost.peak_bytes
    assert cost.bytes_gathered > 1.5 * layer, "one layer at a time, not the whole model"
    bounded = replies("level_job", Work(levels=("full",), max_bytes=layer), 2)
    assert torch.equal(bounded[0]["full"][0], alone)
    assert bounded[0]["full"][1].peak_bytes <= layer


def test_no_more_whole_weights_are_alive_than_are_counted(monkeypatch):
    alive: dict[int, list[tuple[StorageWeakRef, int]]] = {0: [], 1: []}
    most = {0: 0, 1: 0}
    gather = decoders.gathered_weight

    def watched(local, placements, shapes, shape, tp, meter):
        whole = gather(local, placements, shapes, shape, tp, meter)
        if whole is not local:
            alive[tp.rank].append((StorageWeakRef(whole.untyped_storage()), whole.nbytes))
        held = sum(size for ref, size in alive[tp.rank] if not ref.expired())
        most[tp.rank] = max(most[tp.rank], held)
        return whole

    monkeypatch.setattr(decoders, "gathered_weight", watched)
    cost = replies("level_job", Work(levels=("full",)), 2)[0]["full"][1]
    assert 0 < most[0] <= cost.peak_bytes
    assert 0 < most[1] <= cost.peak_bytes


def test_a_bound_below_the_largest_part_is_refused_before_any_request():
    options = {"max_bytes": 1000}
    said = replies("refusal_job", Work(options=options), 2)[0]
    assert said == (
        "SubjectError: embed_tokens: max_bytes=1000, but should be at least 16768, its whole"
        " weights: nothing smaller can be streamed"
    )


def test_bytes_gathered_are_what_the_other_ranks_hold():
    def received(size):
        return replies("level_job", Work(levels=("head",)), size)[0]["head"][1].bytes_gathered

    rows, columns = 131, 64
    assert received(1) == 0
    for size in (2, 4, 8):
        own = -(-rows // size)
        assert received(size) == 2 * columns * (rows - own)


@pytest.mark.parametrize("bound", [0, -1, 1.5, True, "1G"])
def test_a_bound_that_is_no_size_is_refused(bound):
    with pytest.raises(TPCheckError, match=r"max_bytes=.* but should be a whole number above 0"):
        Meter(bound)


def test_a_meter_counts_what_is_held_at_once():
    meter = Meter(100)
    with meter.holding("a", 60), pytest.raises(SubjectError, match="b: max_bytes=100"):
        meter.hold("b", 41)
    with meter.holding("a", 60):
        meter.received(60, 20)
    assert (meter.cost().peak_bytes, meter.cost().bytes_gathered) == (60, 40)
    meter.start()
    assert (meter.cost().peak_bytes, meter.cost().bytes_gathered) == (0, 0)
    assert Cost(1, 5, 2.0).plus(Cost(2, 3, 1.0)) == Cost(3, 5, 3.0)


# Scoring


def test_a_planted_drift_falls_back_for_scoring_and_a_clean_model_does_not():
    options = {"share": 1.0, "level": "rowwise"}
    for fault, levels in (("", ["tp"] * 3), ("bfloat16_wire", ["full", "rowwise", "rowwise"])):
        work = Work(dtype=torch.float16, options=options, requests=3, fault=fault)
        for reply in replies("score_job", work, 4):
            assert reply["levels"] == levels
            assert reply["generated"], "generation goes on at TP=N"
            assert reply["counters"]["drifted"] == bool(fault)
            assert reply["counters"]["fallbacks"] == (3 if fault else 0)


def test_a_request_that_drifted_gets_tp_1s_score():
    clean = Work(dtype=torch.float16, options={"share": 0.0})
    planted = Work(dtype=torch.float16, options={"share": 1.0}, fault="bfloat16_wire")
    alone = replies("score_job", clean, 1)[0]["logprobs"]
    split = replies("score_job", planted, 4)[0]["logprobs"]
    assert torch.equal(split[0], alone[0])


def test_a_level_that_drifts_as_well_makes_way_for_full():
    options = {"share": 1.0, "level": "head"}
    work = Work(dtype=torch.float16, options=options, requests=4, fault="bfloat16_wire")
    reply = replies("score_job", work, 4)[0]
    assert reply["levels"] == ["full", "full", "full", "full"]
    assert [event.next_level for event in reply["events"]] == ["head", "full", "full", "full"]
    assert reply["counters"]["drifted"] == 2


def test_a_score_is_the_log_probability_of_the_tokens_given():
    reply = replies("score_job", Work(options={"share": 0.0}), 2)[0]
    ids = fallback_jobs.ids(0)
    (score,) = reply["logprobs"]
    assert score.shape == (2, 8)
    group = single_group(seed=3, dtype=torch.bfloat16)
    logits_BTV = build_decoder(BUILTINS["llama-tiny"][1], group)(ids)
    for row in range(2):
        for token in range(8):
            scores = logits_BTV[row, token].double()
            expected = scores[ids[row, token + 1]] - scores.logsumexp(-1)
            assert float(score[row, token]) == pytest.approx(float(expected), abs=0.05)


def test_a_users_tolerance_decides_instead_of_the_ratio():
    for atol, level in ((10.0, "tp"), (0.0, "full")):
        options = {"share": 1.0, "tolerance": Tolerance(0.0, atol, "policy")}
        reply = replies("score_job", Work(options=options), 4)[0]
        assert reply["levels"] == [level]


def test_the_share_is_drawn_from_the_seed_and_alike_on_every_rank():
    options = {"share": 0.3, "seed": 7}
    ranks = replies("score_job", Work(options=options, requests=20), 2)
    policy = ScoringPolicy(share=0.3, seed=7)
    expected = [policy.samples(number) for number in range(1, 21)]
    assert 2 <= sum(expected) <= 12
    for reply in ranks:
        assert [value is not None for value in reply["values"]] == expected
        assert reply["counters"]["compared"] == sum(expected)
        assert reply["counters"]["scored"] == 20


def test_a_share_is_what_it_says_and_seeds_draw_apart():
    drawn = [ScoringPolicy(share=0.1).samples(number) for number in range(10_000)]
    assert 900 < sum(drawn) < 1100  # 3.3 standard deviations of 30
    assert drawn != [ScoringPolicy(share=0.1, seed=1).samples(n) for n in range(10_000)]
    assert not any(ScoringPolicy(share=0.0).samples(number) for number in range(100))
    assert all(ScoringPolicy(share=1.0).samples(number) for number in range(100))


def test_a_drift_report_has_the_next_request_compared():
    group = single_group(dtype=torch.bfloat16)
    fallback = ScoringFallback(build_decoder(SPEC, group), share=0.0)
    ids = fallback_jobs.ids() % 96
    assert fallback.score(ids).judgement is None
    assert not fallback.heed(report("PASS", "bfloat16"))
    assert not fallback.heed(report("DRIFT", "float16")), "another dtype"
    assert not fallback.heed(report("DRIFT", "bfloat16", tp_size=2)), "another degree"
    assert fallback.score(ids).judgement is None
    assert fallback.heed(report("DRIFT", "bfloat16"))
    judgement = fallback.score(ids).judgement
    assert judgement is not None
    assert (judgement.drifts, judgement.value) == (False, 1.0), "TP=1 against itself"
    assert fallback.score(ids).judgement is None, "it was told once"


def report(outcome, dtype, tp_size=1):
    check = Check("FAIL", "x") if outcome != "PASS" else Check("PASS")
    verdict = Verdict("s0", tp_size, dtype, outcome, {"drift": check})
    return Report("subject", (verdict,), {}, Path("sim"), "0")


def test_a_callback_sees_every_score_and_may_fail():
    def fail(event):
        raise ValueError("metrics are down")

    group = single_group(dtype=torch.bfloat16)
    fallback = ScoringFallback(build_decoder(SPEC, group), share=1.0, on_event=fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        score = fallback.score(fallback_jobs.ids())
    assert isinstance(score, Score)
    assert fallback.counters()["callback_errors"] == 1
    assert "on_event raised ValueError: metrics are down" in str(caught[0].message)


def test_reset_scores_at_tp_n_again():
    group = single_group(dtype=torch.bfloat16)
    fallback = ScoringFallback(build_decoder(SPEC, group), share=1.0, max_drift_ratio=1.0)
    assert fallback.score(fallback_jobs.ids()).level == "tp"
    fallback._level = "full"
    assert fallback.score(fallback_jobs.ids()).level == "full"
    fallback.reset()
    assert fallback.level == "tp"


def test_counters_keep_the_largest_peak_and_sum_the_rest():
    counters = Counters()
    counters.add(scored=1, peak_bytes=7, seconds=0.5)
    counters.add(scored=1, peak_bytes=3, seconds=0.25)
    found = counters.snapshot()
    assert (found["scored"], found["peak_bytes"], found["seconds"]) == (2, 7, 0.75)
    with pytest.raises(KeyError):
        counters.add(unheard_of=1)


# Judging


def test_a_ratio_above_the_limit_drifts_and_what_is_not_finite_always_does():
    generator = torch.Generator().manual_seed(0)
    oracle = torch.randn(4, 64, generator=generator, dtype=torch.float64)
    noise = torch.randn(4, 64, generator=generator, dtype=torch.float64) * 1e-2
    policy = ScoringPolicy()
    tp1 = (oracle + noise).float()
    for factor, drifts in ((2.9, False), (3.1, True)):
        found = judged(policy, (oracle + factor * noise).float(), tp1, oracle)
        assert found.drifts is drifts
        assert found.value == pytest.approx(factor, rel=1e-3)
    broken = (oracle + noise).float()
    broken[0, 0] = math.nan
    assert judged(policy, broken, tp1, oracle).drifts
    assert judged(policy, oracle.clone(), oracle, oracle) == Judgement(
        False, 0.0, 3.0, "max_drift_ratio=3 of TP=1's own error"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"level": "best"},
            "fallback='best', but should be one of head, rowwise, full, fp32_wire,",
        ),
        ({"share": 1.5}, "share=1.5, but should be a number from 0 to 1"),
        ({"share": math.nan}, "share=nan, but should be a number from 0 to 1"),
        ({"max_drift_ratio": 0.5}, "max_drift_ratio=0.5, but should be a number of at least 1"),
        ({"tolerance": 1e-2}, "tolerance=0.01, but should be a Tolerance(rtol, atol, source)"),
        ({"turn_timeout_s": 0}, "turn_timeout_s=0, but should be more than 0"),
    ],
)
def test_a_wrong_option_is_one_sentence(options, message):
    decoder = build_decoder(SPEC, single_group(dtype=torch.bfloat16))
    with pytest.raises(TPCheckError) as refused:
        ScoringFallback(decoder, **options)
    assert message in str(refused.value)


def test_a_tolerance_has_to_be_a_number():
    with pytest.raises(TPCheckError, match="atol=-1, but should be a finite number >= 0"):
        Tolerance(0.0, -1, "policy")


def test_levels_are_parsed_in_order_and_once():
    assert parse_levels("full, head,full") == ("full", "head")
    with pytest.raises(SubjectError, match="fallback='', but should be one of head"):
        parse_levels("")
    with pytest.raises(SubjectError, match="fallback is empty"):
        parse_levels(())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.nn.Linear(2, 2), "Linear: no parameter is a DTensor and there is no shards()"),
        (lambda ids: ids, "function: has no shards() and no DTensor parameter, but one of them"),
    ],
)
def test_a_subject_without_shards_is_one_sentence(model, message):
    with pytest.raises(SubjectError) as refused:
        ScoringFallback(model)
    assert str(refused.value).startswith(message)


def test_scores_need_two_tokens_of_whole_numbers():
    fallback = ScoringFallback(build_decoder(SPEC, single_group(dtype=torch.bfloat16)))
    for ids in (torch.ones(2, 1, dtype=torch.int64), torch.ones(2, 3), torch.ones(3).long()):
        with pytest.raises(SubjectError, match=r"score: input_ids=.*, but should be whole numbers"):
            fallback.score(ids)


# A callable with shards()


def test_a_callable_with_shards_is_scored_at_tp_1_by_what_its_owner_says():
    options = {"share": 1.0}
    expected, _, _ = replies("handwritten_job", Work(options=options), 1)[0]
    forwards, weights, of_others = 2, 2, 24 * 16 * 2 * 3 // 4
    for logprobs, counters, said in replies("handwritten_job", Work(options=options), 4):
        assert torch.allclose(logprobs, expected, atol=0.05)
        assert counters["compared"] == 1
        assert counters["bytes_gathered"] == forwards * weights * of_others
        assert "pass alone=fn, fn(whole weights by name) -> forward" in said
        assert "has no products that can be replaced" in said


def test_a_callable_has_to_name_its_ranks():
    model = Handwritten(single_group(dtype=torch.bfloat16))
    with pytest.raises(SubjectError, match="tp=None, but should be the TPGroup it was built for"):
        parallel_model(model)


def test_the_whole_shape_is_what_the_pieces_span():
    assert whole_shape([Shard(1), Shard(-1)], [(2, 3), (2, 4)]) == (2, 7)
    assert whole_shape([Replicate(), Replicate()], [(2, 3), (2, 3)]) == (2, 3)
    first = Slices([((slice(0, 2),), (slice(0, 2),))])
    second = Slices([((slice(0, 1),), (slice(2, 3),))])
    assert whole_shape([first, second], [(4, 5), (4, 5)]) == (3, 5)


# Turns


def test_a_request_that_rank_0_never_calls_is_named():
    (result,) = SimulatedRanks().run([Job(f"{__name__}:apart_job", None, 2)])
    assert result.replies[0] == "had its turn"
    assert result.replies[1] == (
        "rank 1: request b waited 0.05 s while rank 0 was at another that nobody here asks for;"
        " every rank should score the same requests"
    )


def apart_job(world, _):
    """Ask for another request on every rank, and return what came of it."""
    turns = Turns(world.group(seed=0, dtype=torch.float32, weight_dtype=torch.float32), 0.05)
    try:
        with turns.turn("ab"[world.rank]):
            return "had its turn"
    except BackendError as error:
        return str(error)


def test_a_turn_that_raised_is_over():
    turns = Turns(single_group(), 0.01)
    with pytest.raises(ValueError, match="x"), turns.turn("a"):
        raise ValueError("x")
    late = pytest.raises(BackendError, match=r"request c waited .* for another's turn to end")
    with turns.turn("b"), late, turns.turn("c"):
        pass


def test_requests_that_differ_have_keys_that_differ():
    ids = torch.arange(6).view(2, 3)
    keys = {
        key_of("score", (ids,)),
        key_of("generate", (ids,)),
        key_of("score", (ids.view(3, 2),)),
        key_of("score", (ids.int(),)),
        key_of("score", (ids + 1,)),
    }
    assert len(keys) == 5
    assert key_of("score", (ids.clone(),)) == key_of("score", (ids,))


def test_it_is_public():
    assert tpcheck.ScoringFallback is ScoringFallback
