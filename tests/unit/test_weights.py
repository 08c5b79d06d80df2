"""Weights: a function of (seed, name), made once, shared, and owned by whoever asks."""

import math
import multiprocessing
import os

import pytest
import torch

from tests.groups import single_group
from tpcheck.errors import SubjectError
from tpcheck.groups import weights
from tpcheck.groups.weights import FileStore, MemoryStore, WeightSource

torch.set_num_threads(1)


def source(store=None, **fields):
    fields = {"seed": 0, "dtype": torch.float64, "weight_dtype": torch.bfloat16} | fields
    return WeightSource(store=store or MemoryStore(), **fields)


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else FileStore(tmp_path)


def test_values_depend_on_seed_and_name_and_nothing_else(store):
    first = source(store).weight("w", (4, 8))
    assert torch.equal(first, source().weight("w", (4, 8)))
    assert torch.equal(first, source(dtype=torch.float32).weight("w", (4, 8)).double())
    assert not torch.equal(first, source(store, seed=1).weight("w", (4, 8)))
    assert not torch.equal(first, source(store).weight("v", (4, 8)))


def test_values_do_not_depend_on_what_was_asked_before_or_on_the_global_generator(store):
    weights = source(store)
    weights.weight("other", (100,))
    torch.manual_seed(123)
    assert torch.equal(weights.weight("w", (4, 8)), source().weight("w", (4, 8)))


def test_values_never_change_from_one_version_to_the_next():
    # A golden or a case id would mean something else.
    found = source(weight_dtype=torch.float32).weight("mlp.up.weight", (2, 2), std=1.0)
    assert [round(float(x), 4) for x in found.flatten()] == [0.0422, 0.3699, 0.1274, 1.1137]


@pytest.mark.parametrize(
    ("shape", "std"), [((20_000,), 0.5), ((200, 100), 0.1), ((10, 20, 100), 0.1), ((1, 1), 1.0)]
)
def test_std_is_one_over_the_root_of_the_last_dim_and_a_half_for_vectors(shape, std):
    found = source().weight("w", shape)
    if found.numel() > 1:
        assert float(found.std()) == pytest.approx(std, rel=0.03)
        assert abs(float(found.mean())) < 4 * std / math.sqrt(found.numel())
    assert found.count_nonzero() == found.numel()


def test_a_given_std_scales(store):
    unit = source(store, weight_dtype=torch.float32).weight("w", (64, 64), std=1.0)
    small = source(store, weight_dtype=torch.float32).weight("w", (64, 64), std=0.25)
    assert torch.equal(small, unit / 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_are_rounded_to_storage_then_cast(store, dtype):
    found = source(store, dtype=dtype).weight("w", (16, 16))
    assert found.dtype == dtype
    assert torch.equal(found, found.bfloat16().to(dtype))
    wide = source(store, dtype=dtype).weight("v", (16, 16), dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, wide.bfloat16().float())


def test_the_oracle_sees_the_weights_of_the_deployed_run(store):
    exact = source(store, dtype=torch.float64).weight("w", (16, 16))
    deployed = source(store, dtype=torch.bfloat16).weight("w", (16, 16))
    assert torch.equal(exact, deployed.double())


@pytest.mark.parametrize(
    ("again", "message"),
    [
        (
            {"shape": (4, 9)},
            "weight 'w': asked with shape, std, dtype = [4, 9], None, None, but was asked before"
            " with [4, 8], None, None; give each tensor its own name",
        ),
        (
            {"shape": (4, 8), "std": 0.1},
            "weight 'w': asked with shape, std, dtype = [4, 8], 0.1, None, but was asked before"
            " with [4, 8], None, None; give each tensor its own name",
        ),
        (
            {"shape": (4, 8), "dtype": torch.float32},
            "weight 'w': asked with shape, std, dtype = [4, 8], None, torch.float32, but was asked"
            " before with [4, 8], None, None; give each tensor its own name",
        ),
    ],
)
def test_one_name_is_one_tensor(again, message):
    weights = source()
    weights.weight("w", (4, 8))
    weights.weight("w", (4, 8))
    with pytest.raises(SubjectError) as error:
        weights.weight("w", again.pop("shape"), **again)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("shape", "options", "phrase"),
    [
        ((4, -1), {}, r"shape=\(4, -1\), but should be whole sizes >= 0"),
        ((4, 2.5), {}, "but should be whole sizes >= 0"),
        ((4,), {"std": 0.0}, "std=0.0, but should be a positive number"),
        ((4,), {"std": math.nan}, "std=nan, but should be a positive number"),
        ((4,), {"dtype": torch.int8}, "dtype=torch.int8, but should be a floating dtype"),
    ],
)
def test_impossible_weights_are_named(shape, options, phrase):
    with pytest.raises(SubjectError, match=f"weight 'w': .*{phrase}"):
        source().weight("w", shape, **options)


