"""A report as JUnit XML, one test case per verdict, for CI systems that collect test results.

Requirement: a CI that reads this file is red whenever the exit code is not 0: an INCONCLUSIVE
verdict, or a report without verdicts, is an error and never a skip. Characters that XML cannot hold
are shown as escapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from tpcheck.records import PASS, Report
from tpcheck.render.content import Finding, findings, headline
from tpcheck.render.text import printable, render_finding


def render_junit(report: Report) -> str:
    """Return one test suite, named after the subject, as an XML document."""
    by_key = {_key(finding): finding for finding in findings(report)}
    suite = new_suite(report)
    for verdict in report.verdicts:
        name = f"{verdict.case_id} tp={verdict.tp_size} {verdict.dtype}"
        case = add_test_case(suite, report.subject, name)
        if verdict.outcome != PASS:
            add_problem(case, [by_key[verdict.case_id, verdict.tp_size, verdict.dtype]])
    return document(suite, report)


def new_suite(report: Report) -> ElementTree.Element:
    """Return a suite without test cases: what it is of, and what it stood on."""
    suite = ElementTree.Element("testsuite", name=printable(f"tpcheck {report.subject}"))
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in {"headline": headline(report), **report.environment}.items():
        add_property(properties, str(name), value)
    return suite


def document(suite: ElementTree.Element, report: Report) -> str:
    """Return a suite with its counts; one without test cases is an error."""
    if not report.verdicts:
        case = add_test_case(suite, report.subject, "anything compared")
        message = printable(headline(report))
        ElementTree.SubElement(case, "error", type=report.outcome, message=message)
    return counted_document(suite)


def counted_document(suite: ElementTree.Element) -> str:
    """Return a suite as an XML document, with the counts of what is in it."""
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", str(len(suite.findall("testcase/error"))))
    suite.set("skipped", "0")
    ElementTree.indent(suite)
    body = ElementTree.tostring(suite, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{body}\n'


def add_test_case(suite: ElementTree.Element, subject: str, name: str) -> ElementTree.Element:
    """Add a test case of a subject."""
    return ElementTree.SubElement(
        suite, "testcase", classname=printable(subject), name=printable(name)
    )


def add_property(properties: ElementTree.Element, name: str, value: object) -> None:
    """Add a name and a value."""
    text = printable(str(value))
    ElementTree.SubElement(properties, "property", name=printable(name), value=text)


def add_problem(case: ElementTree.Element, found: Sequence[Finding], more: str = "") -> None:
    """Add one failure or error: the first finding's kind and message, the text of all."""
    finding = found[0]
    outcome = finding.verdict.outcome
    kind = "error" if outcome in ("ERROR", "INCONCLUSIVE") else "failure"
    message = finding.reasons[0].splitlines()[0] if finding.reasons else finding.title
    problem = ElementTree.SubElement(case, kind, type=outcome, message=printable(message))
    problem.text = "\n\n".join(filter(None, [*map(render_finding, found), more]))


def _key(finding: Finding) -> tuple[str, int, str]:
    return (finding.verdict.case_id, finding.verdict.tp_size, finding.verdict.dtype)
