"""Every planted fault at every degree and dtype: which check catches it, and what would not.

Requirement: a check that cannot fail is a defect, and a fault that nothing catches is a hole: both
fail the build. Drift is judged by the drift check alone, as if there were no float64. Rates come
with exact bounds, by tier: float64, float64 with the norms in float32, the deployed dtype alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from tpcheck.errors import TPCheckError
from tpcheck.fault_cells import Cell, FaultBench, find_fault
from tpcheck.faults import FAULTS, Fault
from tpcheck.groups.jobs import Ranks
from tpcheck.groups.opening import open_ranks
from tpcheck.groups.surroundings import one_thread
from tpcheck.numerics.proportion import clopper_pearson
from tpcheck.records import CHECK_NAMES

TP_SIZES = (2, 3, 4, 8)
MAX_CASES = 5
"""Cases that a fault is given to show itself."""

STAGES = (
    "plan",
    "schedule",
    "structural",
    "decode",
    "rank_agreement",
    "repeatability",
    "tiling",
    "drift",
)
"""Checks in the order in which they could stop a fault. A derived allclose stops none."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class FaultResult:
    """What one planted fault came to.

    expected: the check that has to catch it. caught_by: the checks that failed in every cell, and
    first_stage the first of them. cases_needed: until the expected check failed, at worst; None
    where it missed one of the cells, which are in `missed`. tp_sizes: the degrees it was planted
    at; none where it needs a wider one than was asked for, which `reason` says. drift: per dtype
    those at which drift alone saw it. drift_missed: dtypes in which drift has to see it at every
    degree and did not. casts: degrees at which float64 with float32 casts in it showed it. reason:
    why drift alone does not see it everywhere.
    """

    fault: str
    thread: str
    expected: str
    caught_by: tuple[str, ...]
    first_stage: str
    cases_needed: int | None
    cases_median: float | None
    missed: tuple[str, ...]
    tp_sizes: tuple[int, ...]
    drift: Mapping[str, tuple[int, ...]]
    drift_missed: tuple[str, ...]
    casts: tuple[int, ...]
    reason: str | None

    @property
    def survived(self) -> bool:
        """True when the check that names it missed it, or drift missed what it has to see."""
        return bool(self.missed or self.drift_missed)


@dataclass(frozen=True, slots=True)
class Tier:
    """How many (fault, degree, dtype) one kind of evidence caught at the first case.

    `lower` and `upper` are 95 % Clopper-Pearson bounds of that rate.
    """

    name: str
    caught: int
    planted: int
    lower: float
    upper: float


@dataclass(frozen=True, slots=True)
class FaultMatrix:
    """The results of all faults, the rates by tier, and the checks that caught nothing."""

    results: tuple[FaultResult, ...]
    tiers: tuple[Tier, ...]
    idle_checks: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True when some fault was planted, none survived and no check is idle."""
        planted = any(one.tp_sizes for one in self.results)
        return planted and not self.idle_checks and not any(one.survived for one in self.results)

    def to_json(self) -> dict[str, Any]:
        """Return what `tpcheck selfcheck --json` writes."""
        return {
            "faults": [asdict(one) | {"survived": one.survived} for one in self.results],
            "tiers": [asdict(tier) for tier in self.tiers],
            "idle_checks": list(self.idle_checks),
        }


def selfcheck(
    tp_sizes: Sequence[int] = TP_SIZES,
    dtypes: Sequence[str] = ("bfloat16",),
    *,
    backend: str = "sim",
    seed: int = 0,
    max_cases: int = MAX_CASES,
    casts: bool = True,
    faults: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> FaultMatrix:
    """Plant every known fault in the reference decoder and say which check catches it.

    Simulated failures are not confirmed on real ranks: the faults are known to be faults.

    Args:
        max_cases: how many a fault is given until the check that names it fails.
        casts: plant them too where the norms are cast to float32, for that tier's rate.
        faults: names of those to plant; then a check that catches none of them is not idle.

    Raises:
        TPCheckError: an unknown fault, degree, dtype or backend.
    """
    chosen = [find_fault(name) for name in (FAULTS if faults is None else faults)]
    degrees = tuple(dict.fromkeys(tp_sizes))
    if not degrees or min(degrees) < 2:
        raise TPCheckError(f"tp={list(degrees)}, but should name degrees of at least 2")
    results, rows = [], []
    with one_thread(), open_ranks(backend, max(degrees), None) as ranks:
        for done, fault in enumerate(chosen):
            if progress is not None:
                progress(done, len(chosen), fault.name)
            row = _planted(fault, ranks, degrees, tuple(dtypes), seed, max_cases, casts)
            rows.append(row)
            results.append(_result(row))
    if progress is not None:
        progress(len(chosen), len(chosen), "done")
    return FaultMatrix(
        tuple(results), tuple(_tiers(rows)), _idle(results) if faults is None else ()
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """One fault's cells, and those of the same fault in float64 with float32 casts."""

    fault: Fault
    cells: tuple[Cell, ...]
    casts: tuple[Cell, ...]

    @property
    def structural(self) -> bool:
        """Whether this is a fault that the rates count: one that changes the function."""
        return self.fault.caught_by == "structural"


