"""Ranks that torchrun started, on this node and others: rank 0 drives, the others serve.

Requirement: under torchrun (RANK and WORLD_SIZE are set) a run uses that world. A torchrun process
that dies takes the whole job with it, so subjects do not run in it: each process hosts a zygote
and one rank, exactly as the local pool does, and a rank that dies or hangs is replaced.

Hosts connect to rank 0's listener, whose address and secret travel through torch's own store, and
pass messages on: ("order", life, Order), ("stack",), ("kill",) one way; Reply, Flight,
("stack", text) and ("died", life, how, stack) the other. `life` counts a rank's replacements, so
that late news of a dead one is told apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import json
import os
import pickle
import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from tpcheck.errors import BackendError
from tpcheck.groups import wire
from tpcheck.groups.fleet import Link, LocalFleet, LocalLink
from tpcheck.groups.flight import Flight
from tpcheck.groups.nccl import gpu_layout, visible_gpu_count
from tpcheck.groups.pool import (
    PRELOAD,
    RankPool,
    backend_label,
    launch_settings,
    rank_environment,
)

_CONNECT_S = 120.0
_TICK_S = 0.1
_KEY = "tpcheck/driver"
_RANK = struct.Struct("<I")
_NONCE_BYTES = 32


@dataclass(frozen=True, slots=True)
class TorchrunInfo:
    """This process's place in torchrun's world."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str


def torchrun_world() -> TorchrunInfo | None:
    """Return this process's place if torchrun started it, else None.

    Raises:
        BackendError: the variables are there but do not make sense.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = [os.environ.get(name, "0" if "RANK" in name else "1") for name in names]
    try:
        rank, world_size, local_rank, local_world_size = map(int, values)
    except ValueError:
        given = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        raise BackendError(f"torchrun: {given}, but should be whole numbers") from None
    if not 0 <= rank < world_size:
        raise BackendError(f"torchrun: RANK={rank}, but should be below WORLD_SIZE={world_size}")
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    return TorchrunInfo(rank, world_size, local_rank, local_world_size, address)


def torchrun_pool(
    info: TorchrunInfo, backend: str = "gloo", ranks_per_gpu: int | None = None
) -> RankPool:
    """Return the pool over torchrun's world. For rank 0; the others call `serve_forever`."""
    _require_rendezvous(info)
    own = _host_fleet(info, backend, ranks_per_gpu)
    fleet = TorchrunFleet(info, own)
    return RankPool(info.world_size, backend, ranks_per_gpu, fleet=fleet)


def serve_forever(
    info: TorchrunInfo, backend: str = "gloo", ranks_per_gpu: int | None = None
) -> None:
    """Host one rank until rank 0 is done or gone."""
    _require_rendezvous(info)
    fleet = _host_fleet(info, backend, ranks_per_gpu)
    store = _env_store(info)
    host, port, secret = json.loads(store.get(_KEY))
    sock = socket.create_connection((host, port), timeout=_CONNECT_S)
    rank = _RANK.pack(info.rank)
    nonce = wire.read_exactly(sock, _NONCE_BYTES)
    sock.sendall(rank + hmac.digest(bytes.fromhex(secret), nonce + rank, "sha256"))
    try:
        _Host(info.rank, fleet, _tcp_channel(sock)).run()
    except KeyboardInterrupt:
        pass  # rank 0 says so
    finally:
        fleet.close()


class TorchrunFleet:
    """Rank 0's own rank, and a RemoteLink to every other. Implements Fleet."""

    def __init__(self, info: TorchrunInfo, own: LocalFleet) -> None:
        self.size = info.world_size
        self._own = own
        self._info = info
        stores: Any = dist  # its stubs leave the stores out
        # Both stores are kept: they serve as long as they live.
        self._env_store = _env_store(info)
        self._worlds = stores.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        self._links = self._accept() if info.world_size > 1 else {}

    def link(self, rank: int) -> Link:
        if rank == self._info.rank:
            return self._own.link(rank)
        link = self._links[rank]
        link.catch_up()
        if link.channel.closed:
            raise BackendError(
                f"torchrun: the process of rank {rank} is gone; start torchrun again"
            )
        if link.death:
            link.kill()
        return link

    def sources(self) -> Sequence[Any]:
        return self._own.sources()

    def pump(self) -> None:
        self._own.pump()

    def rendezvous(self, layout: str) -> tuple[Any, ...]:
        return ("tcp", self._info.master_addr, self._worlds.port, layout)

    def trim(self) -> None:
        self._own.trim()

    def abandon(self) -> None:
        self._own.abandon()
        for link in self._links.values():
            link.kill()

    def close(self) -> None:
        self._own.close()
        for link in self._links.values():
            link.channel.close()

    def _accept(self) -> dict[int, RemoteLink]:
        """Publish where to connect, and wait for every host."""
        secret = secrets.token_bytes(32)
        links: dict[int, RemoteLink] = {}
        deadline = time.monotonic() + _CONNECT_S
        with socket.create_server(("", 0)) as listener:
            address = (self._info.master_addr, listener.getsockname()[1], secret.hex())
            self._env_store.set(_KEY, json.dumps(address))
            while len(links) < self.size - 1:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    sock, _ = listener.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, self.size)) - set(links))
                    raise BackendError(
                        f"torchrun: ranks {missing} did not connect within {_CONNECT_S:g} s;"
                        " every process should run the same command"
                    ) from None
                if (rank := _authenticated_rank(sock, secret)) is not None:
                    links[rank] = RemoteLink(rank, _tcp_channel(sock))
        return links


