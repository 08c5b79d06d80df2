"""The contract's table from check to outcome, completely, and the failures that have no checks."""

import itertools

import pytest

from tpcheck.errors import IllegalDegreeError
from tpcheck.records import CHECK_NAMES, OUTCOMES, Check, worst
from tpcheck.spec import Case
from tpcheck.trace import RankFailure
from tpcheck.verdict import accepted_illegal, judge, judge_failure, refused, refused_as_planned

CASE = Case(seed=7, batch=2, seq_len=16)
OUTCOME_OF = {
    "structural": "WRONG",
    "tiling": "WRONG",
    "rank_agreement": "WRONG",
    "repeatability": "WRONG",
    "decode": "WRONG",
    "drift": "DRIFT",
    "allclose": "DRIFT",
    "schedule": "ERROR",
    "plan": "ILLEGAL",
}
NUMBERS = {"atol": 1e-2, "rtol": 1e-2, "tp1_error": 0.03125, "required_atol": 0.0612}
OVERFLOW = Check("FAIL", "inf", {"overflow": True})


def checks(*failing, skipped=(), decides=True):
    made = {name: Check("PASS") for name in CHECK_NAMES}
    made |= {name: Check("SKIPPED", f"{name} was skipped") for name in skipped}
    for name in failing:
        facts = NUMBERS | {"decides": decides} if name == "allclose" else {}
        made[name] = Check("FAIL", f"{name} is off", facts)
    return made


def verdict(*failing, **options):
    return judge(CASE, 4, "bfloat16", checks(*failing, **options), repro="tpcheck run x")


def test_no_failed_check_is_a_pass():
    found = verdict()
    assert (found.outcome, found.reasons) == ("PASS", ())
    assert (found.case_id, found.tp_size, found.dtype) == ("s7-b2-t16", 4, "bfloat16")
    assert found.repro == "tpcheck run x"


def test_the_table_names_every_check():
    assert set(OUTCOME_OF) == set(CHECK_NAMES)


@pytest.mark.parametrize("name", CHECK_NAMES)
def test_one_failed_check_decides_the_outcome(name):
    found = verdict(name)
    assert found.outcome == OUTCOME_OF[name]
    assert f"{name}: {name} is off" in found.reasons


@pytest.mark.parametrize("pair", [*itertools.combinations(CHECK_NAMES, 2)], ids="+".join)
def test_of_two_failed_checks_the_worse_decides_and_both_are_told(pair):
    found = verdict(*pair)
    assert found.outcome == worst([OUTCOME_OF[name] for name in pair])
    assert [f"{name}: {name} is off" in found.reasons for name in pair] == [True, True]


def test_a_derived_tolerance_never_decides():
    assert verdict("allclose", decides=False).outcome == "PASS"
    assert verdict("allclose", decides=False).reasons == ()
    assert verdict("allclose", "structural", decides=False).reasons == (
        "structural: structural is off",
    )


@pytest.mark.parametrize(
    ("skipped", "outcome"),
    [
        (("structural",), "PASS"),
        (("drift",), "PASS"),
        (("structural", "drift"), "INCONCLUSIVE"),
        (tuple(CHECK_NAMES), "INCONCLUSIVE"),
        (("tiling", "decode", "repeatability"), "PASS"),
    ],
)
def test_nothing_compared_is_never_a_pass(skipped, outcome):
    assert verdict(skipped=skipped).outcome == outcome


def test_inconclusive_says_why_nothing_was_compared():
    assert verdict(skipped=("structural", "drift")).reasons == (
        "structural: structural was skipped",
        "drift: drift was skipped",
    )


@pytest.mark.parametrize("name", ["rank_agreement", "schedule", "allclose"])
def test_a_failed_check_decides_also_where_no_numbers_were_compared(name):
    found = verdict(name, skipped=("structural", "drift"))
    assert found.outcome == OUTCOME_OF[name]


