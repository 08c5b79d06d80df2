"""The torch program that one rank runs, from build to logits, as plain data.

Requirement: a failure can be shown without tpcheck, so what a subject does has to be known as a
list of calls that anyone can make: torch functions as users write them, weights and collectives at
the seam, and small values that depend on neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tpcheck.placement import Placement

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
COPIES = ("clone", "detach", "contiguous", "data", "to", "type_as")
INPUT, WEIGHT, CONSTANT, UNKNOWN = "input", "weight", "constant", "?"
"""What a step is besides a torch function or a collective."""


@dataclass(frozen=True, slots=True)
class Ref:
    """What a step made: `index` is -1 where it made one tensor, else which of several."""

    step: int
    index: int = -1


@dataclass(frozen=True, slots=True)
class Constant:
    """A small tensor by value: flat values in row order."""

    shape: tuple[int, ...]
    dtype: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Sequence_:
    """A list of the program, told apart from a tuple: indexing tells them apart."""

    items: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice of the program, hashable."""

    start: Any
    stop: Any
    step: Any


@dataclass(frozen=True, slots=True)
class Step:
    """One call. Arguments are trees of Ref, Constant and plain values.

    same: the result is the first argument over again (a clone, a slice that is all of it). writes:
    storages that the call changed in place. holds: the storages of its results. many: it returned
    a tuple. raises: the type of the exception that it ended in. result: the tensor it made, where
    it made one.
    """

    function: str
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...] = ()
    fqn: str = ""
    same: bool = False
    writes: tuple[int, ...] = ()
    holds: tuple[int, ...] = ()
    many: bool = False
    raises: str = ""
    result: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class ModuleMark:
    """What went into a traced module and came out of it in its first call."""

    input: Ref | Constant | None
    output: Ref | Constant | None
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    in_placement: Placement | None
    out_placement: Placement | None
    floating: bool


@dataclass(slots=True)
class Program:
    """What one rank did, up to wherever it stopped.

    weights: every weight it asked for, by name and shape. unknown: large tensors that no recorded
    call made. error: what it raised. refusal: why the program is not known.
    """

    rank: int
    size: int
    steps: list[Step] = field(default_factory=list)
    outputs: dict[str, Ref | Constant] = field(default_factory=dict)
    modules: dict[str, ModuleMark] = field(default_factory=dict)
    weights: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)
    unknown: dict[str, torch.Tensor] = field(default_factory=dict)
    error: str = ""
    refusal: str = ""
