"""How a checkpoint stores a logical tensor: under its own name, transposed, or fused with others.

Requirement: a slice of the logical tensor lies in one slice of the stored one, so that only its
bytes are read, and those of its partners where features are interleaved. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a logical tensor lies.

    `transposed`: stored as [in, out], as GPT-2's Conv1D does. `part` of `parts`: one of several
    equal tensors fused along the output features (logical dim 0): one behind the other, or
    `interleaved`, feature by feature. `index` of `among`: one of several stacked along a new first
    dim; `among` of 0 means that it is not stacked.
    """

    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1
    index: int = 0
    among: int = 0
    interleaved: bool = False

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the stored tensor's shape, given the logical one's."""
        fused = (shape[0] * self.parts, *shape[1:])
        alone = fused[::-1] if self.transposed else fused
        return (self.among, *alone) if self.among else alone

    def locate(
        self, shape: tuple[int, ...], dim: int, start: int, stop: int
    ) -> tuple[int, int, int]:
        """Return the stored (dim, start, stop) that a logical slice lies in, within the `index`.

        A fused tensor can only be cut along its fused dim: that is how column-parallel weights are.
        """
        if self.parts > 1:
            assert dim == 0, "fused tensors are cut along their output features"
        if self.interleaved:
            start, stop = start * self.parts, stop * self.parts
        elif self.parts > 1:
            start, stop = start + self.part * shape[0], stop + self.part * shape[0]
        return (len(shape) - 1 - dim if self.transposed else dim), start, stop

    def own(self, dim: int) -> tuple[slice, ...]:
        """Return the index that leaves out the partners along `dim` of what `locate` found."""
        if not self.interleaved:
            return ()
        return (*[slice(None)] * dim, slice(self.part, None, self.parts))
