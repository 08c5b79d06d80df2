"""What low-precision all-reduces cost: predicted from the exact partials, and measured.

    python benchmarks/low_precision.py --json benchmarks/results/low_precision.json

Every kind sums partials of 64 x 1024 elements at 2, 4 and 8 ranks, in bfloat16 and float16:
independent, coherent, cancelling, with outlier channels, and with one large rank. `error` is the
rms of the emulated sum against float64, in units of one rounding of the exact sum (TP=1), and
`predicted` what the law of roundings and the ideal codec say; `law` has q^2/12 per rounding in the
codec's place, with q from the block maxima alone, which holds where values spread over many steps.
`model` is a whole decoder on that wire: its drift ratio, and what the injected error predicts.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tpcheck
from tpcheck import environment
from tpcheck.numerics.drift import ROUNDING_RMS
from tpcheck.numerics.low_precision import LOW_PRECISION, float16_energy, wire_error
from tpcheck.numerics.reduction import reduce_sum, sum_nodes
from tpcheck.numerics.ulp import eps

DEGREES = (2, 4, 8)
DTYPES = ("bfloat16", "float16")
LEVELS = {"int8_wire": 128, "int6_wire": 32, "int4_wire": 8}
WARP = 496


def normal(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, 1024, generator=generator, dtype=torch.float64)


def independent(size: int) -> list[Tensor]:
    return [normal(rank) for rank in range(size)]


def coherent(size: int) -> list[Tensor]:
    return [normal(99) + normal(rank) / 4 for rank in range(size)]


def cancelling(size: int) -> list[Tensor]:
    return [normal(99) * (-1) ** rank + normal(rank) / 16 for rank in range(size)]


def outlier_channels(size: int) -> list[Tensor]:
    channels = torch.ones(1024, dtype=torch.float64)
    channels[7::100] = 64
    return [normal(rank) * channels for rank in range(size)]


def one_large_rank(size: int) -> list[Tensor]:
    return [normal(rank) * (64 if rank == size // 2 else 1) for rank in range(size)]


PARTIALS: tuple[Callable[[int], list[Tensor]], ...] = (
    independent,
    coherent,
    cancelling,
    outlier_channels,
    one_large_rank,
)


def mean_square(x: Tensor) -> float:
    return float(x.double().square().mean())


def law(terms: list[Tensor], kind: str) -> float:
    """Return the mean of q^2/12, summed over the roundings of every rank and of the sums."""
    sums = [sum(terms[:4]), sum(terms[4:])] if kind == "fp8_wire" and len(terms) == 8 else []
    return sum(_uniform(x, kind) for x in [*terms, *sums, sum(terms)])


def _uniform(x: Tensor, kind: str) -> float:
    if kind == "fp16_wire":
        return 0.0
    if kind in LEVELS:
        blocks = x.reshape(-1, 32, 2).abs().amax(1)
        return mean_square(blocks / LEVELS[kind]) / 12
    usable = x.reshape(-1)[: x.numel() // WARP * WARP].view(-1, WARP)
    unit = usable.abs().amax(1, keepdim=True) / 448
    binade = torch.log2((usable / unit).abs().clamp_min(2.0**-6)).floor()
    return mean_square(unit * torch.exp2(binade - 3)) / 12


def row(
    partials: Callable[[int], list[Tensor]], kind: str, size: int, dtype: str
) -> dict[str, Any]:
    terms, narrow = partials(size), getattr(torch, dtype)
    exact = sum(terms)
    measured = mean_square(reduce_sum([x.to(narrow) for x in terms], kind).double() - exact)
    energy = [mean_square(x) for x in [*terms, *sum_nodes(terms, kind)]]
    adds = float(float16_energy(terms, kind, narrow).mean())
    roundings = (ROUNDING_RMS * eps(dtype) / 2) ** 2 * (sum(energy) + adds)
    predicted = roundings + mean_square(wire_error(terms, kind))
    at_1 = mean_square(exact.to(narrow).double() - exact)
    return {
        "kind": kind,
        "partials": partials.__name__,
        "tp_size": size,
        "dtype": dtype,
        "error": round(math.sqrt(measured / at_1), 3),
        "predicted": round(math.sqrt(predicted / at_1), 3),
        "measured_over_predicted": round(math.sqrt(measured / predicted), 3),
        "measured_over_law": round(math.sqrt(measured / (roundings + law(terms, kind))), 3),
    }


def models(kind: str) -> list[dict[str, Any]]:
    """Run a clean decoder on a wire that it declares."""
    report = tpcheck.run(
        "builtin:llama-tiny", DEGREES, backend="sim", dtypes=DTYPES, reduction=kind, confirm=False
    )
    return [
        {
            "kind": kind,
            "tp_size": verdict.tp_size,
            "dtype": verdict.dtype,
            "outcome": verdict.outcome,
            "ratio": round(verdict.checks["drift"].facts["ratio"], 3),
            "expected": round(verdict.checks["drift"].facts["expected"], 3),
            "source": verdict.checks["drift"].facts["expected_source"],
        }
        for verdict in report.verdicts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    rows = [
        row(partials, kind, size, dtype)
        for kind in LOW_PRECISION
        for partials in PARTIALS
        for size in DEGREES
        for dtype in DTYPES
    ]
    ratios = [one["measured_over_predicted"] for one in rows]
    result = {
        "command": "python benchmarks/low_precision.py",
        "measured_over_predicted": {"min": min(ratios), "max": max(ratios)},
        "sums": rows,
        "models": [one for kind in LOW_PRECISION for one in models(kind)],
        "minutes": round((time.monotonic() - start) / 60, 1),
        "environment": environment.collect(),
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(rows)} sums: measured / predicted {min(ratios)} to {max(ratios)}")


if __name__ == "__main__":
    main()
