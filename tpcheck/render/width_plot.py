"""The plot of what width costs: where a forward's time goes, and an all-reduce against its size.

Requirement: the title names the degree that pays most, every axis its unit, and the page says above
it where the times were measured: they belong there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tpcheck.render.drift_content import DriftContent, Row
from tpcheck.render.figures import MARKERS, log_axis, log_ticks, plain_axes, svg_of
from tpcheck.render.palette import INKS, series_ink
from tpcheck.render.plots import MAX_TABLE, Plot
from tpcheck.render.width import BY_SIZE, size_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOT_ASKED = "not measured: run with --width, on real ranks, to time each degree"


def width_plot(content: DriftContent) -> Plot:
    """Show how much of a forward is communication, and an all-reduce's time against its size."""
    costs = [cost for cost in content.width if cost.get("degrees")]
    if not costs:
        return Plot("width", "What width costs", reason=NOT_ASKED)
    shares = [
        (one["share"], one["tp_size"], cost["dtype"])
        for cost in costs
        for one in cost["degrees"]
        if one["share"] is not None and one["tp_size"] > 1
    ]
    title = "What width costs: the collectives of this subject could not be seen"
    if shares:
        share, tp_size, dtype = max(shares)
        title = f"Communication is at most {100 * share:.0f} % of a forward (tp {tp_size}, {dtype})"
    rows = [(cost["dtype"], *row) for cost in costs for row in size_rows(cost)]
    where = ", ".join(dict.fromkeys(cost["measured_on"] for cost in costs))
    return Plot(
        "width",
        title,
        f"Measured on {where}. Left: the median forward, the part that its collectives take"
        " hatched; whiskers: the fastest and the slowest repeat. Right: one all-reduce by its"
        " size; line: by itself, filled mark: inside the forward.",
        svg_of(
            lambda figure: _draw(figure, costs),
            name="plot-width",
            height_in=0.3 + 2.7 * len(costs),
            title=title,
            description="Bars per degree, lines per degree; the tables have the numbers.",
        ),
        ("dtype", *(name.replace("\n", " ") for name in BY_SIZE)),
        tuple(rows[:MAX_TABLE]),
    )


def _draw(figure: Figure, costs: Sequence[Row]) -> None:
    grid = figure.subplots(len(costs), 2, squeeze=False)
    for (left, right), cost in zip(grid, costs, strict=True):
        _draw_shares(left, cost)
        _draw_sizes(right, cost)


def _draw_shares(axes: Axes, cost: Row) -> None:
    degrees = cost["degrees"]
    x = range(len(degrees))
    ms = [1e3 * one["forward_s"] for one in degrees]
    talk = [_part(one) for one in degrees]
    work = [whole - part for whole, part in zip(ms, talk, strict=True)]
    axes.bar(x, work, 0.6, color=series_ink(0), label="own work")
    axes.bar(
        x,
        talk,
        0.6,
        bottom=work,
        color=series_ink(1),
        hatch="///",
        edgecolor=INKS["paper"],
        linewidth=0,
        label="collectives",
    )
    ends = [(1e3 * one["fastest_s"], 1e3 * one["slowest_s"]) for one in degrees]
    low = [max(0.0, y - a) for y, (a, _) in zip(ms, ends, strict=True)]
    high = [max(0.0, b - y) for y, (_, b) in zip(ms, ends, strict=True)]
    axes.errorbar(x, ms, yerr=[low, high], fmt="none", ecolor=INKS["ink"], capsize=3, linewidth=1)
    for i, one in enumerate(degrees):
        said = f"{100 * one['share']:.0f} %" if one["share"] else ""
        axes.annotate(
            said,
            (i, ms[i] + high[i]),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
        )
    axes.set_xticks(x, [str(one["tp_size"]) for one in degrees])
    axes.margins(y=0.14)
    axes.grid(visible=False, axis="x")
    plain_axes(axes, title=f"{cost['dtype']}: forward", x="TP degree", y="time of a forward [ms]")
    axes.legend(loc="upper left")


def _part(one: Row) -> float:
    """Return the milliseconds of a forward that its collectives take, as their share of it."""
    return 1e3 * float(one["forward_s"]) * float(one["share"] or 0.0)


def _draw_sizes(axes: Axes, cost: Row) -> None:
    times: list[float] = []
    for i, one in enumerate(cost["degrees"]):
        ink, marker = series_ink(i), MARKERS[i % len(MARKERS)]
        alone = [(e["nbytes"], 1e3 * e["seconds"]) for e in one["bandwidths"] if e["seconds"]]
        inside = [(e["nbytes"], 1e3 * e["seconds"]) for e in one["all_reduces"] if e["seconds"]]
        name = f"tp {one['tp_size']}"
        if alone:
            x, y = zip(*alone, strict=True)
            hollow = INKS["paper"]
            axes.plot(x, y, color=ink, marker=marker, markerfacecolor=hollow, label=name)
        if inside:
            x, y = zip(*inside, strict=True)
            said = None if alone else name
            axes.plot(x, y, linestyle="none", color=ink, marker=marker, markersize=8, label=said)
        times += [seconds for _, seconds in (*alone, *inside)]
    if not times:
        axes.set_visible(False)
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_yticks(log_ticks(min(times), max(times)))
    log_axis(axes.xaxis, _bytes)
    log_axis(axes.yaxis, lambda value: f"{value:g}")
    plain_axes(axes, title=f"{cost['dtype']}: all-reduce", x="message size", y="time of one [ms]")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.3)


def _bytes(value: float) -> str:
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"
