"""False alarms: clean generated models at every degree and dtype; every verdict has to be PASS.

    python benchmarks/clean_models.py --models 300 --json benchmarks/results/clean_models.json

A model is drawn from its seed: 1 to 8 layers, hidden 32 to 256, MHA, GQA or MQA (KV heads below and
above the degree), q/k norm, biases, SwiGLU or GELU, RMSNorm or LayerNorm, tied or not, vocabularies
that divide by nothing, 1 to 16 tokens. Heads and FFN width are multiples of the degree, because
what does not divide is refused by the plan. One model in ten is run on Gloo ranks as well.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch

import tpcheck
from tpcheck import environment
from tpcheck.records import Report
from tpcheck.reference.decoder import build_decoder
from tpcheck.spec import ModelSpec

DEGREES = (2, 3, 4, 8)
DTYPES = ("bfloat16", "float16")
CONFIRM_EVERY = 10


def draw(seed: int, degree: int) -> ModelSpec:
    """Return the model that `seed` draws for `degree`."""
    rng = random.Random(f"{seed}/{degree}")
    heads = degree * rng.choice((1, 1, 2, 3))
    kv_choices = [
        kv
        for kv in range(1, heads + 1)
        if heads % kv == 0 and (kv % degree == 0 or degree % kv == 0)
    ]
    gated = rng.random() < 0.7
    return ModelSpec(
        vocab_size=rng.choice((61, 97, 128, 131, 251, 509)),
        hidden_size=rng.choice((32, 48, 64, 96, 128, 256)),
        intermediate_size=degree * rng.choice((7, 11, 16, 29, 43)),
        num_hidden_layers=rng.choice((1, 1, 2, 2, 3, 4, 8)),
        num_attention_heads=heads,
        num_key_value_heads=rng.choice(kv_choices),
        head_dim=rng.choice((4, 8, 16)),
        hidden_act="silu" if gated else rng.choice(("gelu", "gelu_new", "relu")),
        mlp="gated" if gated else "plain",
        norm_type="rms" if gated else rng.choice(("rms", "layer")),
        position=rng.choice(("rope", "rope", "learned")),
        attention_bias=rng.random() < 0.5,
        attention_out_bias=rng.random() < 0.5,
        mlp_bias=rng.random() < 0.5,
        qk_norm=rng.choice(("none", "none", "per_head", "across_heads")),
        tie_word_embeddings=rng.random() < 0.3,
        max_position_embeddings=16,
    )


def check(seed: int, degree: int, backend: str) -> Report:
    """Run one model at one degree in both dtypes."""
    spec = draw(seed, degree)

    @tpcheck.subject(spec=spec, seq_len=random.Random(seed).choice((1, 2, 5, 9, 16)))
    def build(tp):
        return build_decoder(spec, tp)

    return tpcheck.run(build, (degree,), backend=backend, dtypes=DTYPES, seed=seed)


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "max": ordered[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=300)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    ratios: dict[str, list[float]] = defaultdict(list)
    structural: list[float] = []
    alarms = []
    start = time.monotonic()
    for seed in range(options.models):
        for degree in DEGREES:
            for backend in ("sim", "gloo") if seed % CONFIRM_EVERY == 0 else ("sim",):
                report = check(seed, degree, backend)
                for verdict in report.verdicts:
                    outcomes[backend][verdict.outcome] += 1
                    if verdict.outcome != "PASS":
                        alarms.append([seed, degree, backend, verdict.dtype, *verdict.reasons])
                        continue
                    drift = verdict.checks["drift"].facts
                    ratios[f"{backend} {verdict.dtype} tp={degree}"].append(drift["ratio"])
                    structural.append(verdict.checks["structural"].facts["relative_rms"])
        if seed % 10 == 9:
            done = sum(sum(counter.values()) for counter in outcomes.values())
            print(f"{seed + 1} models, {done} verdicts, {len(alarms)} false alarms", flush=True)
    result = {
        "command": f"python benchmarks/clean_models.py --models {options.models}",
        "models": options.models,
        "degrees": DEGREES,
        "dtypes": DTYPES,
        "verdicts": {backend: dict(counter) for backend, counter in outcomes.items()},
        "false_alarms": alarms,
        "structural_relative_rms": quantiles(structural),
        "drift_ratio": {key: quantiles(values) for key, values in sorted(ratios.items())},
        "minutes": round((time.monotonic() - start) / 60, 1),
        "environment": environment.collect(),
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
