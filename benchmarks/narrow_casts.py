"""Decoders that cast to bfloat16 themselves: no false alarm, and no bug in the noise of the casts.

    python benchmarks/narrow_casts.py --cases 1000 --json benchmarks/results/narrow_casts.json

A case is a decoder drawn by `tpcheck.strategies.points`, on simulated ranks, in which some
functions (products, attention, softmax, norms, activations) compute in bfloat16 whatever they are
given: at every degree, or at TP=N alone. Every second one has a fault besides: one rank's
attention counts 1 + 2^-7 times in one layer. Clean ones have to be the same function (DRIFT is
right where TP=N alone casts); of the faulty ones it is counted how many the noise floor alone
would have shown.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drawn import judged_points

CHUNK = 50
"""Cases per seed of Hypothesis: what one process takes on at a time."""
FAULT = "scaled_rank"


def narrowed(functions: set[Any]) -> Any:
    """Return a mode in which these functions compute in bfloat16 and give what they were given."""
    import torch
    from torch.overrides import TorchFunctionMode

    def floats(values: Any) -> list[torch.dtype]:
        return [x.dtype for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()]

    def cast(x: Any) -> Any:
        return x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    class Narrowed(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            kwargs = kwargs or {}
            given = floats((*args, *kwargs.values()))
            if func not in functions or not given:
                return func(*args, **kwargs)
            kwargs = {key: cast(value) for key, value in kwargs.items()}
            return func(*map(cast, args), **kwargs).to(given[0])

    return Narrowed()


def chunk(seed: int, count: int) -> list[dict[str, Any]]:
    """Run `count` cases drawn from one seed; one row per case."""
    import torch
    from torch.nn import functional

    from tpcheck.faults import FAULTS
    from tpcheck.faults.planting import planted_decoder

    narrowable = (
        {functional.linear, torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul},
        {functional.scaled_dot_product_attention},
        {functional.softmax, torch.softmax, torch.Tensor.softmax},
        {functional.rms_norm, functional.layer_norm},
        {functional.silu, functional.gelu, functional.relu},
    )
    rows: list[dict[str, Any]] = []

    def choices() -> tuple[bool, bool, set[Any]]:
        """Return whether TP=N alone casts, whether there is a fault, and which functions cast."""
        drawn = random.Random(seed * CHUNK + len(rows))
        alone, faulty = drawn.random() < 0.5, drawn.random() < 0.5
        return (
            alone,
            faulty,
            set().union(*drawn.sample(narrowable, drawn.randint(1, len(narrowable)))),
        )

    def build(tp: Any, point: Any) -> Any:
        alone, faulty, functions = choices()
        decoder = planted_decoder(point.spec, FAULTS[FAULT] if faulty else None, tp)

        def forward(input_ids: torch.Tensor) -> torch.Tensor:
            if alone and tp.size == 1:
                return decoder(input_ids)
            with narrowed(functions):
                return decoder(input_ids)

        return forward

    def keep(point: Any, verdict: Any) -> None:
        alone, faulty, _ = choices()
        facts = verdict.checks["structural"].facts
        floor = facts.get("with_casts", facts)
        rows.append(
            {
                "kind": ("faulty" if faulty else "clean")
                + (", TP=N alone casts" if alone else ", every degree casts"),
                "outcome": verdict.outcome,
                "structural": verdict.checks["structural"].outcome,
                "lifted": "with_casts" in facts,
                "limit": floor.get("limit"),
                "relative_rms": floor.get("relative_rms"),
                "smallest_bug": facts.get("smallest_bug"),
                "point": asdict(point),
                "reasons": verdict.reasons,
            }
        )

    judged_points(seed, count, build, keep)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of one kind, its limits and what the floor alone would have shown."""
    clean = rows[0]["kind"].startswith("clean")
    lifted = [row for row in rows if row["lifted"]]
    limits, smallest = (
        sorted(row[key] for row in lifted if row[key]) for key in ("limit", "smallest_bug")
    )
    wrong = [row for row in rows if row["structural"] == "FAIL"]
    return {
        "cases": len(rows),
        "outcomes": dict(Counter(row["outcome"] for row in rows)),
        "lifted": len(lifted),
        "limit_of_the_floor": {"median": limits[len(limits) // 2], "max": limits[-1]},
        "limit_lifted": {"median": smallest[len(smallest) // 2], "max": smallest[-1]},
        "structural_fails": len(wrong),
        **(
            {"false_alarms": [{k: r[k] for k in ("reasons", "point")} for r in wrong]}
            if clean
            else {"fail_by_the_floor_alone": sum(r["relative_rms"] > r["limit"] for r in wrong)}
        ),
    }


def main() -> None:
    from tpcheck import environment

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    start = time.monotonic()
    jobs = [(options.seed + i, CHUNK) for i in range(-(-options.cases // CHUNK))]
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=4) as pool:
        for result in [pool.apply_async(chunk, job) for job in jobs]:
            rows += result.get()
            print(f"{len(rows)} cases, {(time.monotonic() - start) / 60:.1f} min", flush=True)
    result = {
        "command": f"python benchmarks/narrow_casts.py --cases {options.cases}"
        f" --seed {options.seed}",
        "fault": FAULT,
        "kinds": {
            kind: summary([row for row in rows if row["kind"] == kind])
            for kind in sorted({row["kind"] for row in rows})
        },
        "minutes": round((time.monotonic() - start) / 60, 1),
        "environment": environment.collect(),
    }
    options.json.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
