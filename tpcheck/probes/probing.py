"""Probe one message on the ranks: which bits does this all-reduce return, call after call?

Requirement: everything is read through the collective itself, the built-in one or the user's, with
nothing known about it. What is asked of it does not depend on what one rank saw: ranks whose
results differ must still make the same calls, or the probe would hang where it should report.

[Who Reads] Every rank takes part and keeps digests; rank 0 reads order and rounding from its own
outputs. The one thing that decides what comes next, the dtype on the wire, it tells the others.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpcheck.errors import SubjectError
from tpcheck.groups.base import TPGroup
from tpcheck.groups.jobs import World
from tpcheck.numerics.order import (
    Chunk,
    Mask,
    Unreadable,
    leaves_under,
    mask_of,
    pairs_of,
    read_chunks,
)
from tpcheck.numerics.probed_reduction import ProbedMessage, sum_message
from tpcheck.numerics.rounding_probe import (
    accumulator_table,
    average_operands,
    laid_out,
    read_accumulators,
    read_average,
    read_wire,
    rounds_needed,
    same_bits,
    wire_table,
)
from tpcheck.subjects import SubjectRef, load_callable

REPEATS = 3
"""How often the same operands are reduced: repeatability over calls."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Reduce = Callable[[Tensor], Tensor]
Observation = tuple[Sequence[Tensor], Tensor]
"""Every rank's operand, and what rank 0 got."""
Averaged = list[Observation] | None


