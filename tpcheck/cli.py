"""The command line: parse, call the Python API, print, exit.

Requirement: results go to stdout, progress and errors to stderr; exit codes are 0 pass, 1 fail,
2 usage or environment error, 3 inconclusive. A user's mistake is one `error:` line, never a
traceback; a file that cannot be written is found out before the run. `tpcheck --help` loads no
torch: whatever needs it is imported inside the command.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from tpcheck.cli_commands import options as options
from tpcheck.cli_commands.diff import add_diff
from tpcheck.cli_commands.gate import gate
from tpcheck.cli_commands.golden import golden_app
from tpcheck.cli_commands.inputs import subject_inputs
from tpcheck.cli_commands.output import (
    Outputs,
    assert_printed,
    no_results,
    print_error,
    print_result,
)
from tpcheck.environment import tpcheck_version
from tpcheck.errors import TPCheckError
from tpcheck.progress import Progress, progress_bar
from tpcheck.records import EXIT_CODES, USAGE_ERROR

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
        _run_app()
    except TPCheckError as error:
        from tpcheck.render.text import printable

        print_error(f"error: {printable(str(error))}")  # it may quote a file of anybody
    except Exception:
        # 1 would say "the subject fails": nothing is known about it
        print_error(traceback.format_exc().rstrip())
        print_error("error: this is a bug in tpcheck; nothing is known about the subject")
    sys.exit(USAGE_ERROR)


def _run_app() -> None:
    try:
        app(prog_name="tpcheck")
    except OSError:
        assert_printed()
        raise


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Is a model split over N devices still the same function?"""
    if version:
        print_result(f"tpcheck {tpcheck_version()}")
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
    cases: options.Cases = None,
    max_failures: options.MaxFailures = None,
    case: options.CaseId = None,
    until: options.Until = None,
    batch: options.Batch = None,
    seq_len: options.SeqLen = None,
    seed: options.Seed = 0,
    atol: options.Atol = None,
    rtol: options.Rtol = None,
    preset: options.Preset = None,
    sensitivity: options.Sensitivity = False,
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
    outputs = Outputs(json_path, html, junit, markdown, inputs=subject_inputs(subject))
    with _running(outputs, backend, ranks_per_gpu, bar=not (quiet or no_progress)) as progress:
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
            sensitivity=sensitivity,
            timeout_s=timeout,
            progress=progress,
        )
    outputs.write(report)
    outputs.show(report, quiet=quiet)
    raise typer.Exit(report.exit_code)


@app.command()
def drift(
    subject: Annotated[
        str,
        typer.Argument(help="package.module:attr, file.py:attr, builtin:NAME, hf:DIR or ref:DIR."),
    ],
    tp: options.Tp = None,
    backend: options.BackendOption = options.Backend.auto,
    ranks_per_gpu: options.RanksPerGpu = None,
    dtype: options.DTypes = [options.DType.bfloat16, options.DType.float16],  # noqa: B006
    wire: options.Wires = [],  # noqa: B006 - typer copies it
    declared: options.DeclaredOption = None,
    fallback: options.Fallback = None,
    width: options.Width = False,
    cases: options.Cases = None,
    max_failures: options.MaxFailures = None,
    case: options.CaseId = None,
    batch: options.Batch = None,
    seq_len: options.SeqLen = None,
    seed: options.Seed = 0,
    atol: options.Atol = None,
    rtol: options.Rtol = None,
    preset: options.Preset = None,
    sensitivity: options.Sensitivity = False,
    timeout: options.Timeout = 120.0,
    json_path: options.JsonPath = None,
    html: options.HtmlPath = None,
    junit: options.JunitPath = None,
    markdown: options.MarkdownPath = None,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
) -> None:
    """How far does SUBJECT drift, per degree, dtype and dtype on the wire? Verdicts as of run."""
    tp_sizes = options.parse_tp_sizes(tp)
    inputs = subject_inputs(subject)
    outputs = Outputs(json_path, html, junit, markdown, plots=True, inputs=inputs)
    with _running(outputs, backend, ranks_per_gpu, bar=not (quiet or no_progress)) as progress:
        from tpcheck.drift_profiles import command as drift_command

        report = drift_command.drift(
            subject,
            tp_sizes,
            backend=backend.value,
            ranks_per_gpu=ranks_per_gpu,
            dtypes=tuple(dict.fromkeys(one.value for one in dtype)),
            cases=cases,
            max_failures=max_failures,
            case=case,
            batch=batch,
            seq_len=seq_len,
            seed=seed,
            atol=atol,
            rtol=rtol,
            preset=preset,
            wires=tuple(wire),
            declared=declared.value if declared else "",
            fallback=fallback or (),
            width=width,
            sensitivity=sensitivity,
            timeout_s=timeout,
            progress=progress,
        )
    outputs.write(report)
    outputs.show(report, quiet=quiet)
    raise typer.Exit(report.exit_code)


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="A config.json, the directory that holds it, or - for stdin.")
    ],
    engine: options.Engines = [],  # noqa: B006 - typer copies it
    tp: options.Tp = None,
    seq_len: options.CacheLength = None,
    batch: options.CacheBatch = None,
    kv_dtype: options.CacheDType = None,
    weights: options.Weights = False,
    json_path: options.JsonPath = None,
    quiet: options.Quiet = False,
) -> None:
    """Which degrees can MODEL run at, on which engine, and why not? From its config alone."""
    engines, tp_sizes = options.parse_engines(engine), options.parse_tp_sizes(tp)
    if seq_len is None and (batch is not None or kv_dtype is not None):
        name = "--batch" if batch is not None else "--kv-dtype"
        raise TPCheckError(f"{name}: is about the KV cache, but --seq-len is missing")
    outputs = Outputs(json_path, inputs={"MODEL": model})
    outputs.assert_writable()
    from tpcheck.plan_command import exit_code, plan_records
    from tpcheck.plan_memory import Request
    from tpcheck.render.plan import render_plan

    request = Request(seq_len, batch or 1, kv_dtype.value if kv_dtype else None)
    found: Any = plan_records(model, engines, tp_sizes, request, weights=weights)
    outputs.publish(found, render_plan(found), quiet=quiet)
    raise typer.Exit(exit_code(found, asked=engines is not None))


