"""The layers that the properties are about, as subjects: small, sharded the way engines do it.

T tokens, D in features, F out features; capital = whole, lower case = this rank's part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

import tpcheck
from tests.reference_jobs import poison_pads
from tpcheck.pytest_plugin import tp_degrees
from tpcheck.reference.decoder import build_decoder
from tpcheck.shard_plan import STRICT, SplitPolicy
from tpcheck.spec import ModelSpec
from tpcheck.strategies import model_specs

Build = Callable[[tpcheck.TPGroup], Any]


@st.composite
def specs_at_a_degree(draw: st.DrawFn, **pins: Any) -> tuple[ModelSpec, int]:
    """A spec and a degree of --tp at which it is legal."""
    tp_size = draw(tp_degrees())
    return draw(model_specs(tp_size, legal=True, **pins)), tp_size


def decoder(spec: ModelSpec, seq_len: int = 5) -> Build:
    """The reference decoder of a spec."""

    @tpcheck.subject(spec=spec, seq_len=min(seq_len, spec.max_position_embeddings))
    def build(tp):
        return build_decoder(spec, tp)

    return build


def integers(features: int, largest: int = 3) -> Callable[..., torch.Tensor]:
    """Inputs that are small whole numbers: every sum of theirs is exact in every dtype used."""

    def make(generator: torch.Generator, batch: int, seq_len: int) -> torch.Tensor:
        shape = (batch, seq_len, features)
        return torch.randint(-largest, largest + 1, shape, generator=generator).float()

    return make


def normals(features: int) -> Callable[..., torch.Tensor]:
    """Standard normal inputs."""

    def make(generator: torch.Generator, batch: int, seq_len: int) -> torch.Tensor:
        return torch.randn((batch, seq_len, features), generator=generator)

    return make


def whole_numbers(weight: torch.Tensor) -> torch.Tensor:
    """A drawn weight as one of -1, 0, 1: exact in every dtype."""
    return weight.double().mul(1e3).round().remainder(3).sub(1).to(weight.dtype)


def linear_inputs(features: int, exact: bool) -> Callable[..., torch.Tensor]:
    """Inputs of a linear layer: whole numbers where its result must be exact."""
    return (integers if exact else normals)(features)


def whole_linear(
    tp: tpcheck.TPGroup, whole_F: int, whole_D: int, bias: bool, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """w_FD and b_F as every rank draws them, before any is cut."""
    w_FD = tp.weight("w", whole_F, whole_D)
    b_F = tp.weight("b", whole_F) if bias else torch.zeros(whole_F, dtype=tp.dtype)
    return (whole_numbers(w_FD), whole_numbers(b_F)) if exact else (w_FD, b_F)


def column_linear(
    features: int, per_rank: int, bias: bool, exact: bool = False, seq_len: int = 3
) -> Callable[[int], Build]:
    """y_TF = x_TD @ w_FD.T + b_F with F = per_rank * tp_size split over ranks, then gathered."""

    def at(tp_size: int) -> Build:
        whole_F = per_rank * tp_size

        @tpcheck.subject(inputs=linear_inputs(features, exact), seq_len=seq_len)
        def build(tp):
            w_FD, b_F = whole_linear(tp, whole_F, features, bias, exact)
            w_fD, b_f = w_FD.chunk(tp.size)[tp.rank], b_F.chunk(tp.size)[tp.rank]
            return lambda x_TD: tp.all_gather(F.linear(x_TD, w_fD, b_f), -1)

        return build

    return at


def row_linear(
    per_rank: int, features: int, bias: bool, exact: bool = False, seq_len: int = 3
) -> Callable[[int], Build]:
    """y_TF = x_TD @ w_FD.T + b_F with D = per_rank * tp_size split over ranks, then reduced."""

    def at(tp_size: int) -> Build:
        whole_D = per_rank * tp_size

        @tpcheck.subject(inputs=linear_inputs(whole_D, exact), seq_len=seq_len)
        def build(tp):
            w_FD, b_F = whole_linear(tp, features, whole_D, bias, exact)
            w_Fd = w_FD.chunk(tp.size, 1)[tp.rank]

            def forward(x_TD):
                y_TF_partial = F.linear(x_TD.chunk(tp.size, -1)[tp.rank], w_Fd)
                return tp.all_reduce(y_TF_partial) + b_F

            return forward

        return build

    return at


def uneven_row_linear(whole_D: int, features: int, exact: bool = False, seq_len: int = 3) -> Build:
    """A row-parallel linear whose D need not divide: some ranks hold a column less, or none."""

    @tpcheck.subject(inputs=linear_inputs(whole_D, exact), seq_len=seq_len)
    def build(tp):
        w_FD, _ = whole_linear(tp, features, whole_D, bias=False, exact=exact)
        w_Fd = w_FD.tensor_split(tp.size, 1)[tp.rank]

        def forward(x_TD):
            x_Td = x_TD.tensor_split(tp.size, -1)[tp.rank]
            return tp.all_reduce(F.linear(x_Td, w_Fd))

        return forward

    return build


def build_on_a_rank(world: Any, build: Build) -> None:
    """A job: build on one rank and nothing else."""
    build(world.group(seed=0, dtype=torch.float64, weight_dtype=torch.float32))


def split_decoder(
    spec: ModelSpec, policy: SplitPolicy, seq_len: int = 3, poison: float | None = None
) -> Build:
    """The reference decoder of a spec, split by a policy at TP > 1; `poison` fills all its pads."""

    @tpcheck.subject(vocab_size=spec.vocab_size, seq_len=min(seq_len, spec.max_position_embeddings))
    def build(tp):
        model = build_decoder(spec, tp, policy=policy if tp.size > 1 else STRICT)
        if poison is not None:
            poison_pads(model, poison)
        return model

    return build
