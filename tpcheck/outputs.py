"""What a forward gives: the tensor in what it returns, its digest, and the shards it exposes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from tpcheck.errors import SubjectError
from tpcheck.placement import Placement

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def whole(output: Any) -> Any:
    """Unwrap what frameworks return: an HF output's logits, a DTensor's full tensor."""
    if not isinstance(output, torch.Tensor) and hasattr(output, "logits"):
        output = output.logits
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if hasattr(output, "full_tensor"):
        output = output.full_tensor()
    return output


def plain_copy(output: torch.Tensor) -> torch.Tensor:
    """Return what a forward gave as a dense tensor of its own on the CPU, of no subclass."""
    tensor = output.detach().to("cpu")
    tensor = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    if tensor.is_floating_point() and tensor.itemsize == 1:
        return tensor.float()  # the same values; torch can neither subtract nor test these
    copied = tensor.clone(memory_format=torch.contiguous_format)
    return copied if type(copied) is torch.Tensor else copied.as_subclass(torch.Tensor)


def beside(output: Any) -> int:
    """Count the floating tensors that a forward returns beside the one that is compared."""
    if isinstance(output, torch.Tensor):
        return 0
    named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    others = [value for name, value in named.items() if name != "logits"]
    if not named and isinstance(output, (tuple, list)):
        first = getattr(output, "logits", output[0] if output else None)
        others = [one for one in output if one is not first]
    return sum(isinstance(one, torch.Tensor) and one.is_floating_point() for one in others)


def decoded(forward: Any, ids: torch.Tensor, *_: torch.Tensor) -> torch.Tensor | None:
    """Prefill the first half of ids, then step through the rest, one token at a time.

    Returns None on a rank that returns no logits.
    """
    half = max(1, ids.shape[1] // 2)
    logits, state = forward.prefill(ids[:, :half])
    pieces = [logits]
    for position in range(half, ids.shape[1]):
        logits, state = forward.step(ids[:, position : position + 1], state)
        pieces.append(logits)
    pieces = [whole(piece) for piece in pieces]
    if any(piece is None for piece in pieces):
        return None
    return torch.cat([p if p.ndim == 3 else p.unsqueeze(1) for p in pieces], 1)


def digest(tensor: torch.Tensor) -> str:
    """Return a hash of a tensor's bytes, dtype and shape: equal exactly when the bits are."""
    flat: Any = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
    hashed = hashlib.blake2b(flat, digest_size=16)  # in place: outputs can be large
    hashed.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    return hashed.hexdigest()


class Digests:
    """Digests of ranks that run in one process: bits are hashed only where they differ.

    The last output of each name is kept and must not be written to: a rank's own copy, as rank 0
    hands it over anyway.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[torch.Tensor, str]] = {}

    def of(self, name: str, tensor: torch.Tensor) -> str:
        """Return `digest(tensor)`."""
        last = self._last.get(name)
        if last is None or not _same_bits(last[0], tensor):
            last = self._last[name] = (tensor, digest(tensor))
        return last[1]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = _BITS.get(a.itemsize)  # as whole numbers: NaN is NaN, and -0 is not 0
    if bits is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.view(bits), b.view(bits))


def checked_shards(shards: Any) -> dict[str, tuple[torch.Tensor, Any]]:
    if not isinstance(shards, Mapping):
        raise SubjectError(
            f"forward.shards() returned {type(shards).__name__}, but should return"
            " {name: (local tensor, placement)}"
        )
    checked = {}
    for name, entry in shards.items():
        if not (isinstance(entry, tuple) and len(entry) == 2):
            raise SubjectError(f"forward.shards()[{name!r}] should be (local tensor, placement)")
        tensor, placement = entry
        if not isinstance(tensor, torch.Tensor) or not isinstance(placement, Placement):
            raise SubjectError(
                f"forward.shards()[{name!r}]=({type(tensor).__name__}, {placement!r}), but should"
                " be a tensor and one of Shard, Replicate, Partial, Slices"
            )
        checked[str(name)] = (tensor.detach().to("cpu").contiguous(), placement)
    return checked
