"""The emulated reductions, against element-by-element loops and against what must be exact.

tests/real/test_gloo_bits.py holds the ring against real Gloo; here the classes are held against
their definitions, on every path of the implementation.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tpcheck.numerics.reduction as reduction
from tpcheck.numerics.low_precision import LOW_PRECISION
from tpcheck.numerics.reduction import KINDS, reduce, reduce_sum, ring_chunk, sum_nodes

ELEMENTWISE = tuple(kind for kind in KINDS if kind not in LOW_PRECISION)
"""The others cut blocks: tests/unit/test_low_precision.py."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def draw(world: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(world)]


def ring_order(index: int, chunk: int, world: int) -> list[int]:
    """Return the ranks in the order in which Gloo adds this element."""
    c = index // chunk
    return [(c - 1 - k) % world for k in range(world)]


def ring_by_element(tensors: list[Tensor]) -> Tensor:
    flat = [x.reshape(-1) for x in tensors]
    chunk = ring_chunk(flat[0].numel(), flat[0].element_size(), len(flat))
    out = []
    for i in range(flat[0].numel()):
        first, *rest = ring_order(i, chunk, len(flat))
        total = flat[first][i]
        for rank in rest:
            total = total + flat[rank][i]
        out.append(total)
    return torch.stack(out).view(tensors[0].shape)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8, 9])
def test_ring_adds_in_gloos_order(world, dtype):
    for shape in [(1,), (2,), (7,), (16,), (3, 17), (2, 5, 11)]:
        tensors = draw(world, shape, dtype)
        expected = ring_by_element(tensors) if world > 1 else tensors[0]
        assert torch.equal(reduce_sum(tensors), expected), shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_copying_and_slicing_paths_agree(dtype, monkeypatch):
    for world, size in [(3, 1001), (4, 4096), (8, 100_003), (64, 999)]:
        tensors = draw(world, (size,), dtype)
        monkeypatch.setattr(reduction, "_ROTATED_CHUNK_BYTES", 1 << 40)
        monkeypatch.setattr(reduction, "_ROTATED_BYTES", 1 << 40)
        copied = reduce_sum(tensors)
        monkeypatch.setattr(reduction, "_ROTATED_CHUNK_BYTES", 0)
        sliced = reduce_sum(tensors)
        assert torch.equal(copied, sliced), (world, size)


@pytest.mark.parametrize(
    ("count", "element_size", "world", "chunk"),
    [
        (1, 2, 8, 2),
        (64, 2, 8, 8),
        (100, 4, 3, 34),
        (2**20, 2, 4, 2**18),
        (2**21 + 13, 2, 4, 2 * 262146),
        (2**22, 4, 3, 6 * 233017),
    ],
)
def test_ring_chunk_is_a_whole_number_of_segments(count, element_size, world, chunk):
    assert ring_chunk(count, element_size, world) == chunk
    assert chunk * world >= count


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tree_rounds_every_pair(dtype):
    a, b, c, d, e = draw(5, (64,), dtype)
    assert torch.equal(reduce_sum([a, b, c, d], "tree"), (a + b) + (c + d))
    assert torch.equal(reduce_sum([a, b, c, d, e], "tree"), ((a + b) + (c + d)) + e)
    assert torch.equal(reduce_sum([a, b, c], "tree"), (a + b) + c)
    assert torch.equal(reduce_sum([a], "tree"), a)


@pytest.mark.parametrize("dtype", FLOATS)
def test_wide_rounds_once_in_rank_order(dtype):
    tensors = draw(7, (64,), dtype)
    wide = torch.float32 if dtype.itemsize == 2 else torch.float64
    total = tensors[0].to(wide)
    for x in tensors[1:]:
        total = total + x.to(wide)
    assert torch.equal(reduce_sum(tensors, "wide"), total.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_fp32_wire_is_a_float32_ring_rounded_once(dtype):
    tensors = draw(5, (64,), dtype)
    wire = torch.float64 if dtype == torch.float64 else torch.float32
    expected = reduce_sum([x.to(wire) for x in tensors], "ring").to(dtype)
    assert torch.equal(reduce_sum(tensors, "fp32_wire"), expected)


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32, torch.int64, torch.uint8])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_small_whole_numbers_are_exact_in_every_kind(kind, dtype, data):
    world = data.draw(st.integers(1, 9))
    size = data.draw(st.integers(0, 40))
    low = 0 if dtype == torch.uint8 else -14
    numbers = st.lists(st.integers(low, 14), min_size=size, max_size=size)
    rows = [data.draw(numbers) for _ in range(world)]
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    expected = torch.tensor([sum(column) for column in zip(*rows, strict=True)], dtype=dtype)
    actual = reduce_sum(tensors, kind)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 7)])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_result_is_a_new_contiguous_tensor_of_the_operands_shape(kind, shape, world):
    tensors = draw(world, shape, torch.bfloat16)
    before = [x.clone() for x in tensors]
    for op in ("sum", "avg", "max", "min"):
        result = reduce(tensors, op, kind)
        assert result.shape == shape
        assert result.dtype == torch.bfloat16
        assert result.is_contiguous()
        assert result.untyped_storage().nbytes() == result.nbytes
        result.fill_(7)
        assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind):
    tensors = draw(4, (6, 10), torch.bfloat16)
    strided = [x.t().contiguous().t() for x in tensors]
    assert not strided[0].is_contiguous()
    assert torch.equal(reduce_sum(strided, kind), reduce_sum(tensors, kind))
    assert reduce_sum(strided, kind).is_contiguous()
    images = draw(4, (2, 3, 4, 5), torch.bfloat16)
    channels_last = [x.contiguous(memory_format=torch.channels_last) for x in images]
    for some in (channels_last, [images[0], *channels_last[1:]]):
        assert torch.equal(reduce_sum(some, kind), reduce_sum(images, kind))
        assert reduce_sum(some, kind).is_contiguous()


