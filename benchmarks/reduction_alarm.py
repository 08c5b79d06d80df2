"""The alarm on a reduction class: the law beside real Gloo ranks, false alarms, and its power.

    python benchmarks/reduction_alarm.py --runs 10000 --json benchmarks/results/reduction_alarm.json

`law`: a bare row-parallel layer (row_parallel.py) whose terms 2 to 8 Gloo ranks sum: `ring` in the
layer's dtype, `wide` with rounded terms on a wider wire, `fp32_wire` with terms never rounded.
`error` is the rms error in units of TP=1's, `predicted` the law's, `closed_form` that of
independent equal terms, and `excess` the error in units of the emulated class. In float32, and for
fp32_wire, errors are against the terms that the ranks sent.
`clean`: runs of four cases of 512 outputs at 2 to 8 ranks, judged after each: the declared class,
of another order where it has one (rings that begin elsewhere, more than half of the runs, and
accumulators that add in another order). `same_bits` counts the runs in which the outputs were the
emulation's: those cannot alarm, and `other_bits` has the bound without them.
`power`: outputs until the alarm, on a bare layer at 8 ranks in cases of 256 outputs: with noise
added to the declared ring, and where another class sums. `cases` are such cases.
`whole_model`: how much of the same change is left in builtin:llama-tiny's logits, and how many
outputs as independent as a bare layer's that would take. Logits are not: read them as a floor.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from row_parallel import FAMILIES, layer
from torch import Tensor

import tpcheck
from tpcheck import environment
from tpcheck.numerics.alarm import (
    JUDGED,
    RATE,
    Wealth,
    declare,
    law_sigma,
    outputs_needed,
)
from tpcheck.numerics.drift import expected_ratio
from tpcheck.numerics.proportion import clopper_pearson
from tpcheck.numerics.reduction import reduce_sum

DEGREES = (2, 3, 4, 6, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAW_SIZES = {"tokens": 64, "hidden": 256, "inner": 1024}
CLEAN_SIZES = {"tokens": 8, "hidden": 64, "inner": 256}
POWER_SIZES = {"tokens": 4, "hidden": 64, "inner": 256}
CASES, TRIALS = 4, 100
EXCESSES = (1.2, 1.33, 1.72, 3.0)
SWITCHES = (
    (4, "wide", "ring"),
    (4, "wide", "tree"),
    (8, "wide", "ring"),
    (8, "wide", "tree"),
    (4, "ring", "wide"),
    (8, "ring", "wide"),
)
MODEL_SEEDS = 4


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def carried(sent: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Return what is on the wire of a kind: terms in the dtype that an all-reduce adds them in."""
    if kind == "fp32_wire":
        return sent
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    return sent.to(dtype).to(wider) if kind == "wide" else sent.to(dtype)


