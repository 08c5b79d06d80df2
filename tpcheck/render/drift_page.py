"""A drift report as one self-contained HTML page: the verdict, the numbers, the plots.

Requirement: the first line is run's, what fails comes next, then what was measured, in sentences,
tables and plots that hold the same numbers; where something is missing the page says why. Hundreds
of verdicts leave it usable: tables and plots are bounded, and say what they leave out.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tpcheck.records import Report
from tpcheck.render import fallback, width
from tpcheck.render.drift_content import (
    DriftContent,
    drift_content,
    filled_table,
    no_numbers,
    remarks,
    title,
)
from tpcheck.render.drift_plots import layer_plot, ratio_plot, ulp_plot
from tpcheck.render.html import common
from tpcheck.render.pages import MAX_VERDICT_ROWS, page
from tpcheck.render.plots import Plot
from tpcheck.render.rank_plot import rank_plot
from tpcheck.render.width_plot import width_plot

MAX_SENTENCES = 40

_SHORT = {
    "ratio": "drift against degree",
    "layers": "by depth",
    "ulp": "in ulp",
    "ranks": "rank by layer",
    "width": "what width costs",
}


def render_drift_page(report: Report) -> str:
    """Return the whole page.

    Raises:
        TPCheckError: jinja2 or matplotlib is missing.
    """
    content = drift_content(report)
    plots = [ratio_plot, layer_plot, ulp_plot, rank_plot, width_plot]
    return page(
        "drift.html.j2",
        **common(report),
        dtypes=[_dtype(content, name) for name in content.dtypes()],
        no_numbers=no_numbers(content)[:MAX_SENTENCES],
        oracle=_oracle(content),
        plots=[_shown(plot(content)) for plot in plots],
        costs=[_cost(one) for one in content.width],
        effects=_effects(content),
    )


def _dtype(content: DriftContent, dtype: str) -> dict[str, Any]:
    rows = content.rows_in(dtype)
    headers, filled = filled_table(rows)
    shown, degree = [], None
    for row, one in filled[:MAX_VERDICT_ROWS]:
        shown.append(
            {
                "deployed": row["deployed"],
                "next": degree is not None and row["tp_size"] != degree,
                "outcome": row["outcome"],
                "cells": one,
            }
        )
        degree = row["tp_size"]
    sentences = content.sentences_in(dtype)
    return {
        "name": dtype,
        "title": title(dtype, rows),
        "columns": headers,
        "rows": shown,
        "rows_left_out": max(0, len(filled) - MAX_VERDICT_ROWS),
        "sentences": sentences[:MAX_SENTENCES],
        "sentences_left_out": max(0, len(sentences) - MAX_SENTENCES),
        "remarks": remarks(rows)[:MAX_SENTENCES],
    }


def _oracle(content: DriftContent) -> str:
    held = [one.profile["oracle"] for one in content.profiles if one.profile is not None]
    return ", ".join(dict.fromkeys(str(one) for one in held if one)) or "no oracle"


def _shown(plot: Plot) -> dict[str, Any]:
    from markupsafe import Markup  # jinja2's own

    values = asdict(plot)
    # cleaned in figures.py: only shapes and escaped text are left
    values["svg"] = Markup(plot.svg)
    long = len(plot.headers) - 1 if plot.name in ("ratio", "ranks") else -1
    return {**values, "short": _SHORT[plot.name], "long": long}


def _cost(cost: Any) -> dict[str, Any]:
    return {
        "dtype": f"{cost['dtype']}, on {cost['measured_on']}",
        "columns": width.COLUMNS,
        "rows": width.degree_rows(cost),
        "reasons": width.degree_reasons(cost),
        "recommendation": cost["recommendation"],
    }


def _effects(content: DriftContent) -> dict[str, Any] | None:
    if not content.fallback:
        return None
    shown = fallback.effect_rows(content.fallback)
    return {
        "title": fallback.effect_title(content.fallback),
        "columns": fallback.COLUMNS,
        "rows": shown[:MAX_VERDICT_ROWS],
        "remarks": fallback.effect_remarks(content.fallback),
    }
