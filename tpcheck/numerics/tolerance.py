"""Tolerances, each with its source.

Requirement: no tolerance without a source. The structural limit is a noise floor measured on the
case; the default allclose tolerance is derived from TP=1's own error; a user's own stands as given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tpcheck.errors import TPCheckError

STRUCTURAL_LIMIT = 1e-12
"""Relative rms between TP=N and TP=1 in float64. Clean code stays below 2e-15 over 25 models and
3 degrees; the smallest planted bug was above 2e-6."""

NOISE_FACTOR = 8.0
"""How many measured half-ulp responses a float64 run with narrower casts may be off: the response
is one random draw, and a reduction in the narrow dtype rounds at every hop as well."""

PRESETS = {"seed-1e-2": (1e-2, 1e-2)}


@dataclass(frozen=True, slots=True)
class Tolerance:
    """|actual - expected| <= atol + rtol * |expected|, and why these numbers.

    `decides` is true for a user's own: failing it is a verdict, failing a derived one is shown.
    """

    rtol: float
    atol: float
    source: str
    decides: bool = False

    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
                raise TPCheckError(f"{name}={value!r}, but should be a finite number >= 0")
        if not self.source:
            raise TPCheckError("a tolerance needs a source")


def users_tolerance(atol: float | None, rtol: float | None, preset: str | None) -> Tolerance | None:
    """Return what the user asked for, or None; a tolerance given alone leaves the other at 0.

    Raises:
        TPCheckError: an unknown preset, a preset together with numbers, a negative number.

    Source: the user.
    """
    if preset is not None:
        if preset not in PRESETS:
            raise TPCheckError(f"preset={preset!r}, but should be one of {', '.join(PRESETS)}")
        if atol is not None or rtol is not None:
            raise TPCheckError(f"preset={preset!r} and --atol/--rtol cannot be combined")
        atol, rtol = PRESETS[preset]
        return Tolerance(rtol, atol, f"preset {preset}", decides=True)
    if atol is None and rtol is None:
        return None
    return Tolerance(rtol or 0.0, atol or 0.0, "user", decides=True)


def derived_tolerance(error_at_1: float, limit: float, count: int) -> Tolerance:
    """Return the absolute tolerance that a clean TP=N keeps against TP=1, for `count` logits.

    k * e1, where TP=N - TP=1 has rms at most e1 * sqrt(1 + limit^2), and the largest of `count`
    normal errors is sqrt(2 ln count) of its rms; 2 more for tails (worst logit seen: 6.3 e1).

    Source: e1 measured on this case; extreme value of a normal sample, Cramer 1946, section 28.6.
    """
    k = math.sqrt(1 + limit**2) * (math.sqrt(2 * math.log(max(count, 2))) + 2)
    return Tolerance(0.0, k * error_at_1, f"derived: {k:.1f} x e1={error_at_1:.3g}")


def structural_limit(noise_floor: float) -> float:
    """Return the largest relative rms that float64 (or its narrowest cast) explains.

    Source: STRUCTURAL_LIMIT and NOISE_FACTOR above.
    """
    return max(STRUCTURAL_LIMIT, NOISE_FACTOR * noise_floor)
