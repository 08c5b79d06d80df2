"""The plan refuses an illegal degree before a weight moves, and whatever it calls legal runs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tpcheck
from properties.layers import decoder, split_decoder
from tpcheck.groups.jobs import Job
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.pytest_plugin import tp_degrees
from tpcheck.reference.decoder import Decoder, build_decoder
from tpcheck.reference.weights import GeneratedWeights
from tpcheck.shard_plan import (
    RankPlan,
    ShardPlan,
    Span,
    best_plan,
    legal_tp_sizes,
    make_shard_plan,
)
from tpcheck.strategies import model_specs, split_policies

POINTS = tp_degrees().flatmap(lambda n: st.tuples(st.just(n), model_specs(n, legal=False)))
EITHER = tp_degrees().flatmap(lambda n: st.tuples(st.just(n), model_specs(n, legal=None)))


@given(POINTS)
def test_an_illegal_spec_is_refused_before_a_weight_moves(point):
    tp_size, spec = point
    assert_refused_before_a_weight_moves(spec, tp_size)


def assert_refused_before_a_weight_moves(spec, tp_size, **options):
    asked = []

    def build(tp):
        real = tp.weight
        tp.weight = lambda *args, **kwargs: asked.append(args) or real(*args, **kwargs)
        return build_decoder(spec, tp, **options)

    job = Job("properties.layers:build_on_a_rank", build, tp_size)
    (result,) = SimulatedRanks().run([job])
    assert isinstance(result.failure.exception, tpcheck.IllegalDegreeError)
    assert not asked


@given(EITHER)
def test_a_degree_is_legal_exactly_when_it_is_not_refused(point):
    tp_size, spec = point
    if tp_size in legal_tp_sizes(spec, tp_size):
        make_shard_plan(spec, tp_size)
    else:
        with pytest.raises(tpcheck.IllegalDegreeError) as refused:
            make_shard_plan(spec, tp_size)
        assert refused.value.legal_tp_sizes == legal_tp_sizes(spec, max(12, 2 * tp_size))


@given(EITHER)
def test_an_asked_degree_ends_in_the_verdict_the_plan_foretells(tp_pool, point):
    tp_size, spec = point
    legal = tp_size in legal_tp_sizes(spec, tp_size)
    report = tp_pool.run(decoder(spec, 2), tp_sizes=(tp_size,), backend="sim", confirm=False)
    assert report.outcome == ("PASS" if legal else "ILLEGAL")


@st.composite
def split_specs(draw, legal, **pins):
    """A degree, a spec on either side of the strict rules, and a policy on the side asked for."""
    tp_size = draw(tp_degrees())
    spec = draw(model_specs(tp_size, num_hidden_layers=1, **pins))
    return tp_size, spec, draw(split_policies(spec, tp_size, legal))


@settings(max_examples=50)  # a thousand are tried in tests/unit/test_split_policies.py
@given(split_specs(legal=True))
def test_whatever_a_policy_plans_is_the_same_function(tp_check, split):
    tp_size, spec, policy = split
    report = tp_check(split_decoder(spec, policy), tp_sizes=(tp_size,))
    assert report.verdicts[0].checks["structural"].outcome == "PASS"


@given(split_specs(legal=False))
def test_whatever_a_policy_refuses_is_refused_before_a_weight_moves(split):
    tp_size, spec, policy = split
    assert_refused_before_a_weight_moves(spec, tp_size, policy=policy)


@given(EITHER)
def test_every_degree_has_a_plan_once_padding_is_allowed_and_the_strict_one_comes_first(point):
    tp_size, spec = point
    plan = best_plan(spec, tp_size)
    if tp_size in legal_tp_sizes(spec, tp_size):
        assert plan == make_shard_plan(spec, tp_size)
    else:
        assert tp_size in legal_tp_sizes(spec, tp_size, plan.policy)


def forced_plan(spec, tp_size):
    """What dividing by tp_size and dropping the remainder gives: the plan that is refused."""

    def piece(total, rank):
        return Span(total // tp_size * rank, total // tp_size * (rank + 1))

    kv_heads, rows = spec.num_key_value_heads, -(-spec.vocab_size // tp_size)
    per_head = max(1, tp_size // kv_heads)
    ranks = tuple(
        RankPlan(
            query_heads=piece(spec.num_attention_heads, rank),
            kv_heads=piece(kv_heads, rank)
            if kv_heads >= tp_size
            else Span(rank // per_head, rank // per_head + 1),
            intermediate=piece(spec.intermediate_size, rank),
            vocab=Span(min(rank * rows, spec.vocab_size), min((rank + 1) * rows, spec.vocab_size)),
            moe_intermediate=Span(0, 0),
            shared_expert_intermediate=Span(0, 0),
        )
        for rank in range(tp_size)
    )
    return ShardPlan(tp_size, per_head, rows, ranks)


REFUSED = tp_degrees().flatmap(
    # relu can hide a dropped feature: nothing is lost that is zero for every token;
    # scales are cut by force in test_quantization
    lambda n: st.tuples(
        st.just(n), model_specs(n, legal=False, hidden_act="silu", quantization=None)
    )
)


@settings(max_examples=50)
@given(REFUSED)
def test_whatever_is_refused_is_wrong_or_raises_when_it_is_forced(tp_pool, point):
    tp_size, spec = point

    @tpcheck.subject(vocab_size=spec.vocab_size, seq_len=2)
    def build(tp):
        if tp.size == 1:
            return build_decoder(spec, tp)
        return Decoder(spec, forced_plan(spec, tp.size), tp, GeneratedWeights(tp))

    report = tp_pool.run(build, tp_sizes=(tp_size,), backend="sim", confirm=False)
    assert report.outcome in ("WRONG", "ERROR")
