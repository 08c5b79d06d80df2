"""Routers that differ, experts cut, loaded or summed wrongly, shared experts counted wrongly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tpcheck.faults.planting import Decoder, fault, full_weight, reduce_with, set_weight

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup

_MOE: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}
_SHARED = {**_MOE, "shared_expert_intermediate_size": 48}


@fault(
    "vllm-project/vllm#49366",
    "the shared expert is all-reduced by itself, then again with the routed ones",
    needs=_SHARED,
)
def shared_expert_reduced_twice(decoder: Decoder, tp: TPGroup) -> None:
    shared = decoder.layers[0].mlp.shared_expert
    shared.register_forward_hook(lambda _, __, y: tp.all_reduce(y))


@fault(
    "vllm-project/tpu-inference#3435",
    "only the routed experts are all-reduced: the shared one stays a partial",
    needs=_SHARED,
)
def shared_expert_not_reduced(decoder: Decoder, tp: TPGroup) -> None:
    mlp = decoder.layers[0].mlp
    mlp.experts.register_forward_hook(lambda _, __, y: tp.all_reduce(y))
    reduce_with(mlp, lambda y: y)


@fault(
    "sgl-project/sglang#35535",
    "every rank holds the whole shared expert and adds its output before the sum",
    needs=_SHARED,
)
def replicated_shared_expert(decoder: Decoder, tp: TPGroup) -> None:
    shared, name = decoder.layers[0].mlp.shared_expert, "model.layers.0.mlp.shared_expert"
    for part in ("gate", "up"):
        weight = full_weight(tp, decoder, f"{name}.{part}_proj.weight")
        set_weight(getattr(shared, f"{part}_proj").weight_fD, weight)
    set_weight(shared.down_Df, full_weight(tp, decoder, f"{name}.down_proj.weight"))


@fault(
    "vllm-project/vllm#37856",
    "ranks put their terms of the shared expert together for different tokens",
    needs=_SHARED,
)
def shared_expert_of_other_tokens(decoder: Decoder, tp: TPGroup) -> None:
    shared = decoder.layers[0].mlp.shared_expert
    shared.register_forward_pre_hook(lambda _, args: (args[0].roll(tp.rank, 1),))


@fault(
    "mindspore-ai/hyper-parallel#77",
    "the packed [gate; up] weight of every expert is cut in one piece",
    needs=_MOE,
)
def packed_experts_contiguous(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    for index, expert in enumerate(decoder.layers[0].mlp.experts):
        prefix = f"model.layers.0.mlp.experts.{index}"
        halves = [
            full_weight(tp, decoder, f"{prefix}.{part}_proj.weight") for part in ("gate", "up")
        ]
        gate, up = torch.cat(halves).chunk(tp.size)[tp.rank].chunk(2)
        set_weight(expert.gate_proj.weight_fD, gate)
        set_weight(expert.up_proj.weight_fD, up)


@fault(
    "deepspeedai/DeepSpeed#6589",
    "the experts of the first rank's share are loaded in the place of all others",
    needs=_MOE,
)
def experts_of_rank_0(decoder: Decoder, tp: TPGroup) -> None:
    experts = decoder.layers[0].mlp.experts
    share = max(1, len(experts) // tp.size)
    for index, expert in enumerate(experts):
        loaded = experts[index % share]
        expert.gate_proj, expert.up_proj = loaded.gate_proj, loaded.up_proj
        expert.down_Df = loaded.down_Df


@fault(
    "sgl-project/sglang#32963",
    "of two all-reduces over a grid of ranks one is skipped: half of the experts' terms are lost",
    needs=_MOE,
)
def experts_of_half_the_group(decoder: Decoder, tp: TPGroup) -> None:
    mine = tp.rank < (tp.size + 1) // 2
    reduce_with(decoder.layers[0].mlp, lambda y: tp.all_reduce(y if mine else y * 0))


@fault(
    "pytorch/torchtitan#4245",
    "the experts' output bias is added on every rank before the all-reduce",
    needs={**_MOE, "mlp_bias": True},
)
def expert_bias_times_tp(decoder: Decoder, tp: TPGroup) -> None:
    experts = decoder.layers[0].mlp.experts
    bias = experts.bias
    experts.register_forward_hook(lambda _, args, y: y + bias(args[1]))
    experts.bias = lambda _: None


@fault(
    "pytorch/torchtitan#2387",
    "the router's weights went apart: the last rank routes otherwise",
    needs=_MOE,
)
def router_of_one_rank(decoder: Decoder, tp: TPGroup) -> None:
    if tp.rank == tp.size - 1:
        weight = decoder.layers[0].mlp.gate.weight_ED
        set_weight(weight, weight.data.roll(1, 0))


@fault(
    "vllm-project/vllm-ascend#15451",
    "expert ids were captured for one rank's tokens only: the others read as expert 0",
    needs=_MOE,
)
def zeroed_expert_ids(decoder: Decoder, tp: TPGroup) -> None:
    def zeroed(_: Any, __: Any, shares: torch.Tensor) -> torch.Tensor:
        shares, captured = shares.clone(), -(-shares.shape[1] // tp.size)
        lost = shares[:, captured:]
        total = lost.sum(-1)
        lost.zero_()
        lost[..., 0] = total
        return shares

    decoder.layers[0].mlp.gate.register_forward_hook(zeroed)


@fault(
    "pytorch/torchtitan#1448",
    "the sharded path does not renormalize the chosen experts' probabilities",
    needs=_MOE,
)
def shares_not_renormalized(decoder: Decoder, tp: TPGroup) -> None:
    decoder.layers[0].mlp.gate.renormalize = False


@fault(
    "sgl-project/sglang#35160",
    "the sharded path weighs experts by the router's raw logits",
    needs={**_MOE, "norm_topk_prob": False},
)
def raw_logit_shares(decoder: Decoder, tp: TPGroup) -> None:
    def raw(gate: Any, args: tuple[torch.Tensor], shares: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = args[0] @ gate.weight_ED.T
        return logits.masked_fill(shares == 0, 0)

    decoder.layers[0].mlp.gate.register_forward_hook(raw)
