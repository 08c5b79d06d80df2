"""Where a pool's ranks live: on this machine, forked by a zygote that belongs to the pool.

Requirement: the pool schedules and judges; how a rank is started, looked at, signalled and buried
stands here, so that ranks on other machines (torchrun) can offer the same `Link` and `Fleet`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tpcheck.errors import BackendError
from tpcheck.groups.flight import STACK_SIGNAL, Flight, FlightSlot, subject_part
from tpcheck.groups.scratch import Scratch
from tpcheck.groups.wire import Channel
from tpcheck.groups.worker import RankSettings, flight_path, stack_path

_START_S = 180.0
_FORK_S = 30.0
_CLOSE_S = 5.0


class Link(Protocol):
    """The parent's hold on one rank process. `layout` names the world it is in, "" for none."""

    rank: int
    layout: str
    channel: Channel

    @property
    def death(self) -> str:
        """How the process ended, as the rest of a sentence; "" while it lives."""
        ...

    def flight(self) -> Flight:
        """Return what the rank is doing."""
        ...

    def mark_stack(self) -> None:
        """Forget the stacks written so far."""
        ...

    def ask_stack(self) -> None:
        """Make the rank write its stack; `stack` has it a moment later, if the rank can run."""
        ...

    def stack(self) -> str:
        """Return what was written since the last mark."""
        ...

    def kill(self) -> None:
        """Kill the process and what it started; the next `Fleet.link` replaces it."""
        ...


class Fleet(Protocol):
    """All ranks of a pool."""

    size: int

    def link(self, rank: int) -> Link:
        """Return a living rank, starting one if need be."""
        ...

    def sources(self) -> Sequence[Any]:
        """Return what to wait on besides the channels of the links."""
        ...

    def pump(self) -> None:
        """Take in what the sources have to say, without waiting."""
        ...

    def rendezvous(self, layout: str) -> tuple[Any, ...]:
        """Return where the ranks of a new world meet."""
        ...

    def trim(self) -> None:
        """Free shared weights beyond the limit; called while no job runs."""
        ...

    def abandon(self) -> None:
        """Kill every rank at once; `link` starts new ones."""
        ...

    def close(self) -> None:
        """End every process and remove every file. Safe to call twice."""
        ...


class LocalLink:
    """A rank forked by this machine's zygote."""

    def __init__(self, fleet: LocalFleet, rank: int, pid: int, channel: Channel) -> None:
        self.rank = rank
        self.pid = pid
        self.channel = channel
        self.layout = ""
        self._fleet = fleet
        self._slot = FlightSlot(flight_path(fleet.scratch.path, rank))
        self._slot.clear()
        self._stack_path = stack_path(fleet.scratch.path, rank)
        self._stack_from = 0

    @property
    def death(self) -> str:
        status = self._fleet.exits.get(self.pid)
        if status is None and self.channel.closed:
            status = self._fleet.await_exit(self.pid)
            if status is None:
                return "died together with the process that started it"
        return "" if status is None else describe_exit(status)

    def flight(self) -> Flight:
        return self._slot.read()

    def mark_stack(self) -> None:
        with contextlib.suppress(OSError):
            self._stack_from = self._stack_path.stat().st_size

    def ask_stack(self) -> None:
        self.mark_stack()
        self._fleet.signal(self.pid, STACK_SIGNAL)

    def stack(self) -> str:
        with contextlib.suppress(OSError), open(self._stack_path, "rb") as file:
            file.seek(self._stack_from)
            return subject_part(file.read().decode(errors="replace"))
        return ""

    def kill(self) -> None:
        self.kill_process()
        self.close()

    def kill_process(self) -> None:
        """Kill the process and leave it to the pool to find out."""
        self._fleet.signal(self.pid, signal.SIGKILL)

    def close(self) -> None:
        self.channel.close()
        self._slot.close()


