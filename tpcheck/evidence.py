"""What was run for one (case, degree, dtype): the traces that checks read.

Requirement: a check is a pure function, so all it may need is collected first and handed over as
one frozen record; what is missing is None and makes the check say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tpcheck.comparison import pooled_rms, relative, sliced_relative_rms
from tpcheck.execution import AGAIN
from tpcheck.numerics.tolerance import Tolerance
from tpcheck.numerics.ulp import eps
from tpcheck.observation.dispatch import Choice
from tpcheck.trace import NarrowCast, Trace


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """How far casts narrower than float64 may move the output: measured, with where they are.

    sliced: input id -> the same in units of each channel, and of each token; see comparison.
    """

    relative_rms: float = 0.0
    sliced: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    tier: str = "float64"
    source: str = "no cast below float64"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was run for one (case, degree, dtype); every trace list is in rank order.

    oracle: TP=1 in the widest dtype; exact: TP=N in it. base, deployed: the same in the deployed
    dtype, with routing pinned to the oracle's where the subject picks by top-k.
    """

    dtype: str
    tp_size: int
    base: Trace
    deployed: Sequence[Trace]
    oracle: Trace | None = None
    exact: Sequence[Trace] = ()
    oracle_dtype: str = "float64"
    floor: NoiseFloor = field(default_factory=NoiseFloor)
    expected: float = 1.0
    expected_source: str = ""
    base_error: float | None = None
    tolerance: Tolerance | None = None
    logits: str = "all"
    routing_flips: int = 0
    routing_margin: float | None = None
    routing_pinned: bool = False


def distance(actual: Trace, expected: Trace) -> tuple[float, float, int]:
    """Return rms(actual - expected), rms(expected) and the count, over all inputs together."""
    keys = [key for key in actual.outputs if key in expected.outputs and key != AGAIN]
    return pooled_rms([(actual.outputs[key], expected.outputs[key]) for key in keys])


def with_outputs(trace: Trace, more: Trace, suffix: str = "") -> Trace:
    """Return a trace with another's outputs beside its own, under names of their own."""
    added = {f"{key}{suffix}": output for key, output in more.outputs.items()}
    return replace(trace, outputs={**trace.outputs, **added})


def output_response(moved: Trace, still: Trace) -> float:
    """Return the largest relative rms by which any input's output moved."""
    responses = [0.0]
    for key in moved.outputs:
        if key in still.outputs and key != AGAIN:
            error, magnitude, _ = pooled_rms([(moved.outputs[key], still.outputs[key])])
            responses.append(relative(error, magnitude))
    return max(responses)


def noise_floor(casts: Sequence[NarrowCast], moved: Sequence[tuple[Trace, Trace]]) -> NoiseFloor:
    """Return the floor that narrow operations set, given (moved by half an ulp there, still)."""
    response = max(output_response(*pair) for pair in moved)
    at_a = [sliced_relative_rms(a.outputs["A"], b.outputs["A"]) for a, b in moved]
    narrowest = max(casts, key=lambda cast: eps(cast.target))
    where = f" in {narrowest.fqn}" if narrowest.fqn else ""
    return NoiseFloor(
        relative_rms=response,
        sliced={"A": (max(c for c, _ in at_a), max(t for _, t in at_a))},
        tier=narrowest.target,
        source=f"half an ulp at the subject's own {narrowest.target} operations{where}"
        f" moves the output by {response:.2g}",
    )


def routing_flips(
    own: Mapping[str, Sequence[Choice]], reference: Mapping[str, Sequence[Choice]]
) -> tuple[int, float]:
    """Return how many rows chose otherwise than the reference, and the widest margin of those."""
    flips, margin = 0, 0.0
    for key, choices in own.items():
        for mine, other in zip(choices, reference.get(key, ()), strict=False):
            if not mine.comparable(other):
                continue
            count = mine.flips(other)
            if count:
                flips += count
                margin = max(margin, other.margin)
    return flips, margin
