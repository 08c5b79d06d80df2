"""The command line's face is frozen: names, values and exit codes that others build on.

A failure here is a change of the contract: it needs an issue, not an edit of this list.
"""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from tpcheck.cli import app
from tpcheck.cli_commands.inputs import assert_no_input
from tpcheck.cli_commands.options import parse_tp_sizes
from tpcheck.cli_commands.output import Outputs
from tpcheck.errors import TPCheckError

RUN = {
    "subject": None,
    "--list": False,
    "--tp": None,
    "--backend": "auto",
    "--ranks-per-gpu": None,
    "--dtype": ["bfloat16"],
    "--cases": None,
    "--max-failures": None,
    "--case": None,
    "--until": None,
    "--batch": None,
    "--seq-len": None,
    "--seed": 0,
    "--atol": None,
    "--rtol": None,
    "--preset": None,
    "--sensitivity": False,
    "--timeout": 120.0,
    "--json": None,
    "--html": None,
    "--junit": None,
    "--markdown": None,
    "--quiet": False,
    "--no-progress": False,
}
DRIFT = {
    "subject": None,
    "--tp": None,
    "--backend": "auto",
    "--ranks-per-gpu": None,
    "--dtype": ["bfloat16", "float16"],
    "--wire": [],
    "--declared": None,
    "--fallback": None,
    "--width": False,
    "--cases": None,
    "--max-failures": None,
    "--case": None,
    "--batch": None,
    "--seq-len": None,
    "--seed": 0,
    "--atol": None,
    "--rtol": None,
    "--preset": None,
    "--sensitivity": False,
    "--timeout": 120.0,
    "--json": None,
    "--html": None,
    "--junit": None,
    "--markdown": None,
    "--quiet": False,
    "--no-progress": False,
}
SELFCHECK = {
    "--tp": None,
    "--backend": "sim",
    "--dtype": ["bfloat16"],
    "--seed": 0,
    "--json": None,
    "--quiet": False,
    "--no-progress": False,
}
PLAN = {
    "model": None,
    "--engine": [],
    "--tp": None,
    "--seq-len": None,
    "--batch": None,
    "--kv-dtype": None,
    "--weights": False,
    "--json": None,
    "--quiet": False,
}
PROBE = {
    "--tp": None,
    "--backend": "auto",
    "--ranks-per-gpu": None,
    "--dtype": ["bfloat16", "float16", "float32"],
    "--sizes": None,
    "--collective": None,
    "--against": None,
    "--timeout": 120.0,
    "--json": None,
    "--quiet": False,
    "--no-progress": False,
}
GATE = {
    "report": None,
    "--policy": None,
    "--receipt": None,
    "--sign": None,
    "--new-key": None,
    "--verify": None,
    "--public-key": None,
    "--model": None,
    "--tp": None,
    "--dtype": None,
    "--paranoid": False,
    "--json": None,
    "--junit": None,
    "--markdown": None,
    "--quiet": False,
}
COMMANDS = {"run": RUN, "drift": DRIFT, "plan": PLAN, "probe": PROBE, "selfcheck": SELFCHECK}
DIFF = {
    "expected": None,
    "actual": None,
    "--shard-map": None,
    "--tolerance": None,
    "--order": None,
    "--oracle": None,
    "--atol": None,
    "--rtol": None,
    "--tp": None,
    "--rank-pattern": None,
    "--json": None,
    "--jsonl": None,
    "--html": None,
    "--junit": None,
    "--markdown": None,
    "--quiet": False,
    "--no-progress": False,
}
COMMANDS["gate"] = GATE
COMMANDS["diff"] = DIFF


GOLDEN_RECORD = {
    "subject": None,
    "directory": None,
    "--full": False,
    "--update": False,
    "--stream": False,
    "--dtype": ["bfloat16"],
    "--backend": "auto",
    "--cases": None,
    "--case": None,
    "--batch": None,
    "--seq-len": None,
    "--seed": 0,
    "--timeout": 120.0,
    "--json": None,
    "--quiet": False,
    "--no-progress": False,
}
GOLDEN_VERIFY = {
    "subject": None,
    "directory": None,
    "--tp": "1",
    "--dtype": [],
    "--backend": "auto",
    "--ranks-per-gpu": None,
    "--cases": None,
    "--case": None,
    "--batch": None,
    "--seq-len": None,
    "--seed": None,
    "--timeout": 120.0,
    "--json": None,
    "--html": None,
    "--junit": None,
    "--markdown": None,
    "--quiet": False,
    "--no-progress": False,
}
GOLDEN_LIST = {"first": None, "second": None, "--json": None, "--quiet": False}
GOLDEN = {"record": GOLDEN_RECORD, "verify": GOLDEN_VERIFY, "list": GOLDEN_LIST}
COMMANDS["golden"] = {}  # a group: its commands are below


def options_of(command: Any) -> dict[str, Any]:
    return {param.opts[-1]: param.default for param in command.params if param.name != "help"}


def tpcheck(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tpcheck", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
    )


def test_the_commands_and_their_options_with_defaults() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert {name: options_of(command) for name, command in commands.items()} == COMMANDS


