"""`tpcheck golden record|verify|list`: parse, call golden/command.py, print, exit.

Requirement: as in cli.py. Besides, exit code 1 is anything missing or different, and a recorder
whose folder cannot be written to says so before it runs. `list` and `--help` load no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from tpcheck.cli_commands import options as options
from tpcheck.cli_commands.inputs import subject_inputs
from tpcheck.cli_commands.output import Outputs
from tpcheck.errors import TPCheckError
from tpcheck.progress import Progress
from tpcheck.records import EXIT_CODES, PASS
from tpcheck.spec import MAX_SEED

Running = Callable[..., AbstractContextManager[Progress | None]]

SubjectName = Annotated[
    str, typer.Argument(help="package.module:attr, file.py:attr, builtin:NAME, hf:DIR or ref:DIR.")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder with the records.")]
Full = Annotated[bool, typer.Option("--full", help="Keep every logit, not a sketch of them.")]
Update = Annotated[bool, typer.Option("--update", help="Replace records that say something else.")]
Stream = Annotated[
    bool,
    typer.Option("--stream", help="ref:DIR layer by layer, where it fits no device; resumable."),
]
VerifiedTp = Annotated[
    str, typer.Option("--tp", metavar="1,2,4", help="Degrees to hold to the record.")
]
VerifiedDTypes = Annotated[
    list[options.DType],
    typer.Option("--dtype", metavar="|".join(options.DType), help="Default: all recorded."),
]
VerifiedSeed = Annotated[
    int | None, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed of the first case.")
]
FIRST = Annotated[str, typer.Argument(metavar="[SUBJECT] DIR", help="List one subject's, or all.")]
SECOND = Annotated[Path | None, typer.Argument(metavar="", show_default=False)]

FAILED = EXIT_CODES["WRONG"]


def golden_app(running: Running) -> typer.Typer:
    """Return the sub-commands; `running` is how cli.py runs what takes a while."""
    app = typer.Typer(
        help="TP=1 references with provenance: record, verify, list. Missing is a failure.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )

    @app.command()
    def record(
        subject: SubjectName,
        directory: Folder,
        full: Full = False,
        update: Update = False,
        stream: Stream = False,
        dtype: options.DTypes = [options.DType.bfloat16],  # noqa: B006 - typer copies it
        backend: options.BackendOption = options.Backend.auto,
        cases: options.Cases = None,
        case: options.CaseId = None,
        batch: options.Batch = None,
        seq_len: options.SeqLen = None,
        seed: options.Seed = 0,
        timeout: options.Timeout = 120.0,
        json_path: options.JsonPath = None,
        quiet: options.Quiet = False,
        no_progress: options.NoProgress = False,
    ) -> None:
        """Keep what SUBJECT's TP=1 gives, and its float64 oracle, in DIR. Verifies nothing."""
        outputs = Outputs(json_path, inputs=subject_inputs(subject))
        with running(outputs, backend, None, bar=not (quiet or no_progress)) as progress:
            from tpcheck.golden import command as golden_command

            found = golden_command.golden_record(
                subject,
                directory,
                dtypes=_names(dtype),
                backend=backend.value,
                cases=cases,
                case=case,
                batch=batch,
                seq_len=seq_len,
                seed=seed,
                full=full,
                update=update,
                stream=stream,
                timeout_s=timeout,
                progress=progress,
            )
        from tpcheck.render.golden import render_recording

        outputs.publish(found, render_recording(found), quiet=quiet)
        raise typer.Exit(0 if found["outcome"] == "RECORDED" else FAILED)

    @app.command()
    def verify(
        subject: SubjectName,
        directory: Folder,
        tp: VerifiedTp = "1",
        dtype: VerifiedDTypes = [],  # noqa: B006 - typer copies it
        backend: options.BackendOption = options.Backend.auto,
        ranks_per_gpu: options.RanksPerGpu = None,
        cases: options.Cases = None,
        case: options.CaseId = None,
        batch: options.Batch = None,
        seq_len: options.SeqLen = None,
        seed: VerifiedSeed = None,
        timeout: options.Timeout = 120.0,
        json_path: options.JsonPath = None,
        html: options.HtmlPath = None,
        junit: options.JunitPath = None,
        markdown: options.MarkdownPath = None,
        quiet: options.Quiet = False,
        no_progress: options.NoProgress = False,
    ) -> None:
        """Is SUBJECT still what DIR recorded, at TP=1 and at other degrees? Missing fails."""
        tp_sizes = options.parse_tp_sizes(tp)
        outputs = Outputs(json_path, html, junit, markdown, inputs=subject_inputs(subject))
        with running(outputs, backend, ranks_per_gpu, bar=not (quiet or no_progress)) as progress:
            from tpcheck.golden import command as golden_command

            report = golden_command.golden_verify(
                subject,
                directory,
                tp_sizes or (1,),
                dtypes=_names(dtype),
                backend=backend.value,
                ranks_per_gpu=ranks_per_gpu,
                cases=cases,
                case=case,
                batch=batch,
                seq_len=seq_len,
                seed=seed,
                timeout_s=timeout,
                progress=progress,
            )
        outputs.write(report)
        outputs.show(report, quiet=quiet)
        raise typer.Exit(0 if report.outcome == PASS else FAILED)

    @app.command("list")
    def list_(
        first: FIRST,
        second: SECOND = None,
        json_path: options.JsonPath = None,
        quiet: options.Quiet = False,
    ) -> None:
        """Which records DIR holds, of SUBJECT or of all, and what is wrong with them."""
        outputs = Outputs(json_path)
        outputs.assert_writable()
        from tpcheck.golden.listing import listing
        from tpcheck.render.golden import render_listing

        if second is None and ":" in first and not Path(first).exists():
            raise TPCheckError(f"DIR is missing: tpcheck golden list {first} DIR")
        found: Any = listing(second or Path(first), None if second is None else first)
        outputs.publish(found, render_listing(found), quiet=quiet)
        raise typer.Exit(0 if found["outcome"] == "OK" else FAILED)

    return app


def _names(dtypes: list[options.DType]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.value for one in dtypes))
