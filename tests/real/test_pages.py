"""Pages in a real browser without a network: light and dark, wide and narrow, every plot visible.

What a browser computed is asked through a frame around the page, whose own policy runs no script;
screenshots are read pixel by pixel. Skipped where there is no Chromium.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.drift_reports import entry, profile, report_of, usual
from tests.unit.test_palette import contrast
from tpcheck.render.drift_page import render_drift_page
from tpcheck.render.html import render_html
from tpcheck.render.palette import DARK, LIGHT

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no chromium, chromium-browser, google-chrome")

SCHEMES = {"light": (1, LIGHT), "dark": (0, DARK)}
"""Blink's number of a preferred colour scheme, and what a page then has to look like."""

NO_PAGE = "not an origin"

PLOTS = ("plot-ratio", "plot-layers", "plot-ulp", "plot-ranks", "plot-width")
WIDTHS = (360, 800, 1280)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars", "--disable-dev-shm-usage"),
    *("--allow-file-access-from-files", "--force-device-scale-factor=1"),
)
ASK = """<!doctype html><meta charset="utf-8"><body style="margin:0">{frames}<pre id="out"></pre>
<script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement;
    const style = element => frame.contentWindow.getComputedStyle(element);
    return {{
      overflow: root.scrollWidth - root.clientWidth,
      height: root.scrollHeight,
      paper: style(page.body).backgroundColor,
      plots: [...page.querySelectorAll("figure svg")].map(svg => {{
        const box = svg.getBoundingClientRect();
        return {{name: svg.getAttribute("aria-labelledby").split("-title")[0],
          box: [box.x, box.y, box.right, box.bottom],
          inside: [...svg.querySelectorAll("text")].every(text => {{
            const own = text.getBoundingClientRect();
            return own.left >= box.left - 2 && own.right <= box.right + 2
              && own.top >= box.top - 2 && own.bottom <= box.bottom + 2; }}),
          inks: [...new Set([...svg.querySelectorAll("text")].map(t => style(t).fill))]}};
      }}),
      inks: [...new Set([...page.querySelectorAll("h1,h2,p,td,th,li,dt,dd,pre,a,summary,code")]
        .map(element => style(element).color))],
    }};
  }});
  document.getElementById("out").textContent = JSON.stringify(found);
}});
</script>"""


