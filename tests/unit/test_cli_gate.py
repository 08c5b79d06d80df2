"""`tpcheck gate` on files: exit codes, what it writes, and that it needs no torch.

Evidence: the command line itself, in a process of its own where torch cannot be imported.
"""

import json
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import tpcheck
from tests.gate_reports import report_json
from tpcheck.report import write_report

POLICY = """
[policy]
tp = [2, 4]
dtypes = ["bfloat16"]
backends = ["nccl"]
max_drift_ratio = 3.0
max_argmax_flip_margin = 0.05
max_age_days = 30
[policy.match]
torch = "2.13.0"
"""

NO_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numpy", "transformers", "rich"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, NoTorch())
from tpcheck.cli import main
sys.argv = ["tpcheck", *sys.argv[1:]]
main()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    report = report_json() | {"created": datetime.now(UTC).isoformat()}
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "policy.toml").write_text(POLICY)
    return tmp_path


def gate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", NO_TORCH, "gate", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
    )


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_proven_is_allowed_without_torch_and_every_output_says_so(folder: Path) -> None:
    outputs = ["--json", "d.json", "--junit", "d.xml", "--markdown", "d.md"]
    done = gate(folder, "report.json", "--policy", "policy.toml", *outputs)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ALLOWED: models.py:build: all 2")
    found = json.loads((folder / "d.json").read_text())
    assert (found["outcome"], found["refusals"]) == ("ALLOWED", [])
    assert all(one["met"] for one in found["requirements"])
    suite = ElementTree.parse(folder / "d.xml").getroot()
    assert (suite.get("failures"), suite.get("errors")) == ("0", "0")
    assert suite.get("tests") == str(len(found["requirements"]))
    assert (folder / "d.md").read_text().startswith("## ALLOWED: models.py:build: all 2")


def test_what_is_not_proven_is_exit_1_and_every_output_says_so(folder: Path) -> None:
    edited(folder, sensitivity=None, created="2020-01-01T00:00:00Z")
    outputs = ["--json", "-", "--junit", "d.xml", "--markdown", "d.md"]
    done = gate(folder, "report.json", "--policy", "policy.toml", *outputs)
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    assert found["outcome"] == "REFUSED"
    assert [one["reason"].split(":")[0] for one in found["refusals"]] == ["sensitivity", "age"]
    assert all(one["settle"].endswith("--json report.json") for one in found["refusals"])
    suite = ElementTree.parse(folder / "d.xml").getroot()
    assert suite.get("failures") == "2"
    assert "sensitivity: was not measured" in (folder / "d.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: REPORT.json is missing; `tpcheck run SUBJECT --json` writes one"),
        (["report.json"], "error: --policy is missing; it names the TOML file"),
        (["none.json", "--policy", "policy.toml"], "error: none.json: cannot be read: No such"),
        (["report.json", "--policy", "none.toml"], "error: none.toml: cannot be read: No such"),
        (["report.json", "--policy", "report.json"], "error: report.json: is not TOML"),
        (["policy.toml", "--policy", "policy.toml"], "error: policy.toml: is not JSON"),
        (
            ["report.json", "--policy", "policy.toml", "--json", "./report.json"],
            "error: --json=report.json, but should differ from report.json",
        ),
        (
            ["report.json", "--policy", "policy.toml", "--markdown", "policy.toml"],
            "error: --markdown=policy.toml, but should differ from --policy",
        ),
        (
            ["report.json", "--policy", "policy.toml", "--junit", "none/x.xml"],
            "error: none/x.xml: cannot be written: No such file or directory",
        ),
    ],
)
def test_what_cannot_be_read_or_written_is_exit_2(
    folder: Path, arguments: list[str], message: str
) -> None:
    done = gate(folder, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(path.name for path in folder.iterdir()) == ["policy.toml", "report.json"]


@pytest.mark.parametrize("option", ["--junit", "--markdown"])
def test_a_dash_is_no_file(folder: Path, option: str) -> None:
    done = gate(folder, "report.json", "--policy", "policy.toml", option, "-")
    assert done.returncode == 2
    assert done.stderr == f"error: {option}=-: only --json goes to stdout; name a file\n"
    assert not (folder / "-").exists()


@pytest.mark.parametrize(
    ("report", "shell", "code", "error"),
    [
        ("report.json", ">/dev/full", 2, "error: stdout: cannot be written: No space left on"),
        ("report.json", ">&-", 0, ""),
        ("none.json", "2>/dev/full", 2, ""),
        ("none.json", "2>&-", 2, ""),
        ("report.json", "| true", 0, ""),
    ],
)
@pytest.mark.parametrize("quiet", [(), ("--quiet",)], ids=["", "quiet"])
def test_where_nothing_can_be_printed_the_exit_code_says_it(
    folder: Path, report: str, shell: str, code: int, error: str, quiet: tuple[str, ...]
) -> None:
    words = [sys.executable, "-m", "tpcheck", "gate", report, "--policy", "policy.toml", *quiet]
    line = f"({shlex.join(words)}; echo $? >code) {shell}"
    done = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, timeout=120, cwd=folder
    )
    assert int((folder / "code").read_text()) == code
    assert done.stderr.startswith(error)
    assert "Traceback" not in done.stderr
    assert bool(done.stderr) == bool(error)


def test_no_file_writes_to_the_terminal_through_an_error(folder: Path) -> None:
    done = gate(folder, "a\x1b[2Jb", "--policy", "policy.toml")
    assert done.stderr == "error: a\\x1b[2Jb: cannot be read: No such file or directory\n"
    verdicts = json.loads((folder / "report.json").read_text())["verdicts"]
    verdicts[0]["checks"] = {"\x1b[2J\nALLOWED: all 9 requirements are met" + "x" * 99: 7}
    edited(folder, verdicts=verdicts)
    done = gate(folder, "report.json", "--policy", "policy.toml")
    [line] = done.stderr.splitlines()
    assert "report.verdicts[0].checks.'\\x1b[2J\\nALLOWED" in line
    assert "\x1b" not in line
    assert len(line) < 250


def test_a_report_that_contradicts_its_own_outcome_is_exit_2(folder: Path) -> None:
    edited(folder, outcome="DRIFT")
    done = gate(folder, "report.json", "--policy", "policy.toml", "--quiet")
    assert done.returncode == 2
    assert "report.outcome='DRIFT', but should be 'PASS', the worst of its verdicts" in done.stderr


def test_quiet_prints_one_line(folder: Path) -> None:
    done = gate(folder, "report.json", "--policy", "policy.toml", "--quiet")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1


def test_the_command_of_a_refusal_makes_the_report_that_is_allowed(folder: Path) -> None:
    subject = Path(__file__).parents[1] / "drifting_subjects.py"
    short = tpcheck.run(f"{subject}:plain", (2,), backend="sim")
    write_report(short, folder / "report.json")
    policy = POLICY.replace("nccl", "sim").replace("2.13.0", short.environment["torch"])
    asked = "tp = [2, 4]\nrequire_deployed_path = false"
    (folder / "policy.toml").write_text(policy.replace("tp = [2, 4]", asked))
    refused = gate(folder, "report.json", "--policy", "policy.toml", "--json", "-")
    assert refused.returncode == 1
    [command] = {one["settle"] for one in json.loads(refused.stdout)["refusals"]}
    made = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=folder,
    )
    assert (made.returncode, made.stderr) == (0, "")
    settled = gate(folder, "report.json", "--policy", "policy.toml")
    assert (settled.returncode, settled.stderr) == (0, "")
    assert settled.stdout.startswith("ALLOWED: ")
