"""The hook that proves that no reader runs what a file brings: it trips on everything that would.

Evidence: each way to get code out of a file, done on purpose; a reader of ours that unpickles, once
openly and once where it swallows the error; and that no module
that reads files names an unpickler at all.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import marshal
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fuzzing import mutators
from tests.fuzzing.audit import CodeFromFile, no_code_from_files
from tests.fuzzing.harness import judged
from tests.fuzzing.reader import Reader
from tpcheck import report
from tpcheck.files import read_json

PACKAGE = Path(__file__).parents[2] / "tpcheck"


class Gadget:
    """Is asked for by name where it is unpickled."""


def torch_file(folder: Path) -> Path:
    torch.save({"x": torch.ones(2)}, folder / "x.pt")
    return folder / "x.pt"


def module_file(folder: Path) -> None:
    (folder / "brought.py").write_text("x = 1")
    spec = importlib.util.spec_from_file_location("brought", folder / "brought.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


class Own(pickle.Unpickler):
    """One that was there before the doors were closed."""


WAYS: dict[str, Callable[[Path], Any]] = {
    "a pickle of a class": lambda _: pickle.loads(pickle.dumps(Gadget())),
    "a pickle of a number": lambda _: pickle.loads(pickle.dumps(3)),
    "a pickle in a file": lambda _: pickle.load(io.BytesIO(pickle.dumps([1]))),
    "an unpickler": lambda _: pickle.Unpickler(io.BytesIO(pickle.dumps(1))).load(),
    "an unpickler of one's own": lambda _: Own(io.BytesIO(pickle.dumps(Gadget()))).load(),
    "torch.load": lambda folder: torch.load(torch_file(folder), weights_only=False),
    "torch.load of weights": lambda folder: torch.load(torch_file(folder), weights_only=True),
    "marshal": lambda _: marshal.loads(marshal.dumps({})),
    "eval": lambda _: eval("1 + 1"),
    "exec": lambda _: exec("x = 1"),
    "compile": lambda _: compile("1", "report.json", "eval"),
    "a module of a file": module_file,
}


@pytest.mark.parametrize("way", WAYS)
def test_code_from_a_file_trips_the_hook(way: str, tmp_path: Path) -> None:
    with no_code_from_files() as seen, pytest.raises(CodeFromFile):
        WAYS[way](tmp_path)
    assert seen
    with no_code_from_files() as seen:
        torch_file(tmp_path)  # writing is no reading
        random.Random(0).shuffle([1, 2])
    assert not seen


@pytest.mark.parametrize("way", [name for name in WAYS if name != "a module of a file"])
def test_outside_nothing_is_stopped(way: str, tmp_path: Path) -> None:
    with no_code_from_files():
        pass
    WAYS[way](tmp_path)


def test_a_reader_of_ours_that_unpickled_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"

    def judge(data: bytes) -> str:
        path.write_bytes(data)
        report.read_report(path)
        return "accepted"

    reader = Reader("report", "json", b"{}", judge)
    assert judged(reader, mutators.PICKLE).outcome == "refused"
    monkeypatch.setattr("tpcheck.files.parse_json", pickle.loads)
    assert judged(reader, mutators.PICKLE).outcome == "code"


def test_a_reader_that_swallows_the_error_is_seen_all_the_same(tmp_path: Path) -> None:
    def judge(data: bytes) -> str:
        try:
            pickle.loads(data)
        except BaseException:
            return "accepted"
        return "accepted"

    assert judged(Reader("sly", "json", b"", judge), mutators.PICKLE).outcome == "code"


def test_json_is_read_under_the_hook(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]")
    with no_code_from_files() as seen:
        assert read_json(tmp_path / "a.json") == [1]
    assert not seen


UNPICKLERS = {
    *("pickle", "cPickle", "_pickle", "dill", "shelve", "marshal", "joblib", "yaml"),
    *("eval", "exec", "compile", "__import__", "torch.load", "numpy.load", "np.load"),
}
MAY = {
    "subjects.py",  # ships closures to the pool; imports the user's own module
    "groups/pool.py",
    "groups/wire.py",
    "groups/worker.py",
    "groups/torchrun.py",
    "groups/watch.py",
    "repro/scripts.py",  # runs the script that it has just written, before it shows it
    "repro/values.py",
}
"""The private pipe between a process and the ranks that it started; and no file that is read."""


def names_of(tree: ast.AST) -> set[str]:
    """Return what is imported, and what is called by a bare name; `torch.load` as it stands."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(node.func.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
    return found


def test_no_reader_of_a_file_names_an_unpickler() -> None:
    guilty = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name in path.read_text() for name in UNPICKLERS)  # the few worth a parse
        and names_of(ast.parse(path.read_text())) & UNPICKLERS
    }
    assert guilty == MAY


def test_a_module_that_names_one_is_seen() -> None:
    for text in ("import pickle", "from pickle import loads", "torch.load(x)", "eval(x)"):
        assert names_of(ast.parse(text)) & UNPICKLERS
