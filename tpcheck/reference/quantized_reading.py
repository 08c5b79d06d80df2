"""Slices of stored tensors, as they are stored: no rounding, whatever the compute dtype is.

Requirement: a rank reads what it holds of codes and scales, and an index into groups that points
nowhere, or that config.json denies, is an error and not another function.
"""

from __future__ import annotations

import torch

from tpcheck.errors import SubjectError
from tpcheck.quantization import Quantization
from tpcheck.reference.quantized_names import QuantizedPart
from tpcheck.reference.tensor_files import Checkpoint


def read_part(
    checkpoint: Checkpoint, part: QuantizedPart, dim: int, start: int, stop: int
) -> torch.Tensor:
    """Return indices start to stop along a dim of a component."""
    stored, block = part.stored, part.block
    index = stored.index if stored.among else None
    if block and dim == 1:
        first, last = start // block, max(start // block, -(-stop // block))
        blocks = checkpoint.slice(stored.name, 1, first, last, index).flatten(1)
        return blocks.narrow(1, start - first * block, stop - start)
    if not block and checkpoint.shape(stored.name) != part.stored_shape:
        return read_small(checkpoint, stored.name, part.shape, dim, start, stop)
    where = stored.locate(part.shape, dim, start, stop)
    piece = checkpoint.slice(stored.name, *where, index)[stored.own(where[0])]
    return piece.flatten(1) if block else piece


def read_small(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dim: int, start: int, stop: int
) -> torch.Tensor:
    """Return a slice of a tensor of one dim, or of none, that stands for one of this shape."""
    actual, wanted = checkpoint.shape(name), list(shape)
    if shape[dim] not in actual:
        return checkpoint.whole(name).reshape(shape).narrow(dim, start, stop - start)
    wanted[dim] = stop - start
    return checkpoint.slice(name, actual.index(shape[dim]), start, stop).reshape(wanted)


def require_groups(
    name: str, index_k: torch.Tensor, quantization: Quantization, start: int, size: int
) -> None:
    """Raise where the group of an input feature is none, or not the one that it must be.

    Args:
        index_k: the groups of features `start` and up.
        size: how many features the whole weight has.

    Raises:
        SubjectError: names the feature, its group, and what was expected.
    """
    width = quantization.group_size or max(1, size)
    features = torch.arange(start, start + len(index_k))
    count = -(-size // width)
    if quantization.desc_act:
        wrong = (index_k < 0) | (index_k >= count)
        expected = f"from 0 to {count - 1}"
    else:
        wrong = index_k != features // width
        expected = f"feature // {width} where config.json says desc_act=false"
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise SubjectError(
            f"{name}: feature {start + at} is in group {int(index_k[at])}, but should be {expected}"
        )
