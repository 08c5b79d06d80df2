"""tpcheck probe: what it writes, when it exits 1, and what it refuses before a rank is started.

Simulated ranks keep this fast; what stands behind it on real ones is tests/real/test_probe_gloo.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tpcheck.cli import main
from tpcheck.errors import TPCheckError
from tpcheck.numerics.order import Chunk
from tpcheck.probes.command import differences, exit_code, probe_record
from tpcheck.probes.sweep import ProbeReport, SwitchPoint, probe_reductions

QUICK = ("--backend", "sim", "--tp", "3", "--sizes", "6,35", "--dtype", "bfloat16")
KEYS = {
    *("tp_size", "dtype", "count", "bytes", "order", "reason", "wire", "chunks", "repeatable"),
    *("disagreeing_ranks", "reproduced", "average"),
}
COLLECTIVES = """
import torch
import torch.distributed as dist

def in_rank_order(x):
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, x)
    total = gathered[0].float()
    for one in gathered[1:]:
        total = total + one.float()
    return total.to(x.dtype)

number = 3
"""


@dataclass(frozen=True, slots=True)
class Done:
    """How a command line ended."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def probe(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `tpcheck probe` in this process, where torch is loaded, beside the saved report."""

    def run(*arguments: str) -> Done:
        monkeypatch.chdir(saved.parent)
        monkeypatch.setattr(sys, "argv", ["tpcheck", "probe", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return Done(int(end.value.code or 0), said.out, said.err)

    return run


@pytest.fixture(scope="module")
def report() -> ProbeReport:
    return probe_reductions((3, 4), backend="sim", sizes=(6, 35), dtypes=("bfloat16", "float32"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    command = [sys.executable, "-m", "tpcheck", "probe", *QUICK, "--json", "here.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "here.json"


def doctored(saved: Path, change: Any) -> Path:
    value = json.loads(saved.read_text())
    change(value)
    path = saved.with_name("there.json")
    path.write_text(json.dumps(value))
    return path


# -- what it writes


def test_the_json_has_the_fields_of_a_message_and_where_it_ran(saved: Path) -> None:
    value = json.loads(saved.read_text())
    assert value["schema"] == "tpcheck.probe/1"
    assert value["collective"] == "all_reduce"
    assert value["environment"]["backend"] == "sim"
    assert [set(one) for one in value["messages"]] == [KEYS, KEYS]
    assert value["messages"][0]["chunks"] == [
        {"start": 0, "stop": 2, "order": [[1, 2], 0], "accumulator": "bfloat16"},
        {"start": 2, "stop": 4, "order": [[0, 2], 1], "accumulator": "bfloat16"},
        {"start": 4, "stop": 6, "order": [[0, 1], 2], "accumulator": "bfloat16"},
    ]
    assert value["against"] is None


# -- against another machine


def test_the_same_reductions_are_exit_0(probe: Run, saved: Path) -> None:
    done = probe(*QUICK, "--against", saved.name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("SAME as here.json: 2 messages are reduced alike\n")


def test_another_order_is_exit_1_and_named(probe: Run, saved: Path) -> None:
    def swap(value: Any) -> None:
        value["messages"][1]["chunks"][2]["order"] = [[0, 2], 1]

    done = probe(*QUICK, "--against", doctored(saved, swap).name)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "DIFFERS from there.json: 1 of 2 messages are reduced differently"
    said = "tp 3 bfloat16 [35]: order=(0+1)+2 at element 24 (of 11 that differ), but there (0+2)+1"
    assert lines[1].strip() == said


def test_another_environment_is_named_and_is_no_difference(probe: Run, saved: Path) -> None:
    def older(value: Any) -> None:
        value["environment"]["torch"] = "1.13.1"
        value["environment"]["variables"]["NCCL_ALGO"] = "Tree"

    path = doctored(saved, older)
    done = probe(*QUICK, "--against", path.name, "--json", "-")
    assert done.returncode == 0
    against = json.loads(done.stdout)["against"]
    assert against["differences"] == []
    assert against["environment"]["torch"][1] == "1.13.1"
    assert against["environment"]["NCCL_ALGO"] == [None, "Tree"]


@pytest.mark.parametrize(
    ("field", "to"),
    [
        ("wire", "float16"),
        ("repeatable", False),
        ("disagreeing_ranks", (1,)),
        ("average", ("multiply by 1/N, then sum",)),
    ],
)
def test_every_field_of_a_reduction_can_differ(report: ProbeReport, field: str, to: Any) -> None:
    first, *rest = report.messages
    other = replace(report, messages=(replace(first, **{field: to}), *rest))
    found = differences(report, other)["differences"]
    assert [(one["tp_size"], one["count"], one["field"]) for one in found] == [(3, 6, field)]
    assert exit_code(probe_record(report, other)) == 1
    assert exit_code(probe_record(report, report)) == exit_code(probe_record(report, None)) == 0


def test_accumulators_differ_by_element_however_the_chunks_lie(report: ProbeReport) -> None:
    first, *rest = report.messages
    last = first.chunks[-1]
    parts = (
        Chunk(last.start, last.start + 1, last.tree, last.accumulator),
        Chunk(last.start + 1, last.stop, last.tree, "float32"),
    )
    cut = replace(first, chunks=(*first.chunks[:-1], *parts))
    (found,) = differences(report, replace(report, messages=(cut, *rest)))["differences"]
    assert found["field"] == "accumulator"
    assert found["actual"] == "bfloat16 at element 5 (of 1 that differ)"
    assert found["expected"] == "float32"


def test_switch_points_are_compared_where_the_same_sizes_were_swept(report: ProbeReport) -> None:
    switch = SwitchPoint(4, "float32", 8, 9, "4 orders -> 1")
    other = replace(report, switch_points=(switch,))
    (found,) = differences(report, other)["differences"]
    assert (found["tp_size"], found["field"], found["actual"]) == (4, "switch_points", "none")
    assert found["expected"] == "after 8: 4 orders -> 1"
    shorter = replace(other, messages=tuple(one for one in other.messages if one.count == 6))
    assert differences(report, shorter)["differences"] == []


def test_only_common_messages_are_compared_and_the_others_counted(report: ProbeReport) -> None:
    other = replace(report, messages=report.messages[:3])
    found = differences(report, other)
    assert (found["compared"], len(found["only_here"]), found["only_there"]) == (3, 5, [])
    with pytest.raises(TPCheckError, match=r"in both: here tp 3,4, .*; there nothing"):
        differences(report, replace(report, messages=()))


# -- what is refused, before a rank is started


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "none.json"], "error: none.json: cannot be read: No such file"),
        (["--against", "mine.py"], "error: mine.py: is not JSON"),
        (["--against", "list.json"], "error: list.json: is no probe report: probe=[1], but should"),
        (["--against", "report.json"], "probe.schema='tpcheck.report/1', but should be one of"),
        (["--against", "here.json", "--tp", "4"], "error: --against: no message is in both: here"),
        (["--collective", "mine.py:nothing"], "error: mine.py:nothing: "),
        (["--collective", "mine.py:number"], "error: mine.py:number: number is int, not callable"),
        (["--collective", "mine.py:in_rank_order"], "use --backend gloo or nccl"),
        (["--collective", "no.py:fn"], "--collective='no.py:fn': there is no file no.py"),
        (["--collective", "no_such_module:fn"], "there is no module 'no_such_module' on the path"),
        (["--collective", "builtin:fn"], "--collective='builtin:fn', but should be package.module"),
        (["--collective", "fn"], "--collective='fn', but should be package.module:fn"),
        (["--tp", "1"], "error: tp=1, but should be 2 to 64"),
        (["--tp", "65"], "error: tp=65, but should be 2 to 64"),
        (["--sizes", "1,x"], "error: --sizes='1,x', but should be numbers of elements like 1,4096"),
        (["--sizes", "0"], "error: --sizes='0', but should be numbers"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_usage_error_is_exit_2(
    arguments: list[str], message: str, probe: Run, saved: Path
) -> None:
    folder = saved.parent
    (folder / "mine.py").write_text(COLLECTIVES)
    (folder / "list.json").write_text("[1]")
    (folder / "report.json").write_text('{"schema": "tpcheck.report/1"}')
    done = probe(*QUICK, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_users_collective_in_another_order_differs_from_the_backends(
    probe: Run, saved: Path
) -> None:
    (saved.parent / "mine.py").write_text(COLLECTIVES)
    real = ("--backend", "gloo", *QUICK[2:], "--collective", "mine.py:in_rank_order")
    done = probe(*real, "--against", saved.name, "--json", "mine.json")
    assert done.returncode == 1, done.stderr
    value = json.loads((saved.parent / "mine.json").read_text())
    assert value["collective"] == "mine.py:in_rank_order"
    assert [one["reproduced"] for one in value["messages"]] == [True, True]
    assert {one["field"] for one in value["against"]["differences"]} == {"order", "accumulator"}
    assert value["against"]["environment"]["backend"] == ["gloo", "sim"]
