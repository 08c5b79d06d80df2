"""The command line: parse, call the Python API, print, exit.

Requirement: results go to stdout, progress and errors to stderr; exit codes are 0 pass, 1 fail,
2 usage or environment error, 3 inconclusive. A user's mistake is one `error:` line, never a
traceback; a file that cannot be written is found out before the run. `tpcheck --help` loads no
torch: whatever needs it is imported inside the command.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tpcheck import cli_options as options
from tpcheck.environment import tpcheck_version
from tpcheck.errors import TPCheckError
from tpcheck.files import assert_writable, write_text
from tpcheck.progress import progress_bar
from tpcheck.records import USAGE_ERROR, Report

INTERRUPTED = 130

app = typer.Typer(
    name="tpcheck",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a sign still gets the report
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="tpcheck")
    except TPCheckError as error:
        _log(f"error: {error}")
    except Exception:
        # 1 would say "the subject fails": nothing is known about it
        traceback.print_exc()
        _log("error: this is a bug in tpcheck; nothing is known about the subject")
    sys.exit(USAGE_ERROR)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Is a model split over N devices still the same function?"""
    if version:
        _print(f"tpcheck {tpcheck_version()}")
        raise typer.Exit


@app.command()
def run(
    subject: Annotated[
        str | None,
        typer.Argument(help="package.module:attr, file.py:attr, builtin:NAME, hf:DIR or ref:DIR."),
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the builtin subjects.")] = False,
    tp: options.Tp = None,
    backend: options.BackendOption = options.Backend.auto,
    ranks_per_gpu: options.RanksPerGpu = None,
    dtype: options.DTypes = [options.DType.bfloat16],  # noqa: B006 - typer copies it
    cases: options.Cases = 1,
    max_failures: options.MaxFailures = None,
    case: options.CaseId = None,
    until: options.Until = None,
    batch: options.Batch = None,
    seq_len: options.SeqLen = None,
    seed: options.Seed = 0,
    atol: options.Atol = None,
    rtol: options.Rtol = None,
    preset: options.Preset = None,
    timeout: options.Timeout = 120.0,
    json_path: options.JsonPath = None,
    html: options.HtmlPath = None,
    junit: options.JunitPath = None,
    markdown: options.MarkdownPath = None,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Is SUBJECT the same function at every degree? A verdict per case, degree and dtype."""
    if show_list:
        _list_builtins()
        return
    if subject is None:
        raise TPCheckError("SUBJECT is missing; `tpcheck run --list` shows the builtin ones")
    tp_sizes = options.parse_tp_sizes(tp)
    outputs = Outputs(json_path, html, junit, markdown)
    outputs.assert_writable()
    with _interruptible(), progress_bar(enabled=not (quiet or no_progress)) as progress:
        from tpcheck import workflow

        report = workflow.run(
            subject,
            tp_sizes,
            backend=backend.value,
            ranks_per_gpu=ranks_per_gpu,
            dtypes=tuple(dict.fromkeys(one.value for one in dtype)),
            cases=cases,
            max_failures=max_failures,
            case=case,
            until=until,
            batch=batch,
            seq_len=seq_len,
            seed=seed,
            atol=atol,
            rtol=rtol,
            preset=preset,
            timeout_s=timeout,
            progress=progress,
        )
    outputs.write(report)
    outputs.show(report, quiet=quiet)
    raise typer.Exit(report.exit_code)


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a report goes besides the terminal."""

    json: Path | None = None
    html: Path | None = None
    junit: Path | None = None
    markdown: Path | None = None

    def assert_writable(self) -> None:
        """Refuse before the run what could not be written after it."""
        given = {name: getattr(self, name) for name in ("json", "html", "junit", "markdown")}
        taken: dict[str, str] = {}
        for name, path in given.items():
            if path is None or (name == "json" and _is_stdout(path)):
                continue
            other = taken.setdefault(os.path.realpath(path), name)
            if other != name:
                raise TPCheckError(f"--{name}={path}, but should differ from --{other}")
            assert_writable(path)

    def write(self, report: Report) -> None:
        """Write every file that was asked for."""
        if self.json is not None and not _is_stdout(self.json):
            write_text(_as_json(report), self.json)
        if self.html is not None:
            from tpcheck.render.html import render_html

            write_text(render_html(report), self.html)
        if self.junit is not None:
            from tpcheck.render.junit import render_junit

            write_text(render_junit(report), self.junit)
        if self.markdown is not None:
            from tpcheck.render.markdown import render_markdown

            write_text(render_markdown(report), self.markdown)

    def show(self, report: Report, *, quiet: bool) -> None:
        """Print the text report, its first line if quiet, or with `--json -` the JSON alone."""
        if self.json is not None and _is_stdout(self.json):
            _print(_as_json(report))
            return
        from tpcheck.render.text import render_text

        text = render_text(report)
        _print(text.partition("\n")[0] if quiet else text)


def _as_json(report: Report) -> str:
    from tpcheck.report import to_json

    return json.dumps(to_json(report), indent=1, ensure_ascii=False, allow_nan=False)


def _is_stdout(path: Path) -> bool:
    return str(path) == "-"


def _list_builtins() -> None:
    from tabulate import tabulate

    from tpcheck.subjects import list_builtins

    rows = [(f"builtin:{name}", description) for name, description in list_builtins()]
    _print(tabulate(rows, headers=("subject", "what it is"), disable_numparse=True))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Leave quietly on Ctrl-C, with no rank left behind."""
    try:
        yield
    except KeyboardInterrupt:
        pool = sys.modules.get("tpcheck.groups.pool")
        if pool is not None:
            pool.close_pools()
        raise typer.Exit(INTERRUPTED) from None


def _print(text: str) -> None:
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough: the exit code still says the outcome
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _log(text: str) -> None:
    sys.stderr.write(f"{text}\n")
