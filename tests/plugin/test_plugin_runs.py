"""The plugin at work: everything.py is run once in one process and once on two workers.

Each test reads what these runs printed and wrote; the sample project is a user's, run as it stands.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plugin_runs import environment, run_pytest

from tpcheck.report import read_report

HERE = Path(__file__).parent
SAMPLE = HERE.parent / "sample_project"
FAILING = {
    *("test_plain_wrong", "test_no_such_option", "test_beyond_the_world", "test_undecorated"),
    *("test_property_wrong", "test_two_bugs"),
    *("test_only_real_ranks_differ", "test_only_simulation_differs"),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(HERE / "everything.py", folder / "test_everything.py")
    return folder


@pytest.fixture(scope="module")
def alone(project):
    return run_pytest(project, "--tp", "2", "--tp-report", "alone.json", "-rfs", "-n", "0")


@pytest.fixture(scope="module")
def workers(project, alone):
    return run_pytest(project, "--tp", "2", "--tp-report", "workers.json", "-n", "2")


@pytest.fixture
def failure(alone):
    def of(test):
        (text,) = re.findall(rf"^_+ {test} _+\n(.*?)(?=^_+ \w+ _+\n|^=+)", alone.out, re.M | re.S)
        return text

    return of


def failed(run):
    return set(re.findall(r"^FAILED \S+::(\w+)", run.out, re.M))


def summary(run):
    """Return {test: (outcome, verdicts, backend, searched)} of the table at the end."""
    lines = re.search(r"^=+ tpcheck =+\n(.*?)^=", run.out + "=", re.M | re.S)[1].splitlines()
    rules = [match.span() for match in re.finditer("-+", lines[1])]
    table = [line for line in lines[2:] if "::" in line]
    cells = [[line[start:end].strip() for start, end in rules] for line in table]
    return {row[0].partition("::")[2]: tuple(row[1:]) for row in cells}


def test_a_wrong_subject_fails_and_a_right_one_passes(alone):
    assert (alone.code, alone.err) == (1, "")
    assert failed(alone) == FAILING
    assert alone.counts() == {"failed": 8, "passed": 8, "skipped": 1}


def test_the_header_says_what_it_runs_on(alone):
    cores = os.cpu_count()
    assert f"tpcheck: world 2 (degrees 2), backend gloo, devices: cpu, {cores} cores\n" in alone.out


def test_the_failure_is_the_whole_report_at_the_users_line(failure):
    text = failure("test_plain_wrong")
    assert ">       tp_check(subject_of(8, twist=doubled))" in text
    for part in ("WRONG: not the same function", "1 verdict: 1 WRONG", "repro: tpcheck.run(build"):
        assert part in text
    assert "smallest failing degree: tp=2" in text
    assert "plugin/check.py" not in text


def test_the_repro_script_of_a_failure_fails_with_torch_alone(failure, tmp_path):
    script = failure("test_plain_wrong").partition("standalone repro (needs torch only):")[2]
    lines = [line[8:] for line in script.splitlines() if line.startswith("E ")]
    (tmp_path / "repro.py").write_text("\n".join(lines))
    assert len(lines) <= 42
    assert "import tpcheck" not in script
    done = subprocess.run(
        [sys.executable, "repro.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stderr


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("test_no_such_option", "TPCheckError: tp_check: option 'tp_size', but should be one of"),
        (
            "test_beyond_the_world",
            "BackendError: tp_sizes: degree 16, but should be at most 2, the world of --tp; run"
            " pytest --tp 16, or mark the test tp(min_size=16)",
        ),
        ("test_undecorated", "<lambda>: not a subject, but should be decorated with"),
    ],
)
def test_a_users_mistake_is_one_sentence_at_the_users_line(failure, test, message):
    text = failure(test)
    assert message in text
    assert len([line for line in text.splitlines() if line.startswith("E ")]) == 1
    assert "/tpcheck/" not in text


def test_a_property_shrinks_and_is_confirmed_on_real_ranks(failure):
    text = failure("test_property_wrong")
    assert re.search(r"tp_check=tp_check,\n.*hidden=3,.*\n.*tp_size=2,", text)
    assert "@reproduce_failure(" in text
    assert "confirmed on gloo at tp=2" in text
    assert "standalone repro (needs torch only)" in text


def test_two_outcomes_are_two_failures_each_confirmed(failure):
    text = failure("test_two_bugs")
    assert "2 distinct failures" in text
    assert text.count("confirmed on gloo at tp=2") == 2
    assert re.search(r"CheckFailed: WRONG.*hidden=6,.*CheckFailed: ILLEGAL.*hidden=1,", text, re.S)


def test_what_only_simulation_sees_is_said_to_be_that(failure):
    text = failure("test_only_simulation_differs")
    assert (
        "simulation and real ranks disagree: WRONG in simulation, PASS on gloo at tp=2: the"
        " subject shares process state between ranks (a global, a cache, a default), of which real"
        " ranks have one each"
    ) in text
    assert "standalone repro" not in text


def test_what_only_real_ranks_see_is_a_failure_with_its_own_message(failure):
    text = failure("test_only_real_ranks_differ")
    assert re.search(
        r"CheckFailed: simulation and real ranks disagree: PASS in simulation, WRONG on gloo at"
        r" tp=2 \[test_only_real_ranks_differ\(tp_check=tp_check, hidden=\d\)\]: the subject"
        r" depends on what only real ranks have \(a process's environment or state\), or their"
        r" collectives are not what simulation emulates\n",
        text,
    )


def test_the_marker_skips_with_the_reason(alone):
    assert "needs a world of 32 ranks, but it has 2: pytest --tp 32" in alone.out


def test_the_summary_has_a_row_for_each_test_the_worst_first(alone):
    rows = summary(alone)
    assert rows["test_plain"] == ("PASS", "1 PASS", "gloo", "")
    assert rows["test_plain_wrong"] == ("WRONG", "1 WRONG", "gloo", "")
    assert rows["test_property"] == ("PASS", "2 PASS", "gloo", "30 in sim")  # examples 1 and 26
    assert rows["test_property_wrong"][:3] == ("WRONG", "1 WRONG", "gloo")
    assert rows["test_two_bugs"][:3] == ("WRONG", "1 WRONG, 1 ILLEGAL", "gloo")
    assert rows["test_only_simulation_differs"][:3] == ("WRONG", "1 WRONG", "sim")
    assert rows["test_needs_real_ranks"] == ("PASS", "1 PASS", "gloo", "")
    outcomes = [row[0] for row in rows.values()]
    assert outcomes == sorted(outcomes, key=["WRONG", "PASS"].index)


def test_the_report_holds_every_verdict_that_stands(alone, project):
    report = read_report(project / "alone.json")
    assert "tpcheck report written to alone.json" in alone.out
    assert (report.outcome, report.path.backend) == ("WRONG", "mixed")
    ids = [verdict.case_id for verdict in report.verdicts]
    assert "test_everything.py::test_property s0-b2-t4 #2" in ids
    assert len(ids) == sum(
        int(n) for row in summary(alone).values() for n in re.findall(r"\d+", row[1])
    )
    assert re.fullmatch(r"\d+ examples of properties were searched in simulation", report.notes[-1])


def test_workers_say_what_one_process_says(alone, workers, project):
    assert workers.code == 1
    assert failed(workers) == FAILING
    assert workers.counts().items() >= {"failed": 8, "passed": 8, "skipped": 1}.items()
    assert {test: row[:3] for test, row in summary(workers).items()} == {
        test: row[:3] for test, row in summary(alone).items()
    }
    several = [read_report(project / f"{name}.json") for name in ("alone", "workers")]
    assert len({frozenset((v.case_id, v.outcome) for v in one.verdicts) for one in several}) == 1


def test_last_failed_stop_at_first_and_a_choice_of_tests(alone, project):
    run = run_pytest(project, "--tp", "2", "--lf", "-x", "-k", "plain or option", "-p", "no:xdist")
    assert failed(run) == {"test_plain_wrong"}
    assert run.counts().items() >= {"failed": 1}.items()
    assert list(summary(run)) == ["test_plain_wrong"]


LAID_OUT = {
    "pyproject.toml": '[tool.pytest.ini_options]\npythonpath = ["src"]\ntestpaths = ["tests"]\n',
    "src/engine/__init__.py": "VOCAB = 8\n",
    "tests/test_engine.py": """
