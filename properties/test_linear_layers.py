"""Column-parallel then gather, and row-parallel then reduce, equal the whole layer."""

from hypothesis import given
from hypothesis import strategies as st

from properties.layers import column_linear, row_linear, uneven_row_linear
from tpcheck.pytest_plugin import tp_degrees
from tpcheck.strategies import dtypes

SIZES = st.integers(1, 33)


@given(tp_degrees(), SIZES, SIZES, st.booleans(), st.integers(1, 9))
def test_column_parallel_then_gather_is_the_whole_layer(
    tp_check, tp_size, features, per_rank, bias, seq_len
):
    build = column_linear(features, per_rank, bias, seq_len=seq_len)(tp_size)
    tp_check(build, tp_sizes=(tp_size,))


@given(tp_degrees(), SIZES, SIZES, st.booleans(), st.integers(1, 9))
def test_row_parallel_then_reduce_is_the_whole_layer(
    tp_check, tp_size, per_rank, features, bias, seq_len
):
    build = row_linear(per_rank, features, bias, seq_len=seq_len)(tp_size)
    tp_check(build, tp_sizes=(tp_size,))


@given(tp_degrees(), SIZES, SIZES)
def test_an_uneven_row_split_is_the_whole_layer_and_so_is_the_even_one_beside_it(
    tp_check, tp_size, whole_D, features
):
    even_D = -(-whole_D // tp_size) * tp_size
    tp_check(uneven_row_linear(even_D, features), tp_sizes=(tp_size,))
    tp_check(uneven_row_linear(whole_D, features), tp_sizes=(tp_size,))


@given(tp_degrees(), SIZES, SIZES, st.booleans(), dtypes())
def test_whole_numbers_make_a_column_parallel_layer_bitwise_equal(
    tp_check, tp_size, features, per_rank, bias, dtype
):
    build = column_linear(features, per_rank, bias, exact=True)(tp_size)
    tp_check(build, tp_sizes=(tp_size,), dtypes=(dtype,), atol=0.0, rtol=0.0)


@given(tp_degrees(), SIZES, SIZES, dtypes())
def test_whole_numbers_make_a_row_parallel_layer_bitwise_equal(
    tp_check, tp_size, whole_D, features, dtype
):
    build = uneven_row_linear(whole_D, features, exact=True)
    tp_check(build, tp_sizes=(tp_size,), dtypes=(dtype,), atol=0.0, rtol=0.0)
