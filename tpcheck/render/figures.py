"""matplotlib figures as SVG that can stand inside a page: the one file that knows matplotlib.

Requirement: the same report gives the same bytes; several plots share a page, which may be light or
dark; whatever a subject named is text and never markup or mathematics. So a figure is drawn with
matplotlib's defaults whatever the user's are, without its date and by a fixed salt; identifiers get
the plot's name; inks become CSS variables; and only the elements listed here leave.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from tpcheck.errors import TPCheckError
from tpcheck.render.palette import INKS, VARIABLES
from tpcheck.render.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH_IN = 8.2
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_ELEMENTS = {"svg", "defs", "clipPath", "pattern", "g", "path", "rect", "text", "tspan", "use"}
_ATTRIBUTES = {
    *("id", "d", "style", "transform", "x", "y", "width", "height", "clip-path"),
    *("href", "viewBox", "clip-rule", "patternUnits", "patternTransform"),
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tpcheck",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": INKS["ink"],
    "axes.labelcolor": INKS["ink"],
    "axes.titlecolor": INKS["ink"],
    "axes.edgecolor": INKS["muted"],
    "xtick.color": INKS["muted"],
    "ytick.color": INKS["muted"],
    "xtick.labelcolor": INKS["ink"],
    "ytick.labelcolor": INKS["ink"],
    "grid.color": INKS["grid"],
}


def assert_matplotlib() -> None:
    """Raise before a run what drawing would raise after it.

    Raises:
        TPCheckError: matplotlib cannot be imported.
    """
    try:
        import matplotlib.backends.backend_svg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise TPCheckError(
            f"--html: matplotlib is missing ({error}), but plots are drawn with it;"
            " pip install 'tpcheck[report]'"
        ) from error


def svg_of(
    draw: Callable[[Figure], None], *, name: str, height_in: float, title: str, description: str
) -> str:
    """Return what `draw` puts on a figure as an `<svg>` element for the inside of a page.

    Args:
        draw: is given the figure, and draws in INKS.
        name: of the plot, unique on its page: letters, digits and hyphens.
        height_in: inches; a figure is WIDTH_IN wide.
        title: what a reader who cannot see it is told first.
        description: what it shows.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(), warnings.catch_warnings():
        # a sign that the font for measuring lacks is drawn by the reader's own
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        draw(figure)
        for written in figure.findobj(Text):  # what cannot be encoded cannot be drawn either
            if isinstance(written, Text):
                written.set_text(printable(written.get_text()))
        raw = io.StringIO()
        figure.set_canvas(FigureCanvasSVG(figure))
        figure.savefig(raw, format="svg", metadata=nothing)
    root = ElementTree.fromstring(raw.getvalue().encode())
    _clean(root, name)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
    }
    for at, (tag, text) in enumerate((("title", title), ("desc", description))):
        said = ElementTree.Element(tag, id=f"{name}-{tag}")
        said.text = printable(text)
        root.insert(at, said)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def plain_axes(axes: Axes, *, title: str, x: str, y: str) -> None:
    """Give axes what each has to have: what it shows, and what is on its sides with the unit."""
    axes.set_title(label(title, 70))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.tick_params(length=3)


def log_axis(axis: Axis, written: Callable[[float], str]) -> None:
    """Give a logarithmic axis a few plain labels: its own are mathematics."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axis.set_minor_formatter(NullFormatter())


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten within a range, one beyond it on either side.

    Only powers of ten where that would be many.

    Example:
        >>> log_ticks(1.5, 30)
        [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
    """
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = (1, 2, 5) if high / low < 2000 else (1,)
    every = [float(f"{step}e{power}") for power in decades for step in steps]
    below = [one for one in every if one <= low][-1:]
    above = [one for one in every if one >= high][:1]
    return below + [one for one in every if low < one < high] + above


def label(text: str, longest: int = 40) -> str:
    """Return a name on one line, without control characters, its middle left out if it is long.

    Example:
        >>> label("model.layers.0.self_attn.o_proj", 20)
        'model.laye...n.o_proj'
    """
    flat = " ".join(printable(text).split())
    if len(flat) <= longest:
        return flat
    half = longest // 2
    return f"{flat[:half]}...{flat[-(longest - half - 1) :]}"


def _clean(element: ElementTree.Element, name: str) -> None:
    """Leave what is drawn: no namespace, no metadata, no identifier that another plot may have."""
    element.tag = element.tag.rpartition("}")[2]
    if element.tag not in _ELEMENTS:
        raise ValueError(f"matplotlib drew <{element.tag}>, which no page is known to take")
    kept: dict[str, str] = {}
    for key, value in element.attrib.items():
        key = key.rpartition("}")[2]
        if key in ("fill", "stroke"):  # a variable counts in a style only
            kept["style"] = f"{key}: {_inked(value)}; {kept.get('style', '')}"
        if key not in _ATTRIBUTES:
            continue
        if key == "id":
            value = f"{name}-{value}"
        value = re.sub(r"url\(#", f"url(#{name}-", value)
        if key == "href":
            value = f"#{name}-{value.removeprefix('#')}"
        kept[key] = kept.get(key, "") + _inked(value)
    if "style" in kept:
        kept["style"] = re.sub(r"font: ([\d.]+)px [^;]*", r"font-size: \1px", kept["style"])
        kept["style"] = re.sub(r"font-family: [^;]*;? ?", "", kept["style"])
    element.attrib = kept
    for child in list(element):
        if child.tag.rpartition("}")[2] in ("metadata", "style") or not _drawn(child):
            element.remove(child)
        else:
            _clean(child, name)
    element.tail = "\n" if element.tail and not element.tail.strip() else element.tail
    if element.text and element.tag not in ("text", "tspan"):
        element.text = "\n"


def _drawn(child: ElementTree.Element) -> bool:
    return isinstance(child.tag, str)  # comments have none


def _inked(value: str) -> str:
    return re.sub(r"#0102[0-9a-f]{2}\b", lambda found: VARIABLES.get(found[0], found[0]), value)