def gloo_rank(rank: int, size: int, folder: str) -> None:
    """Sum every layer of the table over Gloo; rank 0 keeps the outputs."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    outputs = {}
    for family, dtype, kind in table():
        x = carried(layer(0, size, family, dtype, **LAW_SIZES)[1][rank], kind, dtype).contiguous()
        dist.all_reduce(x)
        outputs[f"{family}/{name(dtype)}/{kind}"] = x.to(dtype)
    if rank == 0:
        torch.save(outputs, f"{folder}/outputs.pt")
    dist.barrier()
    dist.destroy_process_group()


def table() -> list[tuple[str, torch.dtype, str]]:
    return [
        (family, dtype, kind)
        for family in FAMILIES
        for dtype in DTYPES
        for kind in ("ring", "wide", "fp32_wire")
        if dtype != torch.float32 or kind != "fp32_wire"
    ]


def law(size: int) -> list[dict[str, Any]]:
    """Return the table's rows of one degree."""
    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        ranks = [fork.Process(target=gloo_rank, args=(r, size, folder)) for r in range(size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        outputs = torch.load(f"{folder}/outputs.pt")
    return [law_row(size, *one, outputs) for one in table()]


def law_row(
    size: int, family: str, dtype: torch.dtype, kind: str, outputs: dict[str, Tensor]
) -> dict[str, Any]:
    exact, sent = layer(0, size, family, dtype, **LAW_SIZES)
    if dtype == torch.float32 or kind == "fp32_wire":
        exact = sent.double()
    total, actual = exact.sum(0), outputs[f"{family}/{name(dtype)}/{kind}"]
    sigma = law_sigma(exact, kind, dtype)
    errors = actual.double() - total
    at_1 = rms(total.to(dtype).double() - total)
    judged = sigma > 0
    wealth = Wealth().after(actual, declare(exact, kind, dtype))
    return {
        "tp_size": size,
        "family": family,
        "dtype": name(dtype),
        "kind": kind,
        "error": round(rms(errors) / at_1, 3),
        "predicted": round(rms(sigma) / at_1, 3),
        "closed_form": round(expected_ratio(size, kind), 3),
        "error_over_law": round(rms(errors[judged] / sigma[judged]), 4),
        "excess": round(wealth.excess, 4),
        "alarm": wealth.alarm(),
    }


def off_by(rows: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    """Return the least and the largest of one dtype's ratios."""
    mine = [row for row in rows if row["dtype"] == dtype]
    return {
        "error_over_law": [pick(row["error_over_law"] for row in mine) for pick in (min, max)],
        "excess": [pick(row["excess"] for row in mine) for pick in (min, max)],
        "alarms": sum(bool(row["alarm"]) for row in mine),
    }


def clean_run(seed: int) -> dict[str, Any]:
    """Return the highest wealth of one clean run, and how it came about."""
    rng = random.Random(seed)
    kinds = ("ring", "ring", "ring", *JUDGED)  # the one whose other orders have other bits
    size, family, kind = rng.choice(DEGREES), rng.choice(FAMILIES), rng.choice(kinds)
    dtype, even = rng.choice(DTYPES[:2]), rng.random() < 0.5
    start = 0 if kind == "tree" else rng.randrange(1, size)
    wealth, highest, alarm, same = Wealth(), -math.inf, "", True
    for case in range(CASES):
        exact, sent = layer(seed * CASES + case, size, family, dtype, even=even, **CLEAN_SIZES)
        if kind == "fp32_wire":
            exact = sent.double()
        declared = declare(exact, kind, dtype)
        actual = summed(sent.roll(start, 0), kind, dtype)
        same &= torch.equal(actual.double(), declared.exact + declared.errors)
        wealth = wealth.after(actual, declared)
        highest = max(highest, wealth.wider, wealth.narrower)
        alarm = alarm or wealth.alarm()
    return {"kind": kind, "highest": highest, "alarm": alarm, "same": same, "excess": wealth.excess}


def summed(sent: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    terms = sent if kind == "fp32_wire" else sent.to(dtype)
    return reduce_sum(list(terms), kind).to(dtype)


def clean(runs: int) -> dict[str, Any]:
    """Return how many clean runs raised an alarm, with bounds."""
    found = [clean_run(seed) for seed in range(runs)]
    alarms = [one for one in found if one["alarm"]]
    own_bits = [one for one in found if not one["same"]]
    return {
        "runs": runs,
        "outputs_per_run": CASES * CLEAN_SIZES["tokens"] * CLEAN_SIZES["hidden"],
        "false_alarms": len(alarms),
        "rate_bounds_95": clopper_pearson(len(alarms), runs),
        "declared_rate": RATE,
        "alarm_from": round(math.log(2 / RATE), 2),
        "highest_log_wealth": round(max(one["highest"] for one in found), 2),
        "same_bits": runs - len(own_bits),
        "other_bits": {
            "runs": len(own_bits),
            "false_alarms": sum(bool(one["alarm"]) for one in own_bits),
            "rate_bounds_95": clopper_pearson(
                sum(bool(one["alarm"]) for one in own_bits), len(own_bits)
            ),
        },
        "by_kind": {
            kind: {
                "runs": len(mine),
                "other_bits": sum(not one["same"] for one in mine),
                "highest_log_wealth": round(max(one["highest"] for one in mine), 2),
                "excess": [round(pick(one["excess"] for one in mine), 3) for pick in (min, max)],
            }
            for kind in JUDGED
            if (mine := [one for one in found if one["kind"] == kind])
        },
    }


def until_alarm(size: int, declared: str, actual: str, excess: float, seed: int) -> Wealth:
    """Return the wealth at its alarm, `excess` made of noise where the actual class is declared."""
    wealth, generator = Wealth(), torch.Generator().manual_seed(seed)
    for case in range(400):
        exact, sent = layer(seed * 1000 + case, size, dtype=torch.bfloat16, **POWER_SIZES)
        expected = declare(exact, declared, torch.bfloat16)
        start = 1 if actual == "ring" else 0
        given = summed(sent.roll(start, 0), actual, torch.bfloat16).double()
        noise = torch.randn(given.shape, generator=generator, dtype=torch.float64)
        given = given + noise * expected.sigma * math.sqrt(excess**2 - 1)
        wealth = wealth.after(given, expected)
        if wealth.alarm():
            break
    return wealth


def power_row(size: int, declared: str, actual: str, excess: float) -> dict[str, Any]:
    found = [until_alarm(size, declared, actual, excess, seed) for seed in range(TRIALS)]
    outputs, cases = sorted(one.count for one in found), POWER_SIZES["tokens"] * 64
    seen = statistics.mean(one.excess for one in found)
    return {
        "tp_size": size,
        "declared": declared,
        "actual": actual,
        "noise": excess,
        "excess": round(seen, 3),
        "alarms": sum(bool(one.alarm()) for one in found),
        "trials": TRIALS,
        "outputs": {"median": statistics.median(outputs), "most": outputs[-1]},
        "cases": {"median": statistics.median(outputs) / cases, "most": outputs[-1] / cases},
        "predicted_outputs": round(outputs_needed(seen)),
    }


def whole_model() -> list[dict[str, Any]]:
    """Return what a switch from wide to ring leaves in a decoder's logits."""
    errors: dict[tuple[str, int], list[float]] = {}
    for kind in ("wide", "ring"):
        for seed in range(MODEL_SEEDS):
            report = tpcheck.run(
                "builtin:llama-tiny",
                (4, 8),
                backend="sim",
                reduction=kind,
                seed=seed,
                confirm=False,
            )
            for verdict in report.verdicts:
                facts = verdict.checks["drift"].facts
                errors.setdefault((kind, verdict.tp_size), []).append(facts["epsilons"])
    rows = []
    for size, layer_excess in ((4, 1.33), (8, 1.72)):
        pairs = zip(errors["ring", size], errors["wide", size], strict=True)
        ratios = [ring / wide for ring, wide in pairs]
        excess = statistics.geometric_mean(ratios)
        needed = outputs_needed(excess)
        rows.append(
            {
                "tp_size": size,
                "change": "wide -> ring",
                "bare_layer_excess": layer_excess,
                "logits_excess": round(excess, 3),
                "by_seed": [round(one, 3) for one in ratios],
                "outputs_needed": None if math.isinf(needed) else round(needed),
                "reason": "below what the bets gain from" if math.isinf(needed) else "",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    rows = [row for size in DEGREES for row in law(size)]
    result = {
        "command": f"python benchmarks/reduction_alarm.py --runs {options.runs}",
        "backend": "gloo (law); simulated (clean, power, whole_model)",
        "law_off_by": {name(dtype): off_by(rows, name(dtype)) for dtype in DTYPES},
        "law": rows,
        "clean": clean(options.runs),
        "power": [
            *(power_row(8, "ring", "ring", excess) for excess in EXCESSES),
            *(power_row(*switch, 1.0) for switch in SWITCHES),
        ],
        "whole_model": whole_model(),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "environment": environment.collect(),
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    clean_runs = result["clean"]
    print(f"law {result['law_off_by']}; {clean_runs['false_alarms']} of {options.runs} clean runs")


if __name__ == "__main__":
    main()