def test_no_checks_at_all_is_inconclusive():
    assert judge(CASE, 2, "float16", {}, repro="").outcome == "INCONCLUSIVE"


def test_notes_follow_the_reasons():
    found = judge(CASE, 2, "float16", checks("tiling"), repro="", notes=("a tie was pinned",))
    assert found.reasons == ("tiling: tiling is off", "a tie was pinned")


def test_the_first_line_of_drift_does_not_claim_what_was_not_proven():
    assert verdict("drift").reasons[0].startswith("same function; ")
    unproven = verdict("drift", skipped=("structural",))
    assert unproven.reasons[0].startswith("no structural difference was seen; ")


def test_the_first_line_of_an_overflow_says_overflow():
    found = judge(CASE, 2, "float16", checks() | {"drift": OVERFLOW}, repro="")
    assert found.reasons == ("same function; overflows in the deployed dtype", "drift: inf")


def test_outcomes_are_ordered_worst_first():
    assert OUTCOMES == ("WRONG", "ERROR", "DRIFT", "ILLEGAL", "INCONCLUSIVE", "PASS")
    assert worst([]) == "INCONCLUSIVE"
    for better, worse in itertools.combinations(reversed(OUTCOMES), 2):
        assert worst([better, worse, better]) == worse


# Jobs without a result.


@pytest.mark.parametrize("kind", ["raised", "died", "hung", "schedule"])
def test_a_job_that_ended_without_a_result_is_an_error_with_rank_calls_and_stacks(kind):
    failure = RankFailure(
        kind,
        "rank 3 went",
        rank=3,
        traceback="Traceback: boom\n",
        in_flight={1: "all_reduce([2] float64, sum)", 0: "barrier()"},
        stacks={2: "  line 7\n"},
    )
    found = judge_failure(CASE, 4, "bfloat16", failure, repro="again")
    assert found.outcome == "ERROR"
    assert found.checks["schedule"].outcome == "FAIL"
    assert found.checks["schedule"].facts == {"kind": kind, "rank": 3}
    assert found.reasons == (
        "rank 3 went",
        "rank 0 in flight: barrier()",
        "rank 1 in flight: all_reduce([2] float64, sum)",
        "Traceback: boom",
        "rank 2 stack:\n  line 7",
    )
    assert found.repro == "again"


def test_a_rank_that_refuses_the_degree_makes_it_illegal():
    error = IllegalDegreeError("num_attention_heads=6, tp_size=4", legal_tp_sizes=(1, 2, 3))
    failure = RankFailure("raised", "rank 0 raised", rank=0, exception=error)
    found = judge_failure(CASE, 4, "bfloat16", failure, repro="")
    assert found.outcome == "ILLEGAL"
    assert found.reasons == ("plan: num_attention_heads=6, tp_size=4",)
    assert found.checks["plan"].outcome == "FAIL"


def test_a_degree_that_the_plan_refuses_is_illegal():
    found = refused(CASE, 3, "bfloat16", "6 heads over 4", repro="")
    assert (found.outcome, found.checks["plan"].reason) == ("ILLEGAL", "6 heads over 4")


def test_a_drawn_illegal_degree_has_to_be_refused():
    assert refused_as_planned(CASE, 3, "bfloat16", "6 heads over 4", repro="").outcome == "PASS"
    accepted = accepted_illegal(CASE, 3, "bfloat16", "6 heads over 4", repro="")
    assert accepted.outcome == "WRONG"
    assert accepted.checks["plan"].outcome == "FAIL"


@pytest.mark.parametrize(
    ("outcome", "reason", "phrase"),
    [
        ("MAYBE", "", "outcome='MAYBE', but should be PASS, FAIL or SKIPPED"),
        ("FAIL", "", "a check that is FAIL needs a reason"),
        ("SKIPPED", "", "a check that is SKIPPED needs a reason"),
    ],
)
def test_a_check_without_a_reason_cannot_be_made(outcome, reason, phrase):
    with pytest.raises(ValueError, match=phrase):
        Check(outcome, reason)
