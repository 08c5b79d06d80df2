"""Job functions for the chaos tests: what ranks are told to do wrong, and right."""

import faulthandler
import gc
import os
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from tpcheck.errors import IllegalDegreeError


def _group(world):
    return world.group(seed=0, dtype=torch.float32, weight_dtype=torch.bfloat16)


def healthy(world, payload):
    """One all_reduce; the sum of rank + 1."""
    total = _group(world).all_reduce(torch.full((4,), float(world.rank + 1)))
    return {"sum": total, "rank": world.rank, "size": dist.get_world_size(), "payload": payload}


def whoami(world, payload):
    return {"pid": os.getpid(), "backend": world.backend, "env": dict(os.environ)}


def collector(world, payload):
    """Whether garbage is collected here, and how many objects are kept out of it."""
    return gc.isenabled(), gc.get_freeze_count()


def empty(world, payload):
    return None


def loop(world, payload):
    """All_reduce for `seconds`, so that a kill lands at a random place."""
    group, end = _group(world), time.monotonic() + payload["seconds"]
    while bool(group.broadcast(torch.tensor(time.monotonic() < end), src=0)):
        group.all_reduce(torch.ones(256))


def sleep_before_collective(world, payload):
    group = _group(world)
    group.all_reduce(torch.ones(2))
    if world.rank == payload["rank"]:
        time.sleep(3600)
    group.all_reduce(torch.ones(4, 64, dtype=torch.bfloat16))


def mismatch(world, payload):
    group = _group(world)
    group.all_reduce(torch.ones(2))
    x = torch.ones(4, 64)
    if world.rank == payload["rank"]:
        return group.all_gather(x, 0)
    return group.all_reduce(x)


def two_dtypes(world, payload):
    dtype = torch.float32 if world.rank == payload["rank"] else torch.float64
    return _group(world).all_reduce(torch.ones(2, dtype=dtype))


def return_early(world, payload):
    group = _group(world)
    group.all_reduce(torch.ones(2))
    if world.rank != payload["rank"]:
        group.all_reduce(torch.ones(3))


def raise_on(world, payload):
    group = _group(world)
    group.all_reduce(torch.ones(2))
    if world.rank == payload["rank"]:
        raise ValueError("a bad shape")
    group.all_reduce(torch.ones(4, 64))


def refuse(world, payload):
    raise IllegalDegreeError("heads=6, but should divide by 4", legal_tp_sizes=(1, 2, 3))


def leave(world, payload):
    group = _group(world)
    group.all_reduce(torch.ones(2))
    if world.rank == payload["rank"]:
        os._exit(3)
    group.all_reduce(torch.ones(2))


def crash(world, payload):
    group = _group(world)
    group.all_reduce(torch.ones(2))
    if world.rank == payload["rank"]:
        faulthandler._sigsegv()
    group.all_reduce(torch.ones(2))


def stop(world, payload):
    if world.rank == payload["rank"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    _group(world).all_reduce(torch.ones(2))


def exit_politely(world, payload):
    sys.exit("enough")


def return_lambda(world, payload):
    return lambda: None


class _Stubborn(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


class _Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def raise_speechless(world, payload):
    raise _Speechless


def raise_unpicklable(world, payload):
    raise _Stubborn("two", "arguments")


def start_a_child(world, payload):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    return child.pid


def litter(world, payload):
    """Leave settings changed and process groups open."""
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    os.environ["TPCHECK_LITTER"] = "1"
    for _ in range(payload["groups"]):
        dist.new_group(list(range(world.size)))


def litter_environment(world, payload):
    os.environ["TPCHECK_LITTER"] = "1"
    os.environ.pop("TPCHECK_GONE", None)


def look_around(world, payload):
    return {
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "litter": os.environ.get("TPCHECK_LITTER"),
        "fds": len(os.listdir("/proc/self/fd")),
        "directory": os.getcwd(),
    }


def echo(world, payload):
    return payload


def collectives(world, payload):
    """Every collective on small known inputs; the mesh and the group as others see them."""
    group, rank, size = _group(world), world.rank, world.size
    x = torch.arange(2 * size * 3, dtype=payload["dtype"]).view(2 * size, 3) + rank
    before = x.clone()
    result = {
        "sum": group.all_reduce(x),
        "max": group.all_reduce(x, "max"),
        "min": group.all_reduce(x, "min"),
        "avg": group.all_reduce(x, "avg"),
        "gather0": group.all_gather(x, 0),
        "gather1": group.all_gather(x, -1),
        "scatter0": group.reduce_scatter(x, 0),
        "scatter1": group.reduce_scatter(x.t(), 1),
        "to_all": group.all_to_all(x, 0, 1),
        "broadcast": group.broadcast(x, size - 1),
        "empty": group.all_gather(x[:0], 0),
    }
    group.barrier()
    assert torch.equal(x, before)
    assert group.mesh.size() == size
    assert dist.get_world_size(group.process_group) == size
    result["calls"] = [call.describe() for call in group.recorder.take()]
    return result


def float8(world, payload):
    group = _group(world)
    x = torch.arange(8.0).view(2, 4).to(torch.float8_e4m3fn) if world.rank == 0 else None
    x = torch.zeros(2, 4).to(torch.float8_e4m3fn) if x is None else x
    moved = group.broadcast(x, 0), group.all_gather(x, 1), group.all_to_all(x, 1, 0)
    try:
        group.all_reduce(x)
    except Exception as error:
        return [t.float() for t in moved], str(error)


def weights(world, payload):
    return _group(world).weight("layer.weight", 64, 32)


def time_all_reduce(world, payload):
    group = _group(world)
    x, times = torch.ones(payload["elements"]), []
    for _ in range(payload["repeats"]):
        start = time.perf_counter()
        group.all_reduce(x)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def private_bytes(world, payload):
    with open("/proc/self/smaps_rollup") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line and "kB" in line)
    return sum(int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty"))


def affinity(world, payload):
    return set(os.sched_getaffinity(0))
