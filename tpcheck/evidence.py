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

    by_input: the same of single inputs, where one (a token less the mean of all) is next to nothing
    and may move by more than all of it: that speaks for no other.
    sliced: input id -> the same in units of each channel, and of each token; see comparison.
    """

    relative_rms: float = 0.0
    by_input: Mapping[str, float] = field(default_factory=dict)
    sliced: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    tier: str = "float64"
    source: str = "no cast below float64"

    def of(self, key: str) -> float:
        """Return how far the output of one input may be moved."""
        return self.by_input.get(key, self.relative_rms)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was run for one (case, degree, dtype); every trace list is in rank order.

    oracle: TP=1 in the widest dtype; exact: TP=N in it. base, deployed: the same in the deployed
    dtype, with routing pinned to the oracle's where the subject picks by top-k. elsewhere: TP=N and
    TP=1 in the oracle's dtype as `structural` holds them together where `exact` has another reason
    to differ: on other weights, where at these a value lies between two codes; or without the codes
    that only TP=N sends. rebuilt: TP=1 in the oracle's dtype built and run once more, after the
    others. flipped: the outputs that drift leaves out, because in TP=N's run of them one does.
    lifted: TP=1 and TP=N in the oracle's dtype once more, without the subject's own casts.
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
    quantization_error: float | None = None
    tolerance: Tolerance | None = None
    logits: str = "all"
    routing_flips: int = 0
    routing_margin: float | None = None
    routing_pinned: bool = False
    elsewhere: tuple[Trace, Trace] | None = None
    flipped: frozenset[str] = frozenset()
    lifted: Evidence | None = None
    rebuilt: Trace | None = None

    @property
    def exact_pair(self) -> tuple[Trace, Trace]:
        """TP=N and TP=1 in the oracle's dtype, as `structural` compares them."""
        assert self.oracle is not None
        return self.elsewhere or (self.exact[0], self.oracle)

    @property
    def lift(self) -> str:
        """How `lifted` was run, as a Task says it."""
        oracle = None if self.lifted is None else self.lifted.oracle
        return "" if oracle is None else str(oracle.extras["lift"])


def distance(actual: Trace, expected: Trace) -> tuple[float, float, int]:
    """Return rms(actual - expected), rms(expected) and the count, over all inputs together."""
    keys = [key for key in actual.outputs if key in expected.outputs and key != AGAIN]
    return pooled_rms([(actual.outputs[key], expected.outputs[key]) for key in keys])


def with_outputs(trace: Trace, more: Trace, suffix: str = "") -> Trace:
    """Return a trace with another's outputs beside its own, under names of their own."""
    added = {f"{key}{suffix}": output for key, output in more.outputs.items()}
    return replace(trace, outputs={**trace.outputs, **added})


def output_responses(moved: Trace, still: Trace) -> dict[str, float]:
    """Return input id -> the relative rms by which its output moved."""
    found = {}
    for key in moved.outputs:
        if key in still.outputs and key != AGAIN:
            error, magnitude, _ = pooled_rms([(moved.outputs[key], still.outputs[key])])
            found[key] = relative(error, magnitude)
    return found


def without_flips(moved: Trace, still: Trace) -> tuple[Trace, Trace]:
    """Return both without the tokens that moved by far more than most did.

    Half an ulp takes a value that lies between two codes to the other, and its token a whole
    quantum away: in a few tokens, where values of few digits tie. A floor of that size would hide
    any bug below a quantum, and the two runs that it is for differ by no such flip, or are run
    again. Where most tokens flip, they all stay: then that is the noise.
    """
    kept_moved, kept_still = dict(moved.outputs), dict(still.outputs)
    for key in moved.outputs.keys() & still.outputs.keys():
        one, other = moved.outputs[key], still.outputs[key]
        if one.shape != other.shape or one.ndim < 2 or not one.dtype.is_floating_point:
            continue
        rows, held = one.double().flatten(0, -2), other.double().flatten(0, -2)
        error, size = (rows - held).square().mean(-1).sqrt(), held.square().mean().sqrt()
        most = max(_FLIP * float(error.median()), _FLIP * eps("float32") * float(size))
        kept_moved[key], kept_still[key] = rows[error <= most], held[error <= most]
    return replace(moved, outputs=kept_moved), replace(still, outputs=kept_still)


_FLIP = 100.0
"""How far beyond most tokens, or float32's own rounding, one is that flipped: int8's quantum is
some 65,000 float32 roundings, e4m3's 500,000."""


def noise_floor(
    casts: Sequence[NarrowCast], moved: Sequence[tuple[Trace, Trace]], *, codes: bool = False
) -> NoiseFloor:
    """Return the floor that narrow operations set, given (moved by half an ulp there, still).

    Args:
        codes: the subject quantizes; tokens in which a code flipped are left out.
    """
    moved = [without_flips(*pair) for pair in moved] if codes else moved
    response = max(max(output_responses(*pair).values(), default=0.0) for pair in moved)
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


def last_bits_floor(moved: Sequence[Trace], still: Trace) -> NoiseFloor:
    """Return the floor that float64's own rounding sets, from runs whose last bits moved."""
    draws = [output_responses(one, still) for one in moved]
    by_input = {key: max(draw[key] for draw in draws) for key in draws[0]}
    response = by_input["A"]
    sliced = [sliced_relative_rms(one.outputs["A"], still.outputs["A"]) for one in moved]
    return NoiseFloor(
        relative_rms=response,
        by_input=by_input,
        sliced={"A": (max(c for c, _ in sliced), max(t for _, t in sliced))},
        source=f"an ulp of float64 at every operation moves TP=1's output by {response:.2g}",
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
            count, widest = mine.flips(other)
            flips, margin = flips + count, max(margin, widest)
    return flips, margin
