"""Padding that is read, and remainders that are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpcheck.faults.planting import Decoder, fault, reduce_with, set_weight

if TYPE_CHECKING:
    from tpcheck.groups.base import TPGroup


@fault(
    "ByteDance-Seed/VeOmni#1139",
    "the last FFN column of the last rank is never read",
    drift=False,
    reason="one column of a wide FFN can stay below bfloat16's rounding",
)
def dropped_column(decoder: Decoder, tp: TPGroup) -> None:
    if tp.rank == tp.size - 1:
        decoder.layers[0].mlp.down_proj.weight_Df.data[:, -1] = 0


@fault("vllm-project/vllm#41972", "memory that nobody wrote reaches the residual stream")
def uninitialised_operand(decoder: Decoder, tp: TPGroup) -> None:
    reduce_with(decoder.layers[0].mlp.down_proj, lambda y: tp.all_reduce(y + y.new_full((), 1e4)))


@fault(
    "vllm-project/vllm#55649",
    "[gate; up] is padded at its end, so that the point where it is split moves into up",
)
def split_point_moved(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    mlp, pads = decoder.layers[0].mlp, 4
    fused = torch.cat([mlp.gate_proj.weight_fD.data, mlp.up_proj.weight_fD.data])
    halves = torch.nn.functional.pad(fused, (0, 0, 0, 2 * pads)).chunk(2)
    for projection, half in zip((mlp.gate_proj, mlp.up_proj), halves, strict=True):
        set_weight(projection.weight_fD, half)
    down = mlp.down_proj.weight_Df
    set_weight(down, torch.nn.functional.pad(down.data, (0, pads)))
