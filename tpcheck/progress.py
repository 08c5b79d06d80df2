"""A progress bar on stderr for what takes longer than two seconds.

Requirement: a short run prints its result and nothing else, a long one shows at once that it is
alive, and a log file or a pipe never gets a bar. The bar starts from a timer, because the first
case may be the slow one; rich is imported only then.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

DELAY_S = 2.0

Progress = Callable[[int, int, str], None]
"""Called with (done, total, text) whenever something finished."""


@contextmanager
def progress_bar(*, enabled: bool = True, delay_s: float = DELAY_S) -> Iterator[Progress | None]:
    """Yield a callable that moves the bar; None when it is off or stderr is not a terminal."""
    if not enabled or not sys.stderr.isatty():
        yield None
        return
    bar = _Bar()
    timer = threading.Timer(delay_s, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield bar.update
    finally:
        timer.cancel()
        bar.stop()


class _Bar:
    """The state of one bar. The lock is there because the timer starts it from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state = (0, 0, "starting ranks")
        self._live: Any = None
        self._task: Any = None
        self._stopped = False

    def start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Live

        with self._lock:
            if self._stopped:
                return
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            text = TextColumn("{task.description}", markup=False)
            self._live = Live(*columns, text, console=Console(stderr=True), transient=True)
            self._task = self._live.add_task("", total=None)
            self._show()
            self._live.start()

    def update(self, done: int, total: int, text: str) -> None:
        with self._lock:
            self._state = (done, total, text)
            if self._live is not None:
                self._show()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._live is not None:
                self._live.stop()

    def _show(self) -> None:
        done, total, text = self._state
        self._live.update(self._task, completed=done, total=total or None, description=text)
