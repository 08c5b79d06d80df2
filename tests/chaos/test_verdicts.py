"""Whatever a subject does to its ranks ends in the right verdict, and the next case runs."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

import tpcheck

SUBJECTS = str(Path(__file__).parent / "failing_subjects.py")


def run(name, tp_sizes=(2,), **options):
    return tpcheck.run(f"{SUBJECTS}:{name}", tp_sizes, backend="gloo", **options)


@pytest.fixture(autouse=True)
def the_next_case_runs():
    yield
    assert run("clean").outcome == "PASS"


@pytest.mark.parametrize(
    ("name", "outcome", "phrase"),
    [
        ("raises_in_build", "ERROR", "rank 1 raised ValueError: the shard file is missing"),
        ("leaves", "ERROR", "rank 1"),
        ("runs_out_of_memory", "ERROR", "out-of-memory"),
        ("nan_when_sharded", "WRONG", "finite on one side only"),
        ("nan_always", "INCONCLUSIVE", "not finite anywhere"),
        ("refuses", "ILLEGAL", "heads=3, but should be divisible by tp_size=2"),
    ],
)
def test_a_subject_that_ends_badly_gets_the_right_verdict(name, outcome, phrase):
    verdict = run(name).verdicts[0]
    assert verdict.outcome == outcome
    assert any(phrase in reason for reason in verdict.reasons), verdict.reasons


def test_a_hang_is_named_within_the_timeout_plus_five_seconds():
    start = time.monotonic()
    verdict = run("sleeps", timeout_s=3).verdicts[0]
    assert time.monotonic() - start < 3 + 5 + 10  # ten more for TP=1 and a cold pool
    assert verdict.outcome == "ERROR"
    text = "\n".join(verdict.reasons)
    assert "rank 0" in text
    assert "all_reduce([2, " in text
    assert "wait_forever" in text, "the sleeping rank's stack names the line"


def killable(victim, pid_file):
    """A subject that runs for a second at TP=4, and says which process rank `victim` is."""

    @tpcheck.subject(vocab_size=32, seq_len=4)
    def build(tp):
        weight = tp.weight("w", 32, 16)
        calls = []

        def forward(input_ids):
            calls.append(1)
            if tp.size > 1 and len(calls) == 2 and tp.rank == victim:
                pid_file.write_text(str(os.getpid()))
            if tp.size > 1:
                time.sleep(0.15)
            return tp.all_reduce(weight[input_ids] / tp.size) @ weight.T

        return forward

    return build


@pytest.mark.parametrize("attempt", range(int(os.environ.get("TPCHECK_KILLS", "8"))))
def test_a_rank_killed_at_a_random_moment_is_an_error_that_names_it(attempt, tmp_path):
    victim, pid_file = attempt % 4, tmp_path / "pid"

    def kill():
        while not pid_file.exists() or not pid_file.read_text():
            time.sleep(0.005)
        time.sleep(random.Random(attempt).uniform(0, 0.4))
        os.kill(int(pid_file.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    verdict = tpcheck.run(killable(victim, pid_file), (4,), backend="gloo").verdicts[0]
    killer.join()
    assert verdict.outcome == "ERROR", verdict
    assert f"rank {victim} was killed by SIGKILL" in verdict.reasons[0]


def test_a_degree_that_cannot_be_sharded_is_illegal_and_says_which_can():
    verdict = tpcheck.run("builtin:llama-tiny", (3,), backend="gloo").verdicts[0]
    assert verdict.outcome == "ILLEGAL"
    assert "num_attention_heads=8" in verdict.reasons[0]
    assert "1, 2, 4, 8" in verdict.reasons[0]


def test_warm_ranks_see_what_the_parent_set_since(monkeypatch):
    assert run("wrong_by_a_variable").outcome == "PASS"
    monkeypatch.setenv("TPCHECK_TEST_BUG", "1")
    assert run("wrong_by_a_variable").outcome == "WRONG"
    [simulated] = tpcheck.run(f"{SUBJECTS}:wrong_by_a_variable", (2,), backend="sim").verdicts
    assert simulated.outcome == "WRONG"
    assert simulated.reasons[-1] == "confirmed on gloo"
    monkeypatch.delenv("TPCHECK_TEST_BUG")
    assert run("wrong_by_a_variable").outcome == "PASS"


def test_what_simulated_ranks_set_for_each_other_does_not_reach_real_ones():
    [verdict] = tpcheck.run(f"{SUBJECTS}:shares_the_environment", (2,), backend="sim").verdicts
    assert verdict.outcome == "PASS"
    assert verdict.reasons[-1].startswith("WRONG in simulation but PASS on gloo")
