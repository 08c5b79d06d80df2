"""A report as JUnit XML, one test case per verdict, for CI systems that collect test results.

Requirement: a CI that reads this file is red whenever the exit code is not 0: an INCONCLUSIVE
verdict, or a report without verdicts, is an error and never a skip. Characters that XML cannot hold
are shown as escapes.
"""

from __future__ import annotations

from xml.etree import ElementTree

from tpcheck.records import PASS, Report
from tpcheck.render.content import Finding, findings, headline
from tpcheck.render.text import printable, render_finding


def render_junit(report: Report) -> str:
    """Return one test suite, named after the subject, as an XML document."""
    by_key = {_key(finding): finding for finding in findings(report)}
    suite = ElementTree.Element("testsuite", name=printable(f"tpcheck {report.subject}"))
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in {"headline": headline(report), **report.environment}.items():
        text = printable(str(value))
        ElementTree.SubElement(properties, "property", name=printable(str(name)), value=text)
    for verdict in report.verdicts:
        name = f"{verdict.case_id} tp={verdict.tp_size} {verdict.dtype}"
        case = _test_case(suite, report.subject, name)
        if verdict.outcome != PASS:
            _add_problem(case, by_key[verdict.case_id, verdict.tp_size, verdict.dtype])
    if not report.verdicts:
        case = _test_case(suite, report.subject, "anything compared")
        ElementTree.SubElement(case, "error", type=report.outcome, message=headline(report))
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", str(len(suite.findall("testcase/error"))))
    suite.set("skipped", "0")
    ElementTree.indent(suite)
    body = ElementTree.tostring(suite, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{body}\n'


def _key(finding: Finding) -> tuple[str, int, str]:
    return (finding.verdict.case_id, finding.verdict.tp_size, finding.verdict.dtype)


def _test_case(suite: ElementTree.Element, subject: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite, "testcase", classname=printable(subject), name=printable(name)
    )


def _add_problem(case: ElementTree.Element, finding: Finding) -> None:
    outcome = finding.verdict.outcome
    kind = "error" if outcome in ("ERROR", "INCONCLUSIVE") else "failure"
    message = finding.reasons[0].splitlines()[0] if finding.reasons else finding.title
    problem = ElementTree.SubElement(case, kind, type=outcome, message=printable(message))
    problem.text = render_finding(finding)
