"""What levels buy on a subject: the numbers against an independent computation; the table."""

from dataclasses import replace

import pytest
import torch

import tpcheck
from tests.unit.test_moe import MIXTRAL
from tpcheck.case_runs import CaseRuns
from tpcheck.errors import SubjectError
from tpcheck.fallback.gathering import Cost
from tpcheck.fallback.levels import LEVELS
from tpcheck.fallback.measuring import Ran, effect, fallback_effects
from tpcheck.groups.jobs import Job
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.reference.decoder import build_decoder
from tpcheck.render.fallback import render_fallback
from tpcheck.spec import Case
from tpcheck.subjects import make_ref, resolve


def task_of(name, dtype="float16"):
    ref = make_ref(name)
    runs = CaseRuns(SimulatedRanks(), ref, resolve(ref), Case(0, 2, 8), dtype, (4,), 60.0)
    return replace(runs.task, inputs={key: runs.inputs[key] for key in "AB"})


def effects(name, levels=tuple(LEVELS), **options):
    found = fallback_effects(SimulatedRanks(), task_of(name), 4, levels, **options)
    return {one.level: one for one in found}


def test_each_level_is_measured_against_tp_1_and_float64():
    found = effects("builtin:llama-tiny+bfloat16_wire")
    assert list(found) == list(LEVELS)
    full = found["full"]
    assert full.same_bits_as_tp1
    assert full.ratio_after == 1.0
    assert full.logprob_after == 0.0
    assert full.ratio_before > 3
    assert full.logprob_before > 0
    assert found["head"].ratio_after > 3, "the head has no part in it"
    assert found["rowwise"].ratio_after < 1.5
    for one in found.values():
        assert one.ranks_agree
        assert one.bytes_gathered > 0
        assert (one.seconds, one.seconds_deployed) == (None, None), "simulated ranks take turns"


def test_the_numbers_are_those_of_their_definition():
    task = task_of("builtin:llama-tiny")
    ids = task.inputs["A"][0]
    generator = torch.Generator().manual_seed(1)
    oracle = torch.randn(2, 8, 131, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 8, 131, generator=generator, dtype=torch.float64) / 100

    def ran(factor, seconds=1.0):
        output = oracle + factor * noise
        return Ran({"A": output}, {"A": str(factor)}, Cost(10, 20, seconds))

    ranks = [{"": ran(4, 2.0), "head": ran(2, 3.0)}, {"": ran(4, 2.5), "head": ran(2, 1.0)}]
    found = effect("head", ran(1), ranks, ran(0), task, token_ids=True)
    assert found.ratio_before == pytest.approx(4)
    assert found.ratio_after == pytest.approx(2)
    assert (found.seconds, found.seconds_deployed) == (3.0, 2.5)
    assert (found.bytes_gathered, found.peak_bytes) == (10, 20)
    worst = 0.0
    for row in range(2):
        for token in range(7):
            scores = [(oracle + factor * noise)[row, token] for factor in (1, 4)]
            one, other = (s[ids[row, token + 1]] - torch.logsumexp(s, 0) for s in scores)
            worst = max(worst, abs(float(one - other)))
    assert found.logprob_before == pytest.approx(worst)
    apart = [ranks[0], {**ranks[1], "head": ran(3)}]
    assert not effect("head", ran(1), apart, ran(0), task, token_ids=True).ranks_agree


def test_without_an_oracle_or_tokens_there_are_no_such_numbers():
    found = effects("builtin:llama-tiny", ("full",), oracle_dtype="", token_ids=False)["full"]
    assert (found.ratio_before, found.ratio_after) == (None, None)
    assert (found.logprob_before, found.logprob_after) == (None, None)
    assert found.same_bits_as_tp1


def test_a_subject_without_shards_says_so_at_every_level():
    found = effects("tests/subjects/vocab_parallel.py:build", ("full", "head"))
    for one in found.values():
        assert "has no shards() and no DTensor parameter" in one.reason
        assert one.bytes_gathered is None


def test_a_bound_that_is_too_small_is_a_reason_and_no_failure():
    found = effects("builtin:llama-tiny", ("full",), max_bytes=1000)["full"]
    assert "max_bytes=1000, but should be at least" in found.reason