import tpcheck
from engine import VOCAB

@tpcheck.subject(vocab_size=VOCAB, seq_len=2)
def build(tp):
    w = tp.weight("w", VOCAB, VOCAB)
    return lambda ids: tp.all_reduce(w[ids])

def test_a(tp_check):
    tp_check(build, backend="sim", confirm=False)
""",
}


def test_the_repro_line_finds_what_pytest_had_on_its_path(tmp_path):
    for name, text in LAID_OUT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    run = run_pytest(tmp_path, "--tp", "2", "-p", "no:cacheprovider")
    line = re.search(r"repro: (.*)", run.out).group(1)
    assert re.match(r"PYTHONPATH=(tests:src|src:tests) tpcheck run test_engine:build ", line)
    line = line.replace("tpcheck run", f"{shlex.quote(sys.executable)} -m tpcheck run")
    done = subprocess.run(
        line, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("WRONG: ")


def test_simulation_alone_says_so(project):
    chosen = "plain_wrong or property_wrong or by_process or of_the_pool"
    run = run_pytest(project, "--tp", "2,3", "--tp-backend", "sim", "-k", chosen)
    assert failed(run) == {"test_plain_wrong", "test_property_wrong"}
    assert "in simulation only: --tp-backend sim leaves out real ranks" in run.out
    assert summary(run)["test_plain_wrong"] == ("WRONG", "2 WRONG", "sim", "")


def test_the_sample_project(tmp_path):
    project = shutil.copytree(SAMPLE, tmp_path / "sample_project")
    run = run_pytest(project, "--tp", "3")
    assert failed(run) == {"test_wrong_row_parallel"}
    assert run.counts().items() >= {"failed": 1, "passed": 1}.items()
    shrunk = re.search(r"tp_size=(\d+),.*\n.*per_rank=(\d+),.*\n.*out_features=(\d+),", run.out)
    assert shrunk.groups() == ("2", "1", "1")
    assert "confirmed on gloo at tp=2" in run.out
    assert summary(run)["tests/test_layers.py::test_row_parallel".partition("::")[2]] == (
        *("PASS", "4 PASS", "gloo", "100 in sim"),
    )


REFUSES_ODD = """
import tpcheck

