"""`tpcheck diff EXPECTED ACTUAL`: parse, call captures/comparing.py, print, exit.

Requirement: as in cli.py. Exit code 1 is any finding; a path without captures and a malformed rule
file are the user's mistakes and exit with 2. `--jsonl -` streams: a line as soon as a tensor is
judged, and nothing else on stdout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from tpcheck.cli_commands import options as options
from tpcheck.cli_commands.inputs import assert_no_input
from tpcheck.cli_commands.output import Outputs, is_stdout, print_result
from tpcheck.errors import TPCheckError
from tpcheck.files import assert_writable, write_text
from tpcheck.progress import progress_bar

Interruptible = Callable[[], AbstractContextManager[None]]

Expected = Annotated[
    str,
    typer.Argument(
        metavar="EXPECTED", help="Recorded at TP=1: a safetensors file, or a folder of them."
    ),
]
Actual = Annotated[
    str,
    typer.Argument(
        metavar="ACTUAL", help="Recorded at TP=N: the same; files or folders named rank0, rank1..."
    ),
]
ShardMap = Annotated[
    Path | None, typer.Option("--shard-map", metavar="TOML", help="Default: sizes decide.")
]
ToleranceFile = Annotated[
    Path | None, typer.Option("--tolerance", metavar="TOML", help="Default: equal bits.")
]
Order = Annotated[
    Path | None, typer.Option("--order", metavar="TXT", help="Names or patterns, one a line.")
]
Oracle = Annotated[
    Path | None,
    typer.Option("--oracle", metavar="PATH", help="TP=1 in a wider dtype: derives the tolerance."),
]
Degree = Annotated[
    int | None,
    typer.Option("--tp", min=1, metavar="N", help="How many ranks should have recorded."),
]
RankPattern = Annotated[
    str | None,
    typer.Option("--rank-pattern", metavar="REGEX", help="Its one group is the rank; none: one."),
]
JsonLines = Annotated[
    Path | None, typer.Option("--jsonl", metavar="PATH", help="A line per tensor; - is stdout.")
]


def add_diff(app: typer.Typer, interruptible: Interruptible) -> None:
    """Register the command; `interruptible` is how cli.py leaves on Ctrl-C."""

    @app.command()
    def diff(
        expected: Expected,
        actual: Actual,
        shard_map: ShardMap = None,
        tolerance: ToleranceFile = None,
        order: Order = None,
        oracle: Oracle = None,
        atol: options.Atol = None,
        rtol: options.Rtol = None,
        tp: Degree = None,
        rank_pattern: RankPattern = None,
        json_path: options.JsonPath = None,
        jsonl: JsonLines = None,
        html: options.HtmlPath = None,
        junit: options.JunitPath = None,
        markdown: options.MarkdownPath = None,
        quiet: options.Quiet = False,
        no_progress: options.NoProgress = False,
    ) -> None:
        """Do two captures hold the same tensors? Safetensors of any engine, per rank too."""
        rules = {"--shard-map": shard_map, "--tolerance": tolerance, "--order": order}
        captures = {"EXPECTED": expected, "ACTUAL": actual, "--oracle": oracle}
        outputs = Outputs(json_path, html, junit, markdown, inputs={**rules, **captures})
        _assert_writable(outputs, jsonl)
        lines = _Lines(jsonl)
        with interruptible(), progress_bar(enabled=not (quiet or no_progress)) as progress:
            import torch

            from tpcheck.captures import comparing

            # blocks are small: more threads wait for each other, on a busy machine most of the time
            torch.set_num_threads(1)
            report = comparing.diff(
                expected,
                actual,
                shard_map=shard_map,
                tolerance=tolerance,
                order=order,
                oracle=oracle,
                atol=atol,
                rtol=rtol,
                tp_size=tp,
                rank_pattern=rank_pattern,
                on_tensor=lines.add,
                progress=progress,
            )
        from tpcheck.render.diff import render_diff, render_diff_html
        from tpcheck.report import to_json

        lines.close()
        if html is not None:
            write_text(render_diff_html(report), html)
        Outputs(junit=junit, markdown=markdown).write(report)
        if not lines.on_stdout:
            outputs.publish(to_json(report), render_diff(report), quiet=quiet)
        elif json_path is not None:
            write_text(json.dumps(to_json(report), indent=1, allow_nan=False), json_path)
        raise typer.Exit(comparing.exit_code(report))


class _Lines:
    """The lines of `--jsonl`: to stdout at once, to a file in one step at the end."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._kept: list[str] = []
        self.on_stdout = path is not None and is_stdout(path)

    def add(self, verdict: Any) -> None:
        if self._path is None:
            return
        from tpcheck.render.diff import jsonl_record
        from tpcheck.report import finite

        line = json.dumps(finite(jsonl_record(verdict)), ensure_ascii=False, allow_nan=False)
        if self.on_stdout:
            print_result(line)
        else:
            self._kept.append(line)

    def close(self) -> None:
        if self._path is not None and not self.on_stdout:
            write_text("\n".join(self._kept), self._path)


def _assert_writable(outputs: Outputs, jsonl: Path | None) -> None:
    outputs.assert_writable()
    if jsonl is None:
        return
    if is_stdout(jsonl):
        if outputs.json is not None and is_stdout(outputs.json):
            raise TPCheckError("--jsonl=-, but should differ from --json")
        return
    taken = {"json": outputs.json, "html": outputs.html, "junit": outputs.junit}
    for name, path in {**taken, "markdown": outputs.markdown}.items():
        if path is not None and path.resolve() == jsonl.resolve():
            raise TPCheckError(f"--jsonl={jsonl}, but should differ from --{name}")
    assert_no_input("--jsonl", jsonl, outputs.inputs)
    assert_writable(jsonl)
