"""A gate's decision as text, Markdown and JUnit XML. A function of its JSON.

Requirement: the first line says whether it may start; every reason stands there with the command
that settles it, unwrapped, so that it can be pasted; and what was asked and found is shown whole,
met or not, because who reads "allowed" wants to know what it rests on. A CI that reads the XML is
red whenever the exit code is not 0.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from tabulate import tabulate

from tpcheck.render.junit import add_test_case, counted_document
from tpcheck.render.markdown import escaped, fenced
from tpcheck.render.text import printable

Record = Mapping[str, Any]

WIDTH = 110
COLUMNS = ("policy", "where", "asked", "found", "met")
MAX_CELL = 27


def render_gate(decision: Record) -> str:
    """Return the decision as lines of text: the answer, every reason, every requirement."""
    blocks = [f"{headline(decision)}\n{_about(decision)}"]
    blocks += [_refusal(refusal) for refusal in decision["refusals"]]
    blocks.append(_table(decision))
    blocks += ["\n".join(_wrapped(note, "note: ")) for note in decision["notes"]]
    return "\n\n".join(blocks)


def render_gate_markdown(decision: Record) -> str:
    """Return the decision for a pull request comment or a CI job's summary."""
    blocks = [f"## {escaped(headline(decision))}", escaped(_about(decision))]
    for refusal in decision["refusals"]:
        blocks.append(f"{escaped(refusal['reason'])}\n\n{fenced(printable(refusal['settle']))}")
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    lines += [[escaped(cell) for cell in _cells(one)] for one in decision["requirements"]]
    blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    blocks += [f"- {escaped(note)}" for note in decision["notes"]]
    return "\n\n".join(blocks) + "\n"


def render_gate_junit(decision: Record) -> str:
    """Return one test suite with one test case per requirement, as an XML document."""
    subject = decision["subject"]
    suite = ElementTree.Element("testsuite", name=printable(f"tpcheck gate {subject}"))
    for one in decision["requirements"]:
        name = " ".join(filter(None, (one["key"], one["where"], one["asked"])))
        case = add_test_case(suite, subject, name)
        if not one["met"]:
            message = printable(one["reason"])
            problem = ElementTree.SubElement(case, "failure", type="REFUSED", message=message)
            problem.text = printable(f"{one['reason']}\nsettle: {one['settle']}")
    if decision["outcome"] != "ALLOWED" and all(one["met"] for one in decision["requirements"]):
        case = add_test_case(suite, subject, "anything asked")
        ElementTree.SubElement(case, "error", type="REFUSED", message=printable(headline(decision)))
    return counted_document(suite)


def headline(decision: Record) -> str:
    """Say in one line whether the deployment may start."""
    asked = decision["requirements"]
    lacking = sum(not one["met"] for one in asked)
    subject = printable(decision["subject"])
    if decision["outcome"] == "ALLOWED":
        return f"ALLOWED: {subject}: all {len(asked)} requirements are met"
    return f"REFUSED: {subject}: {lacking} of {len(asked)} requirements are not met"


def _about(decision: Record) -> str:
    report, digest = decision["report"], decision["policy_sha256"]
    made = f"of {report['created']}" if report["created"] else "without a date"
    said = f"report {made}, {report['outcome']} on {report['backend']}"
    return printable(f"{said}; policy {digest[:12]}; decided {decision['decided']}")


def _refusal(refusal: Record) -> str:
    # a command is never wrapped: it is there to be pasted
    reason = _wrapped(printable(refusal["reason"]), "- ")
    return "\n".join([*reason, f"  settle: {printable(refusal['settle'])}"])


def _table(decision: Record) -> str:
    rows = [[_fitted(cell) for cell in _cells(one)] for one in decision["requirements"]]
    table = tabulate(rows, headers=COLUMNS, tablefmt="simple", disable_numparse=True)
    return "\n".join(line.rstrip() for line in table.splitlines())


def _cells(one: Record) -> Sequence[str]:
    return (one["key"], one["where"], one["asked"], one["found"], "yes" if one["met"] else "NO")


def _fitted(cell: str) -> str:
    text = printable(cell).replace("\n", " ")
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."


def _wrapped(text: str, first: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )
