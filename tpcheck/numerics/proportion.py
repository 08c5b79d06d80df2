"""What a count of successes says about the proportion behind it.

Requirement: "caught 96 of 96" is not "catches all": a rate is given with exact bounds, which hold
for few trials and at 0 % and 100 % too, where the normal approximation claims certainty.
"""

from __future__ import annotations

import math

_HALVINGS = 60
"""Of [0, 1]: finer than a float near 1."""


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact two-sided bounds of a binomial proportion.

    Args:
        successes: from 0 to `trials`.
        trials: none leave the proportion unknown: 0 to 1.
        confidence: above 0 and below 1; half of the rest on each side.

    Raises:
        ValueError: an argument is out of its range.

    Source: Clopper and Pearson 1934, Biometrika 26: the proportions at which what was seen, or
    more, and what was seen, or less, has the probability (1 - confidence) / 2.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes={successes}, but should be from 0 to trials={trials}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}, but should be above 0 and below 1")
    tail = (1 - confidence) / 2
    lower = _smallest(successes, trials, tail)
    upper = 1 - _smallest(trials - successes, trials, tail)
    return lower, upper


def at_least(successes: int, trials: int, proportion: float) -> float:
    """Return the probability of `successes` or more in `trials`.

    Source: the binomial distribution, its terms in logarithms so that none underflows early.
    """
    if successes <= 0:
        return 1.0
    if proportion <= 0:
        return 0.0
    if proportion >= 1:
        return 1.0
    yes, no = math.log(proportion), math.log1p(-proportion)
    total = math.lgamma(trials + 1)
    terms = (
        total - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * yes + (trials - k) * no
        for k in range(successes, trials + 1)
    )
    return min(1.0, math.fsum(math.exp(term) for term in terms))


def _smallest(successes: int, trials: int, tail: float) -> float:
    """Return the proportion at which `successes` or more have the probability `tail`.

    Source: bisection; that probability grows with the proportion.
    """
    if successes == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if at_least(successes, trials, middle) < tail:
            low = middle
        else:
            high = middle
    return (low + high) / 2