@dataclass(frozen=True, slots=True)
class Browser:
    """One page in one folder; every start has a new profile."""

    folder: Path
    page: Path

    def start(self, scheme: str, *flags: str, target: Path | None = None) -> str:
        profile = self.folder / f"profile-{len(list(self.folder.iterdir()))}"
        number, _ = SCHEMES[scheme]
        done = subprocess.run(
            [
                *(BROWSER, *FLAGS, f"--user-data-dir={profile}"),
                *(f"--blink-settings=preferredColorScheme={number}", *flags),
                (target or self.page).as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "HOME": str(self.folder)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def asked(self, scheme: str, widths: tuple[int, ...] = WIDTHS) -> list[dict[str, Any]]:
        frame = f'<iframe src="{self.page.name}" height="900" style="border:0"'
        frames = "".join(f'{frame} width="{width}"></iframe>' for width in widths)
        around = self.folder / f"ask-{self.page.name}"
        around.write_text(ASK.format(frames=frames), encoding="utf-8")
        dom = self.start(scheme, "--dump-dom", "--virtual-time-budget=20000", target=around)
        found = re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)
        assert found, dom[:2000]
        answers: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
        assert len(answers) == len(widths)
        return answers

    def shot(self, scheme: str, width: int, height: int) -> Image.Image:
        path = self.folder / f"{self.page.stem}-{scheme}.png"
        self.start(scheme, f"--screenshot={path}", f"--window-size={width},{height}")
        with Image.open(path) as picture:
            return picture.convert("RGB")

    def fetched(self) -> list[str]:
        """Return the addresses that opening the page asked the network for."""
        log = self.folder / f"{self.page.stem}-net.json"
        picture = self.folder / "net.png"
        self.start("light", f"--log-net-log={log}", f"--screenshot={picture}")
        events = json.loads(log.read_text(encoding="utf-8"))["events"]
        asked = [event.get("params", {}) for event in events if "url" in event.get("params", {})]
        # the browser's own (its clock, its updates) have no page that they come from
        own = [one for one in asked if one.get("initiator", NO_PAGE) == NO_PAGE]
        return sorted({one["url"] for one in asked if one not in own})


def browser_of(folder: Path, name: str, text: str) -> Browser:
    page = folder / f"{name}.html"
    page.write_text(text, encoding="utf-8")
    return Browser(folder, page)


@cache
def drift_text() -> str:
    return render_drift_page(usual(1.5, width=True, fallback=True))


@pytest.fixture(scope="module")
def drift(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    return browser_of(tmp_path_factory.mktemp("drift"), "drift", drift_text())


def hex_of(css: str) -> str:
    red, green, blue = map(int, re.findall(r"\d+", css)[:3])
    return f"#{red:02x}{green:02x}{blue:02x}"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_drift_page_in_a_browser(drift: Browser, scheme: str) -> None:
    _, colours = SCHEMES[scheme]
    answers = drift.asked(scheme)
    for width, one in zip(WIDTHS, answers, strict=True):
        assert one["overflow"] == 0, f"at {width} pixels the page is wider than its window"
        assert hex_of(one["paper"]) == colours["paper"]
        assert [plot["name"] for plot in one["plots"]] == list(PLOTS)
        assert all(plot["inside"] for plot in one["plots"]), "text is cut off"
        for ink in {*one["inks"], *(ink for plot in one["plots"] for ink in plot["inks"])}:
            assert contrast(hex_of(ink), colours["paper"]) >= 4.5, ink
    widest = answers[-1]
    picture = drift.shot(scheme, WIDTHS[-1], widest["height"])
    assert picture.getpixel((3, 3)) == tuple(bytes.fromhex(colours["paper"][1:]))
    for plot in widest["plots"]:
        assert_drawn(picture.crop(tuple(map(round, plot["box"]))), colours, plot["name"])


def assert_drawn(plot: Image.Image, colours: dict[str, str], name: str) -> None:
    """A plot has its own colours on its paper: text, and marks that stand out."""
    pixels = plot.getcolors(plot.width * plot.height)
    assert pixels
    counts = {"#{:02x}{:02x}{:02x}".format(*colour): count for count, colour in pixels}  # type: ignore[misc]
    total = plot.width * plot.height
    assert total > 100_000, name
    assert counts[colours["paper"]] > 0.2 * total, name
    clear = sum(n for one, n in counts.items() if contrast(one, colours["paper"]) >= 3)
    assert clear > 0.005 * total, f"{name}: only {clear} of {total} pixels stand out"
    own = "h1 h0" if name == "plot-ranks" else "s0"
    assert max(counts.get(colours[ink], 0) for ink in own.split()) > 20, name


def test_the_check_of_plots_sees_an_empty_one() -> None:
    with pytest.raises(AssertionError, match="stand out"):
        assert_drawn(Image.new("RGB", (900, 300), LIGHT["paper"]), LIGHT, "plot-ratio")


def test_a_page_asks_the_network_for_nothing(drift: Browser, tmp_path: Path) -> None:
    assert drift.fetched() == []
    image = '<img src="http://tpcheck.invalid/x.png">'
    faulty = re.sub(r"<meta http-equiv[^>]*>", "", drift_text()).replace("</main>", image)
    assert browser_of(tmp_path, "faulty", faulty).fetched() == ["http://tpcheck.invalid/x.png"]


def test_the_pages_own_policy_stops_a_script_and_a_picture(tmp_path: Path) -> None:
    planted = '<script>document.body.style.background="red"</script></main>'
    planted = f'<img src="http://tpcheck.invalid/x.png">{planted}'
    page = browser_of(tmp_path, "planted", drift_text().replace("</main>", planted))
    assert page.fetched() == []
    (one,) = page.asked("light", (800,))
    assert hex_of(one["paper"]) == LIGHT["paper"]


def test_the_check_of_overflow_sees_a_wide_element(tmp_path: Path) -> None:
    wide = '<div style="width:2000px">x</div></main>'
    page = browser_of(tmp_path, "wide", drift_text().replace("</main>", wide))
    (one,) = page.asked("light", (800,))
    assert one["overflow"] > 1000


LONG = "model.layers.0." + "x" * 400


def test_long_names_and_hundreds_of_cells_stay_within_the_window(tmp_path: Path) -> None:
    odd = {"prediction": {"ratio": 3.0, "valid": False, "reason": LONG}}
    layers = tuple(f"{LONG}.{i}" for i in range(40))
    made = [
        (size, "bfloat16", outcome, profile(entry("bfloat16", 1.5, deployed=True, **odd),
                                            tp_size=size, layers=layers, z=20.0))
        for size, outcome in ((2, "PASS"), (16, "PASS"), (64, "DRIFT"))
    ]  # fmt: skip
    report = report_of(*made, subject=LONG, reason=LONG)
    for name, text in (("drift", render_drift_page(report)), ("run", render_html(report))):
        for width, one in zip(WIDTHS, browser_of(tmp_path, name, text).asked("dark"), strict=True):
            assert one["overflow"] == 0, (name, width)
            assert hex_of(one["paper"]) == DARK["paper"]
            assert all(plot["inside"] for plot in one["plots"]), name
