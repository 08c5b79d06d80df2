"""Where the elements of a logical tensor live on the ranks of a TP group, in DTensor's words.

Requirement: trace points and shards say how a local tensor relates to the whole one without
importing torch, so that plans, reports and gates can read placements anywhere.
"""

from dataclasses import dataclass

from tpcheck.errors import SubjectError

OPS = ("sum", "avg", "max", "min")
"""What terms of a `Partial` may be put together by."""

Region = tuple[slice, ...]
"""One slice per dim; missing trailing dims mean "all of it"."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank r holds the r-th piece along `dim`; pieces may differ in size and may be empty."""

    dim: int

    def __post_init__(self) -> None:
        if not isinstance(self.dim, int) or isinstance(self.dim, bool):
            raise SubjectError(f"Shard: dim={self.dim!r}, but should be the number of a dim")


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank holds the whole tensor, bit for bit."""


@dataclass(frozen=True, slots=True)
class Partial:
    """Every rank holds a term of the whole shape; `op` over ranks gives the tensor."""

    op: str = "sum"

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise SubjectError(f"Partial: op={self.op!r}, but should be one of {', '.join(OPS)}")


@dataclass(frozen=True, slots=True)
class Slices:
    """This rank's pieces, as (local region, global region) pairs of equal size.

    What no local region covers is padding: it belongs to no logical element.
    """

    pieces: tuple[tuple[Region, Region], ...]

    def __init__(self, pieces: object) -> None:
        try:
            pairs = tuple((_region(local), _region(whole)) for local, whole in pieces)  # type: ignore[attr-defined]
        except (TypeError, ValueError) as error:
            raise SubjectError(
                f"Slices: pieces={pieces!r:.200}, but should be (local region, global region)"
                " pairs, where a region is a slice or a tuple of slices"
            ) from error
        object.__setattr__(self, "pieces", pairs)


Placement = Shard | Replicate | Partial | Slices


def _region(value: object) -> Region:
    if isinstance(value, slice):
        return (value,)
    region: Region = tuple(value)  # type: ignore[arg-type]
    if not all(isinstance(part, slice) for part in region):
        raise TypeError("a region is made of slices")
    return region
