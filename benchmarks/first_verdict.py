"""From `pip install` to the verdict on a model directory: minutes, and no line of user code.

    python benchmarks/first_verdict.py --json benchmarks/results/first_verdict.json

In a fresh virtual environment: the README's install, a model directory made once by transformers (8
layers, hidden 256, GQA, bfloat16), then `tpcheck run hf:DIR --tp 2,4` over Gloo. Packages come from
wherever pip finds them, so that `install` says as much of the network as of tpcheck.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
import venv
from pathlib import Path

from tpcheck import environment

ROOT = Path(__file__).resolve().parents[1]


def timed(command: list[str], folder: str) -> tuple[float, str]:
    """Return the seconds that a command took, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return round(time.perf_counter() - start, 1), done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        venv.create(f"{folder}/venv", with_pip=True)
        tools, pins = f"{folder}/venv/bin", os.fspath(ROOT / "constraints.txt")
        seconds = {"venv": round(time.perf_counter() - start, 1)}
        wanted = f"{ROOT}[dev,hf]"
        seconds["install"], _ = timed([f"{tools}/pip", "install", "-q", "-c", pins, wanted], folder)
        make = os.fspath(ROOT / "examples/make_model.py")
        seconds["model"], _ = timed([f"{tools}/python", make, "model"], folder)
        run = [f"{tools}/tpcheck", "run", "hf:model", "--tp", "2,4", "--no-progress"]
        seconds["run"], said = timed(run, folder)
    result = {
        "command": "python benchmarks/first_verdict.py",
        "seconds": seconds,
        "minutes": round(sum(seconds.values()) / 60, 1),
        "verdict": said.splitlines()[0],
        "environment": environment.collect(),
    }
    print(json.dumps({key: result[key] for key in ("seconds", "minutes", "verdict")}, indent=1))
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
