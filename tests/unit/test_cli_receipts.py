"""`tpcheck gate` makes keys, issues receipts and verifies them, one thing a call.

Evidence: the whole way on the command line, from a run to a flipped byte; every combination of
options that means nothing; a report that does not allow or cannot be vouched for.
"""

import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from tests.receipting import MADE, make_model, make_report
from tpcheck.cli_commands.receipts import assert_apart, assert_one_thing
from tpcheck.deployment_gate.receipts import read_receipt
from tpcheck.errors import TPCheckError
from tpcheck.machine import nccl_settings
from tpcheck.report import write_report

POLICY = """
[policy]
tp = [2, 4]
dtypes = ["bfloat16"]
backends = ["nccl"]
min_sensitivity = 0
"""


def gate(*arguments: Any, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tpcheck", "gate", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={"PATH": "", "HOME": str(cwd), **environ},
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = make_model(tmp_path / "model")
    write_report(make_report(model), tmp_path / "report.json")
    (tmp_path / "policy.toml").write_text(POLICY)
    return tmp_path


def test_from_a_key_to_a_flipped_byte(folder: Path) -> None:
    done = gate("--new-key", "key", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    secret = (folder / "key").read_text().splitlines()[1]
    issue = ("report.json", "--policy", "policy.toml", "--receipt", "r.json", "--sign", "key")
    issued = gate(*issue, cwd=folder)
    assert issued.returncode == 0
    assert issued.stdout.startswith("ALLOWED: ")
    receipt = read_receipt(folder / "r.json")
    assert receipt.signature is not None
    assert issued.stderr == (
        f"note: r.json is signed by the key {receipt.signature.key[:16]}..., and good until"
        f" {receipt.expires:%Y-%m-%d %H:%M:%S} UTC\n"
    )
    quiet = gate(*issue, "--quiet", cwd=folder)
    assert (quiet.returncode, quiet.stderr) == (0, "")
    data = (folder / "report.json").read_bytes()
    assert receipt.report_sha256 == hashlib.sha256(data).hexdigest()
    verify = ("--verify", "r.json", "--public-key", "key.pub", "--model", "model", "--tp", "2")
    refused = gate(*verify, "--json", "v.json", cwd=folder)  # this machine has no H200
    assert refused.returncode == 1
    assert refused.stdout.startswith("REFUSED: model at tp_size=2, by r.json: ")
    found = json.loads((folder / "v.json").read_text())
    said = [one["reason"] for one in found["refusals"]]
    assert found["outcome"] == "REFUSED"
    assert not any(reason.startswith("weights") for reason in said)
    shard = folder / "model" / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    again = gate(*verify, "--paranoid", "--dtype", "bfloat16", cwd=folder)
    assert "model-1.safetensors differs" in again.stdout
    everything = [done, issued, refused, again]
    written = [file.read_bytes() for file in folder.rglob("*.json")]
    assert secret not in "".join(one.stdout + one.stderr for one in everything)
    assert not any(secret.encode() in one for one in written)


def test_a_machine_that_fits_is_allowed(folder: Path) -> None:
    """With evidence that needs no GPU: the versions are those of this very environment."""
    report = json.loads((folder / "report.json").read_text())
    report["path"] |= {"backend": "gloo", "same_as_deployed": False, "differences": ["gloo"]}
    report["environment"] |= {
        "torch": version("torch"),
        "nccl_settings": nccl_settings({}),
        "driver": None,
    }
    report["engine"]["version"] = version("transformers")
    (folder / "report.json").write_text(json.dumps(report))
    policy = POLICY.replace("nccl", "gloo") + "require_deployed_path = false\n"
    (folder / "policy.toml").write_text(policy)
    gate("--new-key", "key", "--quiet", cwd=folder)
    issue = ("report.json", "--policy", "policy.toml", "--receipt", "r.json", "--sign", "key")
    assert gate(*issue, "--quiet", cwd=folder).returncode == 0
    verify = ("--verify", "r.json", "--public-key", "key.pub", "--model", "model", "--tp", "4")
    done = gate(*verify, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ALLOWED: model at tp_size=4, by r.json, until 20")
    assert "  tested: bfloat16, batch 2, lengths 1, 3, 4, 5, 16" in done.stdout
    found = json.loads(gate(*verify, "--json", "-", cwd=folder).stdout)
    assert (found["outcome"], found["refusals"]) == ("ALLOWED", [])
    assert gate(*verify, cwd=folder, NCCL_ALGO="Tree").returncode == 1


def test_an_unsigned_receipt_says_so(folder: Path) -> None:
    done = gate("report.json", "--policy", "policy.toml", "--receipt", "r.json", cwd=folder)
    assert done.returncode == 0
    assert done.stderr == "note: r.json is unsigned, so no server starts by it; use --sign KEY\n"
    assert read_receipt(folder / "r.json").signature is None


def test_a_refusal_writes_no_receipt_and_keeps_an_earlier_one(folder: Path) -> None:
    (folder / "policy.toml").write_text(POLICY.replace("[2, 4]", "[2, 4, 8]"))
    issue = ("report.json", "--policy", "policy.toml", "--receipt", "r.json")
    done = gate(*issue, cwd=folder)
    assert (done.returncode, done.stderr) == (1, "")
    assert not (folder / "r.json").exists()
    (folder / "r.json").write_text("earlier")
    done = gate(*issue, cwd=folder)
    assert done.returncode == 1
    assert done.stderr == "note: refused, so no receipt was written; r.json is an earlier one\n"
    assert (folder / "r.json").read_text() == "earlier"


def test_no_receipt_without_a_digest_and_nothing_is_written(folder: Path) -> None:
    write_report(make_report(folder / "model", model=None), folder / "report.json")
    outputs = ("--json", "d.json", "--markdown", "d.md", "--junit", "d.xml")
    before = {file.name for file in folder.iterdir()}
    done = gate(
        "report.json", "--policy", "policy.toml", "--receipt", "r.json", *outputs, cwd=folder
    )
    assert done.returncode == 2
    assert "no digest; run hf:DIR or ref:DIR" in done.stderr
    assert done.stdout == ""
    assert {file.name for file in folder.iterdir()} == before


@pytest.mark.parametrize("path", ["none/r.json", "model", "/dev/null", "-"])
def test_a_place_that_takes_no_receipt_is_found_out_before_the_decision(
    path: str, folder: Path
) -> None:
    issue = ("report.json", "--policy", "policy.toml", "--receipt", path, "--json", "d.json")
    done = gate(*issue, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert path in done.stderr
    assert not (folder / "d.json").exists()


def test_a_key_is_tried_even_where_the_report_is_refused(folder: Path) -> None:
    (folder / "policy.toml").write_text(POLICY.replace("[2, 4]", "[2, 4, 8]"))
    issue = ("report.json", "--policy", "policy.toml", "--receipt", "r.json", "--sign", "none")
    done = gate(*issue, cwd=folder)
    assert (done.returncode, done.stderr) == (
        2,
        "error: none: cannot be read: No such file or directory\n",
    )


def test_a_receipt_expires_with_its_evidence(folder: Path) -> None:
    days = (datetime.now(UTC) - MADE).days + 2
    (folder / "policy.toml").write_text(f"{POLICY}max_age_days = {days}\n")
    issue = ("report.json", "--policy", "policy.toml", "--receipt", "r.json", "--quiet")
    assert gate(*issue, cwd=folder).returncode == 0
    receipt = read_receipt(folder / "r.json")
    assert (receipt.expires - MADE).days == days


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("none", "none: cannot be read: No such file"),
        ("open", "open: has mode 0644, so that others can use it"),
        ("rsa", "rsa: is no Ed25519 private key in PEM"),
    ],
)
def test_a_key_that_cannot_sign_is_found_out_before_anything_is_written(
    key: str, message: str, folder: Path
) -> None:
    gate("--new-key", "open", "--quiet", cwd=folder)
    (folder / "open").chmod(0o644)
    (folder / "rsa").write_bytes(b"-----BEGIN PRIVATE KEY-----\n")
    (folder / "rsa").chmod(0o600)
    issue = ("report.json", "--policy", "policy.toml", "--receipt", "r.json", "--sign", key)
    done = gate(*issue, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert not (folder / "r.json").exists()


def test_a_receipt_never_takes_the_place_of_what_it_rests_on(folder: Path) -> None:
    gate("--new-key", "key", "--quiet", cwd=folder)
    names = ("key", "key.pub", "report.json", "policy.toml")
    kept = {name: (folder / name).read_bytes() for name in names}
    issue = ("report.json", "--policy", "policy.toml", "--sign", "key")
    for path in ("model/../key", "key.pub", "report.json", "./policy.toml"):
        done = gate(*issue, "--receipt", path, cwd=folder)
        assert done.returncode == 2
        assert "but should differ from" in done.stderr
    assert gate(*issue, "--receipt", "r.json", "--json", "key", cwd=folder).returncode == 2
    assert kept == {name: (folder / name).read_bytes() for name in kept}


def test_two_outputs_are_two_files() -> None:
    with pytest.raises(TPCheckError, match=r"--receipt=x, but should differ from --json"):
        assert_apart({"--json": Path("x"), "--receipt": Path("x")}, {})
    assert_apart({"--json": Path("-"), "--receipt": Path("x")}, {"--sign": None})


OPTIONS = (
    "--new-key --verify --public-key --model --tp --dtype --paranoid REPORT.json --policy"
    " --receipt --sign --json --junit --markdown"
).split()


@pytest.mark.parametrize(
    ("used", "message"),
    [
        ("--new-key --policy", "--new-key: does not go with --policy"),
        ("--new-key --verify", "--new-key: does not go with --verify"),
        ("--new-key --json", "--new-key: does not go with --json"),
        ("--new-key REPORT.json", "--new-key: does not go with REPORT.json"),
        ("--verify", "--verify: needs --public-key K as well"),
        ("--verify --public-key", "--verify: needs --model DIR as well"),
        ("--verify --public-key --model", "--verify: needs --tp N as well"),
        ("--verify --public-key --model --tp --policy", "--verify: does not go with --policy"),
        ("--verify --public-key --model --tp --sign", "--verify: does not go with --sign"),
        ("--verify --public-key --model --tp --junit", "--verify: does not go with --junit"),
        ("--verify --public-key --model --tp REPORT.json", "does not go with REPORT.json"),
        ("REPORT.json --policy --sign", "--sign: signs a receipt, but --receipt PATH is missing"),
        ("REPORT.json --policy --tp", "--tp: is about --verify RECEIPT, which is missing"),
        ("REPORT.json --policy --dtype", "--dtype: is about --verify RECEIPT"),
        ("REPORT.json --policy --paranoid", "--paranoid: is about --verify RECEIPT"),
        ("REPORT.json --policy --public-key", "--public-key: is about --verify RECEIPT"),
        ("REPORT.json --policy --model", "--model: is about --verify RECEIPT"),
    ],
)
def test_options_of_two_calls_are_an_error(used: str, message: str) -> None:
    with pytest.raises(TPCheckError, match=message):
        assert_one_thing({name: name in used.split() for name in OPTIONS})


@pytest.mark.parametrize(
    "used",
    [
        "--new-key",
        "--verify --public-key --model --tp --dtype --paranoid --json",
        "REPORT.json --policy",
        "REPORT.json --policy --receipt --json --junit --markdown",
        "REPORT.json --policy --receipt --sign",
    ],
)
def test_options_of_one_call_go_together(used: str) -> None:
    assert_one_thing({name: name in used.split() for name in OPTIONS})


def test_a_new_key_is_one_that_signs(folder: Path) -> None:
    done = gate("--new-key", "key", cwd=folder)
    loaded = serialization.load_pem_private_key((folder / "key").read_bytes(), None)
    assert loaded.public_key() == serialization.load_pem_public_key(
        (folder / "key.pub").read_bytes()
    )
    assert [line.split(": the ")[0] for line in done.stdout.splitlines()] == ["key", "key.pub"]
    again = gate("--new-key", "key", cwd=folder)
    assert again.returncode == 2
    assert again.stderr == "error: key: is there already and is not overwritten; name another\n"
