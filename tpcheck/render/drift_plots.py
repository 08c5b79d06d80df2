"""The plots of a drift report: ratio, layers, ulp, ranks. Each says in its title what it shows.

Requirement: marks are measured, lines are predicted, and a prediction that does not hold looks like
none. Every plot has its numbers as a table and a description for who cannot see it; one without
data is a sentence that says why. What was left out to keep it readable is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tpcheck.render.content import number
from tpcheck.render.drift_content import NOT_VALID, DriftContent, Row
from tpcheck.render.drift_series import (
    MAX_KEYS,
    Depth,
    Key,
    at_most,
    depths,
    ulp_counts,
    why_none,
)
from tpcheck.render.figures import DASHES, MARKERS, label, log_axis, log_ticks, plain_axes, svg_of
from tpcheck.render.palette import INKS, series_ink
from tpcheck.render.plots import MAX_TABLE, Plot, cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NEAR = 1.5
"""Wires whose ratios stay below so many times the deployed one's share its axes."""


def ratio_plot(content: DriftContent) -> Plot:
    """Show the ratio against the degree, per dtype and wire, with what was predicted."""
    kept = [row for row in content.rows if row.get("ratio") is not None]
    if not kept:
        why = next((row["ratio_reason"] for row in content.rows if row.get("ratio_reason")), "")
        why = why or why_none(content, "ratio", "no ratio could be measured")
        return Plot("ratio", "Drift against degree", reason=why)
    panels = _ratio_panels(kept)
    own = [row for row in kept if row["deployed"]]
    title = "Drift against degree"
    if own:
        most = max(own, key=lambda row: row["ratio"])
        title = (
            f"As deployed, TP=N is at most {number(most['ratio'])} x as far from float64 as TP=1"
            f" ({most['dtype']}, tp {most['tp_size']})"
        )
    invalid = sum(bool(row["prediction_reason"]) for row in kept)
    return Plot(
        "ratio",
        title,
        "Marks are measured, with 95 % intervals; lines are what the rounding of this model's own"
        " partial sums predicts. Wires that round much coarser have axes of their own,"
        " logarithmic.",
        svg_of(
            lambda figure: _draw_ratio(figure, panels),
            name="plot-ratio",
            height_in=0.4 + 2.7 * len({dtype for dtype, _, _ in panels}),
            title=title,
            description=f"{len(kept)} ratios with their predictions; the table below has them.",
        ),
        ("dtype", "tp", "on the wire", "ratio", "95 %", "predicted", "prediction holds"),
        tuple(_ratio_row(row) for row in kept[:MAX_TABLE]),
        (f"{invalid} of {len(kept)} hollow: {NOT_VALID}",) if invalid else (),
    )


def _ratio_row(row: Row) -> tuple[str, ...]:
    between = row["interval"]
    return (
        row["dtype"],
        str(row["tp_size"]),
        f"{row['reduction']}{' *' if row['deployed'] else ''}",
        f"{row['ratio']:.4g}",
        "" if not between else f"{between[0]:.4g} to {between[1]:.4g}",
        "" if row["predicted"] is None else f"{row['predicted']:.4g}",
        f"no: {row['prediction_reason']}" if row["prediction_reason"] else "yes",
    )


def _ratio_panels(rows: Sequence[Row]) -> list[tuple[str, bool, list[Row]]]:
    """Return (dtype, far, rows): near wires share axes, those far from them have their own."""
    panels = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        here = [row for row in rows if row["dtype"] == dtype]
        own = [row["ratio"] for row in here if row["deployed"]] or [1.0]
        far = {r["reduction"] for r in here if r["ratio"] > _NEAR * max(own) and not r["deployed"]}
        panels.append((dtype, False, [row for row in here if row["reduction"] not in far]))
        panels.append((dtype, True, [row for row in here if row["reduction"] in far]))
    return [(dtype, far, held) for dtype, far, held in panels if held]


