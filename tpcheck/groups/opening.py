"""Open ranks of the backend asked for, and say what it can hold here.

Requirement: `auto` is nccl when every rank can have a GPU of its own, else gloo; real ranks stay
warm for the session; under torchrun the world is torchrun's, where rank 0 drives and every other
process serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from tpcheck.errors import BackendError, TPCheckError
from tpcheck.groups.jobs import Ranks
from tpcheck.groups.nccl import visible_gpu_count
from tpcheck.groups.pool import RankPool, get_pool
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.groups.torchrun import serve_forever, torchrun_pool, torchrun_world

BACKENDS = ("auto", "sim", "gloo", "nccl")
MAX_RANKS = 64


@contextmanager
def open_ranks(
    backend: str, size: int, ranks_per_gpu: int | None, reduction: str = "ring"
) -> Iterator[Ranks]:
    """Yield ranks of a backend that can hold `size`; real ones stay warm for the session.

    Only simulated ranks can be told how to reduce.

    Raises:
        BackendError: the backend cannot hold that many ranks here.
    """
    chosen = chosen_backend(backend, size, ranks_per_gpu)
    if chosen == "sim":
        simulated = SimulatedRanks(reduction)
        try:
            yield simulated
        finally:
            simulated.close()
        return
    world = torchrun_world()
    if world is None:
        yield get_pool(chosen, size, ranks_per_gpu)
        return
    if size > world.world_size:
        raise BackendError(
            f"tp={size}, but should be at most WORLD_SIZE={world.world_size} under torchrun"
        )
    yield _torchrun_ranks(chosen, ranks_per_gpu)


def serves_torchrun(backend: str, ranks_per_gpu: int | None) -> bool:
    """Serve rank 0 until it is done, if this is another process of torchrun's world.

    Returns:
        Whether this process served, so that the caller has nothing left to do.
    """
    world = torchrun_world()
    if world is None or world.rank == 0:
        return False
    if backend == "sim":  # rank 0 holds every simulated rank
        return True
    serve_forever(world, chosen_backend(backend, world.local_world_size, ranks_per_gpu))
    return True


def backend_room(backend: str, ranks_per_gpu: int | None) -> int:
    """Return how many ranks a backend can hold here."""
    world = torchrun_world()
    if world is not None and backend != "sim":
        return world.world_size
    if backend == "nccl":
        return max(1, visible_gpu_count()) * (ranks_per_gpu or 1)
    return MAX_RANKS


def chosen_backend(backend: str, size: int, ranks_per_gpu: int | None) -> str:
    """Return the backend that a name stands for with `size` ranks on this machine.

    Raises:
        TPCheckError: an unknown name, or ranks_per_gpu without nccl.
    """
    if backend not in BACKENDS:
        raise TPCheckError(f"backend={backend!r}, but should be one of {', '.join(BACKENDS)}")
    if ranks_per_gpu is not None and backend != "nccl":
        raise TPCheckError(f"ranks_per_gpu={ranks_per_gpu} needs backend nccl, not {backend}")
    if backend != "auto":
        return backend
    return "nccl" if visible_gpu_count() >= size else "gloo"


@cache
def _torchrun_ranks(backend: str, ranks_per_gpu: int | None) -> RankPool:
    world = torchrun_world()
    assert world is not None
    return torchrun_pool(world, backend, ranks_per_gpu)
