"""compare: position-exact, masks first, and the smallest tolerance that would have passed."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.comparison import (
    compare,
    describe_region,
    pooled_rms,
    relative,
    scientific,
    worst_comparison,
)
from tpcheck.errors import SubjectError

torch.set_num_threads(1)
inf, nan = math.inf, math.nan


def tensor(*elements: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(elements, dtype=dtype)


def test_equal_tensors_have_no_error_and_need_no_tolerance():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    found = compare(x, x)
    assert (found.count, found.mismatches, found.mask_mismatches) == (12, 0, 0)
    assert (found.relative_rms, found.worst_error, found.worst_ulp) == (0, 0, 0)
    assert found.required_atol == 0


def test_the_worst_element_comes_with_both_values_its_place_and_ulp():
    actual = torch.zeros(2, 3, dtype=torch.bfloat16)
    actual[1, 2] = 1.5
    expected = torch.zeros(2, 3, dtype=torch.float64)
    expected[1, 2] = 1.0
    found = compare(actual, expected)
    assert found.index == (1, 2)
    assert (found.worst_actual, found.worst_expected, found.worst_error) == (1.5, 1.0, 0.5)
    assert found.worst_ulp == 64  # an ulp of bfloat16 at 1 is 2^-7


def test_elements_are_compared_by_position_never_as_a_set():
    found = compare(tensor(1, 2, 3), tensor(3, 2, 1))
    assert found.mismatches == 2
    assert found.relative_rms > 0.7


def test_rms_values_are_those_of_their_definition():
    found = compare(tensor(1, 2, 3, 4), tensor(1, 2, 3, 0))
    assert found.rms_error == 2
    assert found.rms_expected == pytest.approx(math.sqrt(14 / 4))
    assert found.relative_rms == pytest.approx(2 / math.sqrt(14 / 4))


def test_masks_count_by_position_and_kind_and_stay_out_of_every_norm():
    actual = tensor(nan, inf, -inf, nan, 1, inf, 5)
    expected = tensor(nan, inf, -inf, 1, nan, -inf, 4)
    found = compare(actual, expected)
    assert found.mask_mismatches == 3  # NaN for a number, a number for NaN, +inf for -inf
    assert found.count == 1
    assert (found.worst_error, found.rms_error, found.required_atol) == (1, 1, 1)
    assert found.mismatches == 1 + 3
    assert all(map(math.isfinite, (found.relative_rms, found.rms_expected, found.worst_ulp)))


@pytest.mark.parametrize(("rtol", "atol"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.05)])
def test_finite_elements_are_measured_alike_with_and_without_masks_beside_them(rtol, atol):
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(6, 10, generator=generator, dtype=torch.float64)
    actual = expected + 0.1 * torch.randn(6, 10, generator=generator, dtype=torch.float64)
    plain = compare(actual, expected, rtol=rtol, atol=atol)
    row = torch.tensor([[nan, inf, -inf, nan, inf] * 2], dtype=torch.float64)
    masked = compare(torch.cat([actual, row]), torch.cat([expected, row]), rtol=rtol, atol=atol)
    rms = ("rms_error", "rms_expected", "relative_rms")
    alike = {name: pytest.approx(getattr(plain, name), rel=1e-12) for name in rms}
    assert dataclasses.asdict(masked) == dataclasses.asdict(plain) | alike
    assert plain.required_atol == float(((actual - expected).abs() - rtol * expected.abs()).max())
    assert 0 < plain.mismatches <= plain.count == 60


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_nothing_to_compare_is_a_count_of_zero_and_no_error(shape):
    found = compare(torch.zeros(shape), torch.zeros(shape))
    assert (found.count, found.mismatches, found.relative_rms, found.index) == (0, 0, 0, ())


def test_scalars_have_an_empty_index():
    assert compare(torch.tensor(1.0), torch.tensor(2.0)).index == ()


def test_shapes_that_differ_are_an_error_that_names_both():
    with pytest.raises(SubjectError, match=r"shape=\[2, 3\], but should be \[2, 4\] as at TP=1"):
        compare(torch.zeros(2, 3), torch.zeros(2, 4))


def test_shapes_that_would_broadcast_still_differ():
    with pytest.raises(SubjectError):
        compare(torch.zeros(1), torch.zeros(4))


@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1, max_size=8),
    st.floats(0, 0.5),
)
def test_the_required_tolerance_is_the_smallest_that_passes(pairs, rtol):
    actual, expected = (tensor(*side) for side in zip(*pairs, strict=True))
    needed = compare(actual, expected, rtol=rtol).required_atol
    assert compare(actual, expected, rtol=rtol, atol=needed).mismatches == 0
    if needed > 0:
        assert compare(actual, expected, rtol=rtol, atol=needed * (1 - 1e-9)).mismatches > 0


def test_integers_and_half_precision_compare_without_rounding_on_the_way():
    assert compare(torch.tensor([2**40 + 1]), torch.tensor([2**40])).worst_error == 1
    assert compare(tensor(65504, dtype=torch.float16), tensor(65504.0)).worst_error == 0


def test_complex_numbers_are_compared_in_both_halves():
    found = compare(torch.tensor([1 + 2j]), torch.tensor([1 + 3j]))
    assert (found.worst_error, found.worst_actual, found.worst_expected) == (1, 2, 3)


def test_an_error_over_nothing_is_infinitely_large_and_no_error_is_zero():
    assert relative(0.0, 0.0) == 0
    assert relative(1e-30, 0.0) == inf
    assert compare(tensor(1.0), tensor(0.0)).relative_rms == inf


def test_pooling_weighs_every_element_alike():
    pairs = [(tensor(2, 2, 2), tensor(1, 1, 1)), (tensor(1, nan), tensor(1, 1))]
    error, magnitude, count = pooled_rms(pairs)
    assert count == 4
    assert error == pytest.approx(math.sqrt(3 / 4))
    assert magnitude == 1
    assert pooled_rms([]) == (0, 0, 0)


def test_a_mask_that_differs_is_worse_than_any_error():
    small = compare(tensor(nan, 1), tensor(1, 1))
    large = compare(tensor(9, 9), tensor(1, 1))
    assert worst_comparison({"a": large, "b": small})[0] == "b"
    assert worst_comparison({"a": large, "b": compare(tensor(1), tensor(1))})[0] == "a"


@pytest.mark.parametrize(
    ("places", "text"),
    [
        ([], ""),
        ([(0, 5, 2)], "[0, 5, 2]"),
        ([(0, 5, 2), (0, 5, 4)], "[0, 5, 2:5]"),
        ([(1, 0, 0), (2, 3, 0)], "[1:3, 0:4, 0]"),
    ],
)
def test_a_region_is_the_smallest_box_round_its_elements(places, text):
    bad = torch.zeros(4, 8, 8, dtype=torch.bool)
    for place in places:
        bad[place] = True
    assert describe_region(bad) == text


def test_a_scalars_region():
    assert describe_region(torch.tensor(True)) == "[]"


@pytest.mark.parametrize(
    ("value", "text", "up"),
    [
        (0.01, "1e-2", "1e-2"),
        (0.03125, "3.1e-2", "3.2e-2"),
        (0.0999, "1e-1", "1e-1"),
        (1.0, "1e0", "1e0"),
        (65504.0, "6.6e4", "6.6e4"),
        (12.01, "1.2e1", "1.3e1"),
        (0.0, "0", "0"),
    ],
)
def test_tolerances_are_written_as_people_write_them(value, text, up):
    assert scientific(value) == text
    assert scientific(value, up=True) == up


@given(st.floats(1e-12, 1e12))
def test_a_tolerance_rounded_up_passes_when_it_is_pasted(value):
    assert float(scientific(value, up=True)) >= value * (1 - 1e-8)
