"""Drift reports made by hand, with every number known, for what renders them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tpcheck.drift_profiles.summary import summary
from tpcheck.records import Check, Path, Report, Verdict

Json = dict[str, Any]

GLOO = Path("gloo", {"all_reduce": 4}, False, ("backend gloo, not nccl",))
ENVIRONMENT = {"torch": "2.13.0", "python": "3.11.7", "device": "cpu"}
LAYERS = ("layers.0", "layers.1")


def entry(reduction: str, ratio: float | None, *, deployed: bool = False, **fields: Any) -> Json:
    """Return a profile's entry of a reduction whose TP=1 is off by 2 eps."""
    known = ratio is not None
    made: Json = {
        "reduction": reduction,
        "deployed": deployed,
        "error": {"epsilons": 2 * ratio, "relative_rms": ratio / 64} if known else None,
        "ratio": ratio,
        "interval": [ratio * 0.9, ratio * 1.1] if known else None,
        "limit": 3.0,
        "within": known and ratio <= 3,
        "over_deployed": None,
        "over_deployed_interval": None,
        "prediction": {"ratio": 1.25, "valid": True, "reason": ""},
        "difference": {"rms": 0.1, "max": 0.5, "ulp": [[0, 50], [1, 30], [2, 19], [4, 1]]},
        "range": {"overflowed_outputs": 0, "largest_partial": 4.0, "float16_headroom": 16376.0},
        "allclose": [{"required_both": 0.02, "passes": False}],
        "scores": {
            "tokens": 64,
            "flips": {"count": 2, "first": [{"tp1_margin": 0.25}]},
            "kl_mean": 1e-4,
            "kl_max": 1e-2,
        },
    }
    if not known:
        made["ratio_reason"] = "overflow: 7 outputs are not finite where the oracle is"
        made["range"]["overflowed_outputs"] = 7
    return made | fields


def profile(*entries: Json, tp_size: int = 4, layers: tuple[str, ...] = LAYERS, z: float = 0.5):
    """Return a profile with depth and ranks; the last rank of the last layer is z away."""
    points = [
        {"fqn": fqn, "tp1_epsilons": 1.0 + i, "epsilons": (1.0 + i) * 1.2, "ratio": 1.2}
        for i, fqn in enumerate(layers)
    ]
    rows = [
        {"fqn": f"{fqn}.mlp.down_proj", "rank_z": [0.25] * tp_size, "scaled_rank": None}
        for fqn in layers
    ]
    if rows:
        rows[-1]["rank_z"][-1] = z
    return {
        "oracle": "float64",
        "tp1": {"epsilons": 2.0},
        "reductions": list(entries),
        "depth": {"points": points, "begins": f"{layers[0]}.self_attn.o_proj" if layers else None},
        "rows": {"declared": "ring", "reduction": _no_alarm(), "layers": rows},
    }


def _no_alarm() -> Json:
    found = {"hypotheses": ["ring in bfloat16"], "probability": 1.0, "reproduced": 1.0}
    found |= {"tipped": 0.0, "explains": True}
    said = {"identified": "ring in bfloat16", "outputs": 64, "findings": [found]}
    return {**said, "alarm": None, "alarm_reason": "not asked"}


def report_of(
    *made: tuple[int, str, str, Json | None],
    subject: str = "models.py:build",
    reason: str = "",
    width: bool = False,
    fallback: bool = False,
) -> Report:
    """Return a report of (degree, dtype, outcome, profile or None) in that order."""
    verdicts, held = [], []
    for i, (tp_size, dtype, outcome, found) in enumerate(made):
        said = reason or "not the same function: how far another function is off says nothing"
        facts: Json = {"profile": found} if found else {"profile": None, "profile_reason": said}
        bad = outcome != "PASS"
        check = Check("FAIL" if bad else "PASS", said if bad else "", facts)
        reasons = (f"drift: {said}",) if bad else ()
        repro = f"tpcheck run {subject} --tp {tp_size}"
        case = f"s{i}-b2-t16"
        verdicts.append(
            Verdict(case, tp_size, dtype, outcome, {"drift": check}, reasons, repro=repro)
        )
        if found:
            held.append((tp_size, dtype, outcome, found))
    drift = summary(held)
    drift |= {"width": [cost()]} if width else {}
    drift |= {"fallback": [effect()]} if fallback else {}
    return replace(
        Report(subject, tuple(verdicts), ENVIRONMENT, GLOO, "0.1.0"),
        drift=drift,
    )


def cost() -> Json:
    """Return what width costs: 60 % of a forward at TP=2."""
    head = {"imbalance": 1.0, "reason": ""}
    alone = {"all_reduces": [], "bandwidths": []}
    one = {"tp_size": 1, "forward_s": 0.002, "fastest_s": 0.001, "slowest_s": 0.003}
    two = {"tp_size": 2, "forward_s": 0.005, "fastest_s": 0.004, "slowest_s": 0.006}
    sizes = {
        "all_reduces": [{"nbytes": 2048, "calls": 5, "seconds": 0.0006}],
        "bandwidths": [
            {"nbytes": 1024, "seconds": 0.0005, "bytes_per_second": 2048000.0},
            {"nbytes": 1048576, "seconds": 0.004, "bytes_per_second": 262144000.0},
        ],
    }
    return {
        "subject": "models.py:build",
        "dtype": "bfloat16",
        "measured_on": "gloo on cpu, 2 cores for all ranks: says nothing of a GPU",
        "degrees": [
            {**head, **alone, **one, "communication_s": 0.0, "share": 0.0},
            {**head, **sizes, **two, "communication_s": 0.003, "share": 0.6},
        ],
        "recommendation": "tp=1: a forward takes 2 ms, against 5 ms at tp=2",
    }


def effect() -> Json:
    """Return what one level of the fallback buys."""
    return {
        "tp_size": 2,
        "dtype": "bfloat16",
        "level": "full",
        "reason": "",
        "ratio_before": 1.5,
        "ratio_after": 1.0,
        "logprob_before": 0.05,
        "logprob_after": 0.0,
        "same_bits_as_tp1": True,
        "ranks_agree": True,
        "bytes_gathered": 2048,
        "peak_bytes": 1024,
        "device_peak_bytes": None,
        "seconds": 0.002,
        "seconds_deployed": 0.001,
        "measured_on": "gloo on cpu",
    }


def usual(ratio: float = 1.5, **options: Any) -> Report:
    """Return two degrees in bfloat16, with one coarse wire."""
    return report_of(
        *(
            (size, "bfloat16", "PASS", profile(*_entries(ratio, size), tp_size=size))
            for size in (2, 4)
        ),
        **options,
    )


def _entries(ratio: float, tp_size: int) -> list[Json]:
    grown = ratio + 0.125 * (tp_size // 2 - 1)
    return [entry("bfloat16", grown, deployed=True), entry("int4_wire", 10 * ratio)]
