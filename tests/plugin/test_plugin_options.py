"""What the plugin refuses, before the first test and in one line; and what it does uninvited."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from plugin_runs import environment, run_pytest

from tpcheck.plugin import options as pytest_options
from tpcheck.plugin.options import PluginOptions, placed

REFUSED = {
    "a word": (
        ["--tp", "eight"],
        "--tp='eight', but should be a world like 8, or degrees like 2,4",
    ),
    "a hole": (["--tp", "2,,4"], "--tp='2,,4', but should be a world like 8, or degrees like 2,4"),
    "one rank": (
        ["--tp", "1"],
        "--tp=1, but should be at least 2: one rank has nothing to differ from",
    ),
    "zero": (["--tp", "0,2"], "--tp=0,2, but every degree should be 1 to 64"),
    "too many": (["--tp", "2,65"], "--tp=2,65, but every degree should be 1 to 64"),
    "a large world": (["--tp", "100000"], "--tp=100000, but every degree should be 1 to 64"),
    "no cases": (
        ["--tp-cases", "0"],
        "--tp-cases='0', but should be a whole number of at least 1",
    ),
    "no time": (["--tp-timeout", "0"], "--tp-timeout='0', but should be more than 0 seconds"),
    "too much time": (
        ["--tp-timeout", "1" + "0" * 10],
        "--tp-timeout=10000000000, but should be at most 1e+09 seconds",
    ),
    "nan": (["--tp-timeout", "nan"], "--tp-timeout='nan', but should be more than 0 seconds"),
    "ranks on no GPU": (
        ["--tp-ranks-per-gpu", "2"],
        "--tp-ranks-per-gpu=2 needs --tp-backend nccl, not auto",
    ),
    "no folder": (
        ["--tp-report", "nowhere/r.json"],
        "--tp-report: nowhere/r.json: cannot be written: No such file or directory",
    ),
    "no path": (["--tp-report", ""], "--tp-report is empty, but should be the path of a file"),
    "a test for a path": (
        ["--tp-report", "test_x.py"],
        "--tp-report=test_x.py, but should be the path of a report",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_option_is_one_error_before_any_test(pytester, arguments, message):
    pytester.makepyfile("raise SystemExit('collected')")
    result = pytester.runpytest_inprocess(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in result.errlines if line.strip()] == [f"ERROR: {message}"]
    result.stdout.no_fnmatch_line("*collected*")


def test_an_unknown_backend_is_refused_by_pytest_itself(pytester):
    result = pytester.runpytest_inprocess("--tp-backend", "mpi")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*--tp-backend: invalid choice: 'mpi'*")


@pytest.mark.parametrize("marker", ["tp(4)", "tp(min_size=0)", "tp(min_sise=4)"])
def test_a_marker_that_says_nothing_is_refused(pytester, marker):
    pytester.makepyfile(f"import pytest\n@pytest.mark.{marker}\ndef test_a(): pass")
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(f"ERROR: *::test_a: {marker}, but should be tp(min_size=N), N at*")


def test_help_and_collection_load_no_torch(pytester):
    pytester.makepyfile(
        "import tpcheck\nfrom hypothesis import given\n"
        "from tpcheck.pytest_plugin import tp_degrees\n"
        "@given(tp_size=tp_degrees())\ndef test_a(tp_check, tp_size): pass"
    )
    several = (["--help"], ["--collect-only"], ["--collect-only", "--tp", "4"], ["--markers"])
    code = (
        "import sys, pytest\n"
        f"for arguments in {several!r}:\n"
        "    assert pytest.main(arguments) == 0\n"
        "    assert 'torch' not in sys.modules, arguments\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("--tp-ranks-per-gpu", "1 test collected", "world 4 (degrees 2, 3, 4)", "tp(min_"):
        assert text in done.stdout


def test_uninvited_it_loads_no_torch_and_prints_nothing(pytester):
    pytester.makepyfile(
        "import os, sys\ndef test_a():\n    assert 'torch' not in sys.modules\n"
        "    assert os.environ['CUDA_VISIBLE_DEVICES'] == ''"
    )
    for more in ([], ["-p", "no:xdist"], ["-p", "no:tpcheck"], ["-n", "2"]):
        run = run_pytest(pytester.path, *more)
        assert run.code == 0, run.out
        assert not [line for line in run.out.splitlines() if line.startswith("tpcheck")]
        assert "= tpcheck =" not in run.out


def test_switched_off_it_offers_nothing(pytester):
    pytester.makepyfile("def test_a(tp_check): pass")
    run = run_pytest(pytester.path, "-p", "no:tpcheck")
    assert "fixture 'tp_check' not found" in run.out
    assert run_pytest(pytester.path, "-p", "no:tpcheck", "--tp", "2").code == 4


# Where ranks go: GPUs are counted by the caller, so that this holds on a machine without one.


def a_config(workers=0, worker=None, tx=None):
    options = {"tx": tx if tx is not None else ["popen"] * workers}
    config = SimpleNamespace(getoption=lambda name, default=None: options.get(name, default))
    if worker is not None:
        config.workerinput = {"workercount": workers, "workerid": f"gw{worker}"}
    return config


@pytest.fixture
def gpus(monkeypatch):
    def have(count, visible=None):
        monkeypatch.setattr(pytest_options, "_gpu_count", lambda backend: count)
        if visible is None:
            # set before it is deleted, so that it is put back after the test
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return have


def options(*degrees, backend="auto", **more):
    return PluginOptions(degrees=degrees, given=True, sized=True, backend=backend, **more)


@pytest.mark.parametrize(
    ("count", "workers", "world", "backend"),
    [(0, 0, 2, "gloo"), (4, 0, 4, "nccl"), (4, 0, 8, "gloo"), (4, 2, 2, "nccl"), (3, 2, 2, "gloo")],
)
def test_auto_is_nccl_where_every_rank_of_every_worker_has_a_gpu(
    gpus, count, workers, world, backend
):
    gpus(count)
    assert placed(a_config(workers), options(2, world)).backend == backend
    assert "CUDA_VISIBLE_DEVICES" not in os.environ  # the controller's own are left alone


@pytest.mark.parametrize(
    ("visible", "worker", "share"), [(None, 0, "0,1"), (None, 1, "2,3"), ("4,5,6,7,8", 1, "6,7")]
)
def test_every_worker_has_its_own_gpus(gpus, visible, worker, share):
    gpus(5 if visible else 4, visible)
    found = placed(a_config(2, worker=worker), options(2))
    assert found.backend == "nccl"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == share


def test_a_worker_on_the_cpu_keeps_its_view_of_the_gpus(gpus):
    gpus(1)
    assert placed(a_config(2, worker=1), options(2)).backend == "gloo"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


TOO_FEW = "--tp-backend nccl: {}; use {}a smaller --tp, --tp-ranks-per-gpu N or --tp-backend gloo"


@pytest.mark.parametrize(
    ("count", "config", "more", "said"),
    [
        (0, a_config(), {}, ("no GPUs are visible, but 4 ranks need 4", "")),
        (1, a_config(), {}, ("1 GPU is visible, but 4 ranks need 4", "")),
        (
            6,
            a_config(2),
            {},
            ("6 GPUs are visible, but 2 workers of 4 ranks each need 8", "fewer workers (-n), "),
        ),
        (
            2,
            a_config(tx=["3*popen"]),
            {"ranks_per_gpu": 4},
            ("2 GPUs are visible, but 3 workers of 4 ranks each need 3", "fewer workers (-n), "),
        ),
    ],
)
def test_too_few_gpus_is_one_error(gpus, count, config, more, said):
    gpus(count)
    with pytest.raises(pytest.UsageError) as caught:
        placed(config, options(2, 4, backend="nccl", **more))
    assert str(caught.value) == TOO_FEW.format(*said)


def test_too_few_gpus_ends_the_run_before_a_worker_starts(pytester):
    pytester.makepyfile("def test_a(tp_check): pass")
    run = run_pytest(pytester.path, "--tp", "2", "--tp-backend", "nccl", "-n", "2")
    assert run.code == 4
    (line,) = [line for line in run.err.splitlines() if line]
    assert line.startswith(
        "ERROR: --tp-backend nccl: no GPUs are visible, but 2 workers of 2 ranks"
    )
    assert "gw0" not in run.out


def test_ranks_may_share_a_gpu_when_asked_for(gpus):
    gpus(1)
    found = placed(a_config(), options(2, 4, backend="nccl", ranks_per_gpu=4))
    assert found.header() == "tpcheck: world 4 (degrees 2, 4), backend nccl, devices: 1 GPU"


def test_the_default_degrees_are_those_that_the_gpus_hold(gpus):
    gpus(4)
    assert placed(a_config(), PluginOptions(given=True, backend="nccl")).degrees == (2, 4)


DEGREES = """
from hypothesis import given, strategies as st
from tpcheck.pytest_plugin import tp_degrees

SEEN = []

@given(tp_size=tp_degrees(), other=st.integers())
def test_draw(tp_size, other):
    SEEN.append(tp_size)

def test_seen():
    print("seen", sorted(set(SEEN)), "first", SEEN[0], "often", SEEN.count(max(SEEN)) > 10)
"""


@pytest.mark.parametrize(
    ("arguments", "seen", "first"),
    [
        (["--tp", "8"], "[2, 3, 4, 5, 6, 7, 8]", 2),
        (["--tp", "2"], "[2]", 2),
        (["--tp", "6,3"], "[3, 6]", 3),
        ([], "[2, 4, 8]", 2),
    ],
)
def test_degrees_are_those_of_the_command_line(pytester, arguments, seen, first):
    pytester.makepyfile(DEGREES)
    result = pytester.runpytest_inprocess("-s", *arguments)
    assert f"seen {seen} first {first} often True" in result.stdout.str()