def _planted(
    fault: Fault,
    ranks: Ranks,
    tp_sizes: Sequence[int],
    dtypes: tuple[str, ...],
    seed: int,
    max_cases: int,
    casts: bool,
) -> _Row:
    degrees = [size for size in tp_sizes if size >= fault.min_tp]
    if not degrees:
        return _Row(fault, (), ())
    shown = [one for one in dtypes if one in fault.dtypes] if fault.dtypes else list(dtypes)
    shown = shown or list(fault.dtypes)
    bench = FaultBench(fault, ranks, degrees, seed=seed)
    cells = tuple(bench.cell(size, dtype, max_cases) for dtype in shown for size in degrees)
    cast: tuple[Cell, ...] = ()
    if casts and fault.caught_by == "structural":
        bench = FaultBench(fault, ranks, degrees, seed=seed, casts=True)
        cast = tuple(bench.cell(size, shown[0], 1) for size in degrees)
    return _Row(fault, cells, cast)


def _result(row: _Row) -> FaultResult:
    fault, cells = row.fault, row.cells
    missed = [cell for cell in cells if cell.cases is None]
    needed = [cell.cases for cell in cells if cell.cases is not None]
    everywhere = frozenset.intersection(*(cell.seen_by for cell in cells)) if cells else frozenset()
    degrees = tuple(dict.fromkeys(cell.tp_size for cell in cells))
    drift = {
        dtype: tuple(cell.tp_size for cell in cells if cell.dtype == dtype and cell.drift)
        for dtype in dict.fromkeys(cell.dtype for cell in cells)
    }
    return FaultResult(
        fault=fault.name,
        thread=fault.thread,
        expected=fault.caught_by,
        caught_by=tuple(check for check in CHECK_NAMES if check in everywhere),
        first_stage=next((stage for stage in STAGES if stage in everywhere), ""),
        cases_needed=None if missed or not needed else max(needed),
        cases_median=float(median(needed)) if needed else None,
        missed=tuple(f"tp={cell.tp_size} {cell.dtype}" for cell in missed),
        tp_sizes=degrees,
        drift=drift,
        drift_missed=tuple(
            dtype for dtype, seen in drift.items() if fault.drift_sees(dtype) and seen != degrees
        ),
        casts=tuple(cell.tp_size for cell in row.casts if cell.cases is not None),
        reason=(fault.reason or None) if cells else f"not planted: needs tp >= {fault.min_tp}",
    )


def _tiers(rows: Sequence[_Row]) -> Iterator[Tier]:
    counted = [row for row in rows if row.structural]
    cells = [cell for row in counted for cell in row.cells]
    casts = [cell for row in counted for cell in row.casts]
    for name, caught in (
        ("float64", [cell.cases == 1 for cell in cells]),
        ("float64 with float32 casts", [cell.cases == 1 for cell in casts]),
        ("deployed dtype alone", [cell.drift for cell in cells]),
    ):
        lower, upper = clopper_pearson(sum(caught), len(caught))
        yield Tier(name, sum(caught), len(caught), lower, upper)


def _idle(results: Sequence[FaultResult]) -> tuple[str, ...]:
    """Return the checks that catch no fault of those that name them."""
    busy = {one.expected for one in results if one.tp_sizes and not one.missed}
    return tuple(check for check in CHECK_NAMES if check not in busy | {"allclose"})
