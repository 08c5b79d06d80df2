"""False alarms: clean cases drawn by the public strategies; every verdict has to be PASS.

    python benchmarks/clean_cases.py --cases 30000 --json benchmarks/results/clean_cases.json

A case is a decoder drawn by `tpcheck.strategies.points`, at a drawn degree (2, 3, 4, 6, 8), dtype,
batch, length and seed, on simulated ranks: every option of the decoder, widths from 4 up.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drawn import judged_points

CHUNK = 250
"""Cases per seed of Hypothesis: what one process takes on at a time."""


def chunk(seed: int, count: int) -> list[dict[str, Any]]:
    """Run `count` cases drawn from one seed; one row per case."""
    from tpcheck.reference.decoder import build_decoder

    rows: list[dict[str, Any]] = []

    def keep(point: Any, verdict: Any) -> None:
        rows.append(
            {
                "tp_size": point.tp_size,
                "dtype": point.dtype,
                "outcome": verdict.outcome,
                "ratio": verdict.checks["drift"].facts.get("ratio"),
                "structural": verdict.checks["structural"].facts.get("relative_rms"),
                "point": asdict(point) if verdict.outcome != "PASS" else None,
                "reasons": verdict.reasons,
            }
        )

    judged_points(seed, count, lambda tp, point: build_decoder(point.spec, tp), keep)
    return rows


def main() -> None:
    from tpcheck import environment
    from tpcheck.numerics.proportion import clopper_pearson

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=30000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    start = time.monotonic()
    jobs = [(options.seed + i, CHUNK) for i in range(-(-options.cases // CHUNK))]
    outcomes: Counter[str] = Counter()
    where: Counter[str] = Counter()
    ratios: dict[str, list[float]] = defaultdict(list)
    structural = 0.0
    alarms = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, maxtasksperchild=4) as pool:
        results = [pool.apply_async(chunk, job) for job in jobs]
        for done, result in enumerate(results, 1):
            for row in result.get():
                outcomes[row["outcome"]] += 1
                where[f"{row['dtype']} tp={row['tp_size']}"] += 1
                if row["outcome"] != "PASS":
                    alarms.append({key: row[key] for key in ("outcome", "reasons", "point")})
                    continue
                if row["ratio"] is not None:
                    ratios[f"{row['dtype']} tp={row['tp_size']}"].append(row["ratio"])
                structural = max(structural, row["structural"] or 0.0)
            minutes = (time.monotonic() - start) / 60
            print(f"{outcomes.total()} cases, {len(alarms)} alarms, {minutes:.1f} min", flush=True)
            if done % 8 == 0 or done == len(jobs):
                _write(
                    options,
                    outcomes,
                    where,
                    ratios,
                    structural,
                    alarms,
                    minutes,
                    clopper_pearson,
                    environment.collect(),
                )


def _write(options, outcomes, where, ratios, structural, alarms, minutes, bounds, facts) -> None:
    lower, upper = bounds(len(alarms), outcomes.total())
    result = {
        "command": "python benchmarks/clean_cases.py"
        f" --cases {options.cases} --seed {options.seed}",
        "cases": outcomes.total(),
        "outcomes": dict(outcomes),
        "false_alarms": alarms,
        "false_alarm_rate_95": [lower, upper],
        "cases_by_dtype_and_degree": dict(sorted(where.items())),
        "largest_structural_relative_rms": structural,
        "drift_ratio": {
            key: {"median": sorted(values)[len(values) // 2], "max": max(values)}
            for key, values in sorted(ratios.items())
        },
        "minutes": round(minutes, 1),
        "environment": facts,
    }
    options.json.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
