"""What tests/real/test_probe_gloo.py runs on ranks, and collectives of its own to probe."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist

from tpcheck.groups.jobs import World

LAST_IN_RANK_ORDER = 700


def operand(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a rank's operand: mixed signs and sizes, none of it what a probe sends."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"held out {rank} {count}".encode()))
    drawn = torch.randn(count, generator=generator, dtype=torch.float64)
    return (drawn * 2.0 ** torch.randint(-6, 6, (count,), generator=generator)).to(dtype)


def all_reduced(world: World, messages: list[tuple[str, int]]) -> list[torch.Tensor] | None:
    """Return on rank 0 what the all-reduce of this world's group makes of each message."""
    results = []
    for name, count in messages:
        dtype = getattr(torch, name)
        group = world.group(seed=0, dtype=dtype, weight_dtype=dtype)
        results.append(group.all_reduce(operand(world.rank, count, dtype)))
    return None if world.rank else results


def in_rank_order(x: torch.Tensor) -> torch.Tensor:
    """Gather, and add in rank order in float32: another reduction than Gloo's."""
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, x)
    total = gathered[0].float()
    for one in gathered[1:]:
        total = total + one.float()
    return total.to(x.dtype)


def by_size(x: torch.Tensor) -> torch.Tensor:
    """Sum short messages in rank order and long ones by Gloo, as engines switch kernels."""
    if x.numel() <= LAST_IN_RANK_ORDER:
        return in_rank_order(x)
    dist.all_reduce(x)
    return x


def half_wire(x: torch.Tensor) -> torch.Tensor:
    """Send float16, whatever comes."""
    y = x.half()
    dist.all_reduce(y)
    return y.to(x.dtype)


def rank_1_differs(x: torch.Tensor) -> torch.Tensor:
    """Give rank 1 the sum in another order."""
    summed = in_rank_order(x)
    dist.all_reduce(x)
    return summed if dist.get_rank() == 1 else x


_buffers: dict[tuple[torch.Size, torch.dtype], torch.Tensor] = {}


def one_buffer(x: torch.Tensor) -> torch.Tensor:
    """Return the same tensor in every call, as kernels with registered buffers do."""
    buffer = _buffers.setdefault((x.shape, x.dtype), torch.empty_like(x))
    return buffer.copy_(in_rank_order(x))


_calls = 0


def other_bits_at_times(x: torch.Tensor) -> torch.Tensor:
    """Sum in rank order and by Gloo in turns."""
    global _calls
    _calls += 1
    summed = in_rank_order(x)
    dist.all_reduce(x)
    return summed if _calls % 2 else x


def mean(x: torch.Tensor) -> torch.Tensor:
    """Return no sum."""
    return in_rank_order(x) / dist.get_world_size()


def in_place(x: torch.Tensor) -> None:
    """Return nothing."""
    dist.all_reduce(x)


def raises(x: torch.Tensor) -> torch.Tensor:
    """Fail on every rank."""
    raise ValueError("no link")
