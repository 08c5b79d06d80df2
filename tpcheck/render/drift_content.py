"""What every rendering of a drift report says; the other files decide only how it looks.

Requirement: text, HTML, Markdown and JUnit never disagree. One row per degree and dtype on the
wire, then sentences that name their evidence. A number that is not known is blank, a prediction
that does not hold says so and why. Pure functions of the report's JSON, so every number is finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpcheck.records import Report
from tpcheck.render.content import MAX_SHOWN, number
from tpcheck.report import to_json

Row = Mapping[str, Any]

COLUMNS = (
    "tp",
    "on the wire",
    "error in eps\nTP=1, TP=N",
    "ratio (predicted)\n[95 %]",
    "flips\n(margin)",
    "KL\nmean",
    "65504 /\nlargest",
    "verdict",
)
_LARGE = 100
"""Ratios from here on are written with three digits."""

NOT_VALID = "prediction not valid here"


@dataclass(frozen=True, slots=True)
class DriftContent:
    """The drift part of a report: rows and findings of the summary, and every case's profile."""

    rows: tuple[Row, ...]
    findings: tuple[Row, ...]
    fallback: tuple[Row, ...]
    width: tuple[Row, ...]
    profiles: tuple[ProfileOf, ...]

    def dtypes(self) -> list[str]:
        """Return the deployed dtypes that have rows, in order."""
        return list(dict.fromkeys(row["dtype"] for row in self.rows))

    def rows_in(self, dtype: str) -> list[Row]:
        """Return the rows of one deployed dtype."""
        return [row for row in self.rows if row["dtype"] == dtype]

    def sentences_in(self, dtype: str) -> list[str]:
        """Return the findings of one deployed dtype as sentences."""
        return sentences([one for one in self.findings if one["dtype"] == dtype])


@dataclass(frozen=True, slots=True)
class ProfileOf:
    """One verdict's profile; None with the reason why there is none."""

    case_id: str
    tp_size: int
    dtype: str
    profile: Row | None
    reason: str


def drift_content(report: Report) -> DriftContent:
    """Return what a drift report holds, from its JSON."""
    value = to_json(report)
    drift = value.get("drift") or {}
    return DriftContent(
        rows=tuple(drift.get("rows") or ()),
        findings=tuple(drift.get("findings") or ()),
        fallback=tuple(drift.get("fallback") or ()),
        width=tuple(drift.get("width") or ()),
        profiles=tuple(_profile_of(verdict) for verdict in value["verdicts"]),
    )


def _profile_of(verdict: Row) -> ProfileOf:
    check = verdict["checks"].get("drift") or {}
    profile = check.get("profile")
    reason = check.get("profile_reason") or check.get("reason") or "no drift was measured"
    key = (verdict["case_id"], verdict["tp_size"], verdict["dtype"])
    return ProfileOf(*key, profile, "" if profile is not None else str(reason))


def title(dtype: str, rows: Sequence[Row]) -> str:
    """Say what a table of rows rests on."""
    own = next(row for row in rows if row["deployed"])
    cases = f"{own['cases']} cases, " if own["cases"] > 1 else ""
    over = f"{cases}{own['tokens']} tokens" if own.get("tokens") else f"{cases}all outputs"
    return f"{dtype}, {over}; * as it is deployed"


def filled_table(rows: Sequence[Row]) -> tuple[list[str], list[tuple[Row, list[str]]]]:
    """Return headers, and the rows that have numbers with their cells.

    Of COLUMNS those in which some row has something to say.
    """
    filled = [(row, cells(row)) for row in rows if "reason" not in row]
    columns = [i for i, _ in enumerate(COLUMNS) if any(shown[i] for _, shown in filled)]
    held = [(row, [shown[i] for i in columns]) for row, shown in filled]
    return [COLUMNS[i] for i in columns], held


def cells(row: Row) -> tuple[str, ...]:
    """Return a row's numbers as COLUMNS."""
    margin = f" ({number(row['flip_margin'])})" if row["flips"] else ""
    return (
        str(row["tp_size"]),
        f"{row['reduction']}{' *' if row['deployed'] else ''}",
        ", ".join(filter(None, map(number, (row["tp1_epsilons"], row["epsilons"])))),
        _ratio(row),
        f"{number(row['flips'])}{margin}",
        "" if row["kl_mean"] is None else f"{row['kl_mean']:.1e}",
        _times(row["float16_headroom"]),
        row["outcome"],
    )


def _times(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if 10 <= value < 1e6 else f"{value:.2g}"


def _ratio(row: Row) -> str:
    if row["ratio"] is None:
        return "overflow" if row["overflowed_outputs"] else ""
    predicted = "not valid" if row["prediction_reason"] else _brief(row["predicted"])
    return f"{_brief(row['ratio'])} ({predicted}){_interval(row)}"


def _interval(row: Row) -> str:
    """Write an interval by its ends, of a large ratio by how far they are away at most."""
    if not row["interval"]:
        return ""
    low, high = row["interval"]
    if row["ratio"] < _LARGE:
        return f" [{low:.2f}, {high:.2f}]"
    apart = max(high - row["ratio"], row["ratio"] - low) / row["ratio"]
    return f" ±{100 * apart:.0f} %"


def _brief(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < _LARGE else f"{ratio:.3g}"


def remarks(rows: Sequence[Row]) -> list[str]:
    """Say once why predictions do not hold, and why a wire could not be tried."""
    invalid: dict[str, list[str]] = {}
    missing: dict[str, list[str]] = {}
    for row in rows:
        name = f"{row['reduction']} at tp {row['tp_size']}"
        if "reason" in row:
            missing.setdefault(row["reason"], []).append(row["reduction"])
        elif row["prediction_reason"] and row["ratio"] is not None:
            invalid.setdefault(row["prediction_reason"], []).append(name)
    said = [f"{NOT_VALID}: {reason} ({_listed(names)})" for reason, names in invalid.items()]
    for reason, names in missing.items():
        said.append(f"no number for {', '.join(dict.fromkeys(names))}: {reason}")
    return said


def sentences(found: Sequence[Row]) -> list[str]:
    """Say each finding once, with the degrees it holds at, in the order of the findings."""
    said: dict[tuple[str, str], list[str]] = {}
    for one in found:
        said.setdefault((one["about"], one["text"]), []).append(str(one["tp_size"]))
    order = list(dict.fromkeys(about for about, _ in said))
    held = sorted(said.items(), key=lambda one: order.index(one[0][0]))
    return [f"tp {', '.join(degrees)}: {text}" for (_, text), degrees in held]


def no_numbers(content: DriftContent) -> list[str]:
    """Say once per reason which verdicts have no profile."""
    missing: dict[str, list[str]] = {}
    for one in content.profiles:
        if one.profile is None:
            missing.setdefault(one.reason, []).append(f"tp {one.tp_size} {one.dtype}")
    said = []
    for reason, where in missing.items():
        kept = list(dict.fromkeys(where))
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        said.append(f"{reason} ({', '.join(kept[:3])}{more})")
    return said


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - MAX_SHOWN
    return ", ".join(names[:MAX_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
