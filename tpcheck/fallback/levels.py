"""The levels of the fallback: what each does to a model, and what it is for.

Requirement: one table. A level is a name, a sentence for reports, and a function that makes a
forward of a model; what a level buys on a given model is measured, never assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tpcheck.errors import SubjectError
from tpcheck.fallback.declared_shards import Alone, DeclaredShards
from tpcheck.fallback.decoders import DecoderModel
from tpcheck.fallback.gathering import Collectives, Meter
from tpcheck.fallback.models import Forward, ParallelModel, Products
from tpcheck.fallback.products import (
    blocked_columns,
    fixed_tree_product,
    fp32_product,
    whole_product,
)
from tpcheck.fallback.sharded_modules import ShardedModule
from tpcheck.reference.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Level:
    """One remedy. `make(model, meter)` returns the forward that all ranks run together."""

    name: str
    does: str
    make: Callable[[ParallelModel, Meter], Forward]


LEVELS = {
    level.name: level
    for level in (
        Level(
            "head",
            "last hidden state and head gathered, logits in float32",
            lambda model, meter: model.with_head(meter),
        ),
        Level(
            "rowwise",
            "row-parallel inputs and weights gathered, each product whole, in TP=1's order",
            lambda model, meter: model.with_products(Products(whole_product), meter),
        ),
        Level(
            "full",
            "every weight gathered part by part, the whole forward at TP=1: its bits",
            lambda model, meter: model.alone(meter),
        ),
        Level(
            "fp32_wire",
            "row-parallel terms made, sent and summed in float32, rounded once",
            lambda model, meter: model.with_products(Products(fp32_product), meter),
        ),
        Level(
            "fixed_tree",
            "fixed blocks of features summed in one tree: the same bits at TP 1, 2, 4 and 8",
            lambda model, meter: model.with_products(
                Products(fixed_tree_product, blocked_columns), meter
            ),
        ),
    )
}
"""By name, in the order of NUMERICS: what the TP=1 fallback can buy."""


def parse_levels(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return level names, given as a list or as `head,full`.

    Raises:
        SubjectError: one is unknown, or there is none; names those that there are.
    """
    parts = names.split(",") if isinstance(names, str) else list(names)
    wanted = tuple(dict.fromkeys(part.strip() for part in parts))
    for name in wanted:
        if name not in LEVELS:
            raise SubjectError(f"fallback={name!r}, but should be one of {', '.join(LEVELS)}")
    if not wanted:
        raise SubjectError(f"fallback is empty, but should be some of {', '.join(LEVELS)}")
    return wanted


def parallel_model(
    model: Any,
    tp: Collectives | None = None,
    *,
    head: str = "lm_head",
    alone: Alone | None = None,
) -> ParallelModel:
    """Return a model as the levels see it: a decoder, a module of DTensors, or a callable.

    Args:
        model: this rank's model, or an object whose `model` it is.
        tp: the ranks, for a callable with `shards()`; the others know theirs.
        head: FQN of the output layer of a module.
        alone: what a callable with `shards()` is at TP=1.

    Raises:
        SubjectError: nothing says what the ranks hold.
    """
    inner = getattr(model, "model", None)
    if not isinstance(model, torch.nn.Module) and isinstance(inner, torch.nn.Module):
        model = inner
    if isinstance(model, Decoder) and alone is None:
        return DecoderModel(model)
    if hasattr(model, "shards"):
        if tp is None:
            raise SubjectError(
                f"{type(model).__name__}: tp=None, but should be the TPGroup it was built for"
            )
        return DeclaredShards(model, tp, alone)
    if isinstance(model, torch.nn.Module):
        return ShardedModule(model, head)
    raise SubjectError(
        f"{type(model).__name__}: has no shards() and no DTensor parameter, but one of them should"
        " say what each rank holds: see CONTRACT, the subject"
    )
