"""Where NCCL ranks go and the environment they start with: pure functions, no CUDA touched.

Requirement: one rank per GPU runs as deployed, with nothing set but its device. Several ranks on
one GPU are refused by NCCL unless each claims to be its own host; that recipe leaves only sockets
as transport, so its result is labelled `nccl-loopback` and never counts as `nccl`.

[Loopback] NCCL calls two ranks duplicates when host hash and bus id are equal (init.cc, NCCL
2.28.9); NCCL_HOSTID replaces the host hash. Everything else in the recipe takes away paths that
would need a shared host, and pins one ring channel, whose order of additions is known.
"""

from __future__ import annotations

import os

from tpcheck.errors import BackendError


def gpu_layout(tp_size: int, gpu_count: int, ranks_per_gpu: int | None = None) -> list[int]:
    """Return the device index of every rank, filling one GPU after the other.

    Raises:
        BackendError: too few GPUs; names what there is, what is needed and the ways out.
    """
    if ranks_per_gpu is not None and ranks_per_gpu < 1:
        raise BackendError(f"ranks_per_gpu={ranks_per_gpu}, but should be at least 1")
    each = ranks_per_gpu or 1
    if gpu_count == 0:
        raise BackendError(
            "nccl: no GPU is visible, but each rank needs one; use --backend gloo, or look at"
            " CUDA_VISIBLE_DEVICES"
        )
    if tp_size > gpu_count * each:
        needed = -(-tp_size // gpu_count)
        has = f"{gpu_count} GPU{'s' if gpu_count > 1 else ''}"
        raise BackendError(
            f"nccl: tp_size={tp_size}, but {has} hold {gpu_count * each} ranks at {each} per GPU;"
            f" use --ranks-per-gpu {needed} (labelled nccl-loopback) or --backend gloo"
        )
    return [rank // each for rank in range(tp_size)]


def launch_environment(
    rank: int, device: int, loopback: bool, *, visible: str | None = None, log_dir: str = ""
) -> dict[str, str]:
    """Return the variables a rank needs before CUDA and NCCL start.

    Args:
        rank: unique among the ranks that ever meet.
        device: index among the visible GPUs.
        loopback: several ranks share a GPU: the recipe of [Loopback].
        visible: CUDA_VISIBLE_DEVICES of the parent, None if it is not set.
        log_dir: where NCCL's debug log of each process goes; no log without it.
    """
    if not loopback:
        return {"LOCAL_RANK": str(device)}
    names = [name.strip() for name in (visible or "").split(",") if name.strip()]
    environment = {
        "CUDA_VISIBLE_DEVICES": names[device] if names else str(device),
        "LOCAL_RANK": "0",
        "NCCL_HOSTID": f"tpcheck-{rank}",
        **_LOOPBACK,
    }
    if log_dir:
        environment |= {
            "NCCL_DEBUG": "INFO",
            "NCCL_DEBUG_SUBSYS": "INIT,ENV,GRAPH,NET,TUNING",
            "NCCL_DEBUG_FILE": os.path.join(log_dir, "nccl.%p.log"),
        }
    return environment


def visible_gpu_count() -> int:
    """Return how many GPUs this process may use, without creating a CUDA context."""
    import torch

    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        return torch.cuda.device_count()
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_LOOPBACK = {
    "OMP_NUM_THREADS": "1",
    "NCCL_SOCKET_IFNAME": "=lo",
    "NCCL_SOCKET_FAMILY": "AF_INET",
    "NCCL_NET": "Socket",
    "NCCL_NET_PLUGIN": "none",
    "NCCL_IB_DISABLE": "1",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_COLLNET_ENABLE": "0",
    "NCCL_PAT_ENABLE": "0",
    "NCCL_ALGO": "Ring",
    "NCCL_PROTO": "Simple",
    "NCCL_MIN_NCHANNELS": "1",
    "NCCL_MAX_NCHANNELS": "1",
    "NCCL_RAS_ENABLE": "0",
    "GLOO_SOCKET_IFNAME": "lo",
}