class LocalFleet:
    """One zygote and the ranks it forked. Starts with the first `link`."""

    def __init__(
        self,
        size: int,
        launch: Callable[[int], tuple[RankSettings, dict[str, str]]],
        preload: Sequence[str],
        zygote_environment: dict[str, str],
    ) -> None:
        self.size = size
        self.exits: dict[int, int] = {}
        self._launch = launch
        self._preload = list(preload)
        self._zygote_environment = zygote_environment
        self._links: dict[int, LocalLink] = {}
        self._zygote: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._scratch: Scratch | None = None
        self._heard = b""
        self._news: list[dict[str, Any]] = []

    @property
    def scratch(self) -> Scratch:
        assert self._scratch is not None
        return self._scratch

    @property
    def pids(self) -> list[int]:
        """Return the process ids of the zygote and its living ranks."""
        zygote = [self._zygote.pid] if self._zygote else []
        return [*zygote, *(link.pid for link in self._links.values())]

    def link(self, rank: int) -> LocalLink:
        self.pump()
        link = self._links.get(rank)
        if link is not None and not link.channel.closed and link.pid not in self.exits:
            return link
        if link is not None:
            link.kill()
            self._links.pop(rank)
        if self._zygote is not None and self._is_lost():
            self.close()
        if self._zygote is None:
            self._start()
        self._links[rank] = self._fork(rank)
        return self._links[rank]

    def sources(self) -> Sequence[Any]:
        return [self._control] if self._control is not None else []

    def pump(self) -> None:
        self._hear(0.0)
        for message in self._take("exited"):
            self.exits[message["exited"]] = message["status"]

    def await_exit(self, pid: int, timeout_s: float = 1.0) -> int | None:
        """Return the exit status of a rank whose socket is closed; None if it cannot be had."""
        deadline = time.monotonic() + timeout_s
        while pid not in self.exits and self._control is not None:
            if (left := deadline - time.monotonic()) <= 0:
                break
            self._hear(left)
            self.pump()
        return self.exits.get(pid)

    def signal(self, pid: int, number: int) -> None:
        if pid not in self.exits:
            self._ask({"do": "signal", "pid": pid, "signal": int(number)})

    def rendezvous(self, layout: str) -> tuple[Any, ...]:
        return ("file", str(self.scratch.path / f"store-{layout}"))

    def trim(self) -> None:
        from tpcheck.groups.weights import FileStore

        if self._scratch is not None:
            FileStore(self._scratch.weights).trim(self._scratch.weights_limit())

    def abandon(self) -> None:
        self.close()

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()
        if self._control is not None:
            self._control.close()  # the zygote kills the ranks and removes the files
            self._control = None
        if self._zygote is not None:
            try:
                self._zygote.wait(_CLOSE_S)
            except subprocess.TimeoutExpired:
                self._zygote.kill()  # its ranks die with it
                self._zygote.wait()
            self._zygote = None
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None
        self.exits.clear()
        self._heard, self._news = b"", []

    def _start(self) -> None:
        self._scratch = Scratch()
        self._control, theirs = socket.socketpair()
        config = {
            "control": theirs.fileno(),
            "parent": os.getpid(),
            "preload": self._preload,
            "scratch": str(self._scratch.path),
            "path": [entry for entry in sys.path if isinstance(entry, str)],
        }
        with theirs:
            self._zygote = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, json.dumps(config)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a subject prints is no result
                env=self._zygote_environment,
                start_new_session=True,  # a Ctrl-C is the parent's to handle
                pass_fds=(theirs.fileno(), self._scratch.lock),
            )
        self._expect("ready", _START_S)

    def _fork(self, rank: int) -> LocalLink:
        ours, theirs = socket.socketpair()
        settings, environment = self._launch(rank)
        settings = dataclasses.replace(settings, scratch=str(self.scratch.path))
        request = {
            "do": "fork",
            "settings": dataclasses.asdict(settings),
            "environment": environment,
        }
        with theirs:
            self._ask(request, theirs.fileno())
            pid = self._expect("forked", _FORK_S)["forked"]
        self.exits.pop(pid, None)  # the number of an earlier rank
        return LocalLink(self, rank, pid, Channel(ours))

    def _ask(self, request: dict[str, Any], *fds: int) -> None:
        if self._control is not None:
            with contextlib.suppress(OSError):
                line = json.dumps(request).encode() + b"\n"
                socket.send_fds(self._control, [line], list(fds))

    def _expect(self, key: str, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while True:
            for message in self._take(key):
                return message
            left = deadline - time.monotonic()
            if left <= 0 or self._is_lost():
                state = f"did not answer within {timeout_s:g} s" if left <= 0 else "ended"
                self.close()
                raise BackendError(
                    f"pool: the process that starts ranks {state} while it should be {key};"
                    " its stderr says why"
                )
            self._hear(min(left, 0.5))

    def _take(self, key: str) -> list[dict[str, Any]]:
        found = [message for message in self._news if key in message]
        self._news = [message for message in self._news if key not in message]
        return found

    def _hear(self, timeout_s: float) -> None:
        if self._control is None or not _readable(self._control, timeout_s):
            return
        try:
            data = self._control.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._control.close()
            self._control = None
            return
        *lines, self._heard = (self._heard + data).split(b"\n")
        self._news.extend(json.loads(line) for line in lines)

    def _is_lost(self) -> bool:
        return self._control is None or (
            self._zygote is not None and self._zygote.poll() is not None
        )


def _readable(sock: socket.socket, timeout_s: float) -> bool:
    poller = select.poll()  # unlike select, it takes file descriptors above 1023
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def describe_exit(status: int) -> str:
    """Say how a process ended: `was killed by SIGKILL (...)` or `exited with code 3 ...`."""
    if status >= 0:
        return f"exited with code {status} before it answered"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (the kernel's out-of-memory killer, if nobody sent it)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


_BOOT = (
    "import json, sys; config = json.loads(sys.argv[1]); sys.path[:] = config['path'];"
    "from tpcheck.groups.zygote import main; main(config)"
)
