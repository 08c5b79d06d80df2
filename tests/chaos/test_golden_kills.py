"""A recorder that is killed, has no room or no right to write: the folder stays what it was.

TPCHECK_KILLS=50 repeats the campaign that benchmarks/results/golden_kills.json is of.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("TPCHECK_KILLS", "4"))
RECORD = ["-m", "tpcheck", "golden", "record", "builtin:llama-tiny"]
OPTIONS = ["--backend", "sim", "--seq-len", "4", "--quiet"]


def python(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, **options
    )


def test_a_killed_recorder_leaves_a_folder_that_verifies_or_names_what_is_missing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "kills.json"
    done = python("benchmarks/golden_kills.py", "--kills", str(KILLS), "--json", str(path))
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert len(found["rows"]) >= KILLS
    assert found["summary"]["folders_broken"] == 0
    assert found["summary"]["kills"] == KILLS


def test_a_full_disk_is_one_error_and_no_half_file(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\nfrom tpcheck.cli import main\n"
        "sys.dont_write_bytecode = True\n"  # half of a .pyc would stay there for everybody
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\n"
        f"sys.argv = ['tpcheck', *{[*RECORD[2:], str(tmp_path), *OPTIONS]!r}]\nmain()\n"
    )
    done = python("-c", code)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}/builtin-llama-tiny.s0-b2-t4.bfloat16.")
    assert done.stderr.endswith("cannot be written: File too large\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up the right to write")
def test_a_read_only_folder_is_one_error_before_anything_runs(tmp_path: Path) -> None:
    folder = tmp_path / "golden"
    folder.mkdir()
    for parent in (tmp_path, *tmp_path.parents):
        if not parent.name.startswith(("test_", "popen-", "pytest-")):
            break  # what is above is not pytest's
        parent.chmod(0o755)
    folder.chmod(0o555)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom tpcheck.golden.store import prepare\n"
        "from tpcheck.errors import TPCheckError\nos.setuid(65534)\n"
        "try:\n    prepare(Path(sys.argv[1]))\nexcept TPCheckError as error:\n    print(error)\n"
    )
    done = python("-c", code, str(folder))
    assert done.stdout == (f"{folder}: cannot be written to, so no record can be kept there\n"), (
        done.stderr
    )
    assert list(folder.iterdir()) == []
