"""Subjects are what their files say now, on warm ranks too; a load that exits is an error."""

import importlib
import subprocess
import sys

import pytest
import torch

import tpcheck
from tpcheck.errors import SubjectError
from tpcheck.groups.pool import close_pools
from tpcheck.subjects import make_ref, resolve

torch.set_num_threads(1)
RIGHT = """
import tpcheck

@tpcheck.subject(vocab_size=16, seq_len=2)
def build(tp):
    embed = tp.weight("embed", 16, 8)
    up = tp.weight("up", 8, 64).chunk(tp.size, 1)[tp.rank]
    return lambda ids: tp.all_reduce(embed[ids] @ up @ up.T + 0) @ embed.T
"""
WRONG = RIGHT.replace("+ 0", "+ 1")


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """A module that can be imported, and its file; both forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # trusted to the second: edits are faster
    path = tmp_path / f"edited_{abs(hash(request.node.name)) % 10**8}.py"
    path.write_text(WRONG)
    yield path
    sys.modules.pop(path.stem, None)
    close_pools()


@pytest.mark.parametrize("named", ["{}:build", "{.stem}:build"])
def test_an_edited_file_is_judged_as_it_is_now(module, named):
    name = named.format(module)
    assert tpcheck.run(name, (2,), backend="sim", confirm=False).outcome == "WRONG"
    module.write_text(RIGHT)  # of the same length: only the time differs
    assert tpcheck.run(name, (2,), backend="sim", confirm=False).outcome == "PASS"


def test_an_unchanged_file_is_loaded_once(module):
    build = resolve(make_ref(f"{module}:build")).build
    assert resolve(make_ref(f"{module}:build")).build is build


def test_warm_ranks_see_what_was_loaded_again(module):
    edited = importlib.import_module(module.stem)
    assert tpcheck.run(edited.build, (2,), backend="gloo").outcome == "WRONG"
    module.write_text(RIGHT)
    edited = importlib.reload(edited)
    assert tpcheck.run(edited.build, (2,), backend="gloo").outcome == "PASS"


def test_warm_ranks_see_an_edited_file(module):
    assert tpcheck.run(f"{module}:build", (2,), backend="gloo").outcome == "WRONG"
    module.write_text(RIGHT)
    assert tpcheck.run(f"{module}:build", (2,), backend="gloo").outcome == "PASS"


@pytest.mark.parametrize("named", ["{}:build", "{.stem}:build"])
def test_a_module_that_exits_is_an_error_and_not_its_exit_code(module, named):
    module.write_text(f"{RIGHT}\nraise SystemExit(0)\n")
    with pytest.raises(SubjectError) as caught:
        resolve(make_ref(named.format(module)))
    assert str(caught.value).endswith(
        f"it ends with sys.exit(0) ({module.name}, line 10);"
        " guard a script's end with if __name__ == '__main__':"
    )


def test_a_file_that_exits_ends_the_command_with_2(module):
    module.write_text(f"{RIGHT}\nraise SystemExit(0)\n")
    command = [sys.executable, "-m", "tpcheck", "run", f"{module}:build", "--backend", "sim"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "ends with sys.exit(0)" in done.stderr


def test_what_fails_to_load_names_the_users_line(module):
    module.write_text("import tpcheck\nimport json\n\njson.loads('{')\n")
    with pytest.raises(SubjectError, match=rf"{module.name}, line 4\)"):
        resolve(make_ref(f"{module}:build"))
