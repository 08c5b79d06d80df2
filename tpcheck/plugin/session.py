"""The half of the plugin that runs subjects: the session's ranks. Loads torch.

Requirement: all tests of a session share warm ranks, as many as `--tp` asks for, and a subject is
run with the options of the command line unless the test says otherwise.
"""

from __future__ import annotations

import datetime
import functools
import inspect
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tpcheck import workflow
from tpcheck.errors import BackendError, TPCheckError
from tpcheck.groups.jobs import Ranks
from tpcheck.groups.opening import chosen_backend, open_ranks
from tpcheck.groups.pool import close_pools
from tpcheck.groups.torchrun import torchrun_world
from tpcheck.plugin.options import PluginOptions
from tpcheck.records import Report
from tpcheck.subjects import SubjectRef

HYPOTHESIS_DEADLINE = datetime.timedelta(milliseconds=200)
"""What Hypothesis takes when nobody chose a deadline."""

_OPTIONS = frozenset(inspect.signature(workflow.run).parameters) - {"subject"}


class TPPool:
    """The warm ranks of a session. `degrees` are those of `--tp`, `world` is the largest."""

    def __init__(self, options: PluginOptions) -> None:
        self.degrees = options.degrees
        self.world = options.world
        self.backend = _backend(options)
        self._options = options
        self._ranks: Ranks | None = None

    def __repr__(self) -> str:
        return "tp_pool"

    def run(self, subject: str | Callable[..., Any] | SubjectRef, **options: Any) -> Report:
        """Return the Report of `tpcheck.run` on these ranks, whatever its outcome.

        A degree below the world that the subject refuses is left out, unless it was asked for by
        `tp_sizes=` or by name (`--tp 2,4`).

        Raises:
            TPCheckError: an option, the subject or the backend is unusable; the message names it.
        """
        require_known(options)
        given = self._options
        ranged = given.sized and not given.named and options.get("tp_sizes") is None
        if given.sized:
            self._require_room(options.get("tp_sizes"))
        if given.sized and options.get("tp_sizes") is None:
            options["tp_sizes"] = self.degrees
        options = self._defaults(options) | options
        if options["backend"] == self.backend:
            self.open()
        report = workflow.run(subject, **options)  # type: ignore[arg-type]
        return _pasteable(_without_refusals(report, self.world) if ranged else report)

    def open(self) -> None:
        """Make all ranks at once: a pool that grows later starts them anew."""
        wanted = self._options.sized or self._options.torchrun
        if wanted and self._ranks is None and self.backend != "sim":
            with open_ranks(self.backend, self.world, self._options.ranks_per_gpu) as ranks:
                self._ranks = ranks  # real ranks outlive the block

    def close(self) -> None:
        """End the ranks; the next use starts new ones."""
        if self._ranks is not None:
            self._ranks.close()
        close_pools()

    def _defaults(self, options: Mapping[str, Any]) -> dict[str, Any]:
        given = self._options
        defaults: dict[str, Any] = {"backend": self.backend, "timeout_s": given.timeout_s}
        if given.cases is not None:
            defaults["cases"] = given.cases
        if options.get("backend", self.backend) == self.backend:
            defaults["ranks_per_gpu"] = given.ranks_per_gpu
        return defaults

    def _require_room(self, tp_sizes: Any) -> None:
        listed = tp_sizes if isinstance(tp_sizes, (Sequence, set, frozenset)) else ()
        largest = max((size for size in listed if isinstance(size, int)), default=0)
        if largest > self.world:
            raise BackendError(
                f"tp_sizes: degree {largest}, but should be at most {self.world}, the world of"
                f" --tp; run pytest --tp {largest}, or mark the test tp(min_size={largest})"
            )


def print_how_to_repeat(item: pytest.Item) -> None:
    """Let a property that uses tp_check print `@reproduce_failure`; leave its time to tpcheck.

    Hypothesis's deadline of 200 ms stands where nobody chose one, and is dropped: an example that
    needs real ranks takes longer. A deadline of the user's stays, as do all other settings.
    """
    from hypothesis import is_hypothesis_test, settings

    test: Any = getattr(item, "obj", None)
    if not is_hypothesis_test(test):
        return
    function = getattr(test, "__func__", test)
    # where the settings decorator, which may stand only once, and Hypothesis's own plugin put them
    name = "_hypothesis_internal_use_settings"
    chosen = getattr(function, name, None) or settings()
    deadline = None if chosen.deadline == HYPOTHESIS_DEADLINE else chosen.deadline
    setattr(function, name, settings(parent=chosen, print_blob=True, deadline=deadline))


def _without_refusals(report: Report, world: int) -> Report:
    """Return the report without degrees that were refused and that nobody asked for by name."""
    refused = [v for v in report.verdicts if v.outcome == "ILLEGAL" and v.tp_size != world]
    if not refused:
        return report
    sizes = ", ".join(map(str, sorted({verdict.tp_size for verdict in refused})))
    return replace(
        report,
        verdicts=tuple(verdict for verdict in report.verdicts if verdict not in refused),
        notes=(*report.notes, f"degrees {sizes} are refused, and were not asked for by name"),
    )


def _pasteable(report: Report) -> Report:
    """Return the report with commands that find the modules which pytest put on the path.

    `pythonpath`, and the folders of tests and conftests, are on no other command's path.
    """
    repros = [verdict.repro for verdict in report.verdicts if verdict.outcome != "PASS"]
    own = report.subject.startswith(("builtin:", "hf:", "ref:"))
    if own or not any(repro.startswith("tpcheck run ") for repro in repros):
        return report
    here = os.getcwd()
    prefixes = (sys.prefix + os.sep, sys.base_prefix + os.sep)
    added = [
        os.path.relpath(folder, here) if folder.startswith(here + os.sep) else folder
        for folder in dict.fromkeys(sys.path)
        if os.path.isdir(folder)
        and folder != here
        and folder not in _everyones_path()
        and not folder.startswith(prefixes)
    ]
    if not added:
        return report
    path = shlex.quote(os.pathsep.join(added))
    path += f"{os.pathsep}$PYTHONPATH" if os.environ.get("PYTHONPATH") else ""
    verdicts = [
        replace(verdict, repro=f"PYTHONPATH={path} {verdict.repro}")
        if verdict.repro.startswith("tpcheck run ")
        else verdict
        for verdict in report.verdicts
    ]
    return replace(report, verdicts=tuple(verdicts))


@functools.cache
def _everyones_path() -> frozenset[str]:
    """Return the path of any Python that is started here."""
    command = [sys.executable, "-c", "import sys; print(*sys.path[1:], sep='\\n')"]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return frozenset(said.stdout.splitlines())


def require_known(options: Mapping[str, Any]) -> None:
    for name in options.keys() - _OPTIONS:
        known = ", ".join(sorted(_OPTIONS))
        raise TPCheckError(f"tp_check: option {name!r}, but should be one of {known}")


def _backend(options: PluginOptions) -> str:
    world = torchrun_world() if options.torchrun else None
    if world is None:
        return options.backend
    # the processes that serve chose theirs in the same way
    return chosen_backend(options.backend, world.local_world_size, options.ranks_per_gpu)
