"""Where results go: stdout, and the files that were asked for.

Requirement: a file that cannot be written is found out before the run; stdout holds the result and
nothing else, so that it can be piped.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tpcheck.errors import TPCheckError
from tpcheck.files import assert_writable, write_text
from tpcheck.records import Report


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a report goes besides the terminal. `plots`: its page has some."""

    json: Path | None = None
    html: Path | None = None
    junit: Path | None = None
    markdown: Path | None = None
    plots: bool = False

    def assert_writable(self) -> None:
        """Refuse before the run what could not be written after it."""
        given = {name: getattr(self, name) for name in ("json", "html", "junit", "markdown")}
        if self.html is not None:
            _assert_pages(plots=self.plots)
        taken: dict[str, str] = {}
        for name, path in given.items():
            if path is None or (name == "json" and is_stdout(path)):
                continue
            if is_stdout(path):
                raise TPCheckError(f"--{name}=-: only --json goes to stdout; name a file")
            other = taken.setdefault(os.path.realpath(path), name)
            if other != name:
                raise TPCheckError(f"--{name}={path}, but should differ from --{other}")
            assert_writable(path)

    def write(self, report: Report) -> None:
        """Write every file of a report but the JSON; a drift report has its own."""
        drift = report.drift is not None
        if self.html is not None:
            write_text(_page(report) if drift else _run_page(report), self.html)
        if self.junit is not None:
            from tpcheck.render.drift_junit import render_drift_junit
            from tpcheck.render.junit import render_junit

            write_text((render_drift_junit if drift else render_junit)(report), self.junit)
        if self.markdown is not None:
            from tpcheck.render.drift_markdown import render_drift_markdown
            from tpcheck.render.markdown import render_markdown

            write_text((render_drift_markdown if drift else render_markdown)(report), self.markdown)

    def show(self, report: Report, *, quiet: bool) -> None:
        """Publish a report as text and JSON."""
        from tpcheck.render.drift import render_drift
        from tpcheck.render.text import render_text
        from tpcheck.report import to_json

        render = render_text if report.drift is None else render_drift
        self.publish(to_json(report), render(report), quiet=quiet)

    def publish(self, value: dict[str, Any], text: str, *, quiet: bool) -> None:
        """Write the JSON and print the text, its first line if quiet; with `--json -` the JSON."""
        if self.json is not None:
            written = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
            if is_stdout(self.json):
                print_result(written)
                return
            write_text(written, self.json)
        print_result(text.partition("\n")[0] if quiet else text)


def _page(report: Report) -> str:
    from tpcheck.render.drift_page import render_drift_page

    return render_drift_page(report)


def _run_page(report: Report) -> str:
    from tpcheck.render.html import render_html

    return render_html(report)


def _assert_pages(*, plots: bool) -> None:
    """Refuse before the run a page that could not be made after it."""
    from tpcheck.render.figures import assert_matplotlib
    from tpcheck.render.pages import assert_jinja2

    assert_jinja2()
    if plots:
        assert_matplotlib()


def is_stdout(path: Path) -> bool:
    """Say whether a path option means stdout."""
    return str(path) == "-"


def print_result(text: str) -> None:
    """Print to stdout; a reader that has gone changes nothing.

    Raises:
        TPCheckError: it cannot be written, as on a full disk.
    """
    error = _print(text, sys.stdout)
    # `| head` has read enough: the exit code still says the outcome
    if error is not None and not isinstance(error, BrokenPipeError):
        raise TPCheckError(f"stdout: cannot be written: {error.strerror}") from error


def print_error(text: str) -> None:
    """Print to stderr; where it cannot be written, the exit code alone says it."""
    _print(text, sys.stderr)


def _print(text: str, stream: TextIO | None) -> OSError | None:
    """Write a line and return what went wrong."""
    if stream is None:  # it was closed before we started: nobody is to read it
        return None
    try:
        stream.write(f"{text}\n")
        stream.flush()
    except OSError as error:
        # Python writes what is left when it ends, and an error then would change the exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
