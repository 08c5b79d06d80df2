"""What a verdict says, to the letter: one line that stands alone for every kind of outcome."""

import math
from dataclasses import replace

import pytest
import torch

from tests.judging import at, calls, evidence, ranks, trace, values
from tpcheck.checks import run_checks
from tpcheck.conduct import rank_agreement, repeatability, schedule, tiling
from tpcheck.errors import IllegalDegreeError
from tpcheck.execution import AGAIN
from tpcheck.numerics.tolerance import users_tolerance
from tpcheck.placement import Replicate, Shard
from tpcheck.spec import Case
from tpcheck.trace import RankFailure
from tpcheck.verdict import judge, judge_failure, refused

torch.set_num_threads(1)
CASE = Case(seed=7, batch=2, seq_len=16)
GRID = torch.arange(1, 65, dtype=torch.float64).view(2, 4, 8)  # exact in bfloat16


def reasons(found, dtype="bfloat16", tp_size=4):
    return judge(CASE, tp_size, dtype, run_checks(found), repro="").reasons


def grid(dtype="bfloat16", deployed=0.0, base=0.0, exact=0.0, at_index=(1, 2, 3), **fields):
    """Evidence on whole numbers, with one element of each run moved."""

    def moved(by, kind):
        x = GRID.clone()
        x[at_index] += by
        return x.to(kind)

    narrow = getattr(torch, dtype)
    return evidence(
        oracle=GRID,
        exact=moved(exact, torch.float64),
        base=moved(base, narrow),
        deployed=moved(deployed, narrow),
        dtype=dtype,
        **fields,
    )


def test_a_tolerance_below_the_floor():
    found = grid(base=1.0, deployed=-1.0, tolerance=users_tolerance(None, None, "seed-1e-2"))
    assert reasons(found) == (
        "same function; your tolerance 1e-2 is below this dtype's floor"
        " (TP=1 itself is 1e0 from float64); smallest that passes: atol=1.5e0",
        "allclose: A: 1 of 64 elements outside atol=0.01, rtol=0.01 (preset seed-1e-2);"
        " smallest atol that passes: 1.5e0; worst at [1, 2, 3]: 51 for 53, 8 ulp",
    )


def test_a_tolerance_that_is_exceeded():
    found = grid(deployed=1.0, tolerance=users_tolerance(0.25, None, None))
    assert reasons(found) == (
        "same function; your tolerance atol=2.5e-1, rtol=0 is exceeded"
        " (TP=1 itself is 0 from float64); smallest that passes: atol=1e0",
        "allclose: A: 1 of 64 elements outside atol=0.25, rtol=0 (user);"
        " smallest atol that passes: 1e0; worst at [1, 2, 3]: 53 for 52, 4 ulp",
    )


def test_more_rounding_than_the_reduction_explains():
    found = grid(deployed=32.0, expected=1.8, expected_source="ring of 4 equal partials")
    first, second = reasons(found)
    assert first == "same function; rounded more than this reduction explains"
    assert second == (
        "drift: error is 91.3 x that of TP=1, but should be at most 3.12:"
        " this reduction explains 1.8 (ring of 4 equal partials)"
    )


def test_not_the_same_function():
    found = reasons(grid(exact=0.5))
    assert found == (
        "structural: A: relative_rms=0.00167, but should be at most 1e-12;"
        " worst at [1, 2, 3]: 52.5 for 52",
    )


def test_another_shape():
    found = replace(grid(), exact=ranks({"A": GRID[:, :, :7]}))
    assert reasons(found)[0] == (
        "structural: A: shape=[2, 4, 7], but should be [2, 4, 8] as at TP=1"
    )


def test_nan_at_tp_n_in_float64():
    assert reasons(grid(exact=math.nan)) == (
        "structural: A: 1 elements are finite on one side only, at [1, 2, 3]:"
        " TP=N has 1 NaN and 0 inf, TP=1 0 and 0",
    )


def test_overflow_in_the_deployed_dtype():
    first, second = reasons(grid("float16", deployed=math.inf), "float16")
    assert first == "same function; overflows in the deployed dtype"
    assert second == (
        "drift: A: 1 elements are not finite in float16 but are in float64, at [1, 2, 3]:"
        " overflow (TP=1 in float16 has 0)"
    )


def test_nothing_to_compare():
    nothing = torch.full((2, 3), math.nan)
    found = evidence(oracle=nothing.double(), base=nothing, deployed=nothing)
    assert judge(CASE, 2, "bfloat16", run_checks(found), repro="").reasons == (
        "structural: TP=1 in float64 is not finite anywhere: nothing to compare",
        "drift: no element is finite in both: nothing to compare",
    )


def test_a_refused_degree():
    message = "num_attention_heads=6, but should be divisible by tp_size=4"
    assert refused(CASE, 4, "bfloat16", message, repro="").reasons == (f"plan: {message}",)
    failure = RankFailure("raised", "rank 0 raised", 0, exception=IllegalDegreeError(message))
    assert judge_failure(CASE, 4, "bfloat16", failure, repro="").reasons == (f"plan: {message}",)


@pytest.mark.parametrize(
    ("check", "fields", "reason"),
    [
        (
            rank_agreement,
            {"digests": {"A": "other"}},
            "A: rank 3 returned other bits than the rest",
        ),
        (
            repeatability,
            {"digests": {"A": "one", AGAIN: "two"}},
            "rank 3: the same input gave other bits after another input:"
            " state leaks from one call into the next, or chance decides (a race, a random draw)",
        ),
        (
            schedule,
            {"collectives": {"A": calls("all_gather")}},
            "A: rank 0 called #0 all_reduce([2, 4] float64, sum),"
            " rank 3 called #0 all_gather([2, 4] float64, sum)",
        ),
    ],
)
def test_conduct(check, fields, reason):
    traces = ranks({"A": values(2, 4)}, 4, collectives={"A": calls("all_reduce")})
    found = replace(evidence(tp_size=4), exact=at(traces, 3, **fields))
    assert check(found).reason == reason


def test_shards_that_hold_other_values():
    whole = values(4, 2)
    half = {"w": (whole[:2], Shard(0))}
    base = trace(extras={"shards": {"w": (whole, Replicate())}})
    wrong = {"w": (whole[2:] + torch.tensor([[0, 0], [0, 1.0]]), Shard(0))}
    deployed = [trace(0, extras={"shards": half}), trace(1, extras={"shards": wrong})]
    found = replace(evidence(), base=base, deployed=deployed)
    expected, actual = f"{whole[3, 1]:.6g}", f"{whole[3, 1] + 1:.6g}"
    assert tiling(found).reason == (
        f"w: rank 1: [2:4, 0:2]: 1 of 4 elements differ from the reference; first at [3, 1]:"
        f" actual={actual}, but should be {expected}"
    )
