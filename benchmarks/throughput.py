"""Cases per second: simulated ranks and the warm pool, against spawning or forking per case.

    python benchmarks/throughput.py --json benchmarks/results/throughput.json

One case is one TP=1 and one TP=N build, forward and comparison of benchmarks/subject.py, 32 tokens
in two rows.
Every way is measured in this one run, so that ratios hold on a machine whose speed drifts. `limit`
is twice the TP=1 forward on one core and nothing else: no harness can be faster; `gloo limit` is
the case's four all-reduces over the pool's own ranks and nothing else: no pool can be. `cold` cases
have a new seed each, so that weights are drawn; `cached` ones share a seed. Simulated ranks take
one core: `every core` is as many such processes as there are cores, as under `pytest -n`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from subject import HIDDEN, SEQ_LEN, WIDE

from tpcheck import environment
from tpcheck.comparison import compare
from tpcheck.execution import Task, execute
from tpcheck.groups.distributed import DistributedWorld
from tpcheck.groups.flight import FlightSlot
from tpcheck.groups.jobs import Job, Ranks, World
from tpcheck.groups.pool import RankPool
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.groups.weights import MemoryStore
from tpcheck.inputs import make_inputs
from tpcheck.spec import Case
from tpcheck.subjects import SubjectRef, resolve

REF = SubjectRef("name", "subject", "build", "subject:build")
DTYPE = "bfloat16"


def task(seed: int) -> Task:
    subject = resolve(REF)
    inputs = make_inputs(subject, Case(0, 1, subject.options.seq_len), ())
    return Task(REF, seed, DTYPE, DTYPE, {"A": inputs["A"]}, ("A",))


def run_case(ranks: Ranks, tp_size: int, seed: int) -> None:
    """Run TP=1 and TP=N and compare."""
    work = task(seed)
    jobs = [Job("tpcheck.execution:execute", work, size) for size in (1, tp_size)]
    alone, split = ranks.run(jobs)
    for result in (alone, split):
        assert result.failure is None, result.failure
    found = compare(split.replies[0].outputs["A"], alone.replies[0].outputs["A"])
    assert found.relative_rms < 0.1, found


def per_second(case: Callable[[int], None], seconds: float) -> float:
    """Return cases per second over at least `seconds`, after one warm-up."""
    case(0)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or done < 2:
        done += 1
        case(done)
    return done / (time.perf_counter() - start)


def every_core(tp_size: int, seconds: float) -> float:
    """Return the simulated cases per second of one process per core, all at once."""
    cores = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    with context.Pool(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return sum(pool.starmap(_one_core, [(tp_size, seconds)] * cores, chunksize=1))


def _one_core(tp_size: int, seconds: float) -> float:
    ranks = SimulatedRanks()
    return per_second(lambda _: run_case(ranks, tp_size, 0), seconds)


def limit() -> float:
    """Return 1 / (2 x TP=1 forward): no build, no comparison, no ranks."""
    result = SimulatedRanks().run([Job("throughput:forward_seconds", None, 1)])[0]
    assert result.failure is None, result.failure
    return 1 / (2 * result.replies[0])


def forward_seconds(world: World, _payload: None) -> float:
    """Return the median time of a TP=1 forward. Runs as a job."""
    dtype = getattr(torch, DTYPE)
    group = world.group(seed=0, dtype=dtype, weight_dtype=dtype)
    forward, ids, times = resolve(REF).build(group), task(0).inputs["A"][0], []
    with torch.no_grad():
        for _ in range(200):
            start = time.perf_counter()
            forward(ids)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def gloo_limit(pool: RankPool, tp_size: int) -> float:
    """Return 1 / (the case's four bare all-reduces): no pool over this Gloo can be faster."""
    result = pool.run([Job("throughput:reduce_seconds", None, tp_size)])[0]
    assert result.failure is None, result.failure
    return 1 / max(result.replies)


def reduce_seconds(world: World, _payload: None) -> float:
    """Return the median time of four all-reduces of the case's size. Runs as a job."""
    dtype = getattr(torch, DTYPE)
    process_group = world.group(seed=0, dtype=dtype, weight_dtype=dtype).process_group
    x, times = torch.zeros(2, SEQ_LEN, HIDDEN, dtype=dtype), []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(4):
            dist.all_reduce(x, group=process_group)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def processes_per_case(method: str, tp_size: int, seed: int) -> None:
    """Start the ranks of one case, run it over Gloo, and end them: what a launcher does."""
    context = multiprocessing.get_context(method)
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        ranks = [
            context.Process(target=_one_rank, args=(rank, tp_size, seed, folder, queue))
            for rank in range(tp_size)
        ]
        for process in ranks:
            process.start()
        alone, split = queue.get()
        for process in ranks:
            process.join()
        assert compare(torch.tensor(split), torch.tensor(alone)).relative_rms < 0.1


def _one_rank(rank: int, size: int, seed: int, folder: str, queue) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    split = execute(_world(rank, size, folder), task(seed))
    if rank == 0:
        alone = execute(_world(0, 1, folder), task(seed))
        queue.put([trace.outputs["A"].float().tolist() for trace in (alone, split)])
    dist.destroy_process_group()


def _world(rank: int, size: int, folder: str) -> DistributedWorld:
    slot = FlightSlot(Path(f"{folder}/flight-{rank}-{size}"))
    device = torch.device("cpu")
    return DistributedWorld(rank, size, "gloo", device, MemoryStore(), slot)


def measure(tp_size: int, seconds: float) -> dict[str, float]:
    """Return cases per second by way of running them."""
    simulated = SimulatedRanks()
    ways = {
        "limit": limit(),
        "sim cached": per_second(lambda _: run_case(simulated, tp_size, 0), seconds),
        "sim cold": per_second(lambda seed: run_case(simulated, tp_size, seed), seconds),
        "sim cached, every core": every_core(tp_size, seconds),
    }
    if WIDE:
        return ways
    with RankPool(tp_size + 1) as pool:  # TP=1 runs beside TP=N
        ways["gloo limit"] = gloo_limit(pool, tp_size)
        ways["pool cached"] = per_second(lambda _: run_case(pool, tp_size, 0), seconds)
        ways["pool cold"] = per_second(lambda seed: run_case(pool, tp_size, seed), seconds)
    for method in ("fork", "spawn"):
        run = partial(processes_per_case, method, tp_size)
        ways[f"{method} per case"] = per_second(run, seconds)
    return ways


def pool_facts() -> dict[str, float]:
    """Return start-up seconds of 8 ranks and private megabytes of one."""
    start = time.perf_counter()
    with RankPool(8) as pool:
        first = pool.run([Job("throughput:private_megabytes", None, 8)])[0]
        ready = time.perf_counter() - start
        assert first.failure is None, first.failure
        run_case(pool, 4, 0)
        after = pool.run([Job("throughput:private_megabytes", None, 8)])[0]
    return {"start_8_ranks_s": round(ready, 2), "private_mb_per_rank": max(after.replies)}


def private_megabytes(world: World, _payload: None) -> float:
    """Return this rank's private memory. Runs as a job."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return round(sum(int(x.split()[1]) for x in lines if x.startswith("Private")) / 1024, 1)


def import_seconds(statement: str) -> float:
    """Return the median wall time of a fresh interpreter that runs `statement`."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        times.append(time.perf_counter() - start)
    return round(statistics.median(times), 3)


def in_another_process(options: argparse.Namespace, **variables: str) -> dict:
    """Return what this benchmark measures with other sizes."""
    file = Path(f"{options.json}.part")
    command = [sys.executable, __file__, "--json", str(file), "--seconds", str(options.seconds)]
    subprocess.run(command, check=True, env=os.environ | variables)
    part = json.loads(file.read_text())
    file.unlink()
    return part


def main() -> None:
    """Measure the case of BENCH_HIDDEN, then the tiny and the wide one in other processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    degrees = (2, 4, 8, 16, 32, 64) if WIDE else (2, 4, 8)
    result = {
        "hidden": HIDDEN,
        "cases_per_second": {tp: measure(tp, options.seconds) for tp in degrees},
    }
    for tp, ways in result["cases_per_second"].items():
        print(f"hidden {HIDDEN} tp={tp}: " + ", ".join(f"{k} {v:.1f}/s" for k, v in ways.items()))
    if HIDDEN == 256 and not WIDE:
        result |= {"pool": pool_facts(), "environment": environment.collect()}
        result["import_s"] = {
            statement: import_seconds(statement)
            for statement in ("pass", "import tpcheck", "import tpcheck.cli", "import torch")
        }
        result["tiny"] = in_another_process(options, BENCH_HIDDEN="64")
        result["growth"] = in_another_process(options, BENCH_WIDE="1")
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.modules["throughput"] = sys.modules["__main__"]  # jobs find their functions by name
    main()
