"""The fork server: a process that has imported torch once and forks ranks on request.

Requirement: a rank is ready in milliseconds, a dead one is replaced as fast, and nothing outlives
the parent, however it dies. The zygote is a process of its own rather than a multiprocessing
forkserver, because that one runs the user's `__main__` again. It has one thread, never touches
CUDA (a fork after that is lost), and is the only one to reap and to signal ranks, so a process id
is never used after it was given back.

Lines of JSON on a Unix socket. Requests: {"do": "fork", "settings": {...}, "environment": {...}}
with a socket attached, {"do": "signal", "pid": ..., "signal": ...}. Answers: {"ready": true},
{"forked": pid}, {"exited": pid, "status": ...} where status is as in subprocess.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import traceback
import warnings
from typing import Any

_PR_SET_PDEATHSIG = 1
_LOOK_AT_PARENT_S = 1.0


def main(config: dict[str, Any]) -> None:
    """Serve fork requests until the parent is gone, then leave nothing behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=config["control"])
    gc.disable()  # collections took a quarter of the imports' time
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in config["preload"]:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.freeze()  # keep the imported modules' pages shared
    gc.enable()
    zygote = _Zygote(control, config["parent"])
    try:
        zygote.run()
    except Exception:
        traceback.print_exc()
    finally:
        zygote.kill_all()
        shutil.rmtree(config["scratch"], ignore_errors=True)
        os._exit(0)


class _Zygote:
    def __init__(self, control: socket.socket, parent: int) -> None:
        self._control = control
        self._parent = parent
        self._children: set[int] = set()
        self._pending = b""
        self._wake, wake_write = os.pipe()
        self._inherited = [self._wake, wake_write]
        for fd in self._inherited:
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())

    def run(self) -> None:
        self._say(ready=True)
        while os.getppid() == self._parent:
            # A fork of the parent may hold our socket open, so its end is not the only sign.
            sources: list[Any] = [self._control, self._wake]
            ready, _, _ = select.select(sources, [], [], _LOOK_AT_PARENT_S)
            if self._wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake, 4096)
            self._reap()
            if self._control in ready and not self._listen():
                return

    def kill_all(self) -> None:
        for pid in self._children:
            _kill_with_descendants(pid)
        for pid in self._children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def _listen(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, 1 << 16, 8)
        except ConnectionResetError:  # the parent died with words of ours unread
            return False
        if not data:
            return False
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if request["do"] == "fork":
                self._fork(fds.pop(0), request)
            elif request["pid"] in self._children:
                self._signal(request["pid"], request["signal"])
        return True

    def _fork(self, fd: int, request: dict[str, Any]) -> None:
        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_rank(fd, request, zygote)
        os.close(fd)
        self._children.add(pid)
        self._say(forked=pid)

    def _become_rank(self, fd: int, request: dict[str, Any], zygote: int) -> None:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._control.close()
            for inherited in self._inherited:
                os.close(inherited)
            os.setpgid(0, 0)
            _die_with(zygote)
            _volunteer_for_the_oom_killer()
            os.environ.update(request["environment"])
            from tpcheck.groups.worker import RankSettings, serve

            serve(socket.socket(fileno=fd), RankSettings(**request["settings"]))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # no destructors: those of a process group may wait for its peers

    def _signal(self, pid: int, number: int) -> None:
        if number == signal.SIGKILL:
            _kill_with_descendants(pid)
        else:
            os.kill(pid, number)

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._children.discard(pid)
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)  # processes that the subject started
            self._say(exited=pid, status=os.waitstatus_to_exitcode(status))

    def _say(self, **message: Any) -> None:
        with contextlib.suppress(OSError):
            self._control.sendall(json.dumps(message).encode() + b"\n")


def _kill_with_descendants(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)


def _die_with(zygote: int) -> None:
    """Make the kernel kill this rank when the zygote dies, even by SIGKILL (Linux)."""
    with contextlib.suppress(Exception):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != zygote:
        os._exit(1)


def _volunteer_for_the_oom_killer() -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
