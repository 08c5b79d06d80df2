"""What leaves matplotlib for a page: the same bytes, text as text, variables for inks."""

from __future__ import annotations

import builtins
import re
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from tpcheck.errors import TPCheckError
from tpcheck.render.figures import assert_matplotlib, label, log_ticks, plain_axes, svg_of
from tpcheck.render.palette import INKS

HOSTILE = '</text><script>x</script>"onload="x ]]> &amp; $\\frac{$ \x1b[2J \udc80 漢'


def drawn(figure: Any) -> None:
    axes = figure.subplots()
    axes.plot([1, 2], [1, 2], marker="o", color=INKS["s0"], label=HOSTILE)
    axes.bar([1], [1], hatch="///", color=INKS["s1"], edgecolor=INKS["paper"])
    plain_axes(axes, title=HOSTILE, x="x [1]", y="y [1]")
    axes.legend()


def svg(name: str = "plot-a", **said: str) -> str:
    words = {"title": HOSTILE, "description": HOSTILE} | said
    return svg_of(drawn, name=name, height_in=2.0, **words)


def test_the_same_figure_has_the_same_bytes_whatever_the_users_style() -> None:
    first = svg()
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "axes.grid": False}):
        assert svg() == first
    assert not re.search(r"<metadata|Matplotlib v|\d{4}-\d\d-\d\d", first)


def test_hostile_text_stays_text_and_is_no_mathematics() -> None:
    root = ElementTree.fromstring(svg())
    tags = {element.tag for element in root.iter()}
    assert tags <= {*"svg title desc defs clipPath pattern g path rect text tspan use".split()}
    names = {key for element in root.iter() for key in element.attrib}
    assert not [name for name in names if name.startswith("on")]
    texts = [element.text or "" for element in root.iter("text")]
    assert any("<script>" in text and "$\\frac{$" in text for text in texts)
    assert "\x1b" not in svg()
    svg().encode("utf-8")


def test_inks_are_variables_and_no_placeholder_is_left() -> None:
    made = svg()
    assert "var(--s0)" in made
    assert "var(--ink)" in made
    assert "#0102" not in made
    assert not re.search(r'(fill|stroke)="', made), "a variable counts in a style only"


def test_two_plots_share_no_identifier_and_point_at_their_own() -> None:
    one, other = svg("plot-a"), svg("plot-b")
    ids = [set(re.findall(r' id="([^"]+)"', text)) for text in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for text, own in zip((one, other), ids, strict=True):
        assert len(re.findall(r' id="', text)) == len(own)
        pointed = {*re.findall(r"url\(#([^)]+)\)", text), *re.findall(r'href="#([^"]+)"', text)}
        assert pointed
        assert pointed <= own


def test_nothing_is_fetched_and_who_cannot_see_is_told() -> None:
    made = svg(title="a title", description="what it shows")
    assert "http" not in made
    root = ElementTree.fromstring(made)
    assert root.get("role") == "img"
    told = {element.get("id"): element.text for element in root if element.tag in ("title", "desc")}
    assert [told[one] for one in root.get("aria-labelledby", "").split()] == [
        "a title",
        "what it shows",
    ]


def test_an_element_that_no_page_is_known_to_take_is_refused() -> None:
    with pytest.raises(ValueError, match="<image>"):
        svg_of(
            lambda figure: figure.subplots().imshow([[1.0, 2.0]]),
            name="plot-a",
            height_in=2.0,
            title="x",
            description="x",
        )


def test_without_matplotlib_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(TPCheckError, match=r"pip install 'tpcheck\[report\]'"):
        assert_matplotlib()


def test_names_are_one_line_of_bounded_length() -> None:
    assert label("a\nb\x07") == "a b\\x07"
    assert len(label("x" * 500, 40)) <= 43


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (0.003, 41.0), (2.0, 3.0), (1e-9, 1e9)])
def test_ticks_of_a_logarithmic_axis_enclose_what_is_shown(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert ticks == sorted(ticks)
    assert len(ticks) <= 24
