"""The options that commands share, each defined once: name, range, help.

Requirement: an option means the same in every command. Ranges are checked before anything is
imported or started. The list is frozen by tests/test_cli_options.py.
"""

from __future__ import annotations

import math
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tpcheck.errors import TPCheckError
from tpcheck.spec import MAX_SEED

_WHOLE = re.compile(r"0*[1-9][0-9]{0,17}")
"""A whole number of at least 1, of digits that 64 bits hold."""


MAX_TIMEOUT_S = 1e9
"""Thirty years; a system's timers take no more than nine times that."""


MAX_TP = 65536
"""More ranks than any machine has; a plan for many more would take forever."""


class Backend(StrEnum):
    """Where ranks run."""

    auto = "auto"
    sim = "sim"
    gloo = "gloo"
    nccl = "nccl"


class DType(StrEnum):
    """The dtypes a model is deployed in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class KvDType(StrEnum):
    """The dtypes a KV cache is kept in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    float8 = "float8"


class Declared(StrEnum):
    """How an engine says it sums."""

    ring = "ring"
    tree = "tree"
    wide = "wide"
    fp32_wire = "fp32_wire"


def parse_tp_sizes(text: str | None) -> tuple[int, ...] | None:
    """Return the degrees of `--tp 2,4,8` in order, each once; None stands for the default.

    Raises:
        TPCheckError: not whole numbers of 1 to MAX_TP, separated by commas.
    """
    sizes = _whole_numbers("--tp", text, "whole numbers of at least 1 like 2,4,8")
    if sizes is not None and max(sizes) > MAX_TP:
        raise TPCheckError(f"--tp={text!r}, but every degree should be at most {MAX_TP}")
    return sizes


def parse_message_sizes(text: str | None) -> tuple[int, ...] | None:
    """Return the elements of `--sizes 1,4096`, each once; None stands for the default sweep.

    Raises:
        TPCheckError: not whole numbers of at least 1, separated by commas.
    """
    return _whole_numbers("--sizes", text, "numbers of elements like 1,4096")


def _whole_numbers(option: str, text: str | None, expected: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(_WHOLE.fullmatch(piece) for piece in pieces):
        raise TPCheckError(f"{option}={text!r}, but should be {expected}")
    return tuple(dict.fromkeys(map(int, pieces)))


def _tolerance(param: typer.CallbackParam, value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise TPCheckError(f"--{param.name}={value}, but should be a finite number of at least 0")
    return value


def _seconds(value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise TPCheckError(f"--timeout={value}, but should be a finite number of seconds above 0")
    if value > MAX_TIMEOUT_S:
        raise TPCheckError(f"--timeout={value:g}, but should be at most {MAX_TIMEOUT_S:g} seconds")
    return value


def parse_engines(texts: list[str]) -> tuple[str, ...] | None:
    """Return the engines of `--engine vllm,sglang --engine tgi`, each once; None stands for all.

    Raises:
        TPCheckError: a name is empty.
    """
    names = [name.strip() for text in texts for name in text.split(",")]
    if not all(names):
        raise TPCheckError(f"--engine={','.join(texts)!r}, but should be names like vllm,sglang")
    return tuple(dict.fromkeys(names)) or None


Tp = Annotated[str | None, typer.Option("--tp", metavar="2,4,8", help="Degrees to run.")]
BackendOption = Annotated[
    Backend, typer.Option("--backend", help="auto: nccl if there are enough GPUs, else gloo.")
]
RanksPerGpu = Annotated[
    int | None, typer.Option("--ranks-per-gpu", min=1, help="Several NCCL ranks on one GPU.")
]
DTypes = Annotated[
    list[DType], typer.Option("--dtype", metavar="|".join(DType), help="Repeatable.")
]
Wires = Annotated[
    list[str],
    typer.Option("--wire", metavar="float32|int8_wire|...", help="Repeatable; default: all."),
]
DeclaredOption = Annotated[
    Declared | None,
    typer.Option("--declared", help="How the engine says it sums; default: ring, Gloo's."),
]
Fallback = Annotated[
    str | None,
    typer.Option(
        "--fallback",
        metavar="LEVEL,...",
        help="Measure what scoring at TP=1 buys: head,rowwise,full,fp32_wire,fixed_tree.",
    ),
]
Width = Annotated[bool, typer.Option("--width", help="Time each degree's forward and sums.")]
Cases = Annotated[
    int | None,
    typer.Option("--cases", min=1, help="How many seeds (default 1) or generated cases (25)."),
]
MaxFailures = Annotated[
    int | None, typer.Option("--max-failures", min=1, help="Stop after so many failing verdicts.")
]
CaseId = Annotated[str | None, typer.Option("--case", metavar="ID", help="Run this case only.")]
Until = Annotated[
    str | None, typer.Option("--until", metavar="FQN", help="Trace up to this module only.")
]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Pin the batch size.")]
SeqLen = Annotated[int | None, typer.Option("--seq-len", min=1, help="Pin the sequence length.")]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=MAX_SEED, metavar="N", help="Seed of the first case.")
]
Atol = Annotated[
    float | None, typer.Option("--atol", callback=_tolerance, help="Your tolerance: it decides.")
]
Rtol = Annotated[
    float | None, typer.Option("--rtol", callback=_tolerance, help="Your tolerance: it decides.")
]
Preset = Annotated[
    str | None, typer.Option("--preset", metavar="seed-1e-2", help="A named tolerance.")
]
Sensitivity = Annotated[
    bool, typer.Option("--sensitivity", help="Plant faults in SUBJECT: would they be caught?")
]
Timeout = Annotated[
    float, typer.Option("--timeout", metavar="S", callback=_seconds, help="Seconds per case.")
]
JsonPath = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Write the report; - is stdout.")
]
HtmlPath = Annotated[Path | None, typer.Option("--html", metavar="PATH", help="Write a page.")]
JunitPath = Annotated[Path | None, typer.Option("--junit", metavar="PATH", help="Write JUnit XML.")]
MarkdownPath = Annotated[
    Path | None, typer.Option("--markdown", metavar="PATH", help="Write Markdown.")
]
Engines = Annotated[
    list[str],
    typer.Option("--engine", metavar="vllm,sglang", help="Repeatable; without it, every engine."),
]
CacheLength = Annotated[
    int | None, typer.Option("--seq-len", min=1, help="Tokens per row that the KV cache holds.")
]
CacheBatch = Annotated[
    int | None, typer.Option("--batch", min=1, help="Rows that the KV cache holds (default 1).")
]
CacheDType = Annotated[
    KvDType | None, typer.Option("--kv-dtype", help="The KV cache's dtype; default: the model's.")
]
Weights = Annotated[
    bool, typer.Option("--weights", help="Hold the safetensors headers against the config too.")
]
MessageSizes = Annotated[
    str | None,
    typer.Option("--sizes", metavar="1,4096", help="Elements per message; default: 1 to 2^21."),
]
Collective = Annotated[
    str | None,
    typer.Option("--collective", metavar="module:fn", help="Probe your fn(tensor) -> sum."),
]
Against = Annotated[
    Path | None, typer.Option("--against", metavar="OTHER.json", help="Fail where it differs.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print the first line only, no progress.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="No progress bar on stderr.")]
