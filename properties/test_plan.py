"""The plan refuses an illegal degree before a weight moves, and whatever it calls legal runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tpcheck
from properties.layers import decoder
from tpcheck.groups.jobs import Job
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.pytest_plugin import tp_degrees
from tpcheck.reference.decoder import build_decoder
from tpcheck.shard_plan import legal_tp_sizes, make_shard_plan
from tpcheck.strategies import model_specs

POINTS = tp_degrees().flatmap(lambda n: st.tuples(st.just(n), model_specs(n, legal=False)))
EITHER = tp_degrees().flatmap(lambda n: st.tuples(st.just(n), model_specs(n, legal=None)))


@given(POINTS)
def test_an_illegal_spec_is_refused_before_a_weight_moves(point):
    tp_size, spec = point
    asked = []

    def build(tp):
        real = tp.weight
        tp.weight = lambda *args, **kwargs: asked.append(args) or real(*args, **kwargs)
        return build_decoder(spec, tp)

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
