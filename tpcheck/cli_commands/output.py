"""Where results go: stdout, and the files that were asked for.

Requirement: a file that cannot be written is found out before the run; stdout holds the result and
nothing else, so that it can be piped.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tpcheck.cli_commands.inputs import Inputs, assert_no_input
from tpcheck.errors import TPCheckError
from tpcheck.files import assert_writable, write_text
from tpcheck.records import Report


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a report goes besides the terminal. `plots`: its page has some.

    `inputs` are read by the command, so that none of them may be written over.
    """

    json: Path | None = None
    html: Path | None = None
    junit: Path | None = None
    markdown: Path | None = None
    plots: bool = False
    inputs: Inputs = field(default_factory=dict)

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
            assert_no_input(f"--{name}", path, self.inputs)
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


@contextmanager
def no_results() -> Iterator[None]:
    """Send to stderr what is written to stdout, by Python or by a library written in C."""
    if not _are_the_process_own(sys.stdout, sys.stderr):
        with redirect_stdout(sys.stderr):
            yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        ctypes.CDLL(None).fflush(None)  # C buffers what it writes to a pipe
        os.dup2(kept, 1)
        os.close(kept)


def _are_the_process_own(stdout: TextIO | None, stderr: TextIO | None) -> bool:
    """Say whether they are descriptors 1 and 2: where one is closed, that may be any file."""
    try:
        return (
            stdout is not None
            and stderr is not None
            and (stdout.fileno(), stderr.fileno()) == (1, 2)
        )
    except OSError:  # a test captures them
        return False


def is_stdout(path: Path) -> bool:
    """Say whether a path option means stdout."""
    return str(path) == "-"


def print_result(text: str) -> None:
    """Print to stdout; a reader that has gone changes nothing.

    Raises:
        TPCheckError: it cannot be written, as on a full disk.
    """
    _print_result(f"{text}\n")


def assert_printed() -> None:
    """Raise what `print_result` would, for what others wrote to stdout: click writes the help."""
    _print_result("")


def _print_result(text: str) -> None:
    error = _print(text, sys.stdout)
    # `| head` has read enough: the exit code still says the outcome
    if error is not None and not isinstance(error, BrokenPipeError):
        raise TPCheckError(f"stdout: cannot be written: {error.strerror}") from error


def print_error(text: str) -> None:
    """Print to stderr; where it cannot be written, the exit code alone says it."""
    _print(f"{text}\n", sys.stderr)


def _print(text: str, stream: TextIO | None) -> OSError | None:
    """Write a text and return what went wrong."""
    if stream is None:  # it was closed before we started: nobody is to read it
        return None
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        # Python writes what is left when it ends, and an error then would change the exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
