"""The colours of pages and plots, once for light and once for dark.

Requirement: one page reads well in both, for colour-blind readers too. A plot is drawn in inks,
placeholders that become CSS variables; the page gives each a value per scheme. Text stands out from
its paper by at least 4.5 : 1, marks and lines by 3 : 1 (tests/unit/test_palette.py), and no meaning
is carried by colour alone: series differ in marker and dash as well.

Source: hues after Okabe and Ito 2008, Color Universal Design, darkened or lightened until they
stand out; contrast as in WCAG 2.2, section 1.4.
"""

from __future__ import annotations

SERIES = 7
"""Colours of series; more of them start again, with other markers."""

HEAT_EDGES = (1.0, 2.0, 3.0, 5.0, 8.0)
"""Standard errors between two heats; from the last on it is no chance."""

LIGHT = {
    "paper": "#ffffff",
    "panel": "#f5f6f8",
    "ink": "#1b1f24",
    "muted": "#57606a",
    "grid": "#d8dce2",
    "link": "#0a58a6",
    "pass": "#146c33",
    "fail": "#b0181f",
    "warn": "#8a4b00",
    "unknown": "#57606a",
    "s0": "#0072b2",
    "s1": "#c44a00",
    "s2": "#007a5a",
    "s3": "#a8488e",
    "s4": "#866400",
    "s5": "#5b51c9",
    "s6": "#5f6368",
    "h0": "#eef3f8",
    "h1": "#c9dcee",
    "h2": "#9dc3e2",
    "h3": "#4f8fc4",
    "h4": "#1f5c94",
    "h5": "#b03c00",
    "t0": "#1b1f24",
    "t1": "#1b1f24",
    "t2": "#1b1f24",
    "t3": "#000000",
    "t4": "#ffffff",
    "t5": "#ffffff",
}
DARK = {
    "paper": "#11151a",
    "panel": "#1a2027",
    "ink": "#e6e9ed",
    "muted": "#a2acb8",
    "grid": "#323a44",
    "link": "#7cbcf0",
    "pass": "#5fce85",
    "fail": "#ff8a84",
    "warn": "#f0ae54",
    "unknown": "#a2acb8",
    "s0": "#56b4e9",
    "s1": "#f58c4b",
    "s2": "#35c79c",
    "s3": "#e69bcb",
    "s4": "#e3bf45",
    "s5": "#a9a3ff",
    "s6": "#b4bac2",
    "h0": "#1d2833",
    "h1": "#23405a",
    "h2": "#2b5f8c",
    "h3": "#4f94cd",
    "h4": "#9cc9ee",
    "h5": "#f58c4b",
    "t0": "#e6e9ed",
    "t1": "#e6e9ed",
    "t2": "#ffffff",
    "t3": "#000000",
    "t4": "#000000",
    "t5": "#000000",
}
_FIRST = 0x010200
INKS = {name: f"#{_FIRST + i:06x}" for i, name in enumerate(LIGHT)}
"""What a plot is drawn with: a placeholder per name."""

VARIABLES = {placeholder: f"var(--{name})" for name, placeholder in INKS.items()}


def series_ink(index: int) -> str:
    """Return the ink of the so-manieth series."""
    return INKS[f"s{index % SERIES}"]


def heat(size: float) -> int:
    """Return which heat a distance in standard errors has.

    Example:
        >>> heat(0.5), heat(-2.5), heat(8.0)
        (0, 2, 5)
    """
    return sum(abs(size) >= edge for edge in HEAT_EDGES)


def variables(scheme: dict[str, str]) -> str:
    """Return a scheme as CSS declarations."""
    return " ".join(f"--{name}: {value};" for name, value in scheme.items())
