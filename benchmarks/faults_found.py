"""How soon a search finds each planted fault, how small it gets, and how long that takes.

    python benchmarks/faults_found.py --seeds 3 --json benchmarks/results/faults_found.json

Every fault is planted in decoders drawn by `tpcheck.strategies.model_specs`, with the fields it
needs pinned, and searched for at degrees 2, 3 and 4 on simulated ranks. Seconds are those of the
whole search: until the first failure, and shrinking it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = tempfile.mkdtemp()  # nothing is remembered

import torch

import tpcheck
from tpcheck import environment
from tpcheck.errors import PlanError
from tpcheck.faults import FAULTS
from tpcheck.faults.planting import Fault, planted_decoder
from tpcheck.spec import Case
from tpcheck.strategies import model_specs

DEGREES = (2, 3, 4)
LIMIT = 100
"""Cases after which a fault counts as not found."""


def search(fault: Fault, seed: int) -> dict[str, Any]:
    """Search for one fault, and say what it took."""
    degrees = tuple(size for size in DEGREES if size >= fault.min_tp) or (fault.min_tp,)
    pins = dict(fault.needs)
    try:
        specs = model_specs(degrees, legal=fault.accepts is None, max_heads=96, **pins)
    except PlanError:
        degrees = degrees[:1]
        specs = model_specs(degrees, legal=fault.accepts is None, max_heads=96, **pins)

    @tpcheck.subject(specs=specs, seq_len=9)
    def build(tp, spec):
        return planted_decoder(spec, fault, tp)

    build.__qualname__ = f"{fault.name}-{seed}"
    start = time.monotonic()
    report = tpcheck.run(
        build,
        degrees,
        backend="sim",
        confirm=False,
        cases=LIMIT,
        seed=seed,
        dtypes=fault.dtypes[:1] or ("bfloat16",),
    )
    seconds = time.monotonic() - start
    *passed, last = report.verdicts
    found: dict[str, Any] = {"fault": fault.name, "seed": seed, "seconds": round(seconds, 2)}
    if last.outcome == "PASS":
        return found | {"found": False, "cases": LIMIT}
    case = Case.parse(last.case_id)
    assert case.spec is not None
    sizes = (case.spec.hidden_size, case.spec.head_dim, case.spec.intermediate_size)
    return found | {
        "found": True,
        "cases": len({verdict.case_id for verdict in passed}) + 1,
        "outcome": last.outcome,
        "tp_size": last.tp_size,
        "layers": case.spec.num_hidden_layers,
        "largest_dim": max(sizes),
        "tokens": case.batch * case.seq_len,
        "case": last.case_id,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fault", action="append", help="only these; repeatable")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.fault or FAULTS:
        for seed in range(options.seeds):
            rows.append(search(FAULTS[name], seed))
            print({key: value for key, value in rows[-1].items() if key != "case"}, flush=True)
    found = [row for row in rows if row["found"]]
    result = {
        "command": f"python benchmarks/faults_found.py --seeds {options.seeds}",
        "searches": len(rows),
        "found": len(found),
        "median_cases": statistics.median(row["cases"] for row in rows),
        "median_seconds": statistics.median(row["seconds"] for row in rows),
        "max_seconds": max(row["seconds"] for row in found),
        "one_layer_dims_at_most_16": sum(
            row["layers"] == 1 and row["largest_dim"] <= 16 for row in found
        ),
        "median_cases_by_fault": {
            name: statistics.median(row["cases"] for row in rows if row["fault"] == name)
            for name in dict.fromkeys(row["fault"] for row in rows)
        },
        "rows": rows,
        "environment": environment.collect(),
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
