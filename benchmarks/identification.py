"""Blind draws of reductions, told from their outputs: how often rightly, and how surely.

    python benchmarks/identification.py --draws 500 --json benchmarks/results/identification.json

A draw is a bare row-parallel layer (row_parallel.py) at 4, 6 or 8 ranks in bfloat16 or float16, of
any family, even or uneven, 1,024 to 65,536 outputs, whose local products are in float32, summed by
one of the hypotheses. `right` means that the finding named first holds the drawn class, explains
the outputs and has a probability of 0.99; `alone` counts the draws in which it holds nothing else,
and `together` says what it holds otherwise: classes that no output, or too few, could tell apart.
Then the drawn class, with all that rounds like it, is withheld: `another_named` counts how often
another one is named in its place, because it rounds alike in all but a few outputs.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from row_parallel import FAMILIES, layer

from tpcheck import environment
from tpcheck.numerics.identification import CONFIDENT, emulate, hypotheses, identify
from tpcheck.numerics.proportion import clopper_pearson

TOKENS, HIDDEN = (16, 64, 256), (64, 128, 256)


def draw(seed: int) -> dict[str, Any]:
    """Return one draw and what was found."""
    rng = random.Random(seed)
    dtype = rng.choice(("bfloat16", "float16"))
    named, tp_size = getattr(torch, dtype), rng.choice((4, 6, 8))
    family, even = rng.choice(FAMILIES), rng.random() < 0.5
    inner = rng.choice((512, 1024, 2048))
    sizes = {"tokens": rng.choice(TOKENS), "hidden": rng.choice(HIDDEN), "inner": inner}
    exact, sent = layer(seed, tp_size, family, named, even=even, **sizes)
    truth = rng.choice(hypotheses(dtype))
    actual = emulate(sent.double(), truth, named)
    findings = identify(actual, exact)
    own = next(one for one in findings if truth in one.hypotheses)
    rest = [one for one in hypotheses(dtype) if one not in own.hypotheses]
    other = identify(actual, exact, rest)[0]
    first = findings[0]
    return {
        "seed": seed,
        "truth": str(truth),
        "dtype": dtype,
        "tp_size": tp_size,
        "family": family,
        "even": even,
        "outputs": actual.numel(),
        "found": str(first),
        "probability": round(first.probability, 6),
        "reproduced": round(own.reproduced, 5),
        "tipped": round(own.tipped, 5),
        "alone": len(first.hypotheses) == 1,
        "right": first is own and first.explains and first.probability >= CONFIDENT,
        "withheld": {
            "named": str(other.hypotheses[0]) if other.explains else "",
            "reproduced": round(other.reproduced, 5),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    draws = [draw(seed) for seed in range(options.draws)]
    right = sum(one["right"] for one in draws)
    wrongly = [one for one in draws if one["withheld"]["named"]]
    result = {
        "command": f"python benchmarks/identification.py --draws {options.draws}",
        "draws": len(draws),
        "right": right,
        "right_bounds_95": [round(bound, 5) for bound in clopper_pearson(right, len(draws))],
        "alone": sum(one["alone"] for one in draws),
        "together": Counter(one["found"] for one in draws if not one["alone"]).most_common(),
        "least_reproduced_by_the_truth": min(one["reproduced"] for one in draws),
        "most_misses_over_tipped": max(
            (1 - one["reproduced"]) / one["tipped"] for one in draws if one["tipped"] > 0.005
        ),
        "wrong": [one for one in draws if not one["right"]],
        "withheld": {
            "draws": len(draws),
            "another_named": len(wrongly),
            "pairs": Counter(
                f"{one['dtype']} outputs: {one['truth']} -> {one['withheld']['named']}"
                for one in wrongly
            ).most_common(),
        },
        "by_truth": {
            truth: [sum(one["right"] for one in draws if one["truth"] == truth), count]
            for truth, count in sorted(Counter(one["truth"] for one in draws).items())
        },
        "table": draws,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "environment": environment.collect(),
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{right} of {len(draws)} right; withheld: {len(wrongly)} named otherwise")


if __name__ == "__main__":
    main()
