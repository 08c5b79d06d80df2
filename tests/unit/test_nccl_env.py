"""Where NCCL ranks go, what environment they get, and the errors when they cannot go anywhere."""

import pytest
import torch

from tpcheck.errors import BackendError
from tpcheck.groups.nccl import gpu_layout, launch_environment, visible_gpu_count
from tpcheck.groups.pool import RankPool, backend_label


def test_one_rank_per_gpu_by_default():
    assert gpu_layout(4, 8) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("tp_size", "gpus", "each", "devices"),
    [(4, 1, 4, [0, 0, 0, 0]), (4, 2, 2, [0, 0, 1, 1]), (3, 2, 2, [0, 0, 1]), (1, 1, None, [0])],
)
def test_ranks_fill_one_gpu_after_the_other(tp_size, gpus, each, devices):
    assert gpu_layout(tp_size, gpus, each) == devices


def test_too_few_gpus_name_what_there_is_and_the_ways_out():
    with pytest.raises(BackendError) as caught:
        gpu_layout(8, 2)
    assert str(caught.value) == (
        "nccl: tp_size=8, but 2 GPUs hold 2 ranks at 1 per GPU;"
        " use --ranks-per-gpu 4 (labelled nccl-loopback) or --backend gloo"
    )


def test_no_gpu_and_a_senseless_share_are_errors():
    with pytest.raises(BackendError, match="no GPU is visible"):
        gpu_layout(1, 0)
    with pytest.raises(BackendError, match="ranks_per_gpu=0, but should be at least 1"):
        gpu_layout(1, 1, 0)


def test_the_deployed_recipe_sets_nothing_but_the_device():
    assert launch_environment(3, 3, False) == {"LOCAL_RANK": "3"}


def test_the_loopback_recipe_makes_every_rank_its_own_host():
    first, second = (launch_environment(rank, 0, True) for rank in (0, 1))
    assert {name for name in first if first[name] != second[name]} == {"NCCL_HOSTID"}
    assert first["NCCL_HOSTID"] == "tpcheck-0"
    expected = """
        CUDA_VISIBLE_DEVICES=0 LOCAL_RANK=0 OMP_NUM_THREADS=1 NCCL_HOSTID=tpcheck-0
        NCCL_SOCKET_IFNAME==lo NCCL_SOCKET_FAMILY=AF_INET NCCL_NET=Socket NCCL_NET_PLUGIN=none
        NCCL_IB_DISABLE=1 NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_MNNVL_ENABLE=0
        NCCL_NVLS_ENABLE=0 NCCL_COLLNET_ENABLE=0 NCCL_PAT_ENABLE=0 NCCL_ALGO=Ring
        NCCL_PROTO=Simple NCCL_MIN_NCHANNELS=1 NCCL_MAX_NCHANNELS=1 NCCL_RAS_ENABLE=0
        GLOO_SOCKET_IFNAME=lo
    """
    assert first == dict(entry.split("=", 1) for entry in expected.split())


def test_the_loopback_recipe_respects_visible_devices_and_can_log(tmp_path):
    environment = launch_environment(2, 1, True, visible="4,5", log_dir=str(tmp_path))
    assert environment["CUDA_VISIBLE_DEVICES"] == "5"
    assert environment["NCCL_DEBUG_FILE"] == str(tmp_path / "nccl.%p.log")


@pytest.mark.parametrize(
    ("backend", "each", "label"),
    [
        ("gloo", None, "gloo"),
        ("nccl", None, "nccl"),
        ("nccl", 1, "nccl"),
        ("nccl", 2, "nccl-loopback"),
    ],
)
def test_labels(backend, each, label):
    assert backend_label(backend, each) == label


def test_an_unknown_backend_is_an_error():
    with pytest.raises(BackendError, match="backend='mpi', but should be gloo or nccl"):
        RankPool(2, "mpi")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_nccl_without_gpus_is_refused_before_anything_starts():
    assert visible_gpu_count() == 0
    with pytest.raises(BackendError, match="no GPU is visible"):
        RankPool(2, "nccl")