@tpcheck.subject(vocab_size=8, seq_len=2)
def build(tp):
    if tp.size == 3:
        raise tpcheck.IllegalDegreeError("tp_size=3")
    w = tp.weight("w", 8, 8)
    return lambda ids: w[ids]

def test_a(tp_check):
    report = tp_check(build)
    print("sizes", [verdict.tp_size for verdict in report.verdicts], report.notes)
"""


def test_a_world_asks_for_its_own_degree_a_list_for_each(pytester):
    pytester.makepyfile(REFUSES_ODD)
    sim = ("--tp-backend", "sim", "-s")
    run = run_pytest(pytester.path, "--tp", "4", *sim)
    assert "sizes [2, 4] ('degrees 3 are refused, and were not asked for by name',)" in run.out
    run = run_pytest(pytester.path, "--tp", "3,4", *sim)
    assert "CheckFailed: ILLEGAL: a degree that was asked for is refused" in run.out
    run = run_pytest(pytester.path, "--tp-cases", "2", *sim)
    assert "sizes [2, 4, 8, 2, 4, 8]" in run.out


def test_under_torchrun_rank_0_runs_the_tests_and_the_others_serve(pytester):
    pytester.makepyfile(
        "import tpcheck\ndef test_a(tp_check, tp_pool):\n"
        "    report = tp_check('builtin:llama-tiny')\n    assert tp_pool.world == 2\n"
        "    print('ran on', report.path.backend, tp_pool.backend)\n"
        "def test_b(): pass"
    )
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run = run_pytest(pytester.path, "--tp", "2", "-s", before=(*launch, "-m", "pytest"))
    assert run.code == 0, run.out + run.err
    assert run.out.count("test session starts") == 1
    assert "ran on gloo gloo" in run.out
    assert "backend auto under torchrun, devices: 2 processes" in run.out
    # no test meets the ranks: the processes that serve are let go all the same
    run = run_pytest(pytester.path, "--tp", "2", "-k", "b", before=(*launch, "-m", "pytest"))
    assert run.code == 0, run.out + run.err
    assert run.counts().items() >= {"passed": 1}.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "4"], "ERROR: --tp: 4 ranks, but torchrun's world has WORLD_SIZE=2"),
        (["--tp", "2", "-n", "2"], "ERROR: -n does not go with torchrun: its processes are the*"),
    ],
)
def test_what_torchruns_world_cannot_be_is_refused(pytester, monkeypatch, arguments, message):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    result = pytester.runpytest_inprocess(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(message)


def test_other_suites_under_torchrun_are_left_alone(pytester):
    pytester.makepyfile("def test_a(): pass\ndef test_b(tp_pool): pass")
    world = {"RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest"],
        env=environment() | world,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "1 passed, 1 error" in done.stdout
    assert "BackendError: tp_pool: this is torchrun's world, but without --tp" in done.stdout


HANGS = """
import os, signal, sys, time
import pytest
import tpcheck