def test_max_and_min_are_elementwise_on_finite_values():
    tensors = draw(5, (33,), torch.float32)
    assert torch.equal(reduce(tensors, "max"), torch.stack(tensors).amax(0))
    assert torch.equal(reduce(tensors, "min", "wide"), torch.stack(tensors).amin(0))


def test_avg_is_the_rounded_sum_divided():
    tensors = draw(6, (33,), torch.float16)
    assert torch.equal(reduce(tensors, "avg", "tree"), reduce_sum(tensors, "tree") / 6)


def test_avg_truncates_whole_numbers_as_real_ranks_do():
    tensors = [torch.tensor([-7, -1, 1, 7]), torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 1, 1])]
    assert reduce(tensors, "avg").tolist() == [-2, 0, 0, 2]


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_nan_and_infinity_stay_in_their_place(kind):
    tensors = draw(4, (50,), torch.float16)
    tensors[2][7] = math.nan
    tensors[0][9] = math.inf
    tensors[1][11], tensors[3][11] = math.inf, -math.inf
    result = reduce_sum(tensors, kind)
    assert result.isnan().nonzero().flatten().tolist() == [7, 11]
    assert result.isinf().nonzero().flatten().tolist() == [9]


def test_float16_overflows_at_a_partial_sum_only_where_it_is_rounded():
    tensors = [torch.full((4,), v, dtype=torch.float16) for v in (60000.0, 60000.0, -60000.0)]
    assert reduce_sum(tensors, "tree").isinf().all()
    assert torch.equal(reduce_sum(tensors, "wide"), tensors[0])
    assert torch.equal(reduce_sum(tensors, "fp32_wire"), tensors[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_ring_nodes_are_the_partial_sums_of_each_elements_order(world, dtype):
    tensors = draw(world, (5, 11), dtype)
    nodes = sum_nodes(tensors)
    assert len(nodes) == world - 1
    assert all(node.dtype == torch.float64 and node.shape == (5, 11) for node in nodes)
    flat = [x.double().reshape(-1) for x in tensors]
    chunk = ring_chunk(55, tensors[0].element_size(), world)
    for i in range(55):
        order = ring_order(i, chunk, world)
        for k, node in enumerate(nodes):
            expected = sum(flat[rank][i].item() for rank in order[: k + 2])
            assert node.reshape(-1)[i].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("kind", "count"), [("tree", 6), ("wide", 1), ("fp32_wire", 1)])
def test_nodes_are_where_the_kind_rounds(kind, count):
    tensors = draw(7, (9,), torch.bfloat16)
    nodes = sum_nodes(tensors, kind)
    assert len(nodes) == count
    torch.testing.assert_close(nodes[-1], torch.stack(tensors).double().sum(0))


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("world", [4, 8])
def test_nodes_predict_the_error_of_the_emulation(kind, world):
    generator = torch.Generator().manual_seed(world)
    exact = [torch.randn(1 << 15, generator=generator, dtype=torch.float64) for _ in range(world)]
    dtype = torch.float64 if kind == "fp32_wire" else torch.bfloat16
    total = torch.stack(exact).sum(0)
    unit = (total.bfloat16().double() - total).square().mean()
    if kind == "fp32_wire":
        actual = reduce_sum([x.float() for x in exact], kind).bfloat16()
        terms = sum_nodes([x.float() for x in exact], kind)
    else:
        actual = reduce_sum([x.to(dtype) for x in exact], kind)
        terms = exact + sum_nodes([x.to(dtype) for x in exact], kind)
    measured = ((actual.double() - total).square().mean() / unit).sqrt().item()
    law = (sum(t.square().mean() for t in terms) / total.square().mean()).sqrt().item()
    assert measured == pytest.approx(law, rel=0.12)


def test_unknown_names_are_refused():
    tensors = draw(2, (3,), torch.float32)
    with pytest.raises(ValueError, match="reduction kind='star', but should be one of ring, tree"):
        reduce_sum(tensors, "star")
    with pytest.raises(ValueError, match="reduction kind='star'"):
        reduce(tensors, "max", "star")
    with pytest.raises(ValueError, match="reduction kind='star'"):
        sum_nodes(tensors, "star")
    with pytest.raises(ValueError, match="op='prod', but should be sum, avg, max or min"):
        reduce(tensors, "prod")
