"""The warm pool: same ranks for every job, the job's ranks as the world, results as they were."""

import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tpcheck.errors import BackendError, SubjectError
from tpcheck.groups import pool as pools
from tpcheck.groups import wire, worker
from tpcheck.groups.jobs import Job
from tpcheck.groups.pool import RankPool
from tpcheck.groups.simulated import SimulatedRanks

torch.set_num_threads(1)
sys.path.append(str(Path(__file__).parents[1] / "chaos"))


def job(function, payload=None, size=2):
    return Job(f"chaos_jobs:{function}", payload, size, 60.0)


@pytest.fixture(scope="module")
def pool():
    with RankPool(4) as pool:
        yield pool


def replies(pool, *args, **fields):
    (result,) = pool.run([job(*args, **fields)])
    assert result.failure is None, result.failure
    return result.replies


def tensors():
    base = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    yield from (base.to(dtype) for dtype in dtypes)
    yield from (base.to(torch.float8_e5m2), base > 0, (base * 50).to(torch.int8), base.long())
    yield from (base.t(), base[:, ::2], base[0, 0], base[:0], torch.complex(base, base).conj())


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    plain = (t.resolve_conj().contiguous().view(-1).view(torch.uint8) for t in (actual, expected))
    assert torch.equal(*plain)


def test_tensors_survive_the_wire_bit_for_bit_and_are_writable():
    sent = list(tensors())
    received = wire.unpack(wire.pack(sent))
    for actual, expected in zip(received, sent, strict=True):
        assert_same(actual, expected)
        actual.view(torch.uint8 if actual.element_size() == 1 else actual.dtype).zero_()


@pytest.mark.parametrize(
    ("cores", "size", "expected"),
    [
        ((0, 1), 4, [{0}, {0}, {1}, {1}]),
        ((4, 6, 7), 6, [{4}, {4}, {6}, {6}, {7}, {7}]),
        ((0,), 2, [{0}, {0}]),
        ((0, 1), 2, [{0, 1}] * 2),
        ((0, 1), 3, [{0, 1}] * 3),
        ((), 4, [None] * 4),
    ],
)
def test_neighbours_share_a_core_where_every_core_gets_as_many(cores, size, expected, monkeypatch):
    set_to = {}
    monkeypatch.setattr(os, "sched_setaffinity", lambda task, mine: set_to.update({task: mine}))
    found = []
    for rank in range(size):
        set_to.clear()
        worker._share_cores(cores, rank, size)
        found.append(set_to.get(threading.get_native_id()))
    assert found == expected


def test_a_rank_alone_may_use_every_core_again(pool):
    cores = os.sched_getaffinity(0)
    (own,) = replies(pool, "affinity", size=1)
    assert own == cores
    if 4 > len(cores) and 4 % len(cores) == 0:
        crowded = replies(pool, "affinity", size=4)
        assert [len(own) for own in crowded] == [1] * 4
        assert set().union(*crowded) == cores
    assert replies(pool, "affinity", size=1) == (cores,)


class Narrow:
    """A socket that takes at most so many bytes at a time."""

    def __init__(self, most):
        self.most, self.taken, self.calls = most, bytearray(), 0

    def sendmsg(self, pieces):
        took = b"".join(pieces)[: self.most]
        self.taken += took
        self.calls += 1
        return len(took)


