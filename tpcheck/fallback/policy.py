"""When scoring falls back: how often it looks, what it compares, and what counts as drift.

Requirement: the decision is a pure function of numbers, so that it can be tested without a model,
and it names where its limit comes from.

[Two Limits] A tolerance, where one is given, holds TP=N's logits against TP=1's element by element.
Without one the limit is that of the gate's policy, `max_drift_ratio`: how far TP=N is from TP=1 in
float64, in units of how far TP=1 itself is. That is as sharp at any size of logits and in any
dtype, and costs a second forward at TP=1, of the sampled share only.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

from tpcheck.comparison import compare, pooled_rms
from tpcheck.errors import TPCheckError
from tpcheck.fallback.levels import parse_levels
from tpcheck.numerics.drift import RATIO_FLOOR, floored
from tpcheck.numerics.tolerance import Tolerance
from tpcheck.numerics.ulp import eps


@dataclass(frozen=True, slots=True)
class ScoringPolicy:
    """level: what scores once scoring fell back. share: of requests that are compared with TP=1.

    seed: of the sample. max_drift_ratio, tolerance: see [Two Limits].

    Raises:
        TPCheckError: a value is out of range; names it.
    """

    level: str = "full"
    share: float = 0.01
    seed: int = 0
    max_drift_ratio: float = RATIO_FLOOR
    tolerance: Tolerance | None = None

    def __post_init__(self) -> None:
        (level,) = parse_levels([self.level])
        del level
        if not (_is_number(self.share) and 0 <= self.share <= 1):
            raise TPCheckError(f"share={self.share!r}, but should be a number from 0 to 1")
        if not (_is_number(self.max_drift_ratio) and self.max_drift_ratio >= 1):
            raise TPCheckError(
                f"max_drift_ratio={self.max_drift_ratio!r}, but should be a number of at least 1:"
                " TP=1 itself has 1"
            )
        if self.tolerance is not None and not isinstance(self.tolerance, Tolerance):
            raise TPCheckError(
                f"tolerance={self.tolerance!r}, but should be a Tolerance(rtol, atol, source)"
            )

    def samples(self, number: int) -> bool:
        """Whether the `number`-th scored request is one of the share: the same on every rank."""
        digest = hashlib.blake2b(f"{self.seed}\0{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.share * 2.0**64


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether a request drifted, by how much, against which limit and where that comes from.

    `value` and `limit` are ratios of errors, or with a tolerance the largest absolute part needed
    and allowed. Not finite where TP=N is not.
    """

    drifts: bool
    value: float
    limit: float
    source: str


def judged(
    policy: ScoringPolicy, actual: torch.Tensor, expected: torch.Tensor, oracle: torch.Tensor | None
) -> Judgement:
    """Judge one request's logits at TP=N.

    Args:
        actual: logits of TP=N, or of the level that scores.
        expected: of TP=1 in the deployed dtype.
        oracle: of TP=1 in float64; not needed with a tolerance.

    Raises:
        SubjectError: the shapes differ.
    """
    tolerance = policy.tolerance
    if tolerance is not None:
        found = compare(actual, expected, rtol=tolerance.rtol, atol=tolerance.atol)
        worst = found.required_atol if not found.mask_mismatches else math.inf
        return Judgement(found.mismatches > 0, worst, tolerance.atol, tolerance.source)
    assert oracle is not None
    masks = compare(actual, expected).mask_mismatches
    error_n, magnitude, _ = pooled_rms([(actual, oracle)])
    error_1, _, _ = pooled_rms([(expected, oracle)])
    ratio = error_n / floored(error_1, magnitude, eps(expected.dtype)) if error_n else 0.0
    value = math.inf if masks else ratio
    source = f"max_drift_ratio={policy.max_drift_ratio:g} of TP=1's own error"
    return Judgement(not value <= policy.max_drift_ratio, value, policy.max_drift_ratio, source)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
