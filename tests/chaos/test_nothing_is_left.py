"""No process and no file is left behind at exit, at Ctrl-C, or when the parent is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@contextlib.contextmanager
def driver(mode):
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "driver.py"), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def is_gone(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"  # dead, and waiting for a parent that is not ours


def assert_nothing_left(facts):
    deadline = time.monotonic() + 10
    scratch = Path(facts["scratch"])
    while time.monotonic() < deadline:
        if all(map(is_gone, facts["pids"])) and not scratch.exists():
            return
        time.sleep(0.05)
    left = [pid for pid in facts["pids"] if not is_gone(pid)]
    raise AssertionError(f"left behind: processes {left}, scratch {scratch.exists()}")


@pytest.mark.parametrize("mode", ["exit", "hang", "child"])
def test_nothing_is_left(mode):
    with driver(mode) as process:
        facts = json.loads(process.stdout.readline())
        assert len(facts["pids"]) >= 3
        if mode == "exit":
            assert process.wait(30) == 0
        else:
            assert not any(map(is_gone, facts["pids"]))
            time.sleep(0.3)
            process.send_signal(signal.SIGKILL)
        assert_nothing_left(facts)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_after_an_interrupted_job(number):
    with driver("hang") as process:
        facts = json.loads(process.stdout.readline())
        time.sleep(0.3)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == -number
        assert ("KeyboardInterrupt" in stderr) == (number == signal.SIGINT)
        assert_nothing_left(facts)


def test_nothing_is_left_when_parent_and_zygote_are_killed_together():
    with driver("hang") as process:
        facts = json.loads(process.stdout.readline())
        os.kill(facts["pids"][0], signal.SIGKILL)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while not all(map(is_gone, facts["pids"])) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert all(map(is_gone, facts["pids"]))
    # The files have nobody left to remove them: the next pool does.
    with driver("exit") as process:
        process.wait(30)
    assert not Path(facts["scratch"]).exists()
