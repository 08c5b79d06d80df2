"""A warm pool of real ranks: jobs go in, results or named failures come out.

Requirement: spawning ranks for every case costs seconds, so they live for the session; a failure
must then poison only its own job. The pool owns the wall clock: it never blocks without a limit,
and kills and replaces the ranks of a job that went wrong while other jobs on other ranks go on.

[Layouts] A job's ranks are the default process group exactly. Ranks stay in their world as long as
the next job wants the same ranks together; anything else costs a new group (about 0.1 s at 8
ranks), so the scheduler prefers worlds that stand.

[Places] A process is the same rank in every world of a size. Engines cache what belongs to their
rank, slopes or masks of its heads, under sizes alone, because where they are deployed a process has
one rank for life.
"""

from __future__ import annotations

import os
import pickle
import select
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from types import TracebackType

from tpcheck.errors import BackendError, SubjectError
from tpcheck.groups import wire
from tpcheck.groups.fleet import Fleet, Link, LocalFleet
from tpcheck.groups.flight import innermost_frame
from tpcheck.groups.jobs import Job, JobResult
from tpcheck.groups.nccl import gpu_layout, launch_environment, visible_gpu_count
from tpcheck.groups.surroundings import THREAD_COUNTS, environment_changes
from tpcheck.groups.watch import NO_STACK, Watch
from tpcheck.groups.worker import RankSettings

PRELOAD = (
    "tpcheck.groups.worker",
    "torch.distributed.tensor.parallel",  # slow to import, and the mesh needs most of it
    "tpcheck.execution",
)
"""What the zygote imports before it forks; what cannot be imported is left out."""

_TICK_S = 0.1
_STACK_S = 2.0
"""How long ranks may take to write their stacks: more ranks than cores take turns."""
_MOST_GROUPS = 8
"""Process groups a job may leave behind before its ranks get a new world (each has sockets)."""