def test_an_unknown_level_is_refused_before_a_rank_runs():
    with pytest.raises(SubjectError, match="fallback='best', but should be one of head, rowwise"):
        effects("builtin:llama-tiny", "full,best")


def test_the_table_shows_effect_beside_price():
    full = {
        "tp_size": 4,
        "dtype": "float16",
        "level": "full",
        "reason": "",
        "ratio_before": 5.3,
        "ratio_after": 1.0,
        "logprob_before": 0.012,
        "logprob_after": 0.0,
        "same_bits_as_tp1": True,
        "ranks_agree": True,
        "bytes_gathered": 3 << 20,
        "peak_bytes": 1536,
        "device_peak_bytes": None,
        "seconds": 0.0125,
        "seconds_deployed": 0.004,
        "measured_on": "gloo on cpu",
    }
    refused = {**full, "level": "fixed_tree", "reason": "why not"}
    text = render_fallback([full, refused, {**refused, "tp_size": 8}])
    lines = text.splitlines()
    assert lines[0] == (
        "what scoring at TP=1 buys, and costs; times of one forward, on gloo on cpu"
    )
    row = next(line for line in lines if line.startswith("4 "))
    assert row.split() == (
        "4 float16 full 5.3 -> 1 0.012 -> 0 yes 3 MiB 1.5 KiB 12.5 ms (4)".split()
    )
    assert lines[-1] == "fixed_tree: not measured: why not"
    also = {**refused, "level": "full", "reason": "why not"}
    named = {**refused, "reason": "fixed_tree: why not"}
    assert render_fallback([also, named]).splitlines()[1:] == [
        "full, fixed_tree: not measured: why not"
    ]
    assert render_fallback([]) == ""
    nothing = render_fallback([{**full, "ratio_before": 1.02}])
    assert nothing.endswith("there is nothing to buy here")
    free = render_fallback([{**full, "routing_pinned": False}])
    assert "full: routing could not be pinned to the oracle's" in free
    assert "routing" not in render_fallback([{**full, "routing_pinned": True}])
    apart = render_fallback([{**full, "ranks_agree": False}])
    assert "full at tp=4: ranks do not agree" in apart


def moe_task(seed):
    @tpcheck.subject(spec=MIXTRAL, seq_len=16)
    def build(tp):
        return build_decoder(MIXTRAL, tp)

    ref = make_ref(build)
    case = Case(seed, 2, 16)
    runs = CaseRuns(SimulatedRanks(), ref, resolve(ref), case, "bfloat16", (4,), 60.0)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(MIXTRAL.vocab_size, (2, 2, 16), generator=draw)
    return replace(runs.task, inputs={"A": (ids[0],), "B": (ids[1],)})


def test_a_flip_of_the_router_is_not_what_a_level_buys():
    """At this seed TP=4 routes one row otherwise than float64, and the level does not."""
    task = moe_task(3)
    (found,) = fallback_effects(SimulatedRanks(), task, 4, ("full",))
    assert (found.flips_before, found.flips_after) == (1, 0)
    assert found.routing_pinned
    assert 1 < found.ratio_before < 1.3
    assert found.ratio_after == 1.0

    def ran(work, size):
        (result,) = SimulatedRanks().run(
            [Job("tpcheck.fallback.measuring:run_levels", (work, (), None), size, 60.0)]
        )
        return result.replies[0][""].outputs

    exact, alone = ran(replace(task, dtype="float64"), 1), ran(task, 1)
    free = ran(task, 4)
    errors = [sum(float((x[k] - exact[k]).square().sum()) for k in exact) for x in (free, alone)]
    assert (errors[0] / errors[1]) ** 0.5 > 1.5 * found.ratio_before  # what a free flip looks like


def test_what_routes_nothing_has_no_flips_and_what_has_no_oracle_is_not_pinned():
    dense = effects("builtin:llama-tiny", ("full",))["full"]
    assert (dense.flips_before, dense.flips_after, dense.routing_pinned) == (None, None, None)
    (free,) = fallback_effects(SimulatedRanks(), moe_task(3), 4, ("full",), oracle_dtype="")
    assert free.routing_pinned is None
    assert free.ratio_before is None
