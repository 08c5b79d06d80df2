"""What a run stood on: versions, hardware, numeric flags, the environment variables that matter.

Requirement: two reports that differ can be told apart by what differed around them, and a gate can
match on it. Importing this module loads no torch; `collect` does. A report is passed around, so
only variables with the prefixes below are kept, never the value of one that sounds like a secret.
"""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from typing import Any

from tpcheck.machine import (
    driver_version,
    nccl_settings,
    nccl_version,
    package_version,
    visible_gpus,
    without_secret,
)

ENV_PREFIXES = ("NCCL_", "TORCH_", "GLOO_", "CUBLAS_", "NVIDIA_TF32_", "OMP_NUM_THREADS", "MKL_")


def tpcheck_version() -> str:
    """Return the installed version of tpcheck, `0+unknown` when it runs uninstalled."""
    return package_version("tpcheck") or "0+unknown"


def utc_now() -> str:
    """Return this moment as reports write it: UTC, to the second, like 2026-01-31T12:00:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def collect(*, backend: str = "", device: str = "cpu") -> dict[str, Any]:
    """Return everything around a run that can change its numbers, as plain JSON values.

    Args:
        backend: what carried the collectives, as reports print it.
        device: where the tensors lived, `cpu` or `cuda`.
    """
    return {
        "tpcheck": tpcheck_version(),
        "backend": backend,
        "device": device,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": _cores(),
        "numpy": package_version("numpy"),
        "transformers": package_version("transformers"),
        **_torch_facts(device),
        "variables": _variables(),
        "nccl_settings": nccl_settings(),
        "nodes": _nodes(),
    }


def _torch_facts(device: str) -> dict[str, Any]:
    import torch

    matmul = torch.backends.cuda.matmul
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "tf32": _allows_tf32(matmul),
        "tf32_cudnn": _allows_tf32(torch.backends.cudnn),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "bf16_reduced_precision_reduction": matmul.allow_bf16_reduced_precision_reduction,
        "fp16_reduced_precision_reduction": matmul.allow_fp16_reduced_precision_reduction,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "sdpa": {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "mem_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
        },
        "cuda_graphs": False if device == "cpu" else None,  # a subject may replay its own
        "num_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.startswith("cuda") and torch.cuda.is_available():
        nccl: Any = torch.cuda.nccl
        facts["gpu"] = torch.cuda.get_device_name(0)
        facts["gpu_count"] = torch.cuda.device_count()
        facts["nccl"] = ".".join(map(str, nccl.version()))
        # as a server's start will read them, without torch
        facts["gpu_models"] = sorted(set(visible_gpus() or ()))
        facts["nccl_library"] = nccl_version()
        facts["driver"] = driver_version()
    return facts


def _allows_tf32(flag: Any) -> bool:
    # torch refuses to read the old flag once the new one was set, and old releases lack the new one
    precision = getattr(flag, "fp32_precision", None)
    if precision is not None and precision != "none":
        return bool(precision == "tf32")
    return bool(flag.allow_tf32)


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _nodes() -> int:
    """Return how many machines torchrun spans; 1 without it."""
    world, local = os.environ.get("WORLD_SIZE", ""), os.environ.get("LOCAL_WORLD_SIZE", "")
    whole = world.isdecimal() and local.isdecimal() and int(local) > 0
    return max(1, -(-int(world) // int(local))) if whole else 1


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _variables() -> dict[str, str]:
    return {
        name: without_secret(name, value)
        for name, value in sorted(os.environ.items())
        if name.startswith(ENV_PREFIXES)
    }