class RankPool:
    """Ranks on this machine (or in the given fleet). Implements Ranks; starts with the first job.

    Args:
        size: ranks to keep; no job may want more.
        backend: "gloo" or "nccl".
        ranks_per_gpu: several NCCL ranks on one GPU, labelled `nccl-loopback`.
        preload: modules to import once, before ranks are forked.

    Raises:
        BackendError: unknown backend, or too few GPUs.
    """

    def __init__(
        self,
        size: int,
        backend: str = "gloo",
        ranks_per_gpu: int | None = None,
        preload: Sequence[str] = PRELOAD,
        *,
        fleet: Fleet | None = None,
    ) -> None:
        if size < 1:
            raise BackendError(f"pool: size={size}, but should be at least 1")
        self.label = backend_label(backend, ranks_per_gpu)
        self.max_size = size
        self._fleet = fleet or _local_fleet(size, backend, self.label, ranks_per_gpu, preload)
        self._environment = dict(os.environ)  # what the ranks start from
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._jobs = 0
        self._layouts = 0
        weakref.finalize(self, _close_in, self._owner, self._fleet)  # also runs at exit

    @property
    def fleet(self) -> Fleet:
        return self._fleet

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, jobs: Sequence[Job]) -> list[JobResult]:
        """Run every job, side by side on disjoint ranks; results in the order given.

        Raises:
            SubjectError: a payload does not pickle.
            BackendError: a job wants more ranks than the pool has, or ranks cannot be started.
        """
        if os.getpid() != self._owner:
            raise BackendError("pool: its ranks belong to the process that made it, not to a fork")
        for job in jobs:
            if not 1 <= job.size <= self.max_size:
                raise BackendError(f"job: size={job.size}, but should be 1 to {self.max_size}")
        with self._lock:
            try:
                return self._run(jobs)
            except BaseException:
                self._fleet.abandon()  # also at Ctrl-C: nobody waits for these ranks any more
                raise

    def close(self) -> None:
        """Kill the ranks and remove their files. The next job starts new ones."""
        _close_in(self._owner, self._fleet)

    def _run(self, jobs: Sequence[Job]) -> list[JobResult]:
        waiting = list(enumerate(jobs))
        running: list[Watch] = []
        results: dict[int, JobResult] = {}
        while waiting or running:
            if not running:
                self._fleet.trim()
            self._dispatch(waiting, running)
            self._wait(running)
            for watch in list(running):
                reason = watch.stop_reason(time.monotonic())
                if watch.over or reason:
                    running.remove(watch)
                    results[watch.index] = self._settle(watch, "" if watch.over else reason)
        return [results[index] for index in range(len(jobs))]

    def _dispatch(self, waiting: list[tuple[int, Job]], running: list[Watch]) -> None:
        """Start every waiting job that finds enough free ranks."""
        busy = {link.rank for watch in running for link in watch.links}
        free = [rank for rank in range(self.max_size) if rank not in busy]
        for index, job in list(waiting):
            if len(free) < job.size:
                continue
            if running and self.label == "nccl-loopback":
                return  # ranks on one GPU already take turns
            links = self._choose([self._fleet.link(rank) for rank in free], job.size)
            if not links:
                continue
            running.append(self._start(index, job, links))
            free = [rank for rank in free if rank not in {link.rank for link in links}]
            waiting.remove((index, job))

    def _choose(self, free: list[Link], size: int) -> list[Link]:
        """Return ranks that are a world of this size already; else those in no world first.

        Nobody while a place in the world has no free rank; see [Places].
        """
        worlds: dict[str, list[Link]] = {}
        for link in free:
            worlds.setdefault(link.layout, []).append(link)
        for layout, links in worlds.items():
            if layout and _size_of(layout) == size == len(links):
                return links
        free = sorted(free, key=lambda link: (bool(link.layout), link.rank))
        places = {link.rank % size: link for link in reversed(free)}
        return list(places.values()) if len(places) == size else []

    def _start(self, index: int, job: Job, links: list[Link]) -> Watch:
        self._jobs += 1
        links = sorted(links, key=lambda link: link.rank % job.size)
        layouts = {link.layout for link in links}
        layout = layouts.pop()
        if layouts or not layout or _size_of(layout) != job.size:
            self._layouts += 1
            layout = f"{self._layouts}-{job.size}"
        payload = _packed_payload(job)
        path = tuple(entry for entry in sys.path if isinstance(entry, str))
        rendezvous, directory = self._fleet.rendezvous(layout), os.getcwd()
        environment = environment_changes(self._environment)
        for rank, link in enumerate(links):
            link.layout = layout
            link.mark_stack()
            link.channel.post(
                wire.Order(
                    job=self._jobs,
                    function=job.function,
                    payload=pickle.PickleBuffer(payload),
                    rank=rank,
                    size=job.size,
                    layout=layout,
                    rendezvous=rendezvous,
                    path=path,
                    directory=directory,
                    environment=environment,
                )
            )
        return Watch(number=self._jobs, index=index, job=job, links=links, now=time.monotonic())

    def _wait(self, running: list[Watch]) -> None:
        """Sleep until a rank has something to say, at most one tick; take it in."""
        poller = select.poll()
        for source in self._fleet.sources():
            poller.register(source, select.POLLIN)
        for watch in running:
            for rank in watch.pending:
                channel = watch.links[rank].channel
                if not channel.closed:
                    events = select.POLLOUT if channel.wants_write else 0
                    poller.register(channel, select.POLLIN | events)
        poller.poll(_TICK_S * 1000)
        self._fleet.pump()
        for watch in running:
            self._listen(watch)

    def _listen(self, watch: Watch) -> None:
        for rank in watch.pending:
            link = watch.links[rank]
            link.channel.flush()
            now = time.monotonic()
            for reply in link.channel.read():
                watch.take(rank, reply, now)
            if rank in watch.pending and (death := link.death):
                watch.stacks[rank] = link.stack() or f"{NO_STACK}rank {rank} {death}"
                watch.bury(rank, death, now)
        watch.look(time.monotonic())

    def _settle(self, watch: Watch, reason: str) -> JobResult:
        """End a job: collect stacks, replace ranks that cannot be trusted, return its result."""
        self._collect_stacks(watch)
        result = watch.result(reason)
        if result.failure is not None:
            for link in watch.links:
                link.kill()
        elif max(reply.groups for reply in watch.replies.values()) > _MOST_GROUPS:
            for link in watch.links:
                link.layout = ""
        return result

    def _collect_stacks(self, watch: Watch) -> None:
        pending = watch.pending
        for rank in pending:
            watch.links[rank].ask_stack()
        deadline = time.monotonic() + _STACK_S
        before: dict[int, str] = {}
        while pending and time.monotonic() < deadline:
            time.sleep(0.05)
            self._fleet.pump()
            stacks = {rank: watch.links[rank].stack() for rank in pending}
            # a dump is written thread by thread: what names no frame yet is not all there
            if all(map(innermost_frame, stacks.values())) and stacks == before:
                break
            before = stacks
        for rank in pending:
            missing = f"{NO_STACK}rank {rank} is stopped or stuck outside the reach of signals"
            watch.stacks[rank] = before.get(rank) or missing


