"""The dims of stored tensors in the model's vocabulary: heads, widths, rows, and what packs them.

Requirement: a stored dim is a run of blocks, each of so many heads, features or rows of one kind,
and so many of them share one stored index: 8 int4 values in an int32, 128 values in a group's
scale. Everything a degree does to a tensor follows from that. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Block(NamedTuple):
    """`units` heads, features or rows of `width` elements; `split` says of what, "" of nothing."""

    split: str
    units: int
    width: int = 1

    @property
    def size(self) -> int:
        """Elements in all."""
        return self.units * self.width


@dataclass(frozen=True, slots=True)
class Dim:
    """A stored dim: its blocks, one behind the other, and how many elements share an index.

    `what` names that grain: "group", "block" or "packed int32".
    """

    blocks: tuple[Block, ...]
    grain: int = 1
    what: str = ""

    @property
    def elements(self) -> int:
        """Logical elements."""
        return sum(block.size for block in self.blocks)

    @property
    def size(self) -> int:
        """Stored indices."""
        return -(-self.elements // self.grain)

    @property
    def is_split(self) -> bool:
        """Whether ranks hold different parts of it: one scale for all is held by everyone."""
        return any(block.split for block in self.blocks) and (self.grain == 1 or self.size > 1)

    def packed(self, grain: int, what: str) -> Dim:
        """Return this dim with `grain` elements in one stored index; -1 or 0: all in one."""
        return Dim(self.blocks, grain if grain > 0 else max(1, self.elements), what)


@dataclass(frozen=True, slots=True)
class Expected:
    """A stored tensor as the config implies it. `dtypes` of () allows any floating one.

    `optional` tensors may be missing; `any_shape` ones have several forms and only have a name.
    `others` are other forms in which the same thing is stored. `flat` is the file's shape where it
    is not that of the dims: one long run of values.
    """

    dims: tuple[Dim, ...]
    dtypes: tuple[str, ...] = ()
    optional: bool = False
    any_shape: bool = False
    others: tuple[Expected, ...] = ()
    flat: tuple[int, ...] | None = None

    @property
    def logical(self) -> tuple[int, ...]:
        """The sizes of the dims, which are what ranks share out."""
        return tuple(dim.size for dim in self.dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """What the file should say."""
        return self.logical if self.flat is None else self.flat

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Every shape that the file may say."""
        return (self.shape, *(other.shape for other in self.others))

    def stored_as(self, shape: tuple[int, ...]) -> Expected:
        """Return this tensor in the form that has this shape, itself where none has."""
        return next((one for one in (self, *self.others) if one.shape == shape), self)


def constant(size: int) -> Dim:
    """Return a dim that is whole on every rank."""
    return Dim((Block("", size),))


def parse_dims(text: str, vocabulary: Mapping[str, Block]) -> tuple[Dim, ...]:
    """Return the dims of `Q+K+V D`: one word per dim, its blocks joined by +."""
    return tuple(
        Dim(tuple(vocabulary[symbol] for symbol in word.split("+"))) for word in text.split()
    )
