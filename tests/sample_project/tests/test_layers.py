"""Properties of the layers. `pytest --tp 8` proves them at degrees 2 to 8."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import RowParallel, WrongRowParallel

import tpcheck
from tpcheck.pytest_plugin import tp_degrees

SIZES = st.integers(1, 24)


def subject_of(layer, in_features, out_features):
    def inputs(generator, batch, seq):
        return torch.randn(batch, seq, in_features, generator=generator)

    @tpcheck.subject(inputs=inputs, seq_len=4)
    def build(tp):
        return layer(tp, in_features, out_features)

    return build


@given(tp_size=tp_degrees(), per_rank=SIZES, out_features=SIZES)
def test_row_parallel(tp_check, tp_size, per_rank, out_features):
    tp_check(subject_of(RowParallel, per_rank * tp_size, out_features), tp_sizes=(tp_size,))


@given(tp_size=tp_degrees(), per_rank=SIZES, out_features=SIZES)
def test_wrong_row_parallel(tp_check, tp_size, per_rank, out_features):
    tp_check(subject_of(WrongRowParallel, per_rank * tp_size, out_features), tp_sizes=(tp_size,))
