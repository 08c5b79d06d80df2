"""How a row-parallel product is made whole: the three levels that change nothing else.

Requirement: drift comes from the sums over ranks inside the layers, so a remedy is a function of
one row-parallel product: this rank's inputs and weights in, the whole product out, equal on every
rank. Where it runs (reference decoder, DTensor, transformers) is another module's concern.

[Fixed Tree] The same bits at every degree need every sum in the same order and every product of the
same shape. The K features are cut into `leaves` blocks, whoever holds them; each block is one
product, in float32; blocks are added in one balanced tree, whose lower levels lie within a rank and
whose upper ones run over all ranks' subtrees; the total is rounded once. Column-parallel products
and the head are cut into blocks of outputs, because a matrix product may choose its order by its
shape; and so are activations, because exp in the vectorized part of a loop is another exp than in
the rest of it (measured: silu over 24 and 96 features on CPU, an ulp apart).
Source: the idea of arXiv 2511.17826.

Shape legend: B batch, T tokens, D hidden, F features; capital = full, lower case = this rank's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from tpcheck.errors import SubjectError
from tpcheck.fallback.gathering import Collectives, Meter, joined_last

LEAVES = 8
"""Blocks of the fixed tree: the largest degree that has the same bits as the others."""


@dataclass(frozen=True, slots=True)
class Row:
    """Where a row-parallel product stands: its name, every rank's count of features, the ranks.

    bias_D: what TP=1 adds inside the product, whole; None where it is added after it.
    """

    fqn: str
    widths: tuple[int, ...]
    tp: Collectives
    meter: Meter
    bias_D: torch.Tensor | None = None


RowProduct = Callable[[torch.Tensor, torch.Tensor, Row], torch.Tensor]
"""(x [..., f], w [D, f], row) -> y [..., D], whole and equal on every rank, in the dtype of x."""

ColumnProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, str, int], torch.Tensor]
"""(x [..., D], w [f, D], bias [f], fqn, outputs per block) -> y [..., f]."""


def whole_product(x_f: torch.Tensor, w_Df: torch.Tensor, row: Row) -> torch.Tensor:
    """Gather inputs and weights, then make the product as TP=1 does: one sum, in its order."""
    size = w_Df.element_size() * w_Df.shape[0] * sum(row.widths)
    with row.meter.holding(row.fqn, size if row.tp.size > 1 else 0):
        x_F = joined_last(x_f, row.widths, row.tp, row.meter)
        w_DF = joined_last(w_Df, row.widths, row.tp, row.meter)
        return functional.linear(x_F.contiguous(), w_DF.contiguous(), row.bias_D)


def fp32_product(x_f: torch.Tensor, w_Df: torch.Tensor, row: Row) -> torch.Tensor:
    """Make this rank's term in float32, sum the terms in float32, round once."""
    y_D = row.tp.all_reduce(functional.linear(_wide(x_f), _wide(w_Df)))
    row.meter.received(2 * (row.tp.size - 1) * y_D.nbytes // row.tp.size, 0)
    return _rounded_once(y_D, x_f, row)


def fixed_tree_product(x_f: torch.Tensor, w_Df: torch.Tensor, row: Row) -> torch.Tensor:
    """Add blocks of the features in one tree, whoever holds them; see [Fixed Tree].

    Raises:
        SubjectError: the features cannot be cut so that every block lies on one rank.
    """
    width = block_width(row)
    blocks = [
        functional.linear(_wide(x).contiguous(), _wide(w).contiguous())
        for x, w in zip(x_f.split(width, -1), w_Df.split(width, -1), strict=True)
    ]
    mine = tree_sum(blocks)
    every = row.tp.all_gather(mine.unsqueeze(0), 0) if row.tp.size > 1 else mine.unsqueeze(0)
    row.meter.received(row.tp.size * mine.nbytes, mine.nbytes)
    return _rounded_once(tree_sum(list(every.unbind(0))), x_f, row)


def tree_sum(terms: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of 2^n tensors: neighbours first, then neighbouring sums."""
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def blocked_columns(
    x_D: torch.Tensor, w_fD: torch.Tensor, bias_f: torch.Tensor | None, fqn: str, block: int
) -> torch.Tensor:
    """Make outputs in blocks of `block`, so that each has one shape at every degree.

    Raises:
        SubjectError: this rank's outputs are no whole number of blocks.
    """
    require_blocks(w_fD.shape[0], fqn, block)
    weights = w_fD.split(block)
    biases = [None] * len(weights) if bias_f is None else bias_f.split(block)
    pieces = zip(weights, biases, strict=True)
    return torch.cat([functional.linear(x_D, w, bias) for w, bias in pieces], -1)


def require_blocks(outputs: int, fqn: str, block: int) -> None:
    """Raise SubjectError unless a rank's outputs are a whole number of blocks."""
    if block < 1 or outputs % block:
        raise SubjectError(
            f"fixed_tree: {fqn}: {outputs} outputs on a rank, but should be a multiple of {block};"
            " take level full for this model"
        )


def in_blocks(
    function: Callable[..., torch.Tensor], width: int, *tensors: torch.Tensor
) -> torch.Tensor:
    """Apply an elementwise function to blocks of the last dim, each a tensor of its own."""
    pieces = zip(*(tensor.split(width, -1) for tensor in tensors), strict=True)
    return torch.cat([function(*(piece.contiguous() for piece in one)) for one in pieces], -1)


def blocked_rows_of_vocab(x_D: torch.Tensor, w_vD: torch.Tensor, block: int) -> torch.Tensor:
    """Make logits in blocks of `block` vocabulary rows, the last one filled up with zeros."""
    missing = -w_vD.shape[0] % block
    filled = functional.pad(w_vD, (0, 0, 0, missing)) if missing else w_vD
    logits = torch.cat([functional.linear(x_D, w) for w in filled.split(block)], -1)
    return logits[..., : w_vD.shape[0]]


def vocab_block(vocab_size: int) -> int:
    """Return the rows of one block: a power of two, alike at every degree."""
    return min(1024, 1 << (-(-vocab_size // LEAVES) - 1).bit_length())


def block_width(row: Row) -> int:
    """Return the features of one block of the fixed tree.

    Raises:
        SubjectError: the features cannot be cut so that every block lies on one rank.
    """
    total, size = sum(row.widths), row.tp.size
    if LEAVES % size or total % LEAVES or any(width * size != total for width in row.widths):
        raise SubjectError(
            f"fixed_tree: {row.fqn}: features={list(row.widths)} at tp_size={size}, but should be"
            f" {LEAVES} equal blocks, none of them on two ranks; take level full"
        )
    return total // LEAVES


def _rounded_once(y_D: torch.Tensor, x_f: torch.Tensor, row: Row) -> torch.Tensor:
    return (y_D if row.bias_D is None else y_D + row.bias_D).to(x_f.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