def test_a_shape_may_come_as_one_tuple():
    group = single_group()
    assert torch.equal(group.weight("w", (3, 4)), group.weight("w", 3, 4))
    assert group.weight("s").shape == ()


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_empty_and_scalar_weights(store, shape):
    assert source(store).weight("w", shape).shape == shape


def test_whoever_asks_owns_what_it_gets(store):
    weights = source(store)
    first = weights.weight("w", (64, 64))
    kept = first.clone()
    first.zero_()
    assert torch.equal(weights.weight("w", (64, 64)), kept)
    view = weights.weight("w", (64, 64)).chunk(2)[0]
    view.add_(1)
    assert torch.equal(weights.weight("w", (64, 64)), kept)


def test_a_shared_tensor_is_made_once(store):
    made = []

    def make():
        made.append(1)
        return torch.ones(8)

    assert all(torch.equal(store.get("k", make), torch.ones(8)) for _ in range(3))
    assert len(made) == 1


def test_memory_is_bounded_by_dropping_the_oldest():
    store = MemoryStore(max_bytes=4 * 8 * 2)
    made = []
    for key in ("a", "b", "c", "c", "b", "a"):
        store.get(key, lambda key=key: made.append(key) or torch.zeros(8))
    assert made == ["a", "b", "c", "a"]


def test_files_are_trimmed_oldest_first_and_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_SMALL_BYTES", 0)  # a rank keeps small ones of its own
    store = FileStore(tmp_path)
    kept = {key: store.get(key, lambda key=key: torch.full((8,), float(ord(key)))) for key in "ab"}
    for age, path in enumerate(sorted(tmp_path.glob("*.data"))):
        os.utime(path, (age, age))
    store.trim(max_bytes=32)
    assert len(list(tmp_path.glob("*.data"))) == 1
    store.trim(max_bytes=0)
    assert list(tmp_path.iterdir()) == []
    assert [float(kept[key][0]) for key in "ab"] == [97.0, 98.0]  # what was handed out lives on
    assert float(store.get("a", lambda: torch.full((8,), 5.0))[0]) == 5


def test_a_rank_keeps_small_tensors_and_hands_out_ones_that_may_be_written_to(tmp_path):
    store = FileStore(tmp_path)
    store.get("a", lambda: torch.ones(4)).zero_()
    for path in tmp_path.iterdir():
        path.unlink()
    again = store.get("a", lambda: pytest.fail("made twice"))
    assert torch.equal(again, torch.ones(4))


def test_a_rank_keeps_no_large_tensor_and_few_small_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_SMALL_BYTES", 16)
    monkeypatch.setattr(weights, "_NEAR_BYTES", 32)
    store = FileStore(tmp_path)
    sizes = {"large": 5, "a": 4, "b": 4, "c": 4}
    for key, size in sizes.items():
        store.get(key, lambda size=size: torch.ones(size))
    store.trim(max_bytes=0)
    again = {
        key: store.get(key, lambda key=key: torch.zeros(sizes[key])) for key in ("c", "large", "a")
    }
    assert {key: float(x.sum()) for key, x in again.items()} == {"c": 4, "large": 0, "a": 0}


def test_a_disk_that_cannot_be_written_costs_sharing_only(tmp_path):
    store = FileStore(tmp_path / "gone")
    assert torch.equal(store.get("k", lambda: torch.ones(3)), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_files_keep_every_bit_dtype_and_shape(tmp_path, dtype):
    x = (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    FileStore(tmp_path).get("k", lambda: x)
    again = FileStore(tmp_path).get("k", lambda: pytest.fail("made twice"))
    assert again.dtype == dtype
    assert torch.equal(again, x)


def _rank(directory, start, results):
    def make():
        return torch.randn(1 << 16)  # every process draws its own, so a second make would show

    torch.set_num_threads(1)  # a fork of a process that computed on several has none of the others
    torch.manual_seed(os.getpid())
    start.wait()
    mine = FileStore(directory).get("w", make)
    total = float(mine.double().sum())
    mine.zero_()
    results.put(total)


def test_processes_share_one_tensor_and_none_sees_anothers_writes(tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    ranks = [context.Process(target=_rank, args=(tmp_path, start, results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    totals = {results.get(timeout=30) for _ in ranks}
    for rank in ranks:
        rank.join(30)
    assert len(totals) == 1
    after = FileStore(tmp_path).get("w", lambda: pytest.fail("made again"))
    assert float(after.double().sum()) in totals


def test_large_tensors_are_shared_copy_on_write_in_one_process():
    store = MemoryStore()
    first = store.get("w", lambda: torch.zeros(1 << 20))
    second = store.get("w", lambda: torch.zeros(1))
    shared = torch._C._data_address(first) == torch._C._data_address(second)
    assert shared or not hasattr(first, "_lazy_clone")
    first[0] = 1
    assert second[0] == 0
