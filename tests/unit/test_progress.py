"""The bar shows on a terminal only, only for what takes long, and always on stderr."""

import os
import pty
import subprocess
import sys

from tpcheck.progress import progress_bar

CODE = """
import sys, threading
from tpcheck.progress import progress_bar
with progress_bar(enabled={enabled}, delay_s={delay}) as progress:
    if progress is not None:
        progress(1, 3, "s0-b2-t16 tp=2 bfloat16")
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer) and {delay} == 0:
                thread.join()
        progress(2, 3, "s0-b2-t16 [bold]tp=4")
print("result", "rich" in sys.modules)
"""


def on_a_terminal(*, enabled: bool, delay: float) -> tuple[str, str]:
    """Return (stdout, stderr) of CODE whose stderr is a pseudo-terminal."""
    ours, theirs = pty.openpty()
    code = CODE.format(enabled=enabled, delay=delay)
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, env=environment
    ) as child:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
        printed, _ = child.communicate(timeout=60)
    os.close(ours)
    assert child.returncode == 0
    return printed.decode(), shown.decode()


def test_a_long_run_shows_how_far_it_is() -> None:
    printed, shown = on_a_terminal(enabled=True, delay=0)
    assert printed == "result True\n"
    assert "2/3" in shown
    assert "[bold]tp=4" in shown


def test_a_short_run_shows_nothing_and_loads_nothing() -> None:
    assert on_a_terminal(enabled=True, delay=60) == ("result False\n", "")


def test_it_can_be_switched_off() -> None:
    assert on_a_terminal(enabled=False, delay=0) == ("result False\n", "")


def test_a_pipe_gets_no_bar() -> None:
    with progress_bar(delay_s=0) as progress:
        assert progress is None or sys.stderr.isatty()
