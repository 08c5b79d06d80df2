"""Colours of pages and plots: text and marks stand out in both schemes, and do not look alike."""

from __future__ import annotations

import itertools

import pytest

from tpcheck.render.palette import DARK, HEAT_EDGES, INKS, LIGHT, SERIES, heat

SCHEMES = pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance."""
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))


def linear(colour: str) -> list[float]:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_measure_is_that_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@SCHEMES
def test_text_stands_out_from_its_paper(scheme: dict[str, str]) -> None:
    for name in ("ink", "muted", "link", "pass", "fail", "warn", "unknown"):
        for paper in ("paper", "panel"):
            assert contrast(scheme[name], scheme[paper]) >= 4.5, (name, paper)


@SCHEMES
def test_marks_stand_out_from_their_paper(scheme: dict[str, str]) -> None:
    for i in range(SERIES):
        assert contrast(scheme[f"s{i}"], scheme["paper"]) >= 3, i


@SCHEMES
def test_numbers_in_cells_can_be_read(scheme: dict[str, str]) -> None:
    for i in range(len(HEAT_EDGES) + 1):
        assert contrast(scheme[f"t{i}"], scheme[f"h{i}"]) >= 4.5, i


@SCHEMES
def test_more_heat_looks_like_more(scheme: dict[str, str]) -> None:
    levels = [contrast(scheme[f"h{i}"], scheme["paper"]) for i in range(len(HEAT_EDGES))]
    assert levels == sorted(levels)
    assert levels[-1] >= 3


def without_green_cones(colour: str) -> tuple[float, ...]:
    """Linear RGB as a deuteranope sees it: Vienot, Brettel and Mollon 1999."""
    red, green, blue = linear(colour)
    one = 0.29275 * red + 0.70725 * green
    return (one, one, -0.02234 * red + 0.02234 * green + blue)


@SCHEMES
def test_neighbouring_series_differ_without_green_cones(scheme: dict[str, str]) -> None:
    for one, other in itertools.pairwise(f"s{i}" for i in range(SERIES)):
        a, b = without_green_cones(scheme[one]), without_green_cones(scheme[other])
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 0.08, (one, other)


def test_both_schemes_have_a_value_for_every_ink() -> None:
    assert set(LIGHT) == set(DARK) == set(INKS)
    assert len(set(INKS.values())) == len(INKS)
    assert not set(INKS.values()) & {*LIGHT.values(), *DARK.values()}


def test_what_counts_has_a_heat_of_its_own() -> None:
    assert [heat(z) for z in (0.0, 1.0, -2.5, 4.0, 7.9, 8.0, -900.0)] == [0, 1, 2, 3, 4, 5, 5]
