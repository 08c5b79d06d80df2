"""What is said of two outputs: how large an error is, how it is spread, what tolerance it needs.

Requirement: pure functions of tensors that a profile is made of; profile.py says what their
keys mean. Everything is laid out as [tokens, V] float64, and what is not finite on some side is in
no norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tpcheck.comparison import as_float64, compare
from tpcheck.numerics.spread import PERCENTILES, percentiles, ulp_histogram
from tpcheck.numerics.tolerance import Tolerance
from tpcheck.trace import Trace

Json = dict[str, Any]


def laid_out(trace: Trace, keys: Sequence[str]) -> Tensor:
    """Return all outputs as [tokens, V] float64."""
    rows = [as_float64(trace.outputs[key]) for key in keys]
    return torch.cat([x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(-1, 1) for x in rows])


def sequences_of(trace: Trace, keys: Sequence[str], ids: Mapping[str, Tensor]) -> Tensor:
    """Return the number of each token's sequence, as `laid_out` orders tokens.

    A sequence is a row of its input's ids, or of the output where those are not known.
    """
    numbers: list[int] = []
    for key in keys:
        output = trace.outputs[key]
        tokens = output.numel() // output.shape[-1] if output.ndim > 1 else output.numel()
        rows = len(ids[key]) if key in ids else len(output) if output.ndim else 1
        if tokens % rows:
            rows = tokens
        first = numbers[-1] + 1 if numbers else 0
        numbers += [first + i // (tokens // rows) for i in range(tokens)]
    return torch.tensor(numbers)


def positions_of(output: Tensor) -> Tensor:
    """Return each token's position, of an output [B, T, V]."""
    batch, length, _ = output.shape
    return torch.arange(length).repeat(batch)


def error_of(actual: Tensor, wanted: Tensor, finite: Tensor, step: float) -> Json:
    """Return a profile's `error`: rms and percentiles, `step` being eps of the deployed dtype."""
    size = rms_of(wanted, finite)
    errors = (actual - wanted)[finite].abs()
    unit = step * size
    if not unit:
        return {
            "epsilons": None,
            "relative_rms": None,
            "reason": "the oracle is zero or not finite",
        }
    relative = math.sqrt(float(errors.square().mean())) / size
    spread = percentiles(errors / unit)
    names = [f"p{share:g}".replace(".", "_") for share in PERCENTILES]
    return {
        "epsilons": relative / step,
        "relative_rms": relative,
        "max": float(errors.max()) / unit,
        **dict(zip(names, spread, strict=True)),
    }


def difference_of(actual: Tensor, base: Tensor, finite: Tensor, dtype: str) -> Json:
    """Return a profile's `difference`: TP=N - TP=1, and its histogram in ulp of `dtype`."""
    apart = (actual - base)[finite]
    if not apart.numel():
        return {"rms": None, "max": None, "ulp": [], "reason": "nothing is finite on both sides"}
    bins = ulp_histogram(apart, base[finite], getattr(torch, dtype))
    return {
        "rms": float(apart.square().mean().sqrt()),
        "max": float(apart.abs().max()),
        "ulp": [list(one) for one in bins],
    }


def closeness(actual: Tensor, base: Tensor, tolerance: Tolerance) -> Json:
    """Return an entry of a profile's `allclose`: whether it passes, and what would."""
    found = compare(actual, base, rtol=tolerance.rtol, atol=tolerance.atol)
    finite = actual.isfinite() & base.isfinite()
    both = ((actual - base).abs() / (1 + base.abs()))[finite]
    masks = found.mask_mismatches
    return {
        "source": tolerance.source,
        "atol": tolerance.atol,
        "rtol": tolerance.rtol,
        "passes": found.mismatches == 0,
        "mismatches": found.mismatches,
        "required_atol": None if masks else found.required_atol,
        "required_both": None if masks or not both.numel() else float(both.max()),
        **({"required_reason": f"{masks} are not finite on one side only"} if masks else {}),
    }


def rms_of(x: Tensor, finite: Tensor) -> float:
    """Return the root mean square of what is finite."""
    count = max(1, int(finite.sum()))
    return math.sqrt(float(torch.where(finite, x, 0.0).square().sum()) / count)
