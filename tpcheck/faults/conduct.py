"""What ranks do to each other: disagreeing, leaking, calling other collectives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tpcheck.faults.planting import Decoder, change_output, fault, in_order, reduce_with

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


@fault(
    "NVIDIA/TensorRT-LLM#14020",
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
    "exo-explore/exo#2048",
    "rank 0 makes two collectives in another order than the rest",
    "schedule",
    drift=False,
    reason="the forward never ends",
)
def swapped_collectives(decoder: Decoder, tp: TPGroup) -> None:
    def all_reduce(y: torch.Tensor) -> torch.Tensor:
        if tp.rank == 0:
            tp.all_gather(y, 0)
            return tp.all_reduce(y)
        whole = tp.all_reduce(y)
        tp.all_gather(y, 0)
        return whole

    reduce_with(decoder.layers[0].self_attn.o_proj, all_reduce)


@fault(
    "tenstorrent/tt-metal#50688",
    "terms are added in order of arrival, which differs from call to call",
    "repeatability",
    min_tp=3,
    drift=False,
    reason="every order is as good; two ranks' sum has the same bits in either",
)
def summed_by_arrival(decoder: Decoder, tp: TPGroup) -> None:
    calls: list[torch.Size] = []

    def all_reduce(y: torch.Tensor) -> torch.Tensor:
        calls.append(y.shape)
        return in_order(tp.all_gather(y[None], 0).roll(len(calls), 0))

    reduce_with(decoder.layers[0].self_attn.o_proj, all_reduce)


@fault(
    "vllm-project/vllm#2760",
    "a race: the last rank's term is the one of its call before",
)
def stale_term(decoder: Decoder, tp: TPGroup) -> None:
    before: dict[torch.Size, torch.Tensor] = {}

    def all_reduce(y: torch.Tensor) -> torch.Tensor:
        stale = before.get(y.shape, y)
        before[y.shape] = y
        return tp.all_reduce(stale if tp.rank == tp.size - 1 else y)

    reduce_with(decoder.layers[0].self_attn.o_proj, all_reduce)


@fault(
    "meta-pytorch/torchrec#4601",
    "rank 0 has the result, but another rank's buffer is broadcast",
)
def broadcast_of_another_rank(decoder: Decoder, tp: TPGroup) -> None:
    kept = 1.0 if tp.rank == 0 else 0.0
    change_output(decoder.layers[0].input_layernorm, lambda x: tp.broadcast(x * kept, 1))


@fault(
    "sgl-project/sglang#40246",
    "ranks above 0 see other near-ties: their logits differ in the last bits",
    "rank_agreement",
    drift=False,
    reason="rank 0's logits are right",
)
def last_bits_per_rank(decoder: Decoder, tp: TPGroup) -> None:
    if tp.rank > 0:
        change_output(decoder, lambda logits: logits * (1 + 2**-48))


@fault(
    "NVIDIA/TensorRT-LLM#13134",
    "the last rank sometimes, at one length of input only, returns another token's logits",
    "rank_agreement",
    drift=False,
    reason="rank 0's logits are right",
)
def sometimes_another_token(decoder: Decoder, tp: TPGroup) -> None:
    if tp.rank == tp.size - 1:
        change_output(decoder, lambda y: y.roll(1, -1) if y.shape[1] == tp.size + 1 else y)
