"""Under torchrun its world is used: rank 0 drives, the others host a rank that can be replaced."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpcheck.errors import BackendError
from tpcheck.groups.opening import serves_torchrun
from tpcheck.groups.torchrun import (
    TorchrunInfo,
    serve_forever,
    torchrun_pool,
    torchrun_world,
)

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def outcome():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(HERE / "torchrun_driver.py")]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_jobs_run_across_processes_and_failures_are_named_as_in_the_local_pool(outcome):
    assert outcome["label"] == "gloo"
    assert outcome["sums"] == [3.0] * 4
    waits = "rank 0 waits in all_reduce([4, 64]"
    assert outcome["texts"] == [
        "ok",
        f"{waits} float32, sum) (#1), rank 1 in all_gather([4, 64] float32, dim=0) (#1)",
        "ok",
        "rank 1 exited with code 3 before it answered",
        "ok",
        outcome["texts"][5],
        "ok",
        "ok",
        "rank 0 raised ValueError: a bad shape",
        "ok",
    ]
    assert outcome["texts"][5].startswith(
        f"rank 1 did not return within 2 s: {waits} bfloat16, sum) (#1), rank 1 is in sleep_before"
    )
    assert "in sleep_before_collective" in outcome["stack"]


def test_no_torchrun_no_world(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert torchrun_world() is None


def test_torchruns_variables_are_read_and_checked(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "node0")
    assert torchrun_world() == TorchrunInfo(3, 4, 1, 2, "node0")
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(BackendError, match="RANK=4, but should be below WORLD_SIZE=4"):
        torchrun_world()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(BackendError, match=r"RANK=first.*should be whole numbers"):
        torchrun_world()


def test_half_of_torchruns_variables_are_no_world_of_it(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    info = TorchrunInfo(0, 2, 0, 2, "127.0.0.1")
    with pytest.raises(BackendError, match=r"RANK=0 and WORLD_SIZE=2 are set, but MASTER_ADDR is"):
        torchrun_pool(info)
    with pytest.raises(BackendError, match=r"start tpcheck by torchrun, or unset RANK"):
        serve_forever(info)


@pytest.mark.parametrize(("rank", "leaves"), [("0", False), ("1", True)])
def test_rank_0_alone_simulates(monkeypatch, rank, leaves):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert serves_torchrun("sim", None) is leaves
