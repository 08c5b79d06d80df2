"""What was run for one (case, degree, dtype): the traces that checks read.

Requirement: a check is a pure function, so all it may need is collected first and handed over as
one frozen record; what is missing is None and makes the check say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tpcheck.numerics.tolerance import Tolerance
from tpcheck.trace import Trace


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
    repeatable_base: bool = True
    routing_flips: int = 0
    routing_margin: float | None = None
    routing_pinned: bool = False
