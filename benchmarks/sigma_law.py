"""What an all-reduce over real Gloo ranks costs, measured against predicted.

    python benchmarks/sigma_law.py --json benchmarks/results/sigma_law.json

Everything is in units of TP=1's own rms error against float64, at 2, 3, 4, 6 and 8 ranks, in
bfloat16 and float16. `layers`: bare row-parallel layers (row_parallel.py) of four families of
partials, CASES drawn per row, summed by Gloo in the deployed dtype. `models`: whole decoders of
clean_models.py, MODELS drawn per row, run by tpcheck.drift. `measured` is the ratio over all cases
of a row, with a 95 % `interval` over the cases; `law` the general law of the exact partials
(numerics/reduction.py, `sum_nodes`), `closed_form` that of independent equal partials, and
`injected` what `tpcheck drift` predicts: the rounding of these partials put into a float64 run.
`off` is measured over injected, and `within` whether all of the interval is within 15 % of it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import clean_models
import torch
import torch.distributed as dist
from row_parallel import FAMILIES, layer
from torch import Tensor

import tpcheck
from tpcheck import environment
from tpcheck.groups.jobs import Job
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.numerics.drift import expected_ratio
from tpcheck.numerics.reduction import sum_nodes
from tpcheck.numerics.spread import mean_ratio_interval
from tpcheck.observation.injection import reduction_noise
from tpcheck.reference.decoder import build_decoder

DEGREES = (2, 3, 4, 6, 8)
DTYPES = ("bfloat16", "float16")
SIZES = {"tokens": 32, "hidden": 128, "inner": 1024}
ALLOWED = 1.15


def square(x: Tensor) -> float:
    return float(x.double().square().sum())


def gloo_rank(rank: int, size: int, folder: str, cases: int) -> None:
    """Sum every case of one degree over Gloo; rank 0 keeps the outputs."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    outputs = {}
    for family, dtype, seed in table(cases):
        named = getattr(torch, dtype)
        x = layer(seed, size, family, named, **SIZES)[1][rank].to(named)
        dist.all_reduce(x)
        outputs[f"{family}/{dtype}/{seed}"] = x
    if rank == 0:
        torch.save(outputs, f"{folder}/outputs.pt")
    dist.barrier()
    dist.destroy_process_group()


def table(cases: int) -> list[tuple[str, str, int]]:
    return [(f, dtype, seed) for f in FAMILIES for dtype in DTYPES for seed in range(cases)]


def summed(size: int, cases: int) -> dict[str, Tensor]:
    """Return what the ranks' all-reduce made of every case of one degree."""
    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        arguments = [(rank, size, folder, cases) for rank in range(size)]
        ranks = [fork.Process(target=gloo_rank, args=one) for one in arguments]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        found: dict[str, Tensor] = torch.load(f"{folder}/outputs.pt")
    return found


def noise_on_rank(world: Any, work: tuple[Tensor, str, int]) -> float:
    """Return the energy of the rounding injected into the sum of one case's exact terms."""
    terms_RN, dtype, seed = work
    tp = world.group(seed=seed, dtype=torch.float64, weight_dtype=torch.float64)
    exact = tp.all_reduce(terms_RN[world.rank])
    tp.interceptor = reduction_noise(dtype, "ring", seed)
    return square(tp.all_reduce(terms_RN[world.rank]) - exact)


def layer_row(
    size: int, family: str, dtype: str, cases: int, outputs: dict[str, Tensor]
) -> dict[str, Any]:
    named, ranks = getattr(torch, dtype), SimulatedRanks()
    at_1, at_n, law, injected = [], [], [], []
    for seed in range(cases):
        terms_RN, _ = layer(seed, size, family, named, **SIZES)
        total_N = terms_RN.sum(0)
        at_1.append(square(total_N.to(named).double() - total_N))
        at_n.append(square(outputs[f"{family}/{dtype}/{seed}"].double() - total_N))
        nodes = sum_nodes([term.to(named) for term in terms_RN])
        law.append((square(terms_RN) + sum(map(square, nodes))) / square(total_N))
        work = (terms_RN, dtype, seed)
        (result,) = ranks.run([Job("sigma_law:noise_on_rank", work, size, 60.0)])
        assert result.failure is None, result.failure
        injected.append(result.replies[0])
    total = sum(at_1)
    return row(at_n, at_1, math.sqrt(1 + sum(injected) / total)) | {
        "tp_size": size,
        "dtype": dtype,
        "family": family,
        "cases": cases,
        "law": math.sqrt(sum(a * b for a, b in zip(law, at_1, strict=True)) / total),
        "closed_form": expected_ratio(size) if family == "independent" else None,
    }


def row(at_n: list[float], at_1: list[float], injected: float) -> dict[str, Any]:
    """Return measured against injected, over cases."""
    interval = mean_ratio_interval(at_n, at_1)
    assert interval is not None
    measured = math.sqrt(sum(at_n) / sum(at_1))
    return {
        "measured": measured,
        "interval": [interval.low, interval.high],
        "injected": injected,
        "off": measured / injected,
        "within": injected / ALLOWED <= interval.low and interval.high <= ALLOWED * injected,
    }


def model_row(size: int, dtype: str, models: int) -> dict[str, Any]:
    """Return whole models at one degree; epsilons are relative, so that no model counts more."""
    at_1, at_n, predicted, outcomes = [], [], [], []
    for seed in range(models):
        profile, outcome = drifted(seed, size, dtype)
        deployed = profile["reductions"][0]
        at_1.append(profile["tp1"]["epsilons"] ** 2)
        at_n.append(deployed["error"]["epsilons"] ** 2)
        assert deployed["prediction"]["ratio"] is not None, deployed["prediction"]
        predicted.append((deployed["prediction"]["ratio"] ** 2) * at_1[-1])
        outcomes.append(outcome)
    return row(at_n, at_1, math.sqrt(sum(predicted) / sum(at_1))) | {
        "tp_size": size,
        "dtype": dtype,
        "models": models,
        "passed": outcomes.count("PASS"),
        "closed_form": expected_ratio(size),
    }


def drifted(seed: int, size: int, dtype: str) -> tuple[dict[str, Any], str]:
    spec = clean_models.draw(seed, size)

    @tpcheck.subject(spec=spec, seq_len=16)
    def build(tp):
        return build_decoder(spec, tp)

    report = tpcheck.drift(
        build, (size,), backend="gloo", dtypes=(dtype,), wires=("float32",), seed=seed
    )
    (verdict,) = report.verdicts
    return verdict.checks["drift"].facts["profile"], verdict.outcome


def off(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {
        "rows": len(rows),
        "within": sum(one["within"] for one in rows),
        "smallest": min(one["off"] for one in rows),
        "largest": max(one["off"] for one in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--models", type=int, default=16)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    layers = []
    for size in DEGREES:
        outputs = summed(size, options.cases)
        for family in FAMILIES:
            for dtype in DTYPES:
                layers.append(layer_row(size, family, dtype, options.cases, outputs))
                print(json.dumps(layers[-1]))
    models = []
    for size in DEGREES:
        for dtype in DTYPES:
            models.append(model_row(size, dtype, options.models))
            print(json.dumps(models[-1]), round(time.monotonic() - start), "s", flush=True)
    result = {
        "command": f"python benchmarks/sigma_law.py --cases {options.cases}"
        f" --models {options.models}",
        "backend": "gloo",
        "allowed": ALLOWED,
        "layers_off": off(layers),
        "models_off": off(models),
        "layers": layers,
        "models": models,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "environment": environment.collect(),
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(result["layers_off"], result["models_off"])


if __name__ == "__main__":
    main()
