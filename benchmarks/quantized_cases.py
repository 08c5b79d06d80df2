"""Quantized cases that the plan accepts: every format, block, width and degree; all have to PASS.

    python benchmarks/quantized_cases.py --cases 2000 --json benchmarks/results/quantized_cases.json

A case is a quantized decoder drawn by `tpcheck.strategies`, at degree 2, 3, 4 or 8, in bfloat16 or
float16, on simulated ranks: sizes that the plan accepts as they are, or any sizes under a policy
that pads, deals out unevenly, copies scales or makes blocks finer. One case in fifty is run on
Gloo ranks as well. `--case N` runs one again and prints its report.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from drawn import drawing

DEGREES = (2, 3, 4, 8)
DTYPES = ("bfloat16", "float16")
CHUNK = 20
"""Cases per seed of Hypothesis: what one process takes on at a time."""
CONFIRM_EVERY = 50


def drawn(seed: int, count: int) -> list[Any]:
    """Return (point, policy) of `count` cases drawn from one seed."""
    from hypothesis import strategies as st

    from tpcheck.quantization import FORMATS
    from tpcheck.shard_plan import STRICT
    from tpcheck.strategies import points, quantizations, split_policies

    @st.composite
    def cases(draw: st.DrawFn) -> tuple[Any, Any]:
        options = {"dtypes": DTYPES, "max_layers": 2, "max_seq_len": 9, "quantization": None}
        tp_size, strict = draw(st.sampled_from(DEGREES)), draw(st.booleans())
        if strict:  # words of eight codes have to fit, whatever is drawn
            options["head_dim"] = draw(st.sampled_from((8, 16, 32)))
            options["intermediate_size"] = tp_size * draw(st.sampled_from((8, 16, 24, 32, 64)))
        point = draw(points((tp_size,), True if strict else None, max_head_dim=32, **options))
        stored = draw(
            quantizations(
                point.spec,
                point.tp_size,
                True if strict else None,
                formats=[draw(st.sampled_from(FORMATS))],
            )
        )
        spec = replace(point.spec, quantization=stored)
        policy = STRICT if strict else draw(split_policies(spec, point.tp_size, True))
        return replace(point, spec=spec), policy

    found: list[Any] = []

    @drawing(seed, count, cases())
    def collect(case: tuple[Any, Any]) -> None:
        found.append(case)

    collect()
    return found


def run(case: tuple[Any, Any], backend: str) -> Any:
    """Return the report of one case."""
    import tpcheck
    from tpcheck.reference.decoder import build_decoder
    from tpcheck.shard_plan import STRICT

    point, policy = case

    @tpcheck.subject(vocab_size=point.spec.vocab_size, seq_len=point.seq_len)
    def build(tp):
        return build_decoder(point.spec, tp, policy=policy if tp.size > 1 else STRICT)

    return tpcheck.run(
        build,
        (point.tp_size,),
        backend=backend,
        confirm=False,
        dtypes=(point.dtype,),
        batch=point.batch,
        seq_len=point.seq_len,
        seed=point.seed,
    )


def chunk(seed: int) -> list[dict[str, Any]]:
    """Run the cases of one seed; one row per case and backend."""
    import torch

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for index, case in enumerate(drawn(seed, CHUNK)):
        point, policy = case
        number = seed * CHUNK + index
        for backend in ("sim", "gloo") if number % CONFIRM_EVERY == 0 else ("sim",):
            (verdict,) = run(case, backend).verdicts
            failed = verdict.outcome != "PASS"
            rows.append(
                {
                    "case": number,
                    "format": point.spec.quantization.format,
                    "backend": backend,
                    "scales": policy.scales,
                    "tp_size": point.tp_size,
                    "dtype": point.dtype,
                    "outcome": verdict.outcome,
                    "ratio": verdict.checks["drift"].facts.get("ratio"),
                    "structural": verdict.checks["structural"].facts.get("relative_rms"),
                    "point": asdict(point) if failed else None,
                    "split": asdict(policy) if failed else None,
                    "reasons": verdict.reasons,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    if options.case is not None:
        from tpcheck.render.text import render_text

        case = drawn(options.case // CHUNK, CHUNK)[options.case % CHUNK]
        print(*case, render_text(run(case, "sim")), sep="\n")
        return
    start = time.monotonic()
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, maxtasksperchild=4) as pool:
        for found in pool.imap_unordered(chunk, range(-(-options.cases // CHUNK))):
            rows += found
            alarms = sum(row["outcome"] != "PASS" for row in rows)
            minutes = (time.monotonic() - start) / 60
            print(f"{len(rows)} verdicts, {alarms} alarms, {minutes:.1f} min", flush=True)
            if options.json is not None:
                write(options.json, sorted(rows, key=lambda row: row["case"]), minutes)


def write(path: Path, rows: list[dict[str, Any]], minutes: float) -> None:
    """Write what the rows show so far."""
    from tpcheck import environment
    from tpcheck.numerics.proportion import clopper_pearson

    alarms = [row for row in rows if row["outcome"] != "PASS"]
    simulated = [row for row in rows if row["backend"] == "sim"]
    by_format: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_format[row["format"]].append(row)
    result = {
        "command": f"python benchmarks/quantized_cases.py --cases {len(simulated)}",
        "cases": len(simulated),
        "confirmed_on_gloo": len(rows) - len(simulated),
        "false_alarms": alarms,
        "false_alarm_rate_95": clopper_pearson(len(alarms), len(rows)),
        "by_format": {name: summary(mine) for name, mine in sorted(by_format.items())},
        "verdicts_by_dtype_and_degree": counts(rows, "dtype", "tp_size"),
        "verdicts_by_scales": counts(rows, "scales"),
        "minutes": round(minutes, 1),
        "environment": environment.collect(),
    }
    path.write_text(json.dumps(result, indent=1, default=str) + "\n")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of one format."""
    ratios = sorted(row["ratio"] for row in rows if row["ratio"] is not None)
    return {
        "verdicts": len(rows),
        "outcomes": dict(Counter(row["outcome"] for row in rows)),
        "largest_structural_relative_rms": max(row["structural"] or 0.0 for row in rows),
        "drift_ratio": {"median": ratios[len(ratios) // 2], "max": ratios[-1]} if ratios else None,
    }


def counts(rows: list[dict[str, Any]], *keys: str) -> dict[str, int]:
    """Return how many rows have each combination of values."""
    found = Counter(" ".join(str(row[key]) for key in keys) for row in rows)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    main()