@pytest.mark.parametrize("most", [1, 7, 8, 9, 64, 100, 1 << 20])
def test_a_frame_arrives_whole_however_little_the_socket_takes_at_once(most):
    sent = list(tensors())
    sock = Narrow(most)
    wire.send(sock, sent)
    for actual, expected in zip(wire.unpack(sock.taken[8:]), sent, strict=True):
        assert_same(actual, expected)
    assert sock.calls == -(-len(sock.taken) // most)  # one system call where it takes all


def test_a_frame_of_more_pieces_than_one_call_takes_arrives_whole():
    sent = [torch.tensor([float(n)]) for n in range(1000)]
    sock = Narrow(1 << 20)
    wire.send(sock, sent)
    assert torch.equal(torch.cat(wire.unpack(sock.taken[8:])), torch.arange(1000.0))


def test_parameters_arrays_and_nested_packets_survive_the_wire():
    inner = wire.pack(torch.arange(5))
    value = {"p": torch.nn.Parameter(torch.ones(2)), "a": np.arange(4), "inner": inner, "n": None}
    actual = wire.unpack(wire.pack(value))
    assert isinstance(actual["p"], torch.nn.Parameter)
    assert actual["p"].requires_grad
    assert actual["a"].tolist() == [0, 1, 2, 3]
    assert wire.unpack(actual["inner"]).tolist() == [0, 1, 2, 3, 4]


def test_a_column_of_one_element_survives_the_wire():
    sent = torch.arange(6, dtype=torch.int32).view(2, 3)[1:, 1]
    assert sent.is_contiguous()
    assert sent.stride() == (3,)
    assert wire.unpack(wire.pack(sent)).tolist() == [4]


def test_payloads_and_results_travel_through_ranks_unchanged(pool):
    for reply in replies(pool, "echo", list(tensors()), size=4):
        for actual, expected in zip(reply, tensors(), strict=True):
            assert_same(actual, expected)


def test_large_payloads_and_results_do_not_block_each_other(pool):
    large = torch.arange(4 << 20, dtype=torch.int32)
    for reply in replies(pool, "echo", large, size=4):
        assert torch.equal(reply, large)


def test_a_payload_that_does_not_pickle_is_the_subjects_error(pool):
    with pytest.raises(SubjectError, match=r"chaos_jobs:echo: payload=function, but should pickle"):
        pool.run([job("echo", lambda: None)])
    assert replies(pool, "echo", 1) == (1, 1)


def test_the_jobs_ranks_are_the_default_group_whatever_its_size(pool):
    for size in (4, 1, 2, 3, 4):
        for rank, reply in enumerate(replies(pool, "healthy", size=size)):
            assert (reply["rank"], reply["size"]) == (rank, size)
            assert reply["sum"].tolist() == [size * (size + 1) / 2] * 4


def test_libraries_find_the_layout_in_the_environment(pool):
    for rank, reply in enumerate(replies(pool, "whoami", size=2)):
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
        assert [reply["env"][name] for name in names] == [str(rank)] * 2 + ["2"] * 3
        assert reply["backend"] == "gloo"


def test_ranks_stay_warm_and_small_jobs_run_beside_large_ones(pool):
    first = {reply["pid"] for reply in replies(pool, "whoami", size=4)}
    results = pool.run([job("whoami", size=size) for size in (2, 1, 1, 4, 3)])
    assert [len(result.replies) for result in results] == [2, 1, 1, 4, 3]
    pids = [{reply["pid"] for reply in result.replies} for result in results]
    assert set.union(*pids) == first
    assert len(set.union(*pids[:3])) == 4  # disjoint


def test_a_world_that_stands_is_used_again(pool):
    pool.run([job("empty", size=2)])
    before = [pool.fleet.link(rank).layout for rank in range(4)]
    pool.run([job("empty", size=2)])
    assert [pool.fleet.link(rank).layout for rank in range(4)] == before


def test_a_process_is_the_same_rank_in_every_world_of_a_size(pool):
    # What an engine keeps for its rank, under sizes alone, is then right for as long as it lives.
    places = {}
    for sizes in ((1, 2), (3, 1), (2, 2), (1, 3), (2, 1, 1), (1, 1, 2), (4,), (1, 2, 3, 2, 1)):
        for result in pool.run([job("whoami", size=size) for size in sizes]):
            size = len(result.replies)
            for rank, reply in enumerate(result.replies):
                assert places.setdefault((reply["pid"], size), rank) == rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_collectives_do_what_their_names_say(pool, size, dtype):
    inputs = [torch.arange(6 * size, dtype=dtype).view(2 * size, 3) + rank for rank in range(size)]
    stacked = torch.stack(inputs)
    for rank, reply in enumerate(replies(pool, "collectives", {"dtype": dtype}, size=size)):
        total = stacked.sum(0).to(dtype)
        mean = total / size if dtype.is_floating_point else total // size
        expected = {
            "sum": total,
            "max": stacked.amax(0),
            "min": stacked.amin(0),
            "avg": mean.to(dtype),
            "gather0": torch.cat(inputs, 0),
            "gather1": torch.cat(inputs, 1),
            "scatter0": total.chunk(size, 0)[rank],
            "scatter1": total.t().chunk(size, 1)[rank],
            "to_all": torch.cat([x.chunk(size, 0)[rank] for x in inputs], 1),
            "broadcast": inputs[-1],
            "empty": inputs[0][:0],
        }
        for name, tensor in expected.items():
            assert_same(reply[name], tensor)
        assert reply["calls"][0] == f"all_reduce({[2 * size, 3]} {str(dtype)[6:]}, sum)"


def test_float8_is_moved_but_not_added_by_gloo(pool):
    x, zeros = torch.arange(8.0).view(2, 4), torch.zeros(2, 4)
    (broadcast, gathered, exchanged), refusal = replies(pool, "float8")[1]
    assert torch.equal(broadcast, x)
    assert torch.equal(gathered, torch.cat([x, zeros], 1))
    assert torch.equal(exchanged, torch.cat([x[:, 2:], zeros[:, 2:]], 0))
    assert refusal.startswith("all_reduce: dtype=torch.float8_e4m3fn, but Gloo adds no float8")


def test_weights_are_the_same_on_every_rank_and_a_rank_may_write_to_its_own(pool):
    first, second = replies(pool, "weights")
    assert torch.equal(first, second)
    assert torch.equal(replies(pool, "weights", size=4)[3], first)


def test_a_job_finds_the_process_as_the_first_one_did(pool):
    before = replies(pool, "look_around", size=2)
    replies(pool, "litter", {"groups": 1}, size=2)
    for reply, first in zip(replies(pool, "look_around", size=2), before, strict=True):
        assert reply | {"fds": 0} == first | {"fds": 0}
        assert reply["directory"] == os.getcwd()


def test_a_job_finds_the_environment_that_the_parent_has_now(monkeypatch):
    monkeypatch.setenv("TPCHECK_OLD", "before")
    monkeypatch.setenv("TPCHECK_GONE", "before")
    with RankPool(2) as pool:
        replies(pool, "whoami")
        with monkeypatch.context() as patch:
            patch.setenv("TPCHECK_NEW", "now")
            patch.setenv("TPCHECK_OLD", "after")
            patch.delenv("TPCHECK_GONE")
            for reply in replies(pool, "whoami"):
                env = reply["env"]
                assert (env["TPCHECK_NEW"], env["TPCHECK_OLD"]) == ("now", "after")
                assert "TPCHECK_GONE" not in env
        for reply in replies(pool, "whoami"):
            env = reply["env"]
            assert (env["TPCHECK_OLD"], env["TPCHECK_GONE"]) == ("before", "before")
            assert "TPCHECK_NEW" not in env


@pytest.mark.parametrize(
    "name",
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT"
    " CUDA_VISIBLE_DEVICES NCCL_HOSTID GLOO_SOCKET_IFNAME OMP_NUM_THREADS MKL_NUM_THREADS"
    " PYTEST_CURRENT_TEST TORCHELASTIC_RUN_ID".split(),
)
def test_what_makes_a_rank_is_not_the_parents_to_change(pool, monkeypatch, name):
    before = [reply["env"].get(name) for reply in replies(pool, "whoami")]
    monkeypatch.setenv(name, "123")
    assert [reply["env"].get(name) for reply in replies(pool, "whoami")] == before


def test_a_simulated_job_leaves_the_environment_as_it_was(monkeypatch):
    # else what one simulated rank set would reach the real ranks that are to confirm its failure
    monkeypatch.setenv("TPCHECK_GONE", "before")
    before = dict(os.environ)
    replies(SimulatedRanks(), "litter_environment")
    assert dict(os.environ) == before


def test_ranks_collect_their_garbage_but_not_the_imports_they_share(pool):
    for enabled, frozen in replies(pool, "collector"):
        assert enabled
        assert frozen > 10_000  # the modules that the zygote imported


def test_groups_that_jobs_leave_open_do_not_pile_up(pool):
    for _ in range(20):
        replies(pool, "litter", {"groups": 4}, size=2)
    assert all(reply["fds"] < 100 for reply in replies(pool, "look_around", size=2))


def test_a_job_larger_than_the_pool_is_refused(pool):
    with pytest.raises(BackendError, match="size=5, but should be 1 to 4"):
        pool.run([job("empty", size=5)])


def test_a_fork_of_the_parent_neither_uses_nor_ends_the_pool(pool):
    before = replies(pool, "whoami", size=1)[0]["pid"]
    child = os.fork()
    if child == 0:
        try:
            pool.run([job("empty")])
        except BackendError:
            pool.close()
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert before in {reply["pid"] for reply in replies(pool, "whoami", size=4)}


def test_one_pool_per_backend_grows_when_needed():
    pools.close_pools()  # other tests share them
    try:
        small = pools.get_pool("gloo", 1)
        assert pools.get_pool("gloo", 1) is small
        large = pools.get_pool("gloo", 2)
        assert large.max_size == 2
        assert pools.get_pool("gloo", 1) is large
    finally:
        pools.close_pools()


def test_a_closed_pool_leaves_nothing_and_starts_again():
    pool = RankPool(1)
    assert pool.run([job("empty", size=1)])[0].failure is None
    scratch = pool.fleet.scratch.path
    pool.close()
    pool.close()
    assert not scratch.exists()
    assert pool.run([job("empty", size=1)])[0].failure is None
    pool.close()