def test_the_golden_commands_and_their_options_with_defaults() -> None:
    golden = typer.main.get_command(app).commands["golden"]  # type: ignore[attr-defined]
    assert {name: options_of(command) for name, command in golden.commands.items()} == GOLDEN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["golden", "list", "none"], "error: none: is no folder, but should be one with golden"),
        (["golden", "list", "builtin:x"], "error: DIR is missing: tpcheck golden list builtin:x"),
        (["golden", "record", "builtin:x"], "DIR"),
        (["golden", "verify", "x:y", "g", "--tp", "0"], "error: --tp='0', but should be whole"),
        (["run"], "error: SUBJECT is missing; `tpcheck run --list` shows the builtin ones"),
        (["run", "x:y", "--tp", "2,x"], "error: --tp='2,x', but should be whole numbers"),
        (["run", "x:y", "--tp", "0"], "error: --tp='0', but should be whole numbers"),
        (["run", "x:y", "--tp", ""], "error: --tp='', but should be whole numbers"),
        (["run", "x:y", "--atol", "nan"], "error: --atol=nan, but should be a finite number"),
        (["run", "x:y", "--rtol", "-1"], "error: --rtol=-1.0, but should be a finite number"),
        (["run", "x:y", "--timeout", "0"], "error: --timeout=0.0, but should be a finite number"),
        (["run", "x:y", "--json", "none/x.json"], "error: none/x.json: cannot be written: No such"),
        (["run", "x:y", "--html", "x", "--json", "x"], "error: --html=x, but should differ from"),
        (["drift", "x:y", "--html", "none/x.html"], "error: none/x.html: cannot be written: No"),
        (
            ["drift", "x:y", "--html", "x", "--junit", "x"],
            "error: --junit=x, but should differ from",
        ),
        (
            ["run", "x:y", "--timeout", "1e10"],
            "error: --timeout=1e+10, but should be at most 1e+09",
        ),
        (["run", "x:y", "--seed", str(2**63)], "--seed"),
        (["golden", "verify", "x:y", "g", "--seed", str(2**63)], "--seed"),
        (["plan", "x", "--tp", "2,65537"], "error: --tp='2,65537', but every degree should be at"),
        (["run", "x:y", "--cases", "0"], "--cases"),
        (["run", "x:y", "--dtype", "float8"], "--dtype"),
        (["run", "x:y", "--backend", "mpi"], "--backend"),
        (["run", "x:y", "--nonsense"], "--nonsense"),
        (["nonsense"], "nonsense"),
    ],
)
def test_a_usage_error_is_exit_2_and_no_traceback(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = tpcheck(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "shell", "error"),
    [
        ("--help", ">/dev/full", "error: stdout: cannot be written: No space left on device\n"),
        ("run --help", ">/dev/full", "error: stdout: cannot be written: No space left on device\n"),
        ("plan -", "<&-", "error: stdin: is closed, but should be a config.json\n"),
    ],
)
def test_a_stream_that_is_full_or_closed_is_one_sentence(
    command: str, shell: str, error: str
) -> None:
    line = f"{shlex.quote(sys.executable)} -m tpcheck {command} {shell}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, error)


