"""A drift report's page, Markdown and JUnit say what the report says, and nothing breaks out."""

from __future__ import annotations

import builtins
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path as File
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.drift_reports import entry, profile, report_of, usual
from tpcheck.cli_commands.output import Outputs
from tpcheck.errors import TPCheckError
from tpcheck.records import OUTCOMES, Check, Report
from tpcheck.render import drift_markdown, pages
from tpcheck.render.drift import render_drift
from tpcheck.render.drift_content import NOT_VALID, drift_content
from tpcheck.render.drift_junit import render_drift_junit
from tpcheck.render.drift_markdown import render_drift_markdown
from tpcheck.render.drift_page import render_drift_page
from tpcheck.render.drift_plots import ratio_plot
from tpcheck.render.plots import MAX_TABLE
from tpcheck.render.rank_plot import rank_plot
from tpcheck.report import from_json, to_json

HOSTILE = '</pre></svg></style><script>x</script>"onload="y --> ]]>|`````\x1b[2J'
HOSTILE += "\x00 $\\frac{ @t \udc80\n| s"
EVERYTHING = {"width": True, "fallback": True}


class Page(HTMLParser):
    """What a browser would make of a page: its tags, attributes, tables and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] not in ("style", "title"):
            self.texts.append(data.strip())


def page_of(report: Report) -> Page:
    return Page(render_drift_page(report))


@cache
def usual_page() -> str:
    return render_drift_page(usual(1.5, **EVERYTHING))


def test_the_numbers_on_the_page_are_the_reports() -> None:
    report = usual(1.5, **EVERYTHING)
    page = Page(usual_page())
    for row in report.drift["rows"]:
        wire = f"{row['reduction']}{' *' if row['deployed'] else ''}"
        low, high = row["interval"]
        own = [str(row["tp_size"]), wire]
        table = [f"{row['ratio']:.2f} (1.25) [{low:.2f}, {high:.2f}]"]
        beside = [f"{row['ratio']:.4g}", f"{low:.4g} to {high:.4g}", "1.25", "yes"]
        assert any(line[:2] == own and line[3:4] == table for line in page.rows), row
        assert ["bfloat16", *own, *beside] in page.rows
    for fqn, tp1, tpn in (("layers.0", "1", "1.2"), ("layers.1", "2", "2.4")):
        assert ["bfloat16", "4", fqn, tp1, tpn, "1.2"] in page.rows
    assert ["bfloat16", "2", "1 ulp", "30", "30 %"] in page.rows
    assert ["bfloat16", "4", "layers.1.mlp.down_proj", "+0.25, +0.25, +0.25, +0.50"] in page.rows
    assert ["bfloat16", "2", "1048576", "", "", "4 ms", "262 MB/s"] in page.rows
    assert ["2", "5 ms", "4 ms - 6 ms", "3 ms", "60 %", "1.00"] in page.rows
    assert any(line[:4] == ["2", "bfloat16", "full", "1.5 -> 1"] for line in page.rows)


def test_titles_say_what_the_plots_show() -> None:
    texts = Page(usual_page()).texts
    for title in (
        "As deployed, TP=N is at most 1.62 x as far from float64 as TP=1 (bfloat16, tp 4)",
        "By depth, TP=N leaves TP=1 most after layers.1: 1.2 x (bfloat16, tp 4)",
        "99 % of outputs are within 2 ulp of TP=1 where they are furthest (bfloat16, tp 2)",
        "No rank's term is counted wrongly: at most 0.5 standard errors, 8 would count",
        "Communication is at most 60 % of a forward (tp 2, bfloat16)",
    ):
        assert title in texts


def test_a_page_with_another_ratio_is_another_page() -> None:
    one, other = (ratio_plot(drift_content(usual(ratio))) for ratio in (1.5, 1.51))
    assert one.rows != other.rows
    assert one.title != other.title
    assert one.svg != other.svg
    assert one.svg in usual_page()
    assert other.svg not in usual_page()


def test_marks_stand_where_the_numbers_are() -> None:
    """Ratios of 1, 2 and 3 at one degree each are as far apart on the plot as each other."""
    made = [
        (
            size,
            "bfloat16",
            "PASS",
            profile(entry("bfloat16", float(i), deployed=True), tp_size=size),
        )
        for i, size in ((1, 2), (2, 4), (3, 8))
    ]
    plot = ratio_plot(drift_content(report_of(*made))).svg
    (marks,) = [
        found
        for group in re.findall(r'<g clip-path="[^"]*">\s*((?:<use [^>]*></use>\s*)+)</g>', plot)
        if len({*(found := [float(y) for y in re.findall(r' y="([\d.]+)"', group)])}) == 3
    ]
    assert marks[0] - marks[1] == pytest.approx(marks[1] - marks[2], rel=1e-3)
    assert marks[0] > marks[1], "up is more"


@pytest.mark.parametrize(("predicted", "marks"), [(None, 1), (1.25, 2)])
def test_a_prediction_shows_at_one_degree_alone(predicted: float | None, marks: int) -> None:
    """A line needs two points: at a single degree it would be none."""
    said = {"ratio": predicted, "valid": True, "reason": ""}
    one = profile(entry("bfloat16", 1.5, deployed=True, prediction=said))
    svg = ratio_plot(drift_content(report_of((4, "bfloat16", "PASS", one)))).svg
    drawn = re.findall(r'<g clip-path="[^"]*">\s*(?:<use [^>]*></use>\s*)+</g>', svg)
    assert len(drawn) == marks


@pytest.mark.parametrize("degrees", [62, 5])
def test_degrees_are_written_as_far_as_there_is_room(degrees: int) -> None:
    made = [
        (size, "bfloat16", "PASS", profile(entry("bfloat16", 1.5, deployed=True), tp_size=size))
        for size in range(2, 2 + degrees)
    ]
    svg = ratio_plot(drift_content(report_of(*made))).svg
    labels = [text for text in re.findall(r">\s*(\d+)\s*</text>", svg) if "." not in text]
    assert len(labels) <= 16
    assert labels[0] == "2"


def test_the_same_report_gives_the_same_bytes_and_so_does_its_json() -> None:
    assert render_drift_page(from_json(to_json(usual(1.5, **EVERYTHING)))) == usual_page()


def test_a_rank_that_is_counted_wrongly_leads_its_plot() -> None:
    held = profile(entry("bfloat16", 1.5, deployed=True), z=-23.0)
    plot = rank_plot(drift_content(report_of((4, "bfloat16", "PASS", held))))
    said = "rank 3 in layers.1.mlp.down_proj (bfloat16, tp 4), 23 standard errors from once"
    assert plot.title == f"A term is counted wrongly: {said}"
    assert len(re.findall(r"fill: var\(--h5\)", plot.svg)) == 2, "one cell, and the legend"
    assert ">23</text>" in plot.svg


def test_a_prediction_that_does_not_hold_looks_like_none() -> None:
    odd = {"prediction": {"ratio": 3.0, "valid": False, "reason": "measured is 0.5 x it"}}
    held = profile(entry("bfloat16", 1.5, deployed=True, **odd))
    page = render_drift_page(report_of((4, "bfloat16", "PASS", held)))
    assert f"1 of 1 hollow: {NOT_VALID}" in page
    assert "no: measured is 0.5 x it" in page
    assert f"{NOT_VALID}: measured is 0.5 x it (bfloat16 at tp 4)" in page
    assert "1.50 (not valid)" in page
    assert "hollow" not in usual_page()


def test_nothing_a_subject_names_becomes_markup() -> None:
    odd = {"prediction": {"ratio": 3.0, "valid": False, "reason": HOSTILE}}
    held = profile(
        entry("bfloat16", 1.5, deployed=True, **odd), tp_size=2, layers=(HOSTILE, f"{HOSTILE}.1")
    )
    clean, hostile = (
        report_of(
            (2, "bfloat16", "PASS", found),
            (4, "bfloat16", "DRIFT", None),
            subject=subject,
            reason=reason,
            **EVERYTHING,
        )
        for found, subject, reason in (
            (profile(entry("bfloat16", 1.5, deployed=True, **odd), tp_size=2), "s", "r"),
            (held, HOSTILE, HOSTILE),
        )
    )
    text = render_drift_page(hostile)
    page, plain = Page(text), page_of(clean)
    assert "script" not in page.tags
    assert sorted(page.tags) == sorted(plain.tags), "the same elements, whatever the names are"
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "\x1b" not in text
    text.encode("utf-8")
    markdown = render_drift_markdown(hostile)
    for table in re.split(r"\n\n", markdown):
        lines = [line for line in table.splitlines() if line.startswith("| ")]
        assert len({line.replace("\\|", "").count("|") for line in lines}) <= 1
    assert "@t" not in re.sub(r"`{6,}.*?`{6,}", "", markdown, flags=re.DOTALL)
    suite = ElementTree.fromstring(render_drift_junit(hostile).encode())
    assert len(suite.findall("testcase/failure")) == 1


def test_no_page_needs_anything_from_elsewhere() -> None:
    text = usual_page()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "image", "foreignobject"} & set(page.tags)
    assert "http" not in text.replace("http-equiv", "")
    assert not re.search(r"@import|url\((?!#)", text)
    targets = [value for name, value in page.attributes if name in ("href", "src")]
    assert targets
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {str(target).removeprefix("#") for target in targets} <= set(ids)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_report_without_numbers_says_what_it_can(outcome: str) -> None:
    report = report_of((2, "bfloat16", outcome, None), reason="why not")
    page = page_of(report)
    assert next(filter(None, page.texts)).startswith(outcome)
    assert "svg" not in page.tags
    reasons = [text for text in page.texts if text.startswith("No plot: ")]
    assert len(reasons) == 5
    assert [text for text in reasons if "why not" in text] == reasons[:4]
    assert "No drift was measured: why not (tp 2 bfloat16)" in page.texts
    assert "why not" in render_drift_markdown(report)
    suite = ElementTree.fromstring(render_drift_junit(report))
    red = int(suite.get("failures", "0")) + int(suite.get("errors", "0"))
    assert red == (outcome != "PASS")


def test_the_terminal_says_too_why_nothing_was_measured() -> None:
    held = profile(entry("bfloat16", 1.5, deployed=True), tp_size=2)
    reason = "a run for it failed: rank 0 raised RuntimeError: no"
    report = report_of((2, "bfloat16", "PASS", held), (4, "bfloat16", "PASS", None), reason=reason)
    assert f"no drift was measured: {reason} (tp 4 bfloat16)" in render_drift(report).splitlines()
    skipped = Check("SKIPPED", "the run did not finish", {"profile": None})
    verdict = replace(report.verdicts[1], outcome="ERROR", checks={"drift": skipped})
    stopped = render_drift(replace(report, verdicts=(verdict,), drift=None))
    assert "no drift was measured" not in stopped  # the check's own reason stands below
    assert "the run did not finish" in stopped


def test_a_report_without_verdicts_or_without_drift_is_a_page_too() -> None:
    for report in (report_of(), replace(report_of(), drift=None)):
        assert "INCONCLUSIVE" in render_drift_page(report)
        assert "INCONCLUSIVE" in render_drift_markdown(report)
        assert ElementTree.fromstring(render_drift_junit(report)).get("errors") == "1"


def test_an_overflow_is_named_and_no_ratio_is_made_up() -> None:
    lost = entry("bfloat16", None, deployed=True, prediction={"valid": False, "reason": "overflow"})
    lost |= {"error": {"epsilons": 1.0, "relative_rms": 0.1}, "scores": None}
    lost["prediction"]["ratio"] = None
    report = report_of((4, "bfloat16", "DRIFT", profile(lost)), reason="overflow")
    page = page_of(report)
    assert any("overflow" in row for row in page.rows)
    assert "No plot: overflow: 7 outputs are not finite where the oracle is" in page.texts


def test_hundreds_of_verdicts_stay_readable() -> None:
    layers = tuple(f"model.layers.{i}" for i in range(60))
    made = [
        (size, dtype, "DRIFT", found)
        for size in range(2, 14)
        for found in [profile(entry("bfloat16", 1.5, deployed=True), tp_size=size, layers=layers)]
        for dtype in ("bfloat16", "float16")
        for _ in range(10)
    ]
    report = report_of(*made, reason="too far")
    text = render_drift_page(report)
    assert len(text) < 2_000_000
    page = Page(text)
    assert len(page.rows) <= pages.MAX_VERDICT_ROWS + 4 * (MAX_TABLE + 1) + 2 * 13 + 1
    assert page.tags.count("pre") == pages.MAX_FINDINGS
    for said in (
        "and 190 more that are not PASS: the JSON report has all",
        "and 40 more rows: the JSON report has all",
        "15 more degrees and dtypes are in the JSON only",
        "neighbouring layers share a row, which shows each rank's largest",
        "the table leaves out 1280 rows; the JSON has them",
    ):
        assert said in page.texts
    assert len(render_drift_markdown(report).splitlines()) <= drift_markdown.MAX_LINES
    assert len(render_drift_markdown(report).encode()) < 1 << 18
    assert len(ElementTree.fromstring(render_drift_junit(report)).findall("testcase")) == 24


def test_markdown_never_leaves_out_what_is_deployed() -> None:
    wires = [entry(f"w{i}_wire", 2.0) for i in range(9)]
    made = [
        (size, "bfloat16", "PASS", profile(*wires, entry("bfloat16", 1.5, deployed=True)))
        for size in (2, 4, 8)
    ]
    markdown = render_drift_markdown(report_of(*made))
    shown = [line for line in markdown.splitlines() if line.startswith("| ") and "wire" in line]
    assert [f"| {size} | bfloat16 \\* |" in markdown for size in (2, 4, 8)] == [True] * 3
    assert len(shown) - 1 == drift_markdown.MAX_ROWS - 3
    assert "and 18 more rows: the JSON report has all" in markdown


def test_markdown_leads_with_alarms() -> None:
    report = usual()
    alarm = {
        "about": "reduction",
        "dtype": "bfloat16",
        "tp_size": 2,
        "text": "ALARM",
        "raised": "wider",
    }
    calm = {"about": "begins", "dtype": "bfloat16", "tp_size": 4, "text": "calm"}
    report = replace(report, drift={**report.drift, "findings": [calm, alarm]})
    lines = [line for line in render_drift_markdown(report).splitlines() if line.startswith("- tp")]
    assert lines == ["- tp 2: ALARM", "- tp 4: calm"]


def test_junit_has_a_case_per_degree_and_dtype_with_the_numbers() -> None:
    report = usual(1.5)
    suite = ElementTree.fromstring(render_drift_junit(report))
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == ["drift tp=2 bfloat16", "drift tp=4 bfloat16"]
    held = {one.get("name"): one.get("value") for one in cases[0].iter("property")}
    row = report.drift["rows"][0]
    assert float(held["ratio"]) == row["ratio"] == 1.5
    assert [float(held[name]) for name in ("ratio_low", "ratio_high")] == row["interval"]
    assert float(held["ratio.int4_wire"]) == 15.0
    assert (held["reduction"], held["predicted"], held["flips"]) == ("bfloat16", "1.25", "2")


def test_junit_is_as_its_schema_wants() -> None:
    held = profile(entry("bfloat16", 1.5, deployed=True))
    made = [(4, "bfloat16", outcome, held) for outcome in ("PASS", "DRIFT", "ERROR", "DRIFT")]
    suite = ElementTree.fromstring(render_drift_junit(report_of(*made, reason="x")))
    assert suite.tag == "testsuite"
    assert {child.tag for child in suite} == {"properties", "testcase"}
    (case,) = suite.findall("testcase")
    assert set(case.attrib) == {"classname", "name"}
    assert [child.tag for child in case] == ["properties", "error"], "the worst, once"
    assert case[1].get("type") == "ERROR"
    assert (case[1].text or "").count("repro:") == 3
    assert (suite.get("tests"), suite.get("errors"), suite.get("failures")) == ("1", "1", "0")
    for one in suite.iter("property"):
        assert set(one.attrib) == {"name", "value"}
        assert not list(one)


def test_outputs_write_what_belongs_to_a_drift_report(tmp_path: File) -> None:
    paths = [tmp_path / name for name in ("r.html", "r.xml", "r.md")]
    outputs = Outputs(None, *paths, plots=True)
    outputs.assert_writable()
    report = usual(1.5, **EVERYTHING)
    outputs.write(report)
    page, junit, markdown = (path.read_text() for path in paths)
    assert page == usual_page()
    assert junit.rstrip() == render_drift_junit(report).rstrip()
    assert markdown == render_drift_markdown(report)
    outputs.write(replace(report, drift=None))
    assert "plot-ratio" not in paths[0].read_text()


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_what_pages_need_is_missed_before_a_run(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: File
) -> None:
    real = builtins.__import__

    def imported(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", imported)
    outputs = Outputs(html=tmp_path / "x.html", plots=True)
    with pytest.raises(TPCheckError, match=rf"--html: {missing} .*pip install 'tpcheck\[report\]'"):
        outputs.assert_writable()
    assert not list(tmp_path.iterdir())
    Outputs(markdown=tmp_path / "x.md", plots=True).assert_writable()
    if missing == "matplotlib":
        Outputs(html=tmp_path / "x.html").assert_writable()


def test_loading_the_renderers_loads_no_library_of_theirs() -> None:
    code = (
        "import sys, tpcheck.render.html, tpcheck.render.drift_page, tpcheck.render.drift_junit\n"
        "import tpcheck.render.drift_markdown\n"
        "assert not {'matplotlib', 'jinja2', 'torch', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_templates_are_part_of_the_package() -> None:
    held = files("tpcheck.render") / "templates"
    names = {one.name for one in held.iterdir()}
    assert names == {"base.html.j2", "drift.html.j2", "run.html.j2", "verdicts.html.j2"}
    for name in names:
        assert "| safe" not in (held / name).read_text(), "everything is escaped"
        assert "autoescape" not in (held / name).read_text()


def test_the_example_is_whole_and_names_no_machine() -> None:
    example = File(__file__).parents[2] / "examples" / "drift.html"
    text = example.read_text(encoding="utf-8")
    assert example.stat().st_size < 700_000
    assert example.with_suffix(".png").stat().st_size < 200_000
    page = Page(text)
    assert page.tags.count("svg") == 5
    assert not [said for said in page.texts if said.startswith(("No plot: ", "No drift was"))]
    assert not re.search(r"(/home|/root|/tmp|/work|/Users|[A-Z]:\\)", text)
