"""A recorder killed with SIGKILL at random moments: the folder verifies, or names what is missing.

    python benchmarks/golden_kills.py --kills 50 --json benchmarks/results/golden_kills.json

Each child is forked from a process that has everything loaded, so that the moments fall into the
recording and not into imports, and does what `tpcheck golden record` does. Every second replaces
records that are all there (`--update`, small ones by full ones or full ones by small ones): then
all have to verify, whichever of both they are. After each kill no file that
is named may be broken; a verification has to pass, or to name every record that is missing; and at
the end of each round an undisturbed recorder has to leave the folder clean.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tpcheck import environment
from tpcheck.golden.command import golden_record, golden_verify
from tpcheck.golden.listing import listing
from tpcheck.golden.store import scan

SUBJECT = "builtin:llama-tiny"
CASES = 3
ROUND = 5
"""Kills between two undisturbed recordings of the same folder."""


def record(folder: Path, *, full: bool, update: bool) -> None:
    """Record CASES cases, as the command line does."""
    golden_record(SUBJECT, folder, cases=CASES, full=full, update=update, backend="sim", seq_len=8)


def child(folder: Path, *, full: bool, update: bool) -> int:
    """Return the process id of a forked recorder."""
    pid = os.fork()
    if pid:
        return pid
    try:
        record(folder, full=full, update=update)
    finally:
        os._exit(0)


def after(folder: Path) -> dict[str, Any]:
    """Return what a reader finds, and raise where a kill broke something."""
    states = Counter(entry.state for entry in scan(folder))
    bad = {name: n for name, n in states.items() if name not in ("ok", "leftover", "temporary")}
    assert not bad, f"a kill left {bad} in {folder}"
    report = golden_verify(SUBJECT, folder, cases=CASES, backend="sim", seq_len=8)
    passed = sum(verdict.outcome == "PASS" for verdict in report.verdicts)
    unnamed = [
        verdict.case_id
        for verdict in report.verdicts
        if verdict.outcome != "PASS"
        and "there is no record of" not in verdict.checks["record"].reason
    ]
    assert not unnamed, f"neither verified nor named as missing: {unnamed}"
    assert len(report.verdicts) == CASES
    return {"passed": passed, "missing": CASES - passed, **states}


def kill_once(folder: Path, rng: random.Random, longest_s: float, number: int) -> dict[str, Any]:
    """Kill one recorder at a random moment and return what it left."""
    update = number % 2 == 1
    full = rng.random() < 0.5
    if update:
        record(folder, full=not full, update=True)
    started = time.monotonic()
    pid = child(folder, full=full, update=update)
    delay_s = rng.uniform(0, longest_s)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    alive = os.WIFSIGNALED(status)
    found = after(folder)
    assert not update or found["missing"] == 0, "an update that was killed lost a record"
    lived = round((time.monotonic() - started if not alive else delay_s) / longest_s, 3)
    return {"moment": min(lived, 1.0), "killed": alive, "update": update, "full": full, **found}


def measured(kills: int, seed: int) -> dict[str, Any]:
    """Kill so many recorders, not counting those that end before, and return what each left."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        warm = Path(temporary) / "warm"
        record(warm, full=False, update=False)
        started = time.monotonic()
        record(warm, full=True, update=True)
        longest_s = 1.1 * (time.monotonic() - started)
        number = -1
        while sum(row["killed"] for row in rows) < kills:
            number += 1
            folder = Path(temporary) / f"round{number // ROUND}"
            folder.mkdir(exist_ok=True)
            rows.append(kill_once(folder, rng, longest_s, number))
            if number % ROUND == ROUND - 1 or number == kills - 1:
                record(folder, full=False, update=True)
                found = listing(folder, None)
                assert found["outcome"] == "OK", found
                assert found["temporary"] == 0, found
    return {"rows": rows, "summary": _summary(rows)}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "kills": sum(row["killed"] for row in rows),
        "ended_before": sum(not row["killed"] for row in rows),
        "folders_broken": 0,  # an assertion ends the run at the first one
        "all_verified": sum(row["missing"] == 0 for row in rows),
        "missing_named": sum(row["missing"] > 0 for row in rows),
        "with_temporary_file": sum(row.get("temporary", 0) > 0 for row in rows),
        "with_data_no_record_names": sum(row.get("leftover", 0) > 0 for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measured(arguments.kills, arguments.seed)
    found["environment"] = environment.collect()
    print(json.dumps(found["summary"], indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
