"""What all tests were told, in one table and one report. Torch-free.

Requirement: the process that speaks sees the verdicts of every worker, and `--tp-report` is a
Report like any other, so that it can be gated. A report's evidence has one backend: passing
examples of a search in simulation are counted, never entered as evidence of real ranks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tpcheck import environment
from tpcheck.errors import TPCheckError
from tpcheck.records import OUTCOMES, Path, Report, Verdict, worst
from tpcheck.report import from_json, write_report

MAX_ROWS = 24

RECORDS = "tpcheck_records"
"""The attribute of a test's report that carries its verdicts, each as JSON text."""


@dataclass(frozen=True, slots=True)
class Record:
    """What one test was told by one tp_check, or by all the examples of a property.

    searched: examples judged in simulation. report: the verdicts that stand, if any.
    """

    test: str
    searched: int = 0
    report: Report | None = None


class Summary:
    """A plugin of the process that speaks: collects, shows and writes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._records: list[Record] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in what came with a test's report, also from a worker."""
        for text in getattr(report, RECORDS, ()):
            self._records.append(read_record(report.nodeid, text))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the report, also after Ctrl-C and -x: it holds what is known by then."""
        try:
            if self._path:
                write_report(combined_report(self._records), self._path)
        except TPCheckError as error:
            raise pytest.UsageError(f"--tp-report: {error}") from None

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Show one row per test, the worst first."""
        if self._records:
            terminalreporter.section("tpcheck")
            terminalreporter.write_line(table(self._records))
        if self._path:
            terminalreporter.write_line(f"tpcheck report written to {self._path}")


def read_record(test: str, text: str) -> Record:
    """Return the record that a test left as JSON text."""
    value = json.loads(text)
    report = value["report"]
    return Record(test, value["searched"], None if report is None else from_json(report))


def table(records: Sequence[Record]) -> str:
    """Return one row per test: its worst outcome, its verdicts, what was only searched."""
    from tabulate import tabulate

    tests: dict[str, list[Record]] = {}
    for record in records:
        tests.setdefault(record.test, []).append(record)
    rows = sorted((_row(test, several) for test, several in tests.items()), key=_severity)
    shown = tabulate(
        rows[:MAX_ROWS],
        headers=("test", "outcome", "verdicts", "backend", "searched"),
        tablefmt="simple",
        disable_numparse=True,
    )
    rest = len(rows) - MAX_ROWS
    lines = [line.rstrip() for line in shown.splitlines()]
    return "\n".join([*lines, *([f"... and {rest} more tests"] if rest > 0 else [])])


def combined_report(records: Sequence[Record]) -> Report:
    """Return all verdicts as one report; a case's id gets its test's in front."""
    reports = [record.report for record in records if record.report is not None]
    verdicts: dict[tuple[str, int, str], Verdict] = {}
    for record in records:
        for verdict in record.report.verdicts if record.report is not None else ():
            case_id = _free_id(f"{record.test} {verdict.case_id}", verdict, verdicts)
            key = (case_id, verdict.tp_size, verdict.dtype)
            verdicts[key] = replace(verdict, case_id=case_id)
    subjects = dict.fromkeys(report.subject for report in reports)
    searched = sum(record.searched for record in records)
    notes = dict.fromkeys(note for report in reports for note in report.notes)
    if searched:
        notes[f"{searched} examples of properties were searched in simulation"] = None
    return Report(
        subject=next(iter(subjects)) if len(subjects) == 1 else f"pytest, {len(subjects)} subjects",
        verdicts=tuple(verdicts.values()),
        environment=reports[-1].environment if reports else {},
        path=_combined_path([report.path for report in reports]),
        tpcheck=environment.tpcheck_version(),
        notes=tuple(notes),
    )


def _row(test: str, records: Sequence[Record]) -> tuple[str, ...]:
    reports = [record.report for record in records if record.report is not None]
    counts = Counter(verdict.outcome for report in reports for verdict in report.verdicts)
    searched = sum(record.searched for record in records)
    return (
        test,
        worst(list(counts)) if counts else "",
        ", ".join(f"{counts[name]} {name}" for name in OUTCOMES if counts[name]),
        ", ".join(dict.fromkeys(report.path.backend for report in reports)),
        f"{searched} in sim" if searched else "",
    )


def _severity(row: tuple[str, ...]) -> int:
    return OUTCOMES.index(row[1]) if row[1] else len(OUTCOMES)


def _free_id(case_id: str, verdict: Verdict, taken: dict[tuple[str, int, str], Verdict]) -> str:
    found, times = case_id, 1
    while (found, verdict.tp_size, verdict.dtype) in taken:
        times += 1
        found = f"{case_id} #{times}"
    return found


def _combined_path(paths: Sequence[Path]) -> Path:
    backends = list(dict.fromkeys(path.backend for path in paths))
    collectives: Counter[str] = Counter()
    for path in paths:
        collectives.update(path.collectives)
    # a policy names backends: "mixed" is none of them, so such a report proves none
    return Path(
        backend=backends[0] if len(backends) == 1 else "mixed" if backends else "none",
        collectives=dict(collectives),
        same_as_deployed=bool(paths) and all(path.same_as_deployed for path in paths),
        differences=tuple(dict.fromkeys(text for path in paths for text in path.differences)),
    )
