"""Subjects written the way people write them: clean ones pass, buggy twins fail by the right check.

Clean ones run on real Gloo ranks and, where they need no process group, in simulation too, in both
half precisions. Buggy ones run in simulation, a few of every kind on real ranks.
"""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

import tests.subjects
import tpcheck
from tests.subjects.buggy import EXPECTED
from tpcheck.errors import BackendError
from tpcheck.groups.pool import get_pool
from tpcheck.records import FAIL, Report

torch.set_num_threads(1)
DTYPES = ("bfloat16", "float16")
NEED_A_PROCESS_GROUP = {"dtensor", "own_process_group"}
ON_REAL_RANKS = (
    "missing_all_reduce",
    "stale_buffer",
    "logits_differ_per_rank",
    "decode_position_off_by_one",
    "one_rank_raises",
    "extra_collective_on_one_rank",
    "four_bit_all_reduce",
)


def _clean() -> list[str]:
    found = []
    for module in pkgutil.iter_modules(tests.subjects.__path__):
        if module.name != "buggy":
            names = vars(importlib.import_module(f"tests.subjects.{module.name}"))
            found += [
                f"{module.name}:{name}"
                for name, value in names.items()
                if getattr(value, "__tpcheck_subject__", None) is not None
            ]
    return found


CLEAN = _clean()
SIMULATED = [name for name in CLEAN if name.partition(":")[0] not in NEED_A_PROCESS_GROUP]


@pytest.fixture(scope="module", autouse=True)
def pool():
    """One warm pool for the module: every gloo run of this process takes it."""
    return get_pool("gloo", 4)


def run(name: str, tp_sizes=(2, 4), dtypes=DTYPES, **options) -> Report:
    return tpcheck.run(f"tests.subjects.{name}", tp_sizes, dtypes=dtypes, **options)


def told(report: Report) -> list[object]:
    return [(v.tp_size, v.dtype, v.outcome, *v.reasons[:3]) for v in report.verdicts]


def assert_passes(report: Report) -> None:
    assert report.outcome == "PASS", told(report)
    assert len(report.verdicts) == 4
    for verdict in report.verdicts:
        failed = {name for name, check in verdict.checks.items() if check.outcome == FAIL}
        assert failed <= {"allclose"}, (failed, verdict.tp_size, verdict.dtype)


@pytest.mark.parametrize("name", CLEAN)
def test_clean_subjects_pass_on_real_ranks(name):
    assert_passes(run(name, backend="gloo"))


@pytest.mark.parametrize("name", SIMULATED)
def test_clean_subjects_pass_in_simulation(name):
    assert_passes(run(name, backend="sim", confirm=False))


@pytest.mark.parametrize("name", ["dtensor:local_logits", "own_process_group:build"])
def test_what_needs_a_process_group_says_so_in_simulation(name):
    with pytest.raises(BackendError, match="--backend gloo"):
        run(name, backend="sim")


def assert_expected(report: Report, name: str) -> None:
    outcome, check, _ = EXPECTED[name]
    for verdict in report.verdicts:
        failed = {key for key, found in verdict.checks.items() if found.outcome == FAIL}
        assert (verdict.outcome, check in failed) == (outcome, True), told(report)


