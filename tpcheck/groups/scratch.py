"""A pool's scratch directory: weights, rendezvous files, flight slots and stacks, in memory.

Requirement: nothing is left behind, also by a pool that was killed together with its zygote. Each
directory carries its owner's pid in its name and a lock that the kernel frees when owner, zygote
and ranks are gone; whoever starts the next pool removes the directories that are free.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
_ENOUGH_BYTES = 64 << 20


class Scratch:
    """One directory, mode 0700, locked for as long as any process holds `lock`."""

    def __init__(self, base: Path | None = None) -> None:
        base = base or _base()
        remove_stale(base)
        prefix = f"{_prefix()}{os.getpid()}-"
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        self.lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.weights = self.path / "weights"
        self.weights.mkdir()

    def weights_limit(self) -> int:
        """Return how many bytes of weights to keep: 1 GiB, or a quarter of what is free."""
        return min(1 << 30, shutil.disk_usage(self.path).free // 4)

    def remove(self) -> None:
        os.close(self.lock)
        shutil.rmtree(self.path, ignore_errors=True)


def remove_stale(base: Path) -> None:
    """Remove the directories of this user's pools that nobody uses any more."""
    for path in base.glob(f"{_prefix()}*-*"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.name.removeprefix(_prefix()).split("-")[0])
            if not _is_alive(pid) and _is_unlocked(path / "lock"):
                shutil.rmtree(path, ignore_errors=True)


def _prefix() -> str:
    return f"tpcheck-{os.getuid()}-"


def _base() -> Path:
    with contextlib.suppress(OSError):
        usable = os.access(_SHARED_MEMORY, os.W_OK | os.X_OK)
        if usable and shutil.disk_usage(_SHARED_MEMORY).free >= _ENOUGH_BYTES:
            return _SHARED_MEMORY
    return Path(tempfile.gettempdir())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_unlocked(lock: Path) -> bool:
    # The pid alone does not tell: it may belong to another container that shares /dev/shm.
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