@pytest.mark.parametrize(
    "arguments",
    [
        "run good.py:build --json good.py",
        "run good:build --html good.py",
        "drift good.py:build --markdown ./good.py",
        "run ref:model --junit model/config.json",
        "golden record ref:model records --json model/model.safetensors",
        "golden verify ref:model records --markdown model/code.py",
        "plan model/config.json --json model/config.json",
        "plan model --json model/config.json",
        "probe --against probe.json --json probe.json",
        "diff one.safetensors captures --json one.safetensors",
        "diff one.safetensors captures --jsonl captures/rank0/x.safetensors",
        "diff one.safetensors captures --tolerance rules.toml --junit rules.toml",
        "gate --verify r.json --public-key k.pub --model model --tp 2 --json model/config.json",
        "gate --verify r.json --public-key k.pub --model model --tp 2 --json k.pub",
        "gate r.json --policy rules.toml --markdown rules.toml",
    ],
)
def test_nothing_is_written_over_what_is_read(folder: Path, arguments: str) -> None:
    names = ["model/config.json", "model/model.safetensors", "model/code.py", "probe.json"]
    names += ["one.safetensors", "captures/rank0/x.safetensors", "rules.toml", "r.json", "k.pub"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = tpcheck(*arguments.split(), cwd=folder)
    assert done.returncode == 2
    named = re.escape(str(Path(arguments.split()[-1])))
    assert re.fullmatch(f"error: .*{named}.*, but should .*\n", done.stderr), done.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_report_may_lie_beside_what_it_is_about(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "report.json").write_text("of the last run")
    for name in ("model/report.json", "model/new.json", "other.py"):
        assert_no_input("--json", folder / name, {"hf:model": folder / "model"})


def test_degrees_keep_their_order_and_come_once() -> None:
    assert parse_tp_sizes("8, 2,8") == (8, 2)
    assert parse_tp_sizes(None) is None
    for text in ("²", "2,,4", "1.5", "-2", "2;4"):
        with pytest.raises(TPCheckError, match="but should be whole numbers"):
            parse_tp_sizes(text)


def test_a_dash_is_stdout_for_json_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Outputs(json=Path("-")).assert_writable()
    assert list(tmp_path.iterdir()) == []


SUBJECT = """
import torch
import tpcheck

@tpcheck.subject(vocab_size=32, seq_len=4)
def build(tp):
    embed = tp.weight("embed", 32, 16)
    up = tp.weight("up", 32, 16).chunk(tp.size, 0)[tp.rank]
    down = tp.weight("down", 16, 32).chunk(tp.size, 1)[tp.rank]

    def forward(input_ids):
        x = embed[input_ids]
        partial = torch.relu(x @ up.T) @ down.T
        return (x + REDUCE(partial)) @ embed.T

    return forward
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "good.py").write_text(SUBJECT.replace("REDUCE", "tp.all_reduce"))
    (tmp_path / "bad.py").write_text(SUBJECT.replace("REDUCE", ""))
    return tmp_path


def test_a_passing_run_is_exit_0_with_every_output(folder: Path) -> None:
    outputs = ["--json", "r.json", "--html", "r.html", "--junit", "r.xml", "--markdown", "r.md"]
    done = tpcheck("run", "good.py:build", "--tp", "2", "--backend", "sim", *outputs, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("PASS (structure); deployed path not exercised: nccl\n")
    for name in ("r.json", "r.html", "r.xml", "r.md"):
        assert "PASS" in (folder / name).read_text()


def test_a_drift_run_writes_what_it_was_asked_for(folder: Path) -> None:
    paths = ["--json", "d.json", "--html", "d.html", "--junit", "d.xml", "--markdown", "d.md"]
    arguments = ["--tp", "2", "--backend", "sim", "--dtype", "bfloat16", "--wire", "float32"]
    done = tpcheck("drift", "good.py:build", *arguments, *paths, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    ratio = json.loads((folder / "d.json").read_text())["drift"]["rows"][0]["ratio"]
    assert f"{ratio:.4g}" in (folder / "d.html").read_text()
    assert f'name="ratio" value="{ratio}"' in (folder / "d.xml").read_text()
    assert f"{ratio:.2f} (" in (folder / "d.md").read_text()


def test_a_failing_run_is_exit_1_and_its_repro_repeats_it(folder: Path) -> None:
    done = tpcheck("run", "bad.py:build", "--tp", "2", "--backend", "sim", cwd=folder)
    assert done.returncode == 1
    assert done.stdout.startswith("WRONG")
    [line] = [line for line in done.stdout.splitlines() if line.startswith("  repro: tpcheck ")]
    again = tpcheck(*line.removeprefix("  repro: tpcheck ").split(), "--quiet", cwd=folder)
    assert again.returncode == 1
    assert again.stdout == done.stdout.splitlines(keepends=True)[0]


def test_a_subject_that_is_not_there_is_exit_2(folder: Path) -> None:
    done = tpcheck("run", "good.py:nothing", "--tp", "2", "--backend", "sim", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_json_on_stdout_is_json_alone(folder: Path) -> None:
    done = tpcheck(
        "run", "good.py:build", "--tp", "2", "--backend", "sim", "--json", "-", cwd=folder
    )
    assert json.loads(done.stdout)["outcome"] == "PASS"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "loud.py:build", "--tp", "2"],
        ["drift", "loud.py:build", "--tp", "2", "--dtype", "bfloat16", "--wire", "float32"],
        ["golden", "record", "loud.py:build", "records"],
        ["probe", "--tp", "2", "--dtype", "float32", "--sizes", "64"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_a_subject_prints_is_no_result(
    folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # C then writes when it ends
    loud = (folder / "good.py").read_text().replace("x = embed", "say(); x = embed")
    (folder / "loud.py").write_text(
        "import ctypes, os\n"
        "print('loaded')\n"
        "def say():\n"
        "    print('forward'); os.write(1, b'written\\n'); ctypes.CDLL(None).puts(b'put in C')\n"
        f"{loud}\n"
        "def collective(x):\n"
        "    say(); torch.distributed.all_reduce(x); return x\n"
    )
    collective = ["--collective", "loud:collective"] if arguments[0] == "probe" else []
    backend = "gloo" if arguments[0] == "probe" else "sim"
    done = tpcheck(
        *arguments, *collective, "--backend", backend, "--json", "-", "--no-progress", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    for said in ("loaded", "written", "forward"):
        assert said in done.stderr


def test_the_list_names_subjects_that_can_be_run() -> None:
    done = tpcheck("run", "--list")
    assert done.returncode == 0
    assert {"builtin:llama-tiny", "builtin:qwen3-tiny", "builtin:gpt2-tiny"} <= set(
        done.stdout.split()
    )


def test_ctrl_c_is_exit_130_and_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        SUBJECT.replace("REDUCE", "tp.all_reduce").replace(
            "def build(tp):", "def build(tp):\n    import time; print('up'); time.sleep(60)"
        )
    )
    arguments = ["run", "slow.py:build", "--tp", "2", "--backend", "sim"]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "tpcheck", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "up\n"
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (130, "")
