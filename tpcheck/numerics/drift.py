"""The law of a row-parallel reduction, and what a whole model may drift.

Requirement: "how far" only means something against "how far it had to". In units of the TP=1 error,
a reduction over t ranks of independent partials of equal energy costs a known factor that depends
on its class alone; anything else is measured on the case (observation/injection.py).
"""

from __future__ import annotations

import math

ROUNDING_RMS = 0.424
"""Rms of one rounding to nearest, in units of u (eps/2) times the value's magnitude: an error
uniform over one step, over a binade. Measured 0.424 on both 16-bit dtypes."""

RATIO_FLOOR = 3.0
"""Smallest limit on eN/e1. 300 clean models at TP 2, 4 and 8 had a median of 1.10, a 99th
percentile of 1.56 and a maximum of 1.92; bare row-parallel layers at TP=8 2.44."""

EXPECTED_MARGIN = 1.5
"""The law is up to 13 % low (two numbers of one binade), the rest is sampling of e1 and eN."""

SAMPLING_Z = 4.27
"""One verdict in 100,000: the standard normal's 1 - 1e-5 quantile."""

ERROR_FLOOR = 0.15
"""e1 is at least this many eps * rms(oracle): inputs whose TP=1 result happens to be exact would
otherwise make any rounding an infinite ratio. Measured e1 is 0.41 to 2.35 eps."""

ASSUMED_ERROR = 0.41
"""e1 in eps * rms(oracle) where no oracle can be had: the smallest seen over 300 clean models."""


def expected_ratio(tp_size: int, kind: str = "ring") -> float:
    """Return eN/e1 of one bare row-parallel reduction of independent partials of equal energy.

    Args:
        tp_size: number of ranks, at least 1.
        kind: ring or tree (each add rounded to the wire dtype), wide (one rounding), fp32_wire; for
            a low-precision wire what it costs without that wire, whose share hangs on the blocks of
            the partials and not on their energy (`low_precision.wire_error`).

    Source: sum over ranks of |partial|^2 plus sum over nodes of |node|^2, over |y|^2; measured on
    K=4096, N=1024, B=64 within 0 to 7 %.
    """
    if tp_size == 1 or kind == "fp32_wire":
        return 1.0
    if kind == "tree":
        return math.sqrt(1 + math.log2(tp_size))
    if kind == "ring":
        return math.sqrt(1 + (tp_size + 1) / 2 - 1 / tp_size)
    return math.sqrt(2.0)


def ratio_limit(expected: float, error_count: float = math.inf) -> float:
    """Return the largest eN/e1 that `expected` explains, measured over `error_count` errors.

    Args:
        expected: eN/e1 of the law or of the injected rounding.
        error_count: independent errors behind e1; see `effective_count`.

    Source: the constants above and where they were measured; `sampling_spread` for few errors.
    """
    return max(RATIO_FLOOR, EXPECTED_MARGIN * expected, expected * sampling_spread(error_count))


def sampling_spread(error_count: float) -> float:
    """Return how far apart chance alone drives two rms errors of `error_count` normal errors.

    The 1 - 1e-5 quantile of the square root of an F distribution with as many degrees of freedom
    on both sides: 1.5 for 100 errors, 2.9 for 20; below 6 the estimate is that of 6.

    Source: Paulson 1942, the normal approximation to the F distribution.
    """
    spread = 2 / (9 * max(error_count, 6.0))
    rest = 1 - spread
    root = math.sqrt(2 * rest**2 * spread - (SAMPLING_Z * spread) ** 2)
    cube_root = (rest**2 + SAMPLING_Z * root) / (rest**2 - SAMPLING_Z**2 * spread)
    return float(cube_root**1.5)


def effective_count(sum_of_squares: float, sum_of_fourths: float, count: int) -> float:
    """Return how many normal errors carry this much energy as unevenly: 3 (sum e^2)^2 / sum e^4.

    A few massive elements carry the error of a whole output, and then a ratio of rms is a ratio of
    few numbers. Never more than `count`.

    Source: the fourth moment of a normal error is three times its variance squared.
    """
    if sum_of_fourths <= 0:
        return float(count)
    return min(float(count), 3 * sum_of_squares**2 / sum_of_fourths)


def floored(error: float, rms_expected: float, eps: float) -> float:
    """Return e1, raised to the floor that keeps a ratio meaningful.

    Source: ERROR_FLOOR.
    """
    return max(error, ERROR_FLOOR * eps * rms_expected)
