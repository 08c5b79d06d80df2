"""The hooks of examples/deploy, run: each starts what it guards on proven weights, and only then.

Evidence: a real run of a real directory, its gate, receipt and keys; the scripts as they stand; the
commands inside the YAML files, run by the shell that would run them there.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.models import make_model

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"
POLICY = """
[policy]
tp = [2]
dtypes = ["bfloat16"]
backends = ["gloo"]
require = ["structural", "drift"]
require_deployed_path = false
"""


def run(*command: Any, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | {"XDG_CACHE_HOME": str(cwd / "cache"), **variables},
    )


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, its report, a policy, a key pair and the signed receipt."""
    folder = tmp_path_factory.mktemp("deploy")
    make_model(folder / "model", "llama", num_attention_heads=8, hidden_size=64)
    (folder / "policy.toml").write_text(POLICY)
    for command in (
        "run ref:model --tp 2 --sensitivity --json report.json --quiet",
        "gate --new-key release.key",
        "gate report.json --policy policy.toml --receipt receipt.json --sign release.key",
    ):
        done = run(sys.executable, "-m", "tpcheck", *command.split(), cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def swapped(proven: Path) -> Iterator[Path]:
    """Yield that folder with one byte of one weight changed."""
    weights = proven / "model" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    yield proven
    weights.write_bytes(before)


def start_by_python(
    folder: Path, tp_size: int = 2, dtype: str = "bfloat16"
) -> subprocess.CompletedProcess[str]:
    given = ("receipt.json", "release.key.pub", "model", tp_size, dtype)
    return run(sys.executable, DEPLOY / "serve.py", *given, "--", "echo", "serving", cwd=folder)


def start_by_entrypoint(
    folder: Path, tp_size: int = 2, dtype: str = "bfloat16"
) -> subprocess.CompletedProcess[str]:
    return run(
        DEPLOY / "entrypoint.sh",
        "echo",
        "serving",
        cwd=folder,
        MODEL_DIR="model",
        TP_SIZE=str(tp_size),
        DTYPE=dtype,
        TPCHECK_RECEIPT="receipt.json",
        TPCHECK_PUBLIC_KEY="release.key.pub",
    )


STARTS = [start_by_python, start_by_entrypoint]


@pytest.mark.parametrize("start", STARTS)
def test_what_was_proven_starts(start: Any, proven: Path) -> None:
    done = start(proven)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "serving"), done.stderr


@pytest.mark.parametrize("start", STARTS)
def test_other_weights_do_not_start(start: Any, swapped: Path) -> None:
    done = start(swapped)
    assert done.returncode == 1
    assert "serving" not in done.stdout
    assert "model.safetensors" in done.stdout + done.stderr


@pytest.mark.parametrize("start", STARTS)
def test_another_degree_does_not_start(start: Any, proven: Path) -> None:
    done = start(proven, 4)
    assert done.returncode == 1
    assert "serving" not in done.stdout
    assert "tp_size=4" in done.stdout + done.stderr


@pytest.mark.parametrize("start", STARTS)
def test_another_dtype_does_not_start(start: Any, proven: Path) -> None:
    done = start(proven, dtype="float16")
    assert done.returncode == 1
    assert "serving" not in done.stdout
    assert "float16 is asked for" in done.stdout + done.stderr


def test_a_server_that_names_no_dtype_may_be_started_by_the_hook(proven: Path) -> None:
    given = ("receipt.json", "release.key.pub", "model", 2)
    done = run(sys.executable, DEPLOY / "serve.py", *given, "--", "echo", "serving", cwd=proven)
    assert (done.returncode, done.stdout) == (0, "serving\n"), done.stderr


def test_a_container_without_a_receipt_does_not_start(proven: Path) -> None:
    done = run(DEPLOY / "entrypoint.sh", "echo", "serving", cwd=proven, MODEL_DIR="model")
    assert done.returncode != 0
    assert "serving" not in done.stdout
    assert "TP_SIZE: is not set" in done.stderr


def test_the_hook_says_how_it_is_called(proven: Path) -> None:
    done = run(sys.executable, DEPLOY / "serve.py", "receipt.json", cwd=proven)
    assert done.returncode == 1
    assert done.stderr.startswith("usage: serve.py RECEIPT PUBLIC_KEY MODEL_DIR TP_SIZE [DTYPE] --")
    given = ("receipt.json", "release.key.pub", "model", "two", "--", "echo", "serving")
    done = run(sys.executable, DEPLOY / "serve.py", *given, cwd=proven)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "not started: TP_SIZE='two', but should be a whole number\n"