def _draw_ratio(figure: Figure, panels: Sequence[tuple[str, bool, list[Row]]]) -> None:
    dtypes = list(dict.fromkeys(dtype for dtype, _, _ in panels))
    wires = list(dict.fromkeys(row["reduction"] for _, _, rows in panels for row in rows))
    degrees = sorted({row["tp_size"] for _, _, rows in panels for row in rows})
    wide = 1 + any(far for _, far, _ in panels)
    grid = figure.subplots(len(dtypes), wide, squeeze=False)
    for cells in grid:
        for axes in cells:
            axes.set_visible(False)
    for dtype, far, rows in panels:
        axes = grid[dtypes.index(dtype)][int(far)]
        axes.set_visible(True)
        _draw_ratio_panel(axes, rows, wires, degrees)
        what = "coarse wires" if far else "near the deployed wire"
        plain_axes(axes, title=f"{dtype}: {what}", x="TP degree", y="error / TP=1's error [x]")
        if not far:
            axes.axhline(1.0, color=INKS["muted"], linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        if far:
            axes.set_yscale("log")
            measured = [row["ratio"] for row in rows]
            axes.set_yticks(log_ticks(min(measured), max(measured)))
            log_axis(axes.yaxis, lambda value: f"{value:g}")
        axes.legend(
            loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.3, borderaxespad=0.2
        )


def _draw_ratio_panel(
    axes: Axes, rows: Sequence[Row], wires: Sequence[str], degrees: Sequence[int]
) -> None:
    here = list(dict.fromkeys(row["reduction"] for row in rows))
    for i, wire in enumerate(here):
        at = wires.index(wire)
        own = sorted((r for r in rows if r["reduction"] == wire), key=lambda row: row["tp_size"])
        ink = series_ink(at)
        aside = (i - (len(here) - 1) / 2) * 0.1
        x = [degrees.index(row["tp_size"]) + aside for row in own]
        line = [_predicted(row) for row in own]
        # a tick too: one degree alone, or between two whose prediction does not hold, is no line
        dash = DASHES[at % len(DASHES)]
        axes.plot(x, line, color=ink, linestyle=dash, linewidth=1.2, marker="_", markersize=14)
        ends = [row["interval"] or (row["ratio"], row["ratio"]) for row in own]
        measured = [row["ratio"] for row in own]
        below = [max(0.0, y - low) for y, (low, _) in zip(measured, ends, strict=True)]
        above = [max(0.0, high - y) for y, (_, high) in zip(measured, ends, strict=True)]
        axes.errorbar(x, measured, yerr=[below, above], fmt="none", ecolor=ink, elinewidth=1.2)
        for holds in (True, False):
            kept = [j for j, row in enumerate(own) if (not row["prediction_reason"]) == holds]
            axes.plot(
                [x[j] for j in kept],
                [measured[j] for j in kept],
                linestyle="none",
                marker=MARKERS[at % len(MARKERS)],
                color=ink,
                markerfacecolor=ink if holds else INKS["paper"],
                label=label(f"{wire}{' *' if own[0]['deployed'] else ''}", 18) if holds else None,
            )
    step = -(-len(degrees) // 16)
    axes.set_xticks(range(0, len(degrees), step), [str(degree) for degree in degrees[::step]])
    axes.set_xlim(-0.5, len(degrees) - 0.5)


def _predicted(row: Row) -> float:
    """Return a prediction where it holds; a gap in the line where it does not."""
    if row["prediction_reason"] or row["predicted"] is None:
        return float("nan")
    return float(row["predicted"])


def layer_plot(content: DriftContent) -> Plot:
    """Show the error after each layer, TP=1 beside each degree."""
    found = depths(content)
    if not found:
        why = why_none(content, "depth", "no module was seen whose output every rank holds whole")
        return Plot("layers", "Error by depth", reason=why)
    title = "Error by depth: TP=1 and TP=N"
    worst = _worst_layer(found)
    if worst is not None:
        ratio, fqn, (dtype, tp_size) = worst
        title = f"By depth, TP=N leaves TP=1 most after {label(fqn)}: {ratio:.3g} x"
        title += f" ({dtype}, tp {tp_size})"
    rows = [
        (dtype, str(tp_size), label(fqn, 60), number(a), number(b), number(ratio))
        for (dtype, tp_size), one in found.items()
        for fqn, a, b, ratio in zip(one.layers, one.tp1, one.tpn, one.ratios(), strict=True)
    ]
    dtypes = list(dict.fromkeys(dtype for dtype, _ in found))
    return Plot(
        "layers",
        title,
        "Error of the residual stream after each layer against float64, in eps of the deployed"
        " dtype; dashed: TP=1.",
        svg_of(
            lambda figure: _draw_layers(figure, found, dtypes),
            name="plot-layers",
            height_in=2.8,
            title=title,
            description="One line per degree and one for TP=1; the table below has the numbers.",
        ),
        ("dtype", "tp", "after", "TP=1, eps", "TP=N, eps", "ratio"),
        tuple(rows[:MAX_TABLE]),
        cut(rows, found),
    )


def _worst_layer(found: dict[Key, Depth]) -> tuple[float, str, Key] | None:
    every = [
        (ratio, fqn, key)
        for key, one in found.items()
        for fqn, ratio in zip(one.layers, one.ratios(), strict=True)
        if ratio is not None
    ]
    return max(every, default=None)


def _draw_layers(figure: Figure, found: dict[Key, Depth], dtypes: Sequence[str]) -> None:
    degrees = sorted({tp_size for _, tp_size in found})
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        own = {tp_size: one for (name, tp_size), one in found.items() if name == dtype}
        first = next(iter(own.values()))
        x = range(len(first.layers))
        axes.plot(
            x, _gaps(first.tp1), color=INKS["muted"], linestyle=(0, (4, 2)), label="TP=1", zorder=3
        )
        for tp_size, one in list(own.items())[:MAX_KEYS]:
            at = degrees.index(tp_size)
            axes.plot(
                range(len(one.layers)),
                _gaps(one.tpn),
                color=series_ink(at),
                marker=MARKERS[at % len(MARKERS)] if len(one.layers) <= MAX_TABLE // 4 else "",
                label=f"tp {tp_size}",
            )
        plain_axes(axes, title=dtype, x="layer, in order of execution", y="error [eps]")
        axes.xaxis.get_major_locator().set_params(integer=True)
        held = [value for one in own.values() for value in (*one.tp1, *one.tpn) if value]
        axes.set_ylim(0, 1.08 * max(held, default=1.0))
        axes.legend(loc="best", ncols=2)


def ulp_plot(content: DriftContent) -> Plot:
    """Show how far outputs are from TP=1, in steps of the deployed dtype."""
    found = ulp_counts(content)
    found = {key: counts for key, counts in found.items() if sum(counts.values())}
    if not found:
        why = why_none(content, "difference", "no output is finite on both sides")
        return Plot("ulp", "Distance from TP=1 in ulp", reason=why)
    key, counts = max(found.items(), key=lambda one: at_most(one[1], 0.99))
    title = f"99 % of outputs are within {at_most(counts, 0.99)} ulp of TP=1"
    title += f" where they are furthest ({key[0]}, tp {key[1]})" if len(found) > 1 else ""
    rows = [
        (
            dtype,
            str(tp_size),
            _ulp_edge(edge),
            str(count),
            f"{100 * count / sum(held.values()):.3g} %",
        )
        for (dtype, tp_size), held in found.items()
        for edge, count in held.items()
    ]
    dtypes = list(dict.fromkeys(dtype for dtype, _ in found))
    return Plot(
        "ulp",
        title,
        "Share of outputs, as deployed, by their distance from TP=1 in ulp of the deployed dtype;"
        " a value near zero has small ulp, so the same error counts many there.",
        svg_of(
            lambda figure: _draw_ulp(figure, found, dtypes),
            name="plot-ulp",
            height_in=2.8,
            title=title,
            description="A histogram per dtype and degree; the table below has the counts.",
        ),
        ("dtype", "tp", "up to", "outputs", "share"),
        tuple(rows[:MAX_TABLE]),
        cut(rows, found),
    )


def _ulp_edge(edge: int) -> str:
    return "same bits or zero apart" if edge == 0 else f"{edge} ulp"


def _draw_ulp(figure: Figure, found: dict[Key, dict[int, int]], dtypes: Sequence[str]) -> None:
    degrees = sorted({tp_size for _, tp_size in found})
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        own = [(tp, counts) for (name, tp), counts in found.items() if name == dtype][:MAX_KEYS]
        edges = sorted({edge for _, counts in own for edge in counts})
        width = 0.8 / len(own)
        for i, (tp_size, counts) in enumerate(own):
            total = sum(counts.values())
            axes.bar(
                [j + (i - (len(own) - 1) / 2) * width for j in range(len(edges))],
                [100 * counts.get(edge, 0) / total for edge in edges],
                width=width,
                color=series_ink(degrees.index(tp_size)),
                label=f"tp {tp_size}",
            )
        step = -(-len(edges) // 9)
        axes.set_xticks(
            range(0, len(edges), step), [_power(edge) for edge in edges[::step]], fontsize=8
        )
        plain_axes(axes, title=dtype, x="distance from TP=1, up to [ulp]", y="share of outputs [%]")
        axes.grid(visible=False, axis="x")
        axes.legend(loc="upper right")


def _power(edge: int) -> str:
    return str(edge) if edge < 10_000 else f"2^{edge.bit_length() - 1}"


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
