"""The heat map of ranks by layers: whose term a sum does not count exactly once.

Requirement: one wrong rank of one layer is found at a glance among hundreds of cells, by its colour
and by the title; a clean reduction looks clean.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from tpcheck.render.drift_content import DriftContent
from tpcheck.render.drift_series import (
    MAX_KEYS,
    Key,
    RankZ,
    pooled_layers,
    rank_distances,
    why_none,
)
from tpcheck.render.figures import label, plain_axes, svg_of
from tpcheck.render.palette import HEAT_EDGES, INKS, heat
from tpcheck.render.plots import MAX_TABLE, Plot, cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NUMBERED = 8
"""Ranks up to which a cell has room for a number."""


def rank_plot(content: DriftContent) -> Plot:
    """Show, rank by layer, whose term a sum counts wrongly."""
    found = rank_distances(content)
    if not found:
        why = why_none(content, "rows", "no rank's term is known by itself")
        return Plot("ranks", "Rank x layer", reason=why)
    (z, fqn, rank), key = max(
        ((one.worst(), key) for key, one in found.items()), key=lambda one: abs(one[0][0])
    )
    where = f"rank {rank} in {label(fqn)} ({key[0]}, tp {key[1]})"
    title = (
        f"No rank's term is counted wrongly: at most {abs(z):.2g} standard errors, 8 would count"
    )
    if abs(z) >= HEAT_EDGES[-1]:
        title = f"A term is counted wrongly: {where}, {abs(z):.3g} standard errors from once"
    shown = dict(list(found.items())[:MAX_KEYS])
    notes = cut([], found)
    if any(len(pooled_layers(one).layers) < len(one.layers) for one in shown.values()):
        notes += ("neighbouring layers share a row, which shows each rank's largest",)
    rows = [
        (dtype, str(tp_size), label(name, 60), *(", ".join(f"{z:+.2f}" for z in line),))
        for (dtype, tp_size), one in found.items()
        for name, line in zip(one.layers, one.z, strict=True)
    ]
    tallest = max(len(pooled_layers(one).layers) for one in shown.values())
    dtypes = list(dict.fromkeys(dtype for dtype, _ in shown))
    return Plot(
        "ranks",
        title,
        "Each cell: by how many standard errors the sum does not count this rank's term exactly"
        " once, at every row-parallel layer in order of execution. A rank that is scaled, doubled"
        " or dropped stands out as a cell in the last colour.",
        svg_of(
            lambda figure: _draw_ranks(figure, shown, dtypes),
            name="plot-ranks",
            height_in=0.9 + len(dtypes) * (0.75 + 0.125 * tallest),
            title=title,
            description=f"The furthest is {where}; the table below has all.",
        ),
        ("dtype", "tp", "layer", "standard errors, rank 0 first"),
        tuple(rows[:MAX_TABLE]),
        notes + cut(rows, {}),
    )


def _draw_ranks(figure: Figure, found: dict[Key, RankZ], dtypes: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    wide = max(sum(name == dtype for name, _ in found) for dtype in dtypes)
    ratios = [max(3, tp) for _, tp in list(found)[:wide]]
    grid = figure.subplots(len(dtypes), wide, squeeze=False, width_ratios=ratios)
    for line, dtype in zip(grid, dtypes, strict=True):
        own = [(tp_size, one) for (name, tp_size), one in found.items() if name == dtype]
        for j, axes in enumerate(line):
            axes.set_visible(j < len(own))
            if j < len(own):
                _draw_heat(axes, own[j][0], pooled_layers(own[j][1]), dtype, named=j == 0)
    edges = [0.0, *HEAT_EDGES]
    names = [f"{a:g} to {b:g}" for a, b in pairwise(edges)]
    names.append(f"{edges[-1]:g} and more: counted wrongly")
    figure.legend(
        handles=[
            Patch(facecolor=INKS[f"h{i}"], edgecolor=INKS["muted"], linewidth=0.4, label=name)
            for i, name in enumerate(names)
        ],
        loc="outside lower center",
        ncols=len(names),
        title="standard errors away from counted once",
        title_fontsize=8.5,
        handlelength=1.2,
        columnspacing=1.0,
    )


def _draw_heat(axes: Axes, tp_size: int, one: RankZ, dtype: str, *, named: bool) -> None:
    from matplotlib.colors import ListedColormap

    layers, ranks = len(one.layers), len(one.z[0])
    heats = [[heat(z) for z in line] for line in one.z]
    hottest = len(HEAT_EDGES)
    axes.pcolormesh(
        [rank - 0.5 for rank in range(ranks + 1)],
        [i - 0.5 for i in range(layers + 1)],
        heats,
        cmap=ListedColormap([INKS[f"h{i}"] for i in range(hottest + 1)]),
        vmin=-0.5,
        vmax=hottest + 0.5,
        edgecolors=INKS["paper"],
        linewidth=0.8,
    )
    for i, line in enumerate(one.z):
        for rank, z in enumerate(line):
            if ranks <= _NUMBERED and heats[i][rank] == hottest:
                said, ink = f"{abs(z):.0f}", INKS[f"t{hottest}"]
                axes.text(rank, i, said, ha="center", va="center", fontsize=7, color=ink)
    plain_axes(axes, title=f"{dtype}, tp {tp_size}", x="rank", y="")
    axes.set_xlim(-0.5, ranks - 0.5)
    axes.set_ylim(layers - 0.5, -0.5)
    axes.grid(visible=False)
    step = -(-ranks // 16)
    axes.set_xticks(range(0, ranks, step))
    every = -(-layers // 16)
    names = [label(name, 30) for name in one.layers[::every]] if named else []
    axes.set_yticks(
        range(0, layers, every), names or [""] * len(range(0, layers, every)), fontsize=7
    )