def in_pod(proven: Path, command: list[str]) -> list[str]:
    """Return a command of the pod with its mounts where this folder has them."""
    moved = {"/proof/receipt.json": "receipt.json", "/proof/release.pub": "release.key.pub"}
    moved |= {"/models/llama": "model", "--tp=8": "--tp=2"}
    text = " ".join(command)
    for there, here in moved.items():
        assert there in text
        text = text.replace(there, here)
    return text.split()


def test_the_pod_refuses_before_and_after_it_has_started(proven: Path) -> None:
    pod = yaml.safe_load((DEPLOY / "kubernetes.yaml").read_text())["spec"]
    server, (guard,) = pod["containers"][0], pod["initContainers"]
    probe = server["readinessProbe"]["exec"]["command"]
    assert guard["image"] == server["image"]
    assert guard["resources"] == server["resources"]  # the receipt names the GPUs it is checked on
    for checked, served in (
        ("--model=/models/llama", "/models/llama"),
        ("--tp=8", "--tensor-parallel-size=8"),
        ("--dtype=bfloat16", "--dtype=bfloat16"),  # without it a server takes the config's
    ):
        assert checked in guard["command"]
        assert checked in probe
        assert served in server["command"]
    mounts = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in guard["volumeMounts"]} == mounts
    for command in (guard["command"], probe):
        assert run(*in_pod(proven, command), cwd=proven).returncode == 0
    weights = proven / "model" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        for command in (guard["command"], probe):
            assert run(*in_pod(proven, command), cwd=proven).returncode == 1
    finally:
        weights.write_bytes(before)


@pytest.mark.parametrize("allowed", [True, False])
def test_the_job_publishes_its_tables_and_fails_when_refused(
    allowed: bool, proven: Path, tmp_path: Path
) -> None:
    job = yaml.safe_load((DEPLOY / "github-actions.yaml").read_text())["jobs"]["prove"]
    prove, gate = (step["run"] for step in job["steps"] if "run" in step)
    shutil.copytree(proven / "model", tmp_path / "model")
    (tmp_path / "policy.toml").write_text(POLICY if allowed else POLICY.replace("[2]", "[2, 4]"))
    summary = tmp_path / "summary.md"
    variables = {
        "MODEL_DIR": "model",
        "SIGNING_KEY": (proven / "release.key").read_text(),
        "GITHUB_STEP_SUMMARY": str(summary),
    }
    prove = prove.replace("hf:", "ref:").replace("--tp 8", "--tp 2")
    done = run("bash", "-e", "-c", prove, cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    done = run("bash", "-e", "-c", gate, cwd=tmp_path, **variables)
    assert done.returncode == (0 if allowed else 1), done.stdout + done.stderr
    assert (tmp_path / "receipt.json").exists() == allowed
    assert not (tmp_path / "signing.key").exists()
    text = summary.read_text()
    assert "PASS (structure)" in text
    assert ("ALLOWED" if allowed else "REFUSED") in text
    assert variables["SIGNING_KEY"].splitlines()[1] not in text + done.stdout + done.stderr


def test_the_hooks_before_a_commit_run(proven: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((DEPLOY / "pre-commit-config.yaml").read_text())
    model = tmp_path / "models" / "llama"
    shutil.copytree(proven / "model", model)
    shutil.copy(proven / "report.json", model)
    (tmp_path / "policy.toml").write_text(POLICY)
    commands = {hook["id"]: hook["entry"].split() for hook in config["repos"][0]["hooks"]}
    for hook in config["repos"][0]["hooks"]:
        watched = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert any(re.search(hook["files"], str(p.relative_to(tmp_path))) for p in watched)
        assert hook["pass_filenames"] is False
    assert run(*commands["llama-splits"], cwd=tmp_path).returncode == 0
    assert run(*commands["llama-proven"], cwd=tmp_path).returncode == 0
    odd = (model / "config.json").read_text().replace('_heads": 8', '_heads": 6')
    (model / "config.json").write_text(odd)
    assert run(*commands["llama-splits"], cwd=tmp_path).returncode == 1
    (tmp_path / "policy.toml").write_text(POLICY.replace("gloo", "nccl"))
    assert run(*commands["llama-proven"], cwd=tmp_path).returncode == 1
