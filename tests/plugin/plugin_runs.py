"""How these tests run pytest: in a process and a folder of its own, as a user does."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Run:
    """What a run of pytest left."""

    code: int
    out: str
    err: str

    def counts(self) -> dict[str, int]:
        """Return what pytest's last line counts: {"passed": 2, "failed": 1}."""
        last = self.out.strip().splitlines()[-1]
        return {
            word: int(n) for n, word in re.findall(r"(\d+) (failed|passed|skipped|error)", last)
        }


def environment() -> dict[str, str]:
    """Return this process's environment without what an outer pytest or torchrun put there."""
    outer = ("PYTEST_", "HYPOTHESIS", "CI")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in TORCHRUN and not name.startswith(outer)
    }
    # no GPU, so that these runs are the same on every machine
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""}


def run_pytest(folder: Path, *arguments: str, before: tuple[str, ...] = ("-m", "pytest")) -> Run:
    """Run pytest in a folder; every warning is an error."""
    command = [sys.executable, *before, "-W", "error", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    return Run(done.returncode, done.stdout, done.stderr)
