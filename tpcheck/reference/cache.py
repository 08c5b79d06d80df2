"""Keys and values of earlier tokens, for decoding one token at a time.

Requirement: decoding is functional. A call gets the state that earlier calls returned, never
changes it, and returns a new one; so states can be kept, compared and used again.
"""

from __future__ import annotations

import torch

State = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Keys and values per layer, [B, k, S, d] each: this rank's KV heads of all S tokens so far."""


class Cache:
    """One call's view of a state: what was, and what this call adds."""

    def __init__(self, past: State = ()) -> None:
        self._past = past
        self._present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def length(self) -> int:
        """How many tokens came before this call."""
        return self._past[0][0].shape[-2] if self._past else 0

    def extend(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values of all tokens so far, this call's at the end."""
        if self._past:
            keys = torch.cat((self._past[layer][0], keys), dim=-2)
            values = torch.cat((self._past[layer][1], values), dim=-2)
        self._present[layer] = (keys, values)
        return keys, values

    @property
    def state(self) -> State:
        """What the next call needs."""
        return tuple(self._present[layer] for layer in sorted(self._present))
