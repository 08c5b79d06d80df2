"""One rank of test_gloo_bits: compare real Gloo with the emulation, bit for bit.

Runs as `python gloo_bits_worker.py RANK WORLD STORE`; a process of its own, so that pytest's never
forks or joins a process group. Every rank draws every rank's operands from the same seeds, so only
the all-reduce itself crosses processes. Prints a line `DIFFERS ...` per case, and `done N`.
"""

import math
import sys
import zlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from tpcheck.numerics.reduction import reduce, reduce_sum

SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 64, 100, 1000, 4097, 65536 + 3, 2**19 + 1)
LARGEST = 2**21 + 13
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.uint8, torch.int32, torch.int64)
OPS = {
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "avg": dist.ReduceOp.AVG,
}
SPECIAL_SIZES = (1, 7, 64, 1000, 4097)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def operands(
    world: int, dtype: torch.dtype, size: int, special: bool = False
) -> list[torch.Tensor]:
    seed = zlib.crc32(f"{world} {dtype} {size} {special}".encode())
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        low = 0 if dtype == torch.uint8 else -(2**20)
        return [
            torch.randint(low, 2**7, (size,), generator=generator).to(dtype) for _ in range(world)
        ]
    pool = torch.randn(min(size, 2**19) + 64 * world, generator=generator)
    tensors = []
    for rank in range(world):
        # A window into one pool: cheap to draw, and still every rank's elements differ.
        repeats = math.ceil(size / (2**19))
        window = pool[64 * rank : 64 * rank + min(size, 2**19)]
        tensors.append((window.repeat(repeats)[:size] * (1 + rank / 7)).to(dtype))
    if special:
        values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 6e-5, 60000.0]).to(dtype)
        for tensor in tensors:
            where = torch.rand(size, generator=generator) < 0.3
            drawn = values[torch.randint(0, len(values), (size,), generator=generator)]
            tensor[where] = drawn[where]
    return tensors


def cases(world: int) -> Iterator[tuple[str, torch.dtype, int, bool]]:
    for dtype in FLOATS:
        for size in SIZES:
            yield "sum", dtype, size, False
        if world <= 4 or dtype in (torch.bfloat16, torch.float32):
            yield "sum", dtype, LARGEST, False
        for op in OPS:
            for size in SPECIAL_SIZES:
                yield op, dtype, size, True
    for dtype in INTS:
        for op in ("sum", "max", "min"):
            for size in SPECIAL_SIZES:
                yield op, dtype, size, False


def differences(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the mask of elements whose bits differ; any NaN equals any other."""
    if not actual.dtype.is_floating_point:
        return actual != expected
    bits = BITS[actual.element_size()]
    differ = actual.view(bits) != expected.view(bits)
    return differ & ~(actual.isnan() & expected.isnan())


def describe(actual: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> str:
    where = mask.nonzero().flatten().tolist()
    return (
        f"{len(where)} of {mask.numel()} differ, at {where[:12]}{'...' if where[12:] else ''}:"
        f" gloo {actual[where[:3]].tolist()}, emulated {expected[where[:3]].tolist()}"
    )


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def compare_all_reduce(rank: int, world: int) -> int:
    count = 0
    for op, dtype, size, special in cases(world):
        tensors = operands(world, dtype, size, special)
        actual = tensors[rank].clone()
        dist.all_reduce(actual, OPS[op])
        if rank == 0:
            count += 1
            expected = reduce(tensors, op, "ring")
            mask = differences(actual, expected)
            if mask.any():
                say(f"DIFFERS {op} {dtype} n={world} {size=}: {describe(actual, expected, mask)}")
    return count


def compare_reduce_scatter(rank: int, world: int) -> int:
    count = 0
    # torch 2.13 deprecates the name that older ones know.
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    for dtype in FLOATS:
        for size in (world, 13 * world, 1031 * world):
            tensors = operands(world, dtype, size)
            actual = torch.empty(size // world, dtype=dtype)
            scatter(actual, tensors[rank])
            expected = reduce_sum(tensors).chunk(world)[rank]
            mask = differences(actual, expected)
            count += 1
            if mask.any():
                text = describe(actual, expected, mask)
                say(f"DIFFERS reduce_scatter {dtype} n={world} {rank=} {size=}: {text}")
    return count


def main() -> None:
    rank, world, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    store = dist.FileStore(path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    count = compare_all_reduce(rank, world) + compare_reduce_scatter(rank, world)
    dist.barrier()
    dist.destroy_process_group()
    say(f"done {count}")


if __name__ == "__main__":
    main()
