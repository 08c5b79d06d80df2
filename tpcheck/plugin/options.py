"""The plugin's options: declared, read and checked. Loads no torch unless GPUs have to be counted.

Requirement: a bad option, and a machine that cannot hold what was asked for, is one
`pytest.UsageError` before the first test runs. Under xdist every worker gets GPUs of its own: two
workers on one GPU would each measure what the other does to it.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tpcheck.errors import TPCheckError
from tpcheck.files import assert_writable

DEFAULT_DEGREES = (2, 4, 8)
"""Without --tp: what `tpcheck run` tries by default."""

MAX_TIMEOUT_S = 1e9
"""Of one case: a system's timers take no more than nine times that."""

MAX_WORLD = 64
"""The largest world; the largest that was tried."""

BACKENDS = ("auto", "sim", "gloo", "nccl")

_SHOWING = (
    *("help", "version", "collectonly", "showfixtures", "show_fixtures_per_test"),
    *("markers", "cacheshow", "setupplan"),
)

_GPU_NODES = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd")
"""Where none of these is, there is no GPU, and no torch is needed to know it."""


@dataclass(frozen=True, slots=True)
class PluginOptions:
    """What the command line asks of the plugin.

    degrees: what properties draw from, ascending. named: the user listed them one by one. given:
    any option was. torchrun: torchrun's world is to be used. devices: for the header.
    """

    degrees: tuple[int, ...] = DEFAULT_DEGREES
    named: bool = False
    given: bool = False
    sized: bool = False
    backend: str = "auto"
    ranks_per_gpu: int | None = None
    cases: int | None = None
    timeout_s: float = 120.0
    report: str = ""
    torchrun: bool = False
    devices: str = ""

    @property
    def world(self) -> int:
        """How many ranks the largest degree needs."""
        return max(self.degrees)

    def header(self) -> str:
        """Say in one line what the session runs on."""
        degrees = ", ".join(map(str, self.degrees))
        text = f"tpcheck: world {self.world} (degrees {degrees}), backend {self.backend}"
        text += " under torchrun" if self.torchrun else ""
        return f"{text}, devices: {self.devices}" if self.devices else text


def add_options(parser: pytest.Parser) -> None:
    """Declare the options; none has a default, so that what was given can be told."""
    group = parser.getgroup("tpcheck", "tensor-parallel correctness (tpcheck)")
    option = group.addoption
    option(
        "--tp",
        metavar="N|2,4",
        help="N: a world of N ranks, properties draw degrees 2 to N; 2,4: exactly these degrees.",
    )
    option(
        "--tp-backend",
        choices=BACKENDS,
        help="auto (default): nccl if there are enough GPUs, else gloo; sim: all in one process.",
    )
    option("--tp-ranks-per-gpu", metavar="N", help="Several NCCL ranks on one GPU.")
    option("--tp-cases", metavar="N", help="Cases of every tp_check outside @given (default 1).")
    option(
        "--tp-timeout",
        metavar="S",
        help="Seconds one case may take (default 120). A test's own timeout (pytest-timeout) should"
        " be longer: it ends the test without naming the rank that hangs.",
    )
    option("--tp-report", metavar="PATH", help="Write the verdicts of all tests as a JSON report.")


def read_options(config: pytest.Config) -> PluginOptions:
    """Return the options, each checked.

    Raises:
        pytest.UsageError: names the option, its value and what it should be.
    """
    names = ("tp", "tp_backend", "tp_ranks_per_gpu", "tp_cases", "tp_timeout", "tp_report")
    given = {name: value for name in names if (value := config.getoption(name)) is not None}
    if not given:
        return PluginOptions()
    backend = given.get("tp_backend", "auto")
    ranks_per_gpu = _whole("--tp-ranks-per-gpu", given.get("tp_ranks_per_gpu"))
    if ranks_per_gpu is not None and backend != "nccl":
        _refuse(f"--tp-ranks-per-gpu={ranks_per_gpu} needs --tp-backend nccl, not {backend}")
    options = PluginOptions(
        degrees=_degrees(given["tp"]) if "tp" in given else DEFAULT_DEGREES,
        named="," in given.get("tp", ""),
        given=True,
        sized="tp" in given,
        backend=backend,
        ranks_per_gpu=ranks_per_gpu,
        cases=_whole("--tp-cases", given.get("tp_cases")),
        timeout_s=_seconds(given.get("tp_timeout", "120")),
        report=given.get("tp_report", ""),
        torchrun=backend != "sim" and under_torchrun() and not is_worker(config),
    )
    if options.torchrun:
        options = _in_torchruns_world(config, options)
    if "tp_report" in given and not is_worker(config) and not only_shows(config):
        _require_writable(options.report)
    return options


def only_shows(config: pytest.Config) -> bool:
    """Return whether this run lists things and executes no test."""
    return any(config.getoption(name, default=False) for name in _SHOWING)


def under_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_worker(config: pytest.Config) -> bool:
    """Return whether this is a worker of xdist."""
    return hasattr(config, "workerinput")