class RemoteLink:
    """A rank behind another torchrun process. Implements Link."""

    def __init__(self, rank: int, channel: wire.Channel) -> None:
        self.rank = rank
        self.layout = ""
        self.channel: wire.Channel = _FromHost(self, channel)
        self._life = 0
        self._death = ""
        self._flight = Flight()
        self._stack = ""

    @property
    def death(self) -> str:
        if self.channel.closed:
            return "died together with its torchrun process"
        return self._death

    @property
    def life(self) -> int:
        return self._life

    def flight(self) -> Flight:
        return self._flight

    def mark_stack(self) -> None:
        self._stack = ""

    def ask_stack(self) -> None:
        self.mark_stack()
        self.channel.post(("stack",))

    def stack(self) -> str:
        self.catch_up()
        return self._stack

    def kill(self) -> None:
        self.channel.post(("kill",))
        self._life += 1
        self._death, self._flight, self.layout = "", Flight(), ""

    def catch_up(self) -> None:
        """Take in what has arrived; replies in it belong to jobs that nobody waits for."""
        self.channel.read()

    def note(self, message: Any) -> None:
        match message:
            case Flight():
                self._flight = message
            case ("stack", text):
                self._stack = text
            case ("died", life, how, stack) if life == self._life:
                self._death, self._stack = how, stack


class _FromHost(wire.Channel):
    """A channel that hands replies to the pool and keeps news of the rank for its link."""

    def __init__(self, link: RemoteLink, channel: wire.Channel) -> None:
        super().__init__(channel.detach())
        self._link = link

    def post(self, value: object) -> None:
        super().post(("order", self._link.life, value) if isinstance(value, wire.Order) else value)

    def read(self) -> list[Any]:
        replies = []
        for message in super().read():
            if isinstance(message, wire.Reply):
                replies.append(message)
            else:
                self._link.note(message)
        return replies


class _Host:
    """Passes messages between rank 0 and this process's rank."""

    def __init__(self, rank: int, fleet: LocalFleet, driver: wire.Channel) -> None:
        self._rank = rank
        self._fleet = fleet
        self._driver = driver
        self._link: LocalLink | None = None
        self._life = 0
        self._flight = Flight()
        self._stack_asked = False

    def run(self) -> None:
        self._link = self._fleet.link(self._rank)  # warm before the first order
        while not self._driver.closed:
            self._wait()
            self._driver.flush()
            for message in self._driver.read():
                self._obey(message)
            self._fleet.pump()
            self._report()

    def _wait(self) -> None:
        poller = select.poll()
        channels = [self._driver, *([self._link.channel] if self._link else [])]
        for channel in channels:
            events = select.POLLOUT if channel.wants_write else 0
            poller.register(channel, select.POLLIN | events)
        for source in self._fleet.sources():
            poller.register(source, select.POLLIN)
        poller.poll(_TICK_S * 1000)

    def _obey(self, message: tuple[Any, ...]) -> None:
        match message:
            case ("order", life, order):
                self._life = life
                self._link = self._fleet.link(self._rank)
                self._fleet.trim()
                self._link.mark_stack()
                payload = pickle.PickleBuffer(order.payload)
                self._link.channel.post(dataclasses.replace(order, payload=payload))
            case ("stack",) if self._link is not None:
                self._link.ask_stack()
                self._stack_asked = True
            case ("kill",) if self._link is not None:
                self._link.kill()
                self._link = None

    def _report(self) -> None:
        link = self._link
        if link is None:
            return
        link.channel.flush()
        for reply in link.channel.read():
            self._report_flight(link)
            value = pickle.PickleBuffer(reply.value)
            self._driver.post(dataclasses.replace(reply, value=value))
        if death := link.death:
            self._driver.post(("died", self._life, death, link.stack()))
            self._link = None
            return
        self._report_flight(link)
        if self._stack_asked and (stack := link.stack()):
            self._driver.post(("stack", stack))

    def _report_flight(self, link: LocalLink) -> None:
        if (flight := link.flight()) != self._flight:
            self._flight = flight
            self._driver.post(flight)


def _host_fleet(info: TorchrunInfo, backend: str, ranks_per_gpu: int | None) -> LocalFleet:
    label = backend_label(backend, ranks_per_gpu)
    device: int | None = None
    if backend == "nccl":
        layout = gpu_layout(info.local_world_size, visible_gpu_count(), ranks_per_gpu)
        device = layout[info.local_rank]
    environment = rank_environment(local=info.local_world_size == info.world_size)
    return LocalFleet(1, lambda rank: launch_settings(rank, device, label), PRELOAD, environment)


def _require_rendezvous(info: TorchrunInfo) -> None:
    """Raise BackendError where RANK and WORLD_SIZE are set, as schedulers do too, but no more."""
    lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacking:
        raise BackendError(
            f"torchrun: RANK={info.rank} and WORLD_SIZE={info.world_size} are set, but"
            f" {lacking[0]} is not; start tpcheck by torchrun, or unset RANK and WORLD_SIZE"
        )


def _env_store(info: TorchrunInfo) -> Any:
    """Return the store that torchrun's environment describes; torch knows whose server it is."""
    torch_dist: Any = dist  # its stubs leave rendezvous out
    store, _, _ = next(torch_dist.rendezvous("env://", info.rank, info.world_size))
    return store


def _tcp_channel(sock: socket.socket) -> wire.Channel:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return wire.Channel(sock)


def _authenticated_rank(sock: socket.socket, secret: bytes) -> int | None:
    """Return the rank of a host that knows the secret; nothing of anyone else is unpickled."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    sock.settimeout(10.0)
    with contextlib.suppress(OSError, EOFError):
        sock.sendall(nonce)
        rank = wire.read_exactly(sock, _RANK.size)
        proof = wire.read_exactly(sock, 32)
        if hmac.compare_digest(proof, hmac.digest(secret, nonce + rank, "sha256")):
            return int(_RANK.unpack(rank)[0])
    sock.close()
    return None
