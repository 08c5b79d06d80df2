"""How numbers are spread: percentiles, steps of a dtype, and how sure a ratio of errors is.

Requirement: one rms hides both the token that is off by a hundred ulp and how few tokens it rests
on. Nothing here knows a model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PERCENTILES = (50.0, 90.0, 99.0, 99.9)

CONFIDENCE = 0.95
"""Of the intervals here."""

_DRAWS = 1000
"""Resamples: their 2.5 and 97.5 percentiles are then known to about 2 % of the interval."""

_MAX_BLOCKS = 512
"""Blocks to resample: more make the interval no better, and the draws slower."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a number lies with CONFIDENCE."""

    low: float
    high: float


def percentiles(values: Tensor, shares: Sequence[float] = PERCENTILES) -> tuple[float, ...]:
    """Return the values that so many percent of all are not above.

    Always one of the values: the smallest with at least that share at or below it.

    Source: the inverse of the empirical distribution function (Hyndman & Fan 1996, definition 1).
    """
    ordered = values.flatten().sort().values
    count = ordered.numel()
    at = [min(count, max(1, math.ceil(share / 100 * count - 1e-9))) - 1 for share in shares]
    return tuple(float(ordered[i]) for i in at)


def ulp_histogram(errors: Tensor, values: Tensor, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Count errors by their size in ulp of `dtype` at `values`: (up to so many ulp, how many).

    The first bin holds no error at all, the others end at 1, 2, 4, ...: as many as it takes.

    Args:
        errors: finite, any sign.
        values: what they are errors of, of the same shape, finite.
        dtype: of the values.

    Source: the spacing of a binary format, IEEE 754-2019, section 3.3.
    """
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.double().abs().clamp_min(float(info.tiny))).exponent - 1
    ulps = errors.double().abs() / (info.eps * torch.exp2(exponent.double()))
    bins = torch.where(ulps > 0, ulps.clamp_min(1.0).log2().ceil() + 1, 0.0).long().flatten()
    counts = torch.bincount(bins).tolist() if bins.numel() else []
    return [(0 if i == 0 else 2 ** (i - 1), int(count)) for i, count in enumerate(counts)]


def ratio_interval(
    actual_N: Tensor, expected_N: Tensor, *, floor: float = 0.0, seed: int = 0
) -> Interval | None:
    """Return where sqrt(sum actual / sum expected) lies, from blocks of neighbours resampled.

    None for fewer than 8 tokens, which say nothing of their own spread.

    Args:
        actual_N: each token's sum of squares.
        expected_N: the same of what it is held against.
        floor: the least that the mean of `expected_N` counts as.
        seed: of the resampling.

    Source: the percentile bootstrap of a ratio of means (Efron & Tibshirani 1993, section 13.3),
        over blocks because a token's error goes on in those after it (Carlstein 1986).
    """
    count = actual_N.numel()
    if count < 8:
        return None
    blocks = min(count, _MAX_BLOCKS)
    held = torch.stack([actual_N.double(), expected_N.double(), torch.ones(count).double()])
    sums_3b = torch.stack([part.sum(1) for part in held.tensor_split(blocks, 1)], 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(blocks, (_DRAWS, blocks), generator=generator)
    actual, expected, tokens = sums_3b[:, drawn].sum(-1)
    ratios = (actual / torch.maximum(expected, tokens * floor)).sqrt()
    return _interval(ratios[ratios.isfinite()].tolist())


def mean_ratio_interval(
    actual: Sequence[float], expected: Sequence[float], *, seed: int = 0
) -> Interval | None:
    """Return where sqrt(sum actual / sum expected) lies over cases resampled; None for one case.

    Source: the percentile bootstrap, as in `ratio_interval`.
    """
    if len(actual) < 2:
        return None
    generator = random.Random(seed)
    ratios = []
    for _ in range(_DRAWS):
        drawn = generator.choices(range(len(actual)), k=len(actual))
        below = sum(expected[i] for i in drawn)
        if below > 0:
            ratios.append(math.sqrt(sum(actual[i] for i in drawn) / below))
    return _interval(ratios)


def _interval(draws: list[float]) -> Interval | None:
    if not draws:
        return None
    ordered = sorted(draws)
    tail = (1 - CONFIDENCE) / 2
    last = len(ordered) - 1
    return Interval(ordered[round(tail * last)], ordered[round((1 - tail) * last)])