@dataclass(frozen=True, slots=True)
class ProbeTask:
    """A message to probe: `count` elements of `dtype`, by the built-in all-reduce or a user's."""

    dtype: str
    count: int
    collective: SubjectRef | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What rank 0 read of a message. `reason` says why there is no order, or no accumulator.

    `average` is None where nothing averages: a user's collective, or a backend without AVG.
    """

    message: ProbedMessage | None
    reproduced: bool | None
    average: tuple[str, ...] | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RankReading:
    """One rank's share: digests of the repeated calls' results, and on rank 0 the reading."""

    digests: tuple[str, ...]
    reading: Reading | None


def probe_message(world: World, task: ProbeTask) -> RankReading:
    """Probe a message on this rank.

    Raises:
        SubjectError: the user's collective cannot be loaded, returns no such tensor, or no sum.
    """
    with torch.no_grad():
        dtype = getattr(torch, task.dtype)
        group = world.group(seed=0, dtype=dtype, weight_dtype=dtype)
        return _Prober(world, group, task, _collective(group, task)).everything()


def explains(world: World, work: tuple[ProbeTask, tuple[Chunk, ...], str]) -> bool | None:
    """Say on rank 0 whether each element of a message is summed by one of these orders.

    The chunks stand for their trees and accumulators, wherever they lie: one call instead of one
    per pair of ranks, for the search of the size at which another reduction takes over.

    Source: summing random operands in another order changes the bits of about every third element
        at 3 ranks and every second at 8.
    """
    task, chunks, wire = work
    with torch.no_grad():
        dtype = getattr(torch, task.dtype)
        group = world.group(seed=0, dtype=dtype, weight_dtype=dtype)
        own = random_operand(world.rank, task.count, dtype).to(world.device)
        output = _collective(group, task)(own).cpu()
        if world.rank:
            return None
        operands = [random_operand(rank, task.count, dtype) for rank in range(world.size)]
        explained = torch.zeros(task.count, dtype=torch.bool)
        for chunk in {(one.tree, one.accumulator): one for one in chunks}.values():
            whole = replace(chunk, start=0, stop=task.count)
            message = ProbedMessage(world.size, task.dtype, task.count, wire, (whole,))
            explained |= same_bits(sum_message(operands, message), output)
        return bool(explained.all())


def random_operand(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    """Return what a rank puts into the random messages, the same in every process."""
    seed = zlib.crc32(f"{rank} {count}".encode())  # torch looks at 32 bits only
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(count, generator=generator, dtype=drawn).to(dtype)


class _Prober:
    """One rank's calls, in an order that is the same on all, and what they returned."""

    def __init__(self, world: World, group: TPGroup, task: ProbeTask, reduce: Reduce) -> None:
        self.group = group
        self.task = task
        self.reduce = reduce
        self.rank = world.rank
        self.size = world.size
        self.backend = world.backend
        self.device = world.device
        self.dtype: torch.dtype = getattr(torch, task.dtype)

    def everything(self) -> RankReading:
        self._require_sum()
        wire = self._wire()
        operands = self._random()
        outputs = [self._reduced(operands[self.rank]) for _ in range(REPEATS)]
        digests = tuple(_digest(output) for output in outputs)
        masked = [] if wire is None else self._masked(mask_of(self.dtype, wire, self.size))
        rounded = [] if wire is None else self._rounded(wire)
        averaged = self._averaged(operands)
        if self.rank:
            return RankReading(digests, None)
        try:
            message = self._message(wire, masked, rounded)
        except Unreadable as error:
            average = None if averaged is None else ()
            return RankReading(digests, Reading(None, None, average, str(error)))
        return RankReading(digests, _judged(message, (operands, outputs[0]), averaged))

    def _message(
        self, wire: torch.dtype | None, masked: Sequence[Tensor], rounded: Sequence[Observation]
    ) -> ProbedMessage:
        if wire is None:
            raise Unreadable("what is on the wire is no plain float")
        mask = mask_of(self.dtype, wire, self.size)
        under = torch.stack([leaves_under(output, mask, self.size) for output in masked])
        chunks = read_accumulators(read_chunks(under, self.size), wire, rounded)
        return ProbedMessage(self.size, self.task.dtype, self.task.count, named(wire), chunks)

    def _require_sum(self) -> None:
        total = self._reduced(torch.ones(self.task.count, dtype=self.dtype))
        wrong = (total != self.size).nonzero().flatten()
        if len(wrong):
            where = int(wrong[0])
            name = self.task.collective.label if self.task.collective else "all_reduce"
            raise SubjectError(
                f"{name}: ones on {self.size} ranks became {float(total[where]):g} at element"
                f" {where}, but should be their sum, {self.size}"
            )

    def _wire(self) -> torch.dtype | None:
        """Return what is on the wire as rank 0 sees it; None if it is no plain float."""
        tried = self._tried(wire_table(self.dtype, self.size), self.task.count)
        number = -1
        if not self.rank:
            possible = [read_wire(operands, output) for operands, output in tried]
            common = [one for one in possible[0] if all(one in each for each in possible)]
            number = FLOATS.index(common[0]) if common else -1
        told = int(self.group.broadcast(torch.tensor([number], device=self.device), 0))
        return None if told < 0 else FLOATS[told]

    def _masked(self, mask: Mask) -> list[Tensor]:
        """Return what rank 0 got for every masked pair."""
        outputs = []
        for pair in pairs_of(self.size):
            value = mask.value(self.rank, pair)
            output = self._reduced(torch.full((self.task.count,), value, dtype=self.dtype))
            if not self.rank:
                outputs.append(output)
        return outputs

    def _rounded(self, wire: torch.dtype) -> list[Observation]:
        """Show every accumulator input to as many elements as a chunk per rank would have."""
        share = max(1, self.task.count // self.size)
        return self._tried(accumulator_table(wire, self.size), share)

    def _tried(self, table: Tensor, share: int) -> list[Observation]:
        """Reduce messages that show every input to each `share` elements in a row.

        Returns what rank 0 observed.
        """
        seen: list[Observation] = []
        for turn in range(rounds_needed(len(table), share)):
            operands = {
                rank: laid_out(table[:, rank], self.task.count, share, turn).to(self.dtype)
                for rank in self._needed()
            }
            output = self._reduced(operands[self.rank])
            if not self.rank:
                seen.append((list(operands.values()), output))
        return seen

    def _averaged(self, operands: dict[int, Tensor]) -> Averaged:
        if self.task.collective is not None:
            return None
        seen: list[Observation] = []
        for each in (operands, average_operands(operands)):
            output = self._average(each[self.rank].to(self.device))
            if output is None:
                return None
            seen.append((list(each.values()), output.cpu()))
        return seen

    def _average(self, x: Tensor) -> Tensor | None:
        """Return the backend's own average, None if it has none."""
        if self.backend != "gloo":
            return self.group.all_reduce(x, "avg")
        averaged = x.clone()  # a TPGroup divides Gloo's sums itself
        try:
            dist.all_reduce(averaged, dist.ReduceOp.AVG)
        except RuntimeError as error:
            if "AVG" in str(error):
                return None
            raise
        return averaged

    def _random(self) -> dict[int, Tensor]:
        return {rank: random_operand(rank, self.task.count, self.dtype) for rank in self._needed()}

    def _needed(self) -> Sequence[int]:
        """Return the ranks whose operands this one needs: all on rank 0, which reads."""
        return (self.rank,) if self.rank else range(self.size)

    def _reduced(self, own: Tensor) -> Tensor:
        return self.reduce(own.to(self.device)).cpu()


def _judged(
    message: ProbedMessage, random: tuple[dict[int, Tensor], Tensor], averaged: Averaged
) -> Reading:
    """Hold the message that was read against what else was observed."""
    if any(chunk.accumulator is None for chunk in message.chunks):
        unknown = None if averaged is None else ()
        return Reading(message, False, unknown, "no one accumulator explains how it rounds")
    operands, output = random
    reproduced = bool(same_bits(sum_message(list(operands.values()), message), output).all())
    average = None if averaged is None else read_average(message, averaged)
    return Reading(message, reproduced, average)


def _collective(group: TPGroup, task: ProbeTask) -> Reduce:
    if task.collective is None:
        return group.all_reduce
    function, name = load_callable(task.collective), task.collective.label

    def call(x: Tensor) -> Tensor:
        y = function(x.clone())
        if not isinstance(y, Tensor):
            raise SubjectError(f"{name}: returned {type(y).__name__}, but should return a tensor")
        if (y.shape, y.dtype) != (x.shape, x.dtype):
            raise SubjectError(
                f"{name}: returned {named(y.dtype)} {list(y.shape)}, but should return"
                f" {named(x.dtype)} {list(x.shape)}, as it was given"
            )
        return y.clone()  # it may be a buffer that the next call writes to

    return call


def _digest(x: Tensor) -> str:
    data: Any = x.contiguous().view(torch.uint8).numpy()  # its stubs leave the buffer out
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def named(dtype: torch.dtype) -> str:
    """Return a dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")
