"""A drift report as JUnit XML: one test case per degree and deployed dtype, numbers as properties.

Requirement: a CI that reads this file is red whenever the exit code is not 0, as with run's
(junit.py), and can plot the drift of every build from the properties. A test case fails where any
of its verdicts does; there is at most one failure or error in it, as the schema wants.
"""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from tpcheck.records import Report, Verdict, worst
from tpcheck.render.content import Finding, findings
from tpcheck.render.drift_content import DriftContent, drift_content
from tpcheck.render.junit import add_problem, add_property, add_test_case, document, new_suite

NUMBERS = (
    *("reduction", "cases", "tokens", "tp1_epsilons", "epsilons", "relative_rms", "ratio"),
    *("predicted", "prediction_reason", "ratio_reason", "flips", "flip_margin", "kl_mean"),
    *("kl_max", "largest_partial", "float16_headroom", "overflowed_outputs", "required_both"),
)
"""Of what is deployed; absent where there is none."""

MAX_TEXTS = 3
"""Failing verdicts of one degree and dtype that are shown in full."""


def render_drift_junit(report: Report) -> str:
    """Return one test suite, named after the subject, as an XML document."""
    suite = new_suite(report)
    content = drift_content(report)
    groups: dict[tuple[str, int], list[Verdict]] = {}
    for verdict in report.verdicts:
        groups.setdefault((verdict.dtype, verdict.tp_size), []).append(verdict)
    failing = findings(report)
    for (dtype, tp_size), _ in groups.items():
        case = add_test_case(suite, report.subject, f"drift tp={tp_size} {dtype}")
        found = [f for f in failing if (f.verdict.dtype, f.verdict.tp_size) == (dtype, tp_size)]
        _add_numbers(case, content, dtype, tp_size)
        if found:
            _add_failure(case, found)
    return document(suite, report)


def _add_failure(case: ElementTree.Element, found: list[Finding]) -> None:
    lead = worst([one.verdict.outcome for one in found])
    found = sorted(found, key=lambda one: one.verdict.outcome != lead)
    rest = len(found) - MAX_TEXTS
    more = f"... and {rest} more that are not PASS" if rest > 0 else ""
    add_problem(case, found[:MAX_TEXTS], more)


def _add_numbers(
    case: ElementTree.Element, content: DriftContent, dtype: str, tp_size: int
) -> None:
    rows = [row for row in content.rows_in(dtype) if row["tp_size"] == tp_size]
    values: dict[str, Any] = {"tp_size": tp_size, "dtype": dtype}
    for row in rows:
        if row["deployed"]:
            values |= {name: row.get(name) for name in NUMBERS}
            if row.get("interval"):
                values |= {"ratio_low": row["interval"][0], "ratio_high": row["interval"][1]}
        elif row.get("ratio") is not None:
            values[f"ratio.{row['reduction']}"] = row["ratio"]
    known = {name: value for name, value in values.items() if value not in (None, "")}
    if not rows:
        reasons = [
            one.reason
            for one in content.profiles
            if (one.dtype, one.tp_size) == (dtype, tp_size) and one.profile is None
        ]
        known["no_drift_reason"] = reasons[0] if reasons else "no drift was measured"
    properties = ElementTree.SubElement(case, "properties")
    for name, value in known.items():
        add_property(properties, name, value)
