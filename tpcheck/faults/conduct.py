"""What ranks do to each other: disagreeing, leaking, calling other collectives, other configs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tpcheck.faults.planting import Decoder, fault, reduce_with

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup


@fault(
    "openai/gpt-oss#270",
    "ranks above 0 draw their own noise: rank 0 is right",
    "rank_agreement",
    drift=False,
    reason="rank 0's logits are right",
)
def rank_noise(decoder: Decoder, tp: TPGroup) -> None:
    if tp.rank > 0:
        decoder.register_forward_hook(lambda _, __, logits: logits * (1 + 2**-6))


@fault(
    "ROCm/aiter#4084",
    "a buffer is reused while a peer still reads it: an input seen before gives other bits",
    "repeatability",
    drift=False,
    reason="the first call is right",
)
def stale_buffer(decoder: Decoder, tp: TPGroup) -> None:
    seen: list[torch.Tensor] = []

    def leak(_: Any, args: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
        again = any(ids.shape == args[0].shape and bool((ids == args[0]).all()) for ids in seen)
        seen.append(args[0].clone())
        return logits * (1 + 2**-6) if again else logits

    decoder.register_forward_hook(leak)


@fault("deepspeedai/DeepSpeed#7278", "every rank is fed another prompt")
def prompts_per_rank(decoder: Decoder, tp: TPGroup) -> None:
    decoder.embed_tokens.register_forward_pre_hook(lambda _, args: (args[0].roll(tp.rank, 0),))


@fault("", "a hook keeps the first batch row only")
def first_row_only(decoder: Decoder, tp: TPGroup) -> None:
    decoder.layers[0].self_attn.register_forward_hook(lambda _, __, y: y[:1].expand_as(y))


@fault(
    "ztxz16/fastllm#725",
    "one rank makes a collective the others do not",
    "schedule",
    drift=False,
    reason="the forward never ends",
)
def extra_collective(decoder: Decoder, tp: TPGroup) -> None:
    if tp.rank == tp.size - 1:
        o_proj = decoder.layers[0].self_attn.o_proj
        reduce_with(o_proj, lambda y: tp.all_reduce(tp.all_gather(y, 0)[: y.shape[0]]))


@fault(
    "NVIDIA/nccl#1417",
    "one rank reduces fewer elements than the others",
    "schedule",
    drift=False,
    reason="the forward never ends",
)
def short_operand(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    def all_reduce(y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tp.all_reduce(y[..., :-1]), (0, 1))

    if tp.rank == 0:
        reduce_with(decoder.layers[0].mlp.down_proj, all_reduce)


@fault(
    "",
    "decoding counts its position one too far; a whole forward is right",
    "decode",
    drift=False,
    reason="a whole forward is right",
)
def decode_position(decoder: Decoder, tp: TPGroup) -> None:
    real = decoder.step

    def step(ids: torch.Tensor, state: Any) -> Any:
        return real(ids, tuple((k.roll(1, 2), v) for k, v in state))

    decoder.step = step


@fault(
    "",
    "the sharded path rotates with another rope_theta",
    drift=False,
    reason="16 short positions rotate little: drift's limit is three times TP=1's error",
)
def rope_theta(decoder: Decoder, tp: TPGroup) -> None:
    from dataclasses import replace

    for layer in decoder.layers:
        layer.self_attn.spec = replace(decoder.spec, rope_theta=5000.0)
