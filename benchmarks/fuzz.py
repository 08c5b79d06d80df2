"""Altered files through every reader: no crash, no hang, nothing altered accepted, no code run.

    python benchmarks/fuzz.py --inputs 20000 --json benchmarks/results/fuzz.json

The readers, with the law of each, stand in the table of tests/fuzzing/readers.py, what is done to
their files in tests/fuzzing/mutators.py. Each reader gets its share of the inputs, every kind of
edit in turn, and a process of its own whose memory is limited, so that a bomb ends that process and
not the machine. What breaks a law is kept below --keep, as the bytes that were read. The first
input of every reader is its own file, unaltered, which has to be accepted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fuzzing.harness import BAD, altered, judged
from tests.fuzzing.mutators import BYTE_EDITS
from tests.fuzzing.reader import Reader
from tests.fuzzing.readers import make_readers
from tpcheck import environment

MORE_MEMORY = 2 * 2**30
"""Bytes of address space that a worker may take beyond what it starts with."""

STUCK_S = 300
"""Without news for so long a worker hangs where no timer of its own reaches it."""


def _inputs(reader: Reader, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    yield "nothing", reader.original
    whole = [name for name in reader.edits if name in BYTE_EDITS]
    inside = [name for name in reader.edits if name not in BYTE_EDITS] or whole
    for i in range(
        count - 1
    ):  # most edits of bytes end in the parser: what it lets through is half
        names = inside if i % 2 else whole
        edit = names[i // 2 % len(names)]
        yield edit, altered(reader, edit, random.Random(f"{seed} {reader.name} {edit} {i}"))


def _work(reader: Reader, count: int, seed: int, keep: Path, current: Path, news: Any) -> None:
    """Judge a reader's share and send the counts."""
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MORE_MEMORY,) * 2)
    outcomes: dict[str, Counter[str]] = {}
    bad: list[dict[str, Any]] = []
    slowest, largest = (0.0, "", 0), (0, "", 0)
    for number, (edit, data) in enumerate(_inputs(reader, count, seed)):
        current.write_bytes(data)
        result = judged(reader, data)
        outcomes.setdefault(edit, Counter())[result.outcome] += 1
        slowest = max(slowest, (round(result.cpu_s, 3), edit, len(data)))
        largest = max(largest, (result.peak_bytes, edit, len(data)))
        if result.outcome in BAD or (edit == "nothing" and result.outcome != reader.unaltered):
            path = keep / f"{reader.name.replace(' ', '_')}-{number}.bin"
            keep.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            bad.append({"edit": edit, "outcome": result.outcome, "text": result.text})
        if number % 50 == 0:
            news.send(None)
    row = {
        "reader": reader.name,
        "inputs": sum(sum(one.values()) for one in outcomes.values()),
        "outcomes": dict(sum(outcomes.values(), Counter())),
        "by_edit": {edit: dict(sorted(found.items())) for edit, found in outcomes.items()},
        "slowest": dict(zip(("cpu_s", "edit", "file_bytes"), slowest, strict=True)),
        "largest": dict(zip(("peak_bytes", "edit", "file_bytes"), largest, strict=True)),
        "bad": bad,
    }
    news.send(row)


def _campaign(reader: Reader, count: int, seed: int, keep: Path, folder: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    current = folder / "current.bin"
    worker = context.Process(target=_work, args=(reader, count, seed, keep, current, there))
    worker.start()
    there.close()
    row = None
    try:
        while row is None and here.poll(STUCK_S):
            row = here.recv()
    except EOFError:
        pass
    if row is None:
        worker.kill()
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{reader.name.replace(' ', '_')}-stuck.bin").write_bytes(current.read_bytes())
        how = "ended" if worker.exitcode is not None else "stuck"
        row = {"reader": reader.name, "inputs": 0, "outcomes": {}, "bad": [{"outcome": how}]}
    worker.join()
    return row


def measured(inputs: int, seed: int, only: str, keep: Path) -> dict[str, Any]:
    """Fuzz every reader and return the rows and their sum."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        readers = [reader for reader in make_readers(folder) if only in reader.name]
        share = -(-inputs // len(readers))
        rows = []
        for reader in readers:
            rows.append(_campaign(reader, share, seed, keep, folder))
            print(json.dumps({k: rows[-1][k] for k in ("reader", "outcomes", "bad")}), flush=True)
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row["outcomes"])
    summary = {
        "inputs": sum(row["inputs"] for row in rows),
        "readers": len(rows),
        "outcomes": dict(total),
        "bad": sum(len(row["bad"]) for row in rows),
        "slowest_cpu_s": max(row.get("slowest", {"cpu_s": 0})["cpu_s"] for row in rows),
        "largest_peak_mb": round(
            max(row.get("largest", {"peak_bytes": 0})["peak_bytes"] for row in rows) / 2**20, 1
        ),
        "seed": seed,
        "seconds": round(time.monotonic() - started),
    }
    return {"summary": summary, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose name holds this")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measured(arguments.inputs, arguments.seed, arguments.only, arguments.keep)
    print(json.dumps(found["summary"], indent=1))
    if arguments.json is not None:
        found["environment"] = environment.collect()
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(1 if found["summary"]["bad"] else 0)


if __name__ == "__main__":
    main()
