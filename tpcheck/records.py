"""The types that leave a run: Comparison, Check, Verdict, Report. Torch-free.

Requirement: reports and gates run on machines without torch, and everything shown is rendered from
these records alone. Numbers are finite floats or None; a None always has a reason beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCHEMA = "tpcheck.report/1"

PASS, FAIL, SKIPPED = "PASS", "FAIL", "SKIPPED"

OUTCOMES = ("WRONG", "ERROR", "DRIFT", "ILLEGAL", "INCONCLUSIVE", "PASS")
"""A verdict's outcomes, worst first."""

EXIT_CODES = {"PASS": 0, "WRONG": 1, "ERROR": 1, "DRIFT": 1, "ILLEGAL": 1, "INCONCLUSIVE": 3}
USAGE_ERROR = 2

CHECK_NAMES = (
    "plan",
    "structural",
    "drift",
    "allclose",
    "rank_agreement",
    "repeatability",
    "schedule",
    "tiling",
    "decode",
)
"""Every check, in the order reports show them."""

OUTCOME_OF = {
    "structural": "WRONG",
    "tiling": "WRONG",
    "rank_agreement": "WRONG",
    "repeatability": "WRONG",
    "decode": "WRONG",
    "drift": "DRIFT",
    "allclose": "DRIFT",
    "schedule": "ERROR",
    "plan": "ILLEGAL",
    "bits": "DRIFT",  # of a golden record: rounded otherwise than recorded
    "record": "INCONCLUSIVE",  # of a golden record: missing, or not to be trusted
}
"""What a failed check means for its verdict."""


def worst(outcomes: list[str]) -> str:
    """Return the worst of some outcomes; INCONCLUSIVE when there are none."""
    return min(outcomes, key=OUTCOMES.index, default="INCONCLUSIVE")


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far `actual` is from `expected`: numbers only, no judgement.

    Errors are |actual - expected| in the oracle's precision. `relative_rms` is
    rms(error) / rms(expected). Positions where either side is not finite are compared as masks
    (`mask_mismatches`) and left out of every norm. `index` is the worst element's.
    """

    count: int
    mismatches: int
    mask_mismatches: int
    rms_error: float
    rms_expected: float
    relative_rms: float
    worst_error: float
    worst_actual: float
    worst_expected: float
    worst_ulp: float
    index: tuple[int, ...]
    required_atol: float


@dataclass(frozen=True, slots=True)
class Check:
    """One named check: PASS, FAIL or SKIPPED; FAIL and SKIPPED say why. `facts` are its numbers."""

    outcome: str
    reason: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.outcome not in (PASS, FAIL, SKIPPED):
            raise ValueError(f"outcome={self.outcome!r}, but should be PASS, FAIL or SKIPPED")
        if self.outcome != PASS and not self.reason:
            raise ValueError(f"a check that is {self.outcome} needs a reason")


BEFORE_IT = "its input is"
"""How the detail of a divergence goes on where the fault lies before the module."""


@dataclass(frozen=True, slots=True)
class FirstDivergence:
    """The first traced module, in execution order, that leaves its reference."""

    fqn: str
    rank: int | None = None
    index: str = ""
    ulp: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one (case, degree, dtype). Its key is (case_id, tp_size, dtype).

    `repro` is a command that repeats it, `script` a program that shows it with torch alone.
    """

    case_id: str
    tp_size: int
    dtype: str
    outcome: str
    checks: Mapping[str, Check]
    reasons: tuple[str, ...] = ()
    first_divergence: FirstDivergence | None = None
    repro: str = ""
    script: str = ""


@dataclass(frozen=True, slots=True)
class Path:
    """What carried the run, and whether that is the deployed path."""

    backend: str
    collectives: Mapping[str, int] = field(default_factory=dict)
    same_as_deployed: bool = False
    differences: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """Every verdict of a run with the environment that produced it. `outcome` is the worst one.

    `drift` is what a drift report's profiles come to: drift_profiles/summary.py has its keys. What
    exactly was run stands in `model` (directory and digests; None without a directory), `engine`
    (name, version, arguments), `tested` (the lengths per degree, dtype and batch) and `reduction`
    (kind, and whether it was emulated or is assumed); provenance.py makes them, and older reports
    lack them. `created` is when it was made: UTC, ISO 8601; empty where it is not known.
    """

    subject: str
    verdicts: tuple[Verdict, ...]
    environment: Mapping[str, Any]
    path: Path
    tpcheck: str
    sensitivity: Mapping[str, Any] | None = None
    drift: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    model: Mapping[str, Any] | None = None
    engine: Mapping[str, Any] | None = None
    tested: tuple[Mapping[str, Any], ...] | None = None
    reduction: Mapping[str, Any] | None = None
    created: str = ""

    @property
    def outcome(self) -> str:
        return worst([verdict.outcome for verdict in self.verdicts])

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.outcome]