def test_the_table_names_every_buggy_subject():
    names = vars(importlib.import_module("tests.subjects.buggy"))
    assert set(EXPECTED) == {
        name for name, value in names.items() if hasattr(value, "__tpcheck_subject__")
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_buggy_subjects_fail_by_the_right_check(name):
    smallest = EXPECTED[name][2]
    dtypes = ("float16",) if name == "overflow_in_the_sum" else ("bfloat16",)
    sizes = tuple(size for size in (2, 4) if size >= smallest)
    report = run(f"buggy:{name}", sizes, dtypes, backend="sim", confirm=False)
    assert_expected(report, name)


@pytest.mark.parametrize("name", ON_REAL_RANKS)
def test_buggy_subjects_fail_by_the_right_check_on_real_ranks(name):
    report = run(f"buggy:{name}", (2,), ("bfloat16",), backend="gloo")
    assert_expected(report, name)


def test_below_the_degree_that_shows_it_a_bug_is_not_there():
    assert run("buggy:heads_cut_in_two", (2,), backend="sim").outcome == "PASS"


def test_overflow_is_no_bug_in_a_dtype_that_can_hold_it():
    assert run("buggy:overflow_in_the_sum", dtypes=("bfloat16",), backend="sim").outcome == "PASS"


@pytest.mark.parametrize(
    ("name", "checks"),
    [("logits_differ_per_rank", {"rank_agreement"}), ("decode_position_off_by_one", {"decode"})],
)
def test_one_check_alone_sees_it(name, checks):
    report = run(f"buggy:{name}", (2,), ("bfloat16",), backend="sim", confirm=False)
    (verdict,) = report.verdicts
    assert {key for key, found in verdict.checks.items() if found.outcome == FAIL} == checks


def test_a_failure_in_simulation_is_confirmed_on_real_ranks():
    (verdict,) = run("buggy:missing_all_reduce", (2,), ("bfloat16",), backend="sim").verdicts
    assert verdict.outcome == "WRONG"
    assert verdict.reasons[-1] == "confirmed on gloo"


def test_a_degree_the_subject_refuses_is_illegal():
    (verdict,) = run("rank0_bias:build", (3,), ("bfloat16",), backend="sim").verdicts
    assert (verdict.outcome, verdict.reasons) == (
        "ILLEGAL",
        ("plan: intermediate_size=64, tp_size=3\n  tp_size at which it builds: 1, 2, 4",),
    )


@pytest.mark.parametrize("tp_size", [2, 4])
def test_a_subject_without_float64_is_judged_by_drift_alone_and_says_so(tp_size):
    (verdict,) = run("half_only:build", (tp_size,), ("bfloat16",), backend="sim").verdicts
    assert verdict.outcome == "PASS"
    structural, drift = verdict.checks["structural"], verdict.checks["drift"]
    assert structural.outcome == "SKIPPED"
    assert "float64=False" in structural.reason
    assert drift.outcome == "PASS"
    assert 0 < drift.facts["smallest_bug"] < 1


def test_float64_that_raises_is_an_error_when_it_was_not_declared():
    def build(tp):
        def forward(ids):
            if tp.dtype == torch.float64:
                raise RuntimeError("no kernel for float64")
            return torch.zeros(*ids.shape, 4, dtype=tp.dtype)

        return forward

    build = tpcheck.subject(vocab_size=8, seq_len=4)(build)
    (verdict,) = tpcheck.run(build, (2,), backend="sim", confirm=False).verdicts
    assert verdict.outcome == "ERROR"
    assert "no kernel for float64" in verdict.reasons[0]


def test_a_model_that_is_nan_everywhere_is_inconclusive():
    @tpcheck.subject(vocab_size=8, seq_len=4)
    def build(tp):
        w = tp.weight("w", 8, 4) * float("nan")
        return lambda ids: w[ids]

    (verdict,) = tpcheck.run(build, (2,), backend="sim").verdicts
    assert verdict.outcome == "INCONCLUSIVE"
    assert "nothing to compare" in verdict.reasons[0]


def test_a_users_tolerance_below_the_dtypes_floor_is_drift_and_a_wide_one_passes():
    strict = run("nn_module:build", (2,), ("bfloat16",), backend="sim", atol=1e-6)
    assert [v.outcome for v in strict.verdicts] == ["DRIFT"]
    assert strict.verdicts[0].checks["allclose"].facts["decides"] is True
    needed = strict.verdicts[0].checks["allclose"].facts["required_atol"]
    wide = run("nn_module:build", (2,), ("bfloat16",), backend="sim", atol=needed)
    assert wide.outcome == "PASS"


@pytest.mark.parametrize("kind", ["exact", "zeros"])
def test_exact_integers_have_no_infinite_ratio(kind):
    factor = 0.0 if kind == "zeros" else 1.0

    @tpcheck.subject(vocab_size=16, seq_len=4)
    def build(tp):
        table = (torch.arange(64, dtype=tp.dtype).view(16, 4) % 5 - 2) * factor
        return lambda ids: tp.all_reduce(table[ids] / tp.size)

    report = tpcheck.run(build, (2, 4), backend="sim", dtypes=DTYPES)
    assert report.outcome == "PASS", told(report)
    assert all(v.checks["drift"].facts["ratio"] == 0 for v in report.verdicts)
