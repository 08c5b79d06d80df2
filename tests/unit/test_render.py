"""Every rendering says what the report says, and nothing a subject names can break out of it."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.records import OUTCOMES, Check, FirstDivergence, Path, Report, Verdict
from tpcheck.render.content import MAX_ROWS, at_least, findings, headline, rows
from tpcheck.render.html import render_html
from tpcheck.render.junit import render_junit
from tpcheck.render.markdown import render_markdown
from tpcheck.render.selfcheck import render_selfcheck
from tpcheck.render.text import WIDTH, render_text

RENDERERS = (render_text, render_html, render_junit, render_markdown)
GLOO = Path("gloo", {"all_reduce": 4}, False, ("backend gloo, not nccl",))
NCCL = Path("nccl", {"all_reduce": 4}, True, ())
HOSTILE = "</pre><script>x</script>]]>|`````\x1b[2J\x00 & @team \udc80\nsecond"


def verdict(outcome: str, tp_size: int = 2, case_id: str = "s0-b2-t16", text: str = "x") -> Verdict:
    bad = outcome not in ("PASS", "INCONCLUSIVE")
    structural = {"relative_rms": 0.24 if bad else 1e-15, "limit": 1e-12, "dtype": "float64"}
    checks = {
        "structural": Check("FAIL" if bad else "PASS", "too far" if bad else "", structural),
        "drift": Check("PASS", "", {"ratio": 1.1, "expected": 1.05, "limit": 3.0}),
    }
    return Verdict(
        case_id=case_id,
        tp_size=tp_size,
        dtype="bfloat16",
        outcome=outcome,
        checks=checks,
        reasons=() if outcome == "PASS" else (f"structural: {text}",),
        first_divergence=FirstDivergence(text, 1, "[0]", 3.0) if bad else None,
        repro="tpcheck run models.py:build --tp 2",
    )


def report(*verdicts: Verdict, path: Path = GLOO, subject: str = "models.py:build") -> Report:
    return Report(subject, verdicts, {"torch": "2.13.0", "device": "cpu"}, path, "0.1.0")


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_the_first_line_starts_with_the_outcome(outcome: str) -> None:
    assert render_text(report(verdict(outcome))).startswith(outcome)


def test_the_headline_says_which_path_was_not_run() -> None:
    passing = report(verdict("PASS"))
    expected = "PASS (structure); deployed path not exercised: nccl"
    assert headline(passing) == expected
    for render in RENDERERS:
        assert expected in render(passing)
    assert "not exercised" not in render_text(report(verdict("PASS"), path=NCCL))


def test_a_pass_on_the_deployed_path_is_one_line() -> None:
    first = render_text(report(verdict("PASS"), verdict("PASS", 4), path=NCCL)).splitlines()[0]
    assert first == "PASS  models.py:build  tp 2, 4 · bfloat16 · nccl"


def test_drift_leads_with_what_judge_said_first() -> None:
    sentence = "same function; your tolerance 1e-2 is below this dtype's floor"
    drifted = verdict("DRIFT")
    drifted = Verdict(
        drifted.case_id, 2, "bfloat16", "DRIFT", drifted.checks, (sentence, "allclose: y")
    )
    assert headline(report(drifted, path=NCCL)) == f"DRIFT: {sentence}"


def test_every_line_fits_but_the_one_to_paste() -> None:
    many = [
        verdict(outcome, size, text="a long sentence " * 30)
        for size in (2, 16)
        for outcome in OUTCOMES
    ]
    for line in render_text(report(*many)).splitlines():
        assert len(line) <= WIDTH or line.startswith("  repro: ")


def test_three_findings_and_a_count_the_worst_first() -> None:
    text = render_text(
        report(*[verdict("DRIFT", size) for size in (2, 3, 4, 5)], verdict("WRONG", 8))
    )
    assert text.count("repro:") == 3
    assert "... and 2 more that are not PASS" in text
    assert text.index("WRONG  s0-b2-t16 tp=8") < text.index("DRIFT  s0-b2-t16 tp=2")


def test_many_passes_share_a_row_that_shows_the_largest_number() -> None:
    passes = [verdict("PASS", 2, case_id=f"s{i}-b2-t16") for i in range(MAX_ROWS)]
    worst = Check("PASS", "", {"relative_rms": 7e-13, "limit": 1e-12})
    odd = Verdict("s99-b2-t16", 2, "bfloat16", "PASS", {"structural": worst})
    shown = rows(report(*passes, odd, verdict("WRONG", 4)))
    assert [row[0] for row in shown] == ["s0-b2-t16", f"{MAX_ROWS + 1} cases"]
    assert shown[1][4] == "7e-13 / 1e-12"


def test_a_number_that_was_not_finite_is_named_and_not_shown_as_zero() -> None:
    checks = {"drift": Check("FAIL", "overflow", {"ratio": None, "limit": 3.0})}
    text = render_text(report(Verdict("s0-b1-t1", 2, "float16", "DRIFT", checks)))
    assert "not finite / 3" in text
    assert "ratio not finite, limit 3" in text


def test_skipped_checks_are_named_with_their_reason_and_count() -> None:
    checks = {"tiling": Check("SKIPPED", "the subject exposes no shards")}
    text = render_text(report(Verdict("s0-b1-t1", 2, "float16", "INCONCLUSIVE", checks)))
    assert "skipped  " in text
    assert "tiling: the subject exposes no shards (in 1 verdict)" in text


def test_an_error_shows_every_rank_and_both_ends_of_a_long_stack() -> None:
    stack = "rank 0 stack:\n" + "\n".join(f"line {i}" for i in range(100))
    reasons = (
        "rank 3 was killed by SIGKILL",
        *[f"rank {i} in flight: #5" for i in range(8)],
        stack,
    )
    text = render_text(report(Verdict("s0-b1-t1", 8, "float16", "ERROR", {}, reasons)))
    assert "rank 7 in flight: #5" in text
    assert "line 0\n" in text
    assert "line 99" in text
    assert "... 76 more lines" in text


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_ci_that_reads_junit_is_red_unless_pass(outcome: str) -> None:
    suite = ElementTree.fromstring(render_junit(report(verdict("PASS"), verdict(outcome, 4))))
    red = int(suite.get("failures", "0")) + int(suite.get("errors", "0"))
    assert red == (outcome != "PASS")
    assert len(suite.findall("testcase")) == int(suite.get("tests", "0")) == 2


def test_a_report_without_verdicts_is_inconclusive_and_red_everywhere() -> None:
    empty = report()
    assert render_text(empty).startswith("INCONCLUSIVE")
    assert ElementTree.fromstring(render_junit(empty)).get("errors") == "1"
    for render in RENDERERS:
        assert "INCONCLUSIVE" in render(empty)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)


def test_hostile_names_stay_text_in_every_rendering() -> None:
    hostile = report(verdict("WRONG", case_id=HOSTILE, text=HOSTILE), subject=HOSTILE)
    assert "\x1b" not in render_text(hostile)
    tags = _Tags()
    tags.feed(render_html(hostile))
    assert "script" not in tags.tags
    page = render_html(hostile)
    assert page.count("<pre>") == page.count("</pre>") == 1
    suite = ElementTree.fromstring(render_junit(hostile).encode())
    assert len(suite.findall("testcase/failure")) == 1
    markdown = render_markdown(hostile)
    table = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert len(table) == 3
    assert {line.replace("\\|", "").count("|") for line in table} == {9}
    assert "``````text" in markdown
    for render in RENDERERS:
        render(hostile).encode("utf-8")


def test_markdown_links_nothing_that_a_subject_names() -> None:
    name = "https://x.example/a WWW.x.example ftp://x.example"
    shown = render_markdown(report(verdict("WRONG", case_id=name), subject="models.py:build"))
    outside = "".join(shown.split("```")[::2])
    assert "x.example" in outside
    assert "://" not in outside
    assert "www." not in outside.lower()


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_a_tolerance_that_is_typed_back_is_enough(needed: float) -> None:
    assert needed <= float(at_least(needed)) <= needed * 1.011


def test_html_needs_nothing_from_elsewhere() -> None:
    page = render_html(report(verdict("WRONG")))
    assert "http" not in page.replace("http-equiv", "")
    assert "src=" not in page
    assert page.startswith("<!doctype html>")


def test_findings_hold_what_to_paste_and_one_thing_to_do() -> None:
    for outcome in OUTCOMES:
        for finding in findings(report(verdict(outcome))):
            assert finding.repro.startswith("tpcheck run ")
            assert finding.next


def test_a_module_whose_input_is_off_is_not_what_to_look_at() -> None:
    wrong = verdict("WRONG")
    detail = "relative rms 1; its input is off already on rank 1: look at what comes before it"
    wrong = replace(wrong, first_divergence=FirstDivergence("layers.0.mlp", 1, detail=detail))
    (finding,) = findings(report(wrong))
    assert finding.next == "look at what gives layers.0.mlp its input"


SELFCHECK_FAULT = {
    "fault": "double_bias",
    "thread": "owner/repo#1",
    "expected": "structural",
    "caught_by": ["structural", "drift"],
    "first_stage": "structural",
    "cases_needed": 3,
    "cases_median": 1.5,
    "missed": [],
    "tp_sizes": [2, 4],
    "drift": {"bfloat16": [2, 4], "float32": [4]},
    "drift_missed": [],
    "casts": [2, 4],
    "reason": "why not",
    "survived": False,
}
SELFCHECK_TIER = {"name": "float64", "caught": 9, "planted": 9, "lower": 0.6637, "upper": 1.0}


def selfcheck_of(*faults: dict, idle: tuple[str, ...] = ()) -> str:
    return render_selfcheck(
        {"faults": faults, "tiers": [SELFCHECK_TIER], "idle_checks": list(idle)}
    )


def test_selfcheck_says_what_caught_each_fault_and_what_drift_alone_would_have_seen() -> None:
    seen_everywhere = SELFCHECK_FAULT | {"fault": "y", "drift": {"bfloat16": [2, 4]}}
    text = selfcheck_of(SELFCHECK_FAULT, seen_everywhere)
    assert text.startswith("PASS: 2 of 2 planted faults are caught\n")
    assert "float64" in text
    assert "9 of 9 at the first case, 95 % within 66.4 % to 100.0 %" in text
    *_, row, other = text.splitlines()
    assert re.split(r"  +", row) == [
        "double_bias",
        "owner/repo#1",
        "structural",
        "structural",
        "1.5, at most 3",
        "all",
        "tp 4",
        "why not",
    ]
    assert "why not" not in other, "a reason is for what drift misses"


def test_selfcheck_leads_with_what_survived() -> None:
    blind = SELFCHECK_FAULT | {
        "fault": "x",
        "caught_by": [],
        "first_stage": "",
        "cases_needed": None,
        "cases_median": None,
        "missed": ["tp=2 bfloat16"],
        "drift": {"bfloat16": [], "float32": []},
        "survived": True,
    }
    text = selfcheck_of(SELFCHECK_FAULT, blind)
    assert text.startswith("FAIL: 1 of 2 planted faults are caught; survived: x\n")
    assert text.index("structural: SURVIVED, missed at tp=2 bfloat16") < text.index("double_bias")
    unseen = SELFCHECK_FAULT | {"drift_missed": ["float32"], "survived": True}
    assert "SURVIVED, drift missed it in float32" in selfcheck_of(unseen)


def test_selfcheck_fails_for_a_check_that_caught_nothing() -> None:
    text = selfcheck_of(SELFCHECK_FAULT, idle=("tiling", "decode"))
    assert text.splitlines()[0] == (
        "FAIL: 1 of 1 planted faults are caught; no fault is caught by: tiling, decode"
    )
