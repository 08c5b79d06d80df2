"""A reference decoder's products, replaced one by one in a tree of its own.

Requirement: whatever is row-parallel is found, experts included, whose terms are summed together in
one all-reduce: each expert's product is made whole instead, and nothing is left to sum. Where the
bits may not hang on the degree, everything whose shape does is cut into blocks (products: [Fixed
Tree]).

Shape legend: B batch, T tokens, D hidden, F features, V vocab; capital = full, lower case = this
rank's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from tpcheck.fallback.cloning import cloned, shallow, with_forward
from tpcheck.fallback.gathering import Meter, joined_last
from tpcheck.fallback.models import Products
from tpcheck.fallback.products import (
    LEAVES,
    Row,
    block_width,
    blocked_rows_of_vocab,
    in_blocks,
    require_blocks,
    vocab_block,
)
from tpcheck.groups.base import RecordedGroup, Recorder
from tpcheck.reference.decoder import Decoder
from tpcheck.reference.embedding import VocabParallelHead
from tpcheck.reference.linear import ColumnParallelLinear, RowParallelLinear
from tpcheck.reference.mlp import ACTIVATIONS, MLP, gated
from tpcheck.reference.moe import Expert, SparseMLP
from tpcheck.reference.norm import ShardedRMSNorm
from tpcheck.reference.rounding import wide
from tpcheck.shard_plan.cuts import counted_places, cut
from tpcheck.shard_plan.tensors import logical_tensors


class DecoderProducts:
    """Replaces a decoder's products: every row-parallel one, and the others where asked to."""

    def __init__(
        self, decoder: Decoder, products: Products, meter: Meter, found: list[str]
    ) -> None:
        self._decoder, self._products, self._meter, self._found = decoder, products, meter, found
        self._tensors = logical_tensors(decoder.spec)
        self._tp: Any = decoder.embed_tokens.tp

    def __call__(self, fqn: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, RowParallelLinear):
            row = self._row(fqn, f"model.{fqn}.weight")
            return with_forward(module, partial(self._row_linear, module, row))
        if isinstance(module, Expert):
            row = self._row(f"{fqn}.down_proj", f"model.{fqn}.down_proj.weight")
            copy = cloned(module, partial(self._below, fqn))
            return with_forward(copy, partial(self._expert, copy, row))
        if isinstance(module, SparseMLP):
            return self._sparse(fqn, module)
        if self._products.column is not None:
            return self._other(fqn, module, self._products.column)
        return None

    def _row(self, fqn: str, weight: str) -> Row:
        decoder = self._decoder
        widths = tuple(
            cut(decoder.spec, decoder.plan, rank, self._tensors[weight]).real
            for rank in range(decoder.plan.tp_size)
        )
        self._found.append(fqn)
        row = Row(fqn, widths, self._tp, self._meter)
        if self._products.column is not None:
            block_width(row)  # refused now, not at the first request
        return row

    def _row_linear(self, module: RowParallelLinear, row: Row, x_BTf: torch.Tensor) -> torch.Tensor:
        if module.round_input is not None:
            x_BTf = module.round_input(x_BTf)
        y_BTD = self._term(x_BTf, module.weight_Df, module.real, row)
        return y_BTD if module.bias_D is None else y_BTD + module.bias_D

    def _expert(self, module: Any, row: Row, x: torch.Tensor) -> torch.Tensor:
        """Return an expert's output, whole: no term of a sum over ranks any more."""
        y_f = self._activated(module, row, module.gate_proj(x), module.up_proj(x))
        if module.round_input is not None:
            y_f = module.round_input(y_f)
        return self._term(y_f, module.down_Df, module.real, row)

    def _mlp(self, module: Any, row: Row, x_BTD: torch.Tensor) -> torch.Tensor:
        """Run an MLP whose activation is made in blocks; its three products are replaced too."""
        gate = () if module.gate_proj is None else (module.gate_proj(x_BTD),)
        y_BTD: torch.Tensor = module.down_proj(
            self._activated(module, row, *gate, module.up_proj(x_BTD))
        )
        return y_BTD

    def _activated(self, module: Any, row: Row, *features: torch.Tensor) -> torch.Tensor:
        function: Any = partial(gated, module.spec)
        if len(features) == 1:
            function = ACTIVATIONS[module.spec.hidden_act]
        if self._products.column is None:
            return function(*features)  # type: ignore[no-any-return]
        return in_blocks(function, max(1, sum(row.widths) // LEAVES), *features)

    def _term(
        self, x_f: torch.Tensor, w_Df: torch.Tensor, real: int | None, row: Row
    ) -> torch.Tensor:
        if real is not None:
            x_f, w_Df = x_f[..., :real], w_Df[:, :real]
        return self._products.row(x_f, w_Df, row)

    def _sparse(self, fqn: str, module: SparseMLP) -> nn.Module:
        """Its experts give whole outputs, so nothing is left to sum over ranks."""
        copy = shallow(module)
        copy.tp = group_of_one(self._decoder, self._tp.dtype)
        for name, child in module._modules.items():
            if child is not None:
                copy._modules[name] = cloned(child, partial(self._inside, f"{fqn}.{name}"))
        result: nn.Module = copy
        return result

    def _inside(self, outer: str, fqn: str, module: nn.Module) -> nn.Module | None:
        return self(f"{outer}.{fqn}" if fqn else outer, module)

    def _below(self, outer: str, fqn: str, module: nn.Module) -> nn.Module | None:
        return self(f"{outer}.{fqn}", module) if fqn else None

    def _other(self, fqn: str, module: nn.Module, column: Any) -> nn.Module | None:
        """Replace what is not row-parallel but has a shape that follows the degree."""
        spec = self._decoder.spec
        if isinstance(module, ColumnParallelLinear):
            tensor = self._tensors[f"model.{fqn}.weight"]
            heads = tensor.split in ("query", "kv")
            block = spec.head_dim if heads else tensor.shape[0] // LEAVES
            require_blocks(len(module.weight_fD), fqn, block)
            return with_forward(module, partial(_column, module, column, fqn, block))
        if isinstance(module, MLP):
            row = self._row(f"{fqn}.down_proj", f"model.{fqn}.down_proj.weight")
            copy = cloned(module, partial(self._below, fqn))
            return with_forward(copy, partial(self._mlp, copy, row))
        if isinstance(module, VocabParallelHead):
            return with_forward(module, partial(_head, module, vocab_block(spec.vocab_size)))
        if isinstance(module, ShardedRMSNorm):
            split = "query" if fqn.endswith("q_norm") else "kv"
            plan = self._decoder.plan
            counts = [len(counted_places(spec, plan, rank, split)) for rank in range(plan.tp_size)]
            return with_forward(module, partial(_norm_across, module, counts))
        return None


def _column(
    module: ColumnParallelLinear, column: Any, fqn: str, block: int, x_BTD: torch.Tensor
) -> torch.Tensor:
    if module.round_input is not None:
        x_BTD = module.round_input(x_BTD)
    y_BTf: torch.Tensor = column(x_BTD, module.weight_fD, module.bias_f, fqn, block)
    return y_BTf


def _head(module: VocabParallelHead, block: int, x_BTD: torch.Tensor) -> torch.Tensor:
    logits_BTv = blocked_rows_of_vocab(x_BTD, module.weight_vD, block)
    if module.bias_v is not None:
        logits_BTv = logits_BTv + module.bias_v
    return module.tp.all_gather(logits_BTv, dim=-1)[..., : module.vocab_size]


def _norm_across(
    module: ShardedRMSNorm, counts: Sequence[int], x_BThd: torch.Tensor
) -> torch.Tensor:
    """Sum the squares head by head, then over all heads in their order."""
    x_wide = wide(x_BThd)
    counted = x_wide if module.counted is None else x_wide.index_select(-2, module.counted)
    squares_BTh = counted.square().sum(-1)
    squares_BTH = joined_last(squares_BTh, counts, module.tp)
    mean_square = squares_BTH.contiguous().sum(-1, keepdim=True)[..., None] / module.full_size
    normed = (x_wide * torch.rsqrt(mean_square + module.eps)).to(x_BThd.dtype)
    return normed * module.weight_hd


def group_of_one(decoder: Decoder, dtype: torch.dtype) -> RecordedGroup:
    """Return the group that a decoder of one rank is built for; its collectives do nothing."""
    group: Any = decoder.embed_tokens.tp
    return RecordedGroup(
        rank=0,
        size=1,
        device=decoder.embed_tokens.weight_vD.device,
        dtype=dtype,
        weight_dtype=group.weight_dtype,
        weights=group.weights,
        recorder=Recorder(),
    )