def _close_in(owner: int, fleet: Fleet) -> None:
    if os.getpid() == owner:  # a fork of the parent must not end its ranks
        fleet.close()


def backend_label(backend: str, ranks_per_gpu: int | None = None) -> str:
    """Return the backend as reports print it: `gloo`, `nccl` or `nccl-loopback`."""
    if backend not in ("gloo", "nccl"):
        raise BackendError(f"backend={backend!r}, but should be gloo or nccl")
    return "nccl-loopback" if backend == "nccl" and (ranks_per_gpu or 1) > 1 else backend


def get_pool(backend: str = "gloo", size: int = 1, ranks_per_gpu: int | None = None) -> RankPool:
    """Return this process's warm pool for a backend, replaced by a larger one when needed."""
    key = backend_label(backend, ranks_per_gpu)
    pool = _pools.get(key)
    if pool is None or pool.max_size < size or pool._owner != os.getpid():
        if pool is not None:
            pool.close()
        pool = _pools[key] = RankPool(size, backend, ranks_per_gpu)
    return pool


def close_pools() -> None:
    """Close every pool that `get_pool` made."""
    while _pools:
        _pools.popitem()[1].close()


_pools: dict[str, RankPool] = {}


def _local_fleet(
    size: int, backend: str, label: str, ranks_per_gpu: int | None, preload: Sequence[str]
) -> LocalFleet:
    devices: list[int | None] = [None] * size
    if backend == "nccl":
        devices = [*gpu_layout(size, visible_gpu_count(), ranks_per_gpu)]

    def launch(rank: int) -> tuple[RankSettings, dict[str, str]]:
        return launch_settings(rank, devices[rank], label)

    return LocalFleet(size, launch, preload, rank_environment())


def launch_settings(
    rank: int, device: int | None, label: str
) -> tuple[RankSettings, dict[str, str]]:
    """Return how to start one rank: its settings and environment. `device` None means the CPU."""
    if device is None:
        return RankSettings(rank=rank, backend="gloo", label=label), {}
    loopback = label == "nccl-loopback"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = "cuda:0" if loopback else f"cuda:{device}"
    settings = RankSettings(rank=rank, backend="nccl", label=label, device=name)
    return settings, launch_environment(rank, device, loopback, visible=visible)


def rank_environment(*, local: bool = True) -> dict[str, str]:
    """Return this process's environment, made fit for single-threaded ranks.

    `local`: all ranks are on this machine, so Gloo may use the loopback device.
    """
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")
    }
    kept |= dict.fromkeys(THREAD_COUNTS, "1")
    kept["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for GPUs must not start CUDA before a fork
    kept.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    kept.setdefault("TOKENIZERS_PARALLELISM", "false")
    if local:
        kept.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    return kept


def _packed_payload(job: Job) -> bytearray:
    try:
        return wire.pack(job.payload)
    except Exception as error:
        raise SubjectError(
            f"{job.function}: payload={type(job.payload).__name__}, but should pickle to travel"
            f" to the ranks: {error}"
        ) from error


def _size_of(layout: str) -> int:
    return int(layout.rpartition("-")[2])
