"""What a remedy asks of a tensor-parallel model, whichever kind of model it is.

Requirement: the levels are written once. A model says how it runs, how it runs at TP=1 on whole
weights that are gathered as they are needed, and how it runs with other row-parallel products or
another head; what it cannot do is one sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from tpcheck.errors import SubjectError
from tpcheck.fallback.gathering import Collectives, Meter
from tpcheck.fallback.products import ColumnProduct, RowProduct

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Products:
    """How a model's products are made: the row-parallel ones, and where given all others too."""

    row: RowProduct
    column: ColumnProduct | None = None


class ParallelModel(Protocol):
    """A tensor-parallel model on this rank; what it returns runs on all ranks together."""

    name: str
    tp: Collectives
    dtype: torch.dtype
    device: torch.device

    def run(self, *arguments: Any, **options: Any) -> Any:
        """Run the model as it is deployed."""
        ...

    def alone(self, meter: Meter, dtype: torch.dtype | None = None) -> Forward:
        """Return the forward at TP=1, in `dtype` or the model's own, weights gathered part by part.

        Raises:
            SubjectError: it cannot be said what the model is at TP=1, or a part is too large.
        """
        ...

    def with_products(self, products: Products, meter: Meter) -> Forward:
        """Return the forward with its products made otherwise.

        Raises:
            SubjectError: the model has none that can be found, or has some that cannot be replaced.
        """
        ...

    def with_head(self, meter: Meter) -> Forward:
        """Return the forward with the head gathered whole, and its product in float32.

        Raises:
            SubjectError: the head cannot be found.
        """
        ...


class WholeHead(nn.Module):
    """hidden [..., D] -> logits [..., V] in float32, from the head's gathered rows."""

    def __init__(self, gather: Callable[[], tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        super().__init__()
        self._gather = gather

    def forward(self, x_D: Any) -> torch.Tensor:
        """Return the logits, equal on every rank."""
        if hasattr(x_D, "full_tensor"):
            x_D = x_D.full_tensor()
        w_VD, bias_V = self._gather()
        wide = torch.promote_types(w_VD.dtype, torch.float32)
        bias = None if bias_V is None else bias_V.to(wide)
        return nn.functional.linear(x_D.to(wide), w_VD.to(wide), bias)


@contextmanager
def no_rows_is_an_error(name: str) -> Iterator[list[str]]:
    """Yield a list for the row-parallel modules found; none is an error that says so."""
    found: list[str] = []
    yield found
    if not found:
        raise SubjectError(f"{name}: no row-parallel product was found to replace; take level full")