@app.command()
def probe(
    tp: options.Tp = None,
    backend: options.BackendOption = options.Backend.auto,
    ranks_per_gpu: options.RanksPerGpu = None,
    dtype: options.DTypes = list(options.DType),  # noqa: B006 - typer copies it
    sizes: options.MessageSizes = None,
    collective: options.Collective = None,
    against: options.Against = None,
    timeout: options.Timeout = 120.0,
    json_path: options.JsonPath = None,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
) -> None:
    """In which order does this machine's all-reduce add, and how does it round? Per size."""
    tp_sizes, counts = options.parse_tp_sizes(tp), options.parse_message_sizes(sizes)
    outputs = Outputs(json_path, inputs={"--against": against})
    with _running(outputs, backend, ranks_per_gpu, bar=not (quiet or no_progress)) as progress:
        from tpcheck.probes import command as probe_command
        from tpcheck.probes import sweep as probe_sweep

        dtypes = tuple(one.value for one in dtype)
        degrees = tp_sizes or probe_sweep.DEFAULT_TP_SIZES
        counts = counts or probe_sweep.DEFAULT_SIZES
        other = probe_command.read_other(against, degrees, dtypes, counts)
        report = probe_sweep.probe_reductions(
            tp_sizes,
            backend=backend.value,
            ranks_per_gpu=ranks_per_gpu,
            dtypes=dtypes,
            sizes=counts,
            collective=probe_command.collective_ref(collective),
            timeout_s=timeout,
            progress=progress,
        )
        found = probe_command.probe_record(report, other, str(against or ""))
    from tpcheck.render.probe import render_probe

    outputs.publish(found, render_probe(found), quiet=quiet)
    raise typer.Exit(probe_command.exit_code(found))


@app.command()
def selfcheck(
    tp: options.Tp = None,
    backend: options.BackendOption = options.Backend.sim,
    dtype: options.DTypes = [options.DType.bfloat16],  # noqa: B006 - typer copies it
    seed: options.Seed = 0,
    json_path: options.JsonPath = None,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
) -> None:
    """Plant every known fault; which check catches it? Fails when one survives."""
    tp_sizes = options.parse_tp_sizes(tp)
    outputs = Outputs(json_path)
    with _running(outputs, backend, None, bar=not (quiet or no_progress)) as progress:
        from tpcheck import fault_matrix

        matrix = fault_matrix.selfcheck(
            tp_sizes or fault_matrix.TP_SIZES,
            tuple(dict.fromkeys(one.value for one in dtype)),
            backend=backend.value,
            seed=seed,
            progress=progress,
        )
    from tpcheck.render.selfcheck import render_selfcheck

    found = matrix.to_json()
    outputs.publish(found, render_selfcheck(found), quiet=quiet)
    raise typer.Exit(0 if matrix.passed else EXIT_CODES["WRONG"])


@contextmanager
def _running(
    outputs: Outputs, backend: options.Backend, ranks_per_gpu: int | None, *, bar: bool
) -> Iterator[Progress | None]:
    """Yield what a run reports its progress to, once the outputs are known to be writable.

    What a subject prints meanwhile is no result: it goes to stderr, as what ranks print does.
    """
    _serve_if_torchrun_wants(backend, ranks_per_gpu)
    outputs.assert_writable()
    with no_results(), _interruptible(), progress_bar(enabled=bar) as progress:
        yield progress


def _serve_if_torchrun_wants(backend: options.Backend, ranks_per_gpu: int | None) -> None:
    """Under torchrun rank 0 speaks and the others serve it: they leave here."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return
    from tpcheck.groups.opening import serves_torchrun

    with no_results(), _interruptible():
        if serves_torchrun(backend.value, ranks_per_gpu):
            raise typer.Exit


def _list_builtins() -> None:
    from tabulate import tabulate

    from tpcheck.subjects import list_builtins

    rows = [(f"builtin:{name}", description) for name, description in list_builtins()]
    print_result(tabulate(rows, headers=("subject", "what it is"), disable_numparse=True))


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


add_diff(app, _interruptible)
app.add_typer(golden_app(_running), name="golden")
app.command()(gate)
