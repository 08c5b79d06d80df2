"""The rank's side of the pool: take an order, join its world, run the function, answer.

Requirement: a rank serves many jobs, so each job must find the process as the first one did, and
whatever a job does (raise, exit, corrupt its group) must reach the parent as a reply or as the end
of this process. The parent decides which world a job runs in; ranks only follow.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tpcheck.groups import wire
from tpcheck.groups.distributed import DistributedWorld
from tpcheck.groups.flight import FlightSlot, write_stacks_to
from tpcheck.groups.jobs import text_of
from tpcheck.groups.surroundings import change_environment, restored_environment
from tpcheck.groups.weights import FileStore

_NEVER = timedelta(days=1)
"""Timeout of process groups: the parent has the wall clock, and its message names the operation."""


@dataclass(frozen=True, slots=True)
class RankSettings:
    """What stays the same in a rank's life. `label` is the backend as reports print it."""

    rank: int
    scratch: str = ""
    backend: str = "gloo"
    label: str = "gloo"
    device: str = "cpu"


def flight_path(scratch: str | Path, rank: int) -> Path:
    return Path(scratch, f"flight-{rank}")


def stack_path(scratch: str | Path, rank: int) -> Path:
    return Path(scratch, f"stack-{rank}")


def serve(sock: socket.socket, settings: RankSettings) -> None:
    """Work on orders until the parent closes the socket."""
    torch.set_num_threads(1)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a rank may be killed with its last words unsaid
        sys.stdout.reconfigure(line_buffering=True)
    write_stacks_to(stack_path(settings.scratch, settings.rank))
    rank = _Rank(settings)
    while True:
        try:
            order: wire.Order = wire.receive(sock)
        except (EOFError, OSError):
            return
        reply = rank.obey(order)
        try:
            wire.send(sock, reply)
        except OSError:
            return


class _Rank:
    def __init__(self, settings: RankSettings) -> None:
        self._settings = settings
        self._device = torch.device(settings.device)
        self._slot = FlightSlot(flight_path(settings.scratch, settings.rank))
        self._store = FileStore(Path(settings.scratch, "weights"))
        self._layout = ""
        self._world: DistributedWorld | None = None
        self._cores = _cores()

    def obey(self, order: wire.Order) -> wire.Reply:
        self._slot.begin(order.job)
        try:
            world = self._join(order)
        except Exception as error:
            return _failure(order, "environment", error)
        try:
            with _restored_process(), restored_environment():
                _adopt_surroundings(order)
                value = _resolve(order.function)(world, wire.unpack(order.payload))
                packed = _pack_result(order, value)
        except BaseException as error:
            gc.collect()  # a traceback keeps the tensors of its frames
            return _failure(order, "raised", error)
        # Before the reply, so that the parent never reads "waiting" of a rank that answered.
        self._slot.end()
        groups = len(dist.distributed_c10d._world.pg_map)
        return wire.Reply(order.job, "returned", pickle.PickleBuffer(packed), groups=groups)

    def _join(self, order: wire.Order) -> DistributedWorld:
        if self._world is not None and self._layout == order.layout:
            return self._world
        self._world, self._layout = None, ""
        if dist.is_initialized():
            dist.destroy_process_group()
        _announce(order, self._device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        dist.init_process_group(
            self._settings.backend,
            store=_open_store(order),
            rank=order.rank,
            world_size=order.size,
            timeout=_NEVER,
            device_id=self._device if self._device.type == "cuda" else None,
        )
        _calm_gloo_threads()
        if self._device.type == "cpu":
            _share_cores(self._cores, order.rank, order.size)
        self._world = DistributedWorld(
            rank=order.rank,
            size=order.size,
            backend=self._settings.label,
            device=self._device,
            store=self._store,
            slot=self._slot,
        )
        self._layout = order.layout
        return self._world


def _open_store(order: wire.Order) -> Any:
    stores: Any = dist  # its stubs leave the stores out
    match order.rendezvous:
        case ("file", path):
            return stores.FileStore(path, order.size)
        case ("tcp", host, port, prefix):
            return stores.PrefixStore(prefix, stores.TCPStore(host, port, is_master=False))
    raise ValueError(f"rendezvous={order.rendezvous!r}, but should be file or tcp")


def _announce(order: wire.Order, device: torch.device) -> None:
    """Set what torchrun would: libraries look at the environment and not at the group."""
    os.environ.update(
        RANK=str(order.rank),
        WORLD_SIZE=str(order.size),
        LOCAL_WORLD_SIZE=str(order.size),
        LOCAL_SIZE=str(order.size),
    )
    if device.type != "cuda":
        os.environ["LOCAL_RANK"] = str(order.rank)  # on CUDA the launch environment pins a device
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")


def _calm_gloo_threads() -> None:
    """Let Gloo's loop threads give way to compute threads.

    [Gloo Threads] With more ranks than cores they spin on data nobody has asked for yet and starve
    the late rank; SCHED_BATCH made a 4 KB all_reduce at 4 ranks on 2 cores 4 times faster.
    """
    with contextlib.suppress(OSError, AttributeError):
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):
                if Path("/proc/self/task", task, "comm").read_text().strip() == "gloo_tcp_loop":
                    os.sched_setscheduler(int(task), os.SCHED_BATCH, os.sched_param(0))


def _cores() -> tuple[int, ...]:
    """Return the cores that this process may run on; none where the system does not say."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def _share_cores(cores: tuple[int, ...], rank: int, size: int) -> None:
    """Keep neighbours of the ring on one core, where every core gets equally many ranks.

    What Gloo sends at 4 KB is mostly waking the receiver, which is cheap on the same core: eight
    ranks on two cores reduce 1.4 times as fast. Else the system deals out ranks as it sees fit.
    """
    crowded = cores and size > len(cores) and size % len(cores) == 0
    mine = {cores[rank * len(cores) // size]} if crowded else set(cores)
    with contextlib.suppress(OSError):
        for task in os.listdir("/proc/self/task") if mine else ():
            with contextlib.suppress(OSError):  # a thread that has ended meanwhile
                os.sched_setaffinity(int(task), mine)


def _adopt_surroundings(order: wire.Order) -> None:
    sys.path[:] = order.path
    importlib.invalidate_caches()
    with contextlib.suppress(OSError):
        os.chdir(order.directory)
    change_environment(order.environment)


def _resolve(function: str) -> Any:
    module, _, name = function.partition(":")
    target: Any = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    return target


@contextlib.contextmanager
def _restored_process() -> Iterator[None]:
    """Put back the process-wide settings that subjects like to change."""
    dtype, grad, threads = (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    )
    deterministic = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            # Guarded, because the first call imports torch._inductor: 1.5 s.
            torch.use_deterministic_algorithms(deterministic)
        torch.set_float32_matmul_precision(precision)


def _pack_result(order: wire.Order, value: object) -> bytearray:
    try:
        return wire.pack(value)
    except Exception as error:
        kind = type(value).__name__
        raise TypeError(
            f"{order.function} returned a {kind} that does not pickle: {error}"
        ) from error


def _failure(order: wire.Order, kind: str, error: BaseException) -> wire.Reply:
    # The first frame is this file's own.
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    text = "".join(traceback.format_exception(type(error), error, trace))
    return wire.Reply(
        order.job,
        kind,
        exception_type=type(error).__name__,
        message=text_of(error),
        exception=_pickled(error),
        traceback=text,
    )


def _pickled(error: BaseException) -> bytes:
    """Return the exception's pickle, or nothing if it does not survive one."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return b""
    return data