@tpcheck.subject(vocab_size=8, seq_len=2)
def build(tp):
    def forward(ids):
        print(os.getpid(), file=sys.__stderr__, flush=True)
        time.sleep(600)
    return forward

def test_a(tp_check):
    tp_check(build)
"""

RAN_OUT = """
def test_b(tp_check):
    # what pytest-timeout does: fail in the middle of whatever the main thread is in
    def stop(number, frame):
        pytest.fail("Timeout (>2.0s) from pytest-timeout.")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 2)
    tp_check(build, timeout_s=600)

def test_c(tp_check):
    tp_check("builtin:llama-tiny")
"""


def test_a_timeout_costs_only_its_own_test(pytester):
    pytester.makepyfile(HANGS + RAN_OUT)
    run = run_pytest(pytester.path, "--tp", "2", "--tp-timeout", "2")
    assert failed(run) == {"test_a", "test_b"}
    assert run.counts() == {"failed": 2, "passed": 1}
    assert "no rank returned within" in run.out
    assert "smallest failing degree: tp=2, rank 0" in run.out
    assert "standalone repro" not in run.out  # it would hang again
    assert "Failed: Timeout (>2.0s) from pytest-timeout." in run.out
    assert summary(run) == {
        "test_a": ("ERROR", "1 ERROR", "gloo", ""),
        "test_c": ("PASS", "1 PASS", "gloo", ""),
    }


@pytest.mark.parametrize("more", [[], ["-n", "1"]], ids=["alone", "a worker"])
def test_ctrl_c_leaves_no_process(pytester, more):
    pytester.makepyfile(HANGS)
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "--tp", "2", "-s", "--tp-report", "r.json", *more],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        rank = int(process.stderr.readline())
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == pytest.ExitCode.INTERRUPTED
    assert "KeyboardInterrupt" in out
    assert read_report("r.json").outcome == "INCONCLUSIVE"  # nothing was found out by then
    deadline = time.monotonic() + 20
    while is_alive(rank) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(rank)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
