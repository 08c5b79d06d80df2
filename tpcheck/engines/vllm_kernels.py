"""Which kernel vLLM 0.33 takes for a weight of 4 or 8 bits in groups, and why not another.

Requirement: whether a cut group is refused, wrong or late depends on the kernel, and the kernel on
the card and the activation's dtype. The order is vLLM's on CUDA; kernels that need another package
are taken as not installed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tpcheck.engines.facts import Quant, round_up


class Chosen(NamedTuple):
    """The kernel's class name, or None and vLLM's text."""

    kernel: str | None
    text: str = ""


class _Layer(NamedTuple):
    full_k: int
    k: int
    n: int
    quant: Quant
    act: str
    capability: int


def choose_kernel(
    full_k: int, k: int, n: int, quant: Quant, act: str, compute_capability: str
) -> Chosen:
    """Return the first kernel that accepts K x N on one rank of a layer of `full_k` inputs."""
    capability = int(float(compute_capability) * 10 + 0.5)
    layer = _Layer(full_k, k, n, quant, act, capability)
    reasons = []
    for name, least, refuse in _KERNELS:
        if capability < least:
            reasons.append(
                f"{name} requires capability {least}, current compute  capability is {capability}"
            )
            continue
        why = refuse(layer)
        if why is None:
            return Chosen(name)
        reasons.append(f" {name} cannot implement due to: {why}")
    head = "Failed to find a kernel that can implement the WNA16 linear layer. Reasons: \n"
    return Chosen(None, head + "\n".join(reasons))


def marlin_padded(n: int, k: int, group_size: int) -> tuple[int, int]:
    """Return the smallest (N, K) that one of Marlin's two tile shapes covers, in whole groups."""
    group = max(1, group_size)
    shapes = [
        (round_up(n, tile_n), round_up(k, math.lcm(tile_k, group)))
        for tile_n, tile_k in ((64, 128), (128, 64))
    ]
    return min(shapes, key=lambda shape: shape[0] * shape[1])


def tile_refusal(n: int, k: int) -> str | None:
    """Return what the fp8 and fp4 variants of Marlin say of N x K on one rank, which pad nothing.

    Source: vllm/model_executor/layers/quantization/utils/marlin_utils.py:161-194.
    """
    advice = "Consider reducing tensor_parallel_size or running with --quantization gptq."
    said = f"Weight output_size_per_partition = {n} is not divisible by  min_thread_n = 64."
    if n % 64:
        return f"{said} {advice}"
    said = f"Weight input_size_per_partition = {k} is not divisible by min_thread_k = 128."
    return f"{said} {advice}" if k % 128 else None


def _cutlass(layer: _Layer) -> str | None:
    if layer.capability != 90:
        return "CUTLASS W4A8 requires compute capability of 90 (Hopper)"
    return "CUTLASS W4A8 only supports FP8 (e4m3) activations"


def _machete(layer: _Layer) -> str | None:
    if layer.capability != 90:
        return "Machete requires compute capability of 90 (Hopper)"
    if layer.quant.group_size not in (-1, 64, 128):
        return (
            f"Group size ({layer.quant.group_size}) not supported by Machete, supported group"
            " sizes are: [-1, 64, 128]"
        )
    if layer.k % 64:
        return "Input features size must be divisible by 64"
    if layer.n % 128:
        return "Output features size must be divisible by 128"
    return None


def _marlin(layer: _Layer) -> str | None:
    group = layer.quant.group_size or -1
    if group not in (-1, 32, 64, 128):
        return (
            f"Group size ({group}) not supported by Marlin, supported group sizes are:"
            " [-1, 32, 64, 128]"
        )
    if group != -1 and group < layer.full_k and layer.k % group:
        return f"in_features per partition {layer.k} is not divisible by group_size = {group}."
    return None


def _conch(layer: _Layer) -> str | None:
    return (
        "conch-triton-kernels is not installed, please install it via"
        " `pip install conch-triton-kernels` and try again!"
    )


def _exllama(layer: _Layer) -> str | None:
    if layer.n % (32 // layer.quant.bits):
        return (
            "Output features must be a multiple of the pack factor (32 / num_bits) so that we can"
            " correctly pack the zero points"
        )
    if layer.act != "float16":
        return "Exllama only supports float16 activations"
    group = layer.quant.group_size or -1
    if group <= 0:
        return (
            f"Group size ({group}) must be positive, Exllama does not support channelwise"
            " quantization"
        )
    if layer.full_k % group:
        return (
            f"Group size ({group}) does not evenly divide the number of input features"
            f" ({layer.full_k})"
        )
    return None


def _triton(layer: _Layer) -> str | None:
    group = layer.quant.group_size or -1
    if group > 0 and layer.k % group:
        return f"Input features {layer.k} not divisible by group size {group}"
    return None


def _humming(layer: _Layer) -> str | None:
    return "Humming is not installed"


_KERNELS = (
    ("CutlassW4A8LinearKernel", 90, _cutlass),
    ("MacheteLinearKernel", 90, _machete),
    ("MarlinLinearKernel", 75, _marlin),
    ("ConchLinearKernel", 80, _conch),
    ("ExllamaLinearKernel", 60, _exllama),
    ("TritonW4A16LinearKernel", 0, _triton),
    ("HummingLinearKernel", 75, _humming),
)
