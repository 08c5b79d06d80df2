"""One reader of a file: an example by the real writer, and the law of what may be accepted.

Requirement: what a row of the table (readers.py) is made of, and what its laws compare with: values
by type, tensors bit by bit as the format's own library reads them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.fuzzing import mutators

Judge = Callable[[bytes], str]
Forge = Callable[[random.Random, bytes], bytes]


class Violation(AssertionError):
    """A law is broken."""


@dataclass(frozen=True, slots=True)
class Reader:
    """A reader. `forge` makes an edited file fit the checks that anybody can compute anew."""

    name: str
    format: str
    original: bytes
    judge: Judge
    forge: Forge | None = None
    unaltered: str = "same"

    @property
    def edits(self) -> dict[str, mutators.Edit]:
        """What is done to its file, by name."""
        made = dict(mutators.EDITS[self.format])
        if self.forge is not None:
            made["forge"] = self.forge
        return made


def broken(unless: object, text: str) -> None:
    """Raise Violation unless a law holds."""
    if not unless:
        raise Violation(text)


def typed(value: Any) -> str:
    """Return one text for equal values: 1, 1.0 and true are three."""
    return json.dumps(value, sort_keys=True)


def tensors_of_all_kinds() -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return {
        "layers.0.w": torch.randn(4, 6, generator=generator),
        "layers.1.w": torch.randn(3, 8, generator=generator).bfloat16(),
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 3),
        "one": torch.tensor(2.5, dtype=torch.float64),
    }


def true_tensors(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Return (dtype, shape, bytes) of every tensor as the format's own library reads them."""
    from safetensors import SafetensorError, deserialize

    try:
        found = deserialize(data)
    except (SafetensorError, ValueError, OverflowError):
        return None
    return {name: (one["dtype"], tuple(one["shape"]), bytes(one["data"])) for name, one in found}


def bytes_of(tensor: Any) -> bytes:
    import torch

    raw: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return raw
