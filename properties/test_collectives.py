"""What collectives promise whatever they carry: slicing commutes, order of whole numbers does not
matter, pieces come back where they were."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import tpcheck
from properties.layers import integers
from tpcheck.numerics.low_precision import LOW_PRECISION
from tpcheck.numerics.reduction import KINDS, reduce
from tpcheck.pytest_plugin import tp_degrees
from tpcheck.strategies import dtypes

SIZES = st.integers(1, 40)


@given(tp_degrees(), SIZES, st.data(), dtypes())
def test_all_reduce_commutes_with_slicing(tp_check, tp_size, features, data, dtype):
    start = data.draw(st.integers(0, features - 1), label="start")
    stop = data.draw(st.integers(start + 1, features), label="stop")

    def subject_that(slices_first):
        @tpcheck.subject(inputs=integers(features), seq_len=3)
        def build(tp):
            def forward(x):
                mine = x * tp.rank  # whole numbers, another one on every rank
                if slices_first:
                    return tp.all_reduce(mine[..., start:stop])
                return tp.all_reduce(mine)[..., start:stop]

            # sum over ranks of rank * x is x * size(size-1)/2: what TP=1 has to return as well
            total = tp_size * (tp_size - 1) // 2
            return forward if tp.size > 1 else lambda x: (x * total)[..., start:stop]

        return build

    for slices_first in (True, False):
        tp_check(
            subject_that(slices_first), tp_sizes=(tp_size,), dtypes=(dtype,), atol=0.0, rtol=0.0
        )


@given(tp_degrees(), SIZES, st.integers(0, 2**31))
def test_whole_numbers_sum_to_the_same_bits_in_any_order_of_reduction(tp_size, count, seed):
    generator = torch.Generator().manual_seed(seed)
    ranks = [torch.randint(-8, 9, (count,), generator=generator) for _ in range(tp_size)]
    expected = sum(ranks)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for kind in (kind for kind in KINDS if kind not in LOW_PRECISION):
            total = reduce([x.to(dtype) for x in ranks], "sum", kind)
            assert total.dtype == dtype
            assert torch.equal(total.long(), expected), (dtype, kind)


@given(tp_degrees(), st.integers(1, 6), st.integers(0, 2), dtypes())
def test_gather_scatter_and_exchange_put_every_piece_back(tp_check, tp_size, pieces, dim, dtype):
    sizes = [2, 3, 4]
    sizes[dim] = pieces * tp_size

    def inputs(generator):
        return torch.randint(-8, 9, sizes, generator=generator).float()

    @tpcheck.subject(inputs=inputs, seq_len=1)
    def build(tp):
        def forward(x):
            mine = x.chunk(tp.size, dim)[tp.rank]
            gathered = tp.all_gather(mine, dim)
            scattered = tp.all_gather(tp.reduce_scatter(x, dim), dim) / tp.size
            other = (dim + 1) % 3
            there = tp.all_to_all(gathered, dim, other)
            back = tp.all_to_all(there, other, dim)
            sent = tp.broadcast(x * (tp.rank + 1), tp.size - 1) / tp.size
            return torch.stack([gathered, scattered, back, sent])

        return forward

    tp_check(build, tp_sizes=(tp_size,), dtypes=("float32",), atol=0.0, rtol=0.0)
    tp_check(build, tp_sizes=(tp_size,), dtypes=(dtype,))