def placed(config: pytest.Config, options: PluginOptions) -> PluginOptions:
    """Return the options with the backend that `auto` means here; give a worker its GPUs.

    Raises:
        pytest.UsageError: there are too few GPUs for every worker.
    """
    if options.torchrun:
        return replace(options, devices=f"{os.environ['WORLD_SIZE']} processes")
    gpus = 0 if options.backend in ("sim", "gloo") else _gpu_count(options.backend)
    workers = _worker_count(config)
    each = gpus // workers
    room = each * (options.ranks_per_gpu or 1)
    if options.backend == "nccl" and not options.sized:
        fitting = tuple(size for size in options.degrees if size <= room)
        options = replace(options, degrees=fitting or options.degrees)
    enough = gpus > 0 and options.world <= room
    if options.backend == "nccl" and not enough:
        _refuse_too_few(options, gpus, workers)
    if options.backend == "auto":
        options = replace(options, backend="nccl" if enough else "gloo")
    if options.backend != "nccl":
        return replace(options, devices=f"cpu, {os.cpu_count()} cores")
    if is_worker(config):
        _take_share(config, each, gpus)
    share = f", {each} for each of {workers} workers" if workers > 1 else ""
    return replace(options, devices=f"{gpus} GPU{'' if gpus == 1 else 's'}{share}")


def share_of(names: Sequence[str], worker: int, each: int) -> str:
    """Return the CUDA_VISIBLE_DEVICES of one worker.

    Example:
        >>> share_of(["4", "5", "6", "7"], worker=1, each=2)
        '6,7'
    """
    return ",".join(names[worker * each : (worker + 1) * each])


def _degrees(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        _refuse(f"--tp={text!r}, but should be a world like 8, or degrees like 2,4")
    sizes = sorted({int(part) for part in parts})
    if "," not in text:
        sizes = list(range(2, min(sizes[0], MAX_WORLD + 1) + 1))
        if not sizes:
            _refuse(f"--tp={text}, but should be at least 2: one rank has nothing to differ from")
    if sizes[0] < 1 or sizes[-1] > MAX_WORLD:
        _refuse(f"--tp={text}, but every degree should be 1 to {MAX_WORLD}")
    return tuple(sizes)


def _whole(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        _refuse(f"{name}={text!r}, but should be a whole number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) or float(text) <= 0:
        _refuse(f"--tp-timeout={text!r}, but should be more than 0 seconds")
    if float(text) > MAX_TIMEOUT_S:
        _refuse(f"--tp-timeout={text}, but should be at most {MAX_TIMEOUT_S:g} seconds")
    return float(text)


def _require_writable(path: str) -> None:
    if not path:
        _refuse("--tp-report is empty, but should be the path of a file")
    if path.endswith(".py"):  # its value was left out, and a test file would be written over
        _refuse(f"--tp-report={path}, but should be the path of a report")
    try:
        assert_writable(path)
    except TPCheckError as error:
        _refuse(f"--tp-report: {error}")


def _in_torchruns_world(config: pytest.Config, options: PluginOptions) -> PluginOptions:
    if config.getoption("numprocesses", default=None) or config.getoption("tx", default=None):
        _refuse("-n does not go with torchrun: its processes are the ranks; leave out one of them")
    size = os.environ["WORLD_SIZE"]
    room = int(size) if size.isdigit() else 0
    if not options.sized:
        options = replace(options, degrees=tuple(n for n in options.degrees if n <= room) or (2,))
    if options.world > room:
        _refuse(f"--tp: {options.world} ranks, but torchrun's world has WORLD_SIZE={size}")
    return options


def _worker_count(config: pytest.Config) -> int:
    if is_worker(config):
        workerinput: dict[str, Any] = config.workerinput  # type: ignore[attr-defined]
        return int(workerinput["workercount"])
    count = 0
    for spec in config.getoption("tx", default=None) or ():
        times, star, _ = spec.partition("*")
        count += int(times) if star and times.isdigit() else 1
    return max(1, count)


def _gpu_count(backend: str) -> int:
    if backend == "auto" and not any(glob.glob(pattern) for pattern in _GPU_NODES):
        return 0
    from tpcheck.groups.nccl import visible_gpu_count

    return visible_gpu_count()


def _take_share(config: pytest.Config, each: int, gpus: int) -> None:
    worker = int(re.sub(r"\D", "", config.workerinput["workerid"]))  # type: ignore[attr-defined]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",") if name.strip()]
    names = names or [str(index) for index in range(gpus)]
    os.environ["CUDA_VISIBLE_DEVICES"] = share_of(names, worker, each)


def _refuse_too_few(options: PluginOptions, gpus: int, workers: int) -> None:
    needed = -(-options.world // (options.ranks_per_gpu or 1)) * workers
    asked = f"{workers} workers of {options.world} ranks each" if workers > 1 else ""
    asked = asked or f"{options.world} ranks"
    fewer = "fewer workers (-n), " if workers > 1 else ""
    visible = f"{gpus or 'no'} GPU{' is' if gpus == 1 else 's are'} visible"
    _refuse(
        f"--tp-backend nccl: {visible}, but {asked} need {needed}; use {fewer}a smaller --tp,"
        " --tp-ranks-per-gpu N or --tp-backend gloo"
    )


def _refuse(message: str) -> None:
    raise pytest.UsageError(message)
