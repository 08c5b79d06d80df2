"""The environment of a job: the parent's as it is now, put back when the job ends.

Requirement: ranks outlive what a user sets between two runs (monkeypatch.setenv, a switch of a
kernel), and a subject that reads it must be the same one on warm ranks as in simulation, or a
failure seen there would be "confirmed" away. Only what changed since the ranks' environment was
taken travels, and nothing that makes a rank a rank.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch

from tpcheck.groups.nccl import launch_environment

THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

_OF_RANKS = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PYTORCH_NVML_BASED_CUDA_CHECK",
        "PYTEST_CURRENT_TEST",  # changes with every test, and is no setting
        *THREAD_COUNTS,
        *launch_environment(0, 0, loopback=True),
    }
)
_OF_RANKS_BY_PREFIX = ("GLOO_", "TORCHELASTIC")

_RAW: Mapping[Any, Any] = vars(os.environ).get("_data", os.environ)
"""What os.environ decodes: a copy of it takes one microsecond and not fifty, at every job."""


def environment_changes(since: Mapping[str, str]) -> dict[str, str | None]:
    """Return what was set, or removed (None), since this process's environment was `since`.

    What the pool decides for ranks (their place, device, transport and threads) is left out.
    """
    now = dict(os.environ)
    if now == since:
        return {}
    return {
        name: now.get(name)
        for name in now.keys() | since.keys()
        if now.get(name) != since.get(name)
        and name not in _OF_RANKS
        and not name.startswith(_OF_RANKS_BY_PREFIX)
    }


def change_environment(changes: Mapping[str, str | None]) -> None:
    """Set and remove variables, as `environment_changes` gives them."""
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def restored_environment() -> Iterator[None]:
    """Put the environment back as it was; only what differs is touched, threads may read it."""
    before = dict(_RAW)
    try:
        yield
    finally:
        now = dict(_RAW)
        if now != before:
            names = [
                name for name in now.keys() | before.keys() if now.get(name) != before.get(name)
            ]
            change_environment({_text(name): _text(before.get(name)) for name in names})


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, as ranks of a pool do, and put the count back.

    The bits are then those of any number of cores, and no thread spins: on two cores that others
    use as well, two threads took eight times as long.
    """
    threads = torch.get_num_threads()
    if threads != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextlib.contextmanager
def exit_raises() -> Iterator[None]:
    """Let os._exit raise SystemExit here: a rank that leaves is a failure, not tpcheck's own end.

    Children that a subject forks leave as ever.
    """
    leave, owner = os._exit, os.getpid()

    def raising(status: int) -> NoReturn:
        if os.getpid() != owner:
            leave(status)
        raise SystemExit(status)

    os._exit = raising
    try:
        yield
    finally:
        os._exit = leave


def _text(raw: Any) -> Any:
    return None if raw is None else os.fsdecode(raw)
