"""Rows and tokens: prompts mixed up, remainders dropped, positions counted from elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tpcheck.faults.planting import Decoder, change_output, fault, reduce_with, set_weight

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup


@fault("deepspeedai/DeepSpeed#7278", "every rank is fed another prompt")
def prompts_per_rank(decoder: Decoder, tp: TPGroup) -> None:
    decoder.embed_tokens.register_forward_pre_hook(lambda _, args: (args[0].roll(tp.rank, 0),))


@fault("NVIDIA/TensorRT-LLM#7128", "after the gather only the first rank's rows are kept")
def first_row_only(decoder: Decoder, tp: TPGroup) -> None:
    change_output(decoder.layers[0].self_attn, lambda y: y[:1].expand_as(y))


@fault(
    "deepspeedai/DeepSpeed#5808",
    "an exchange that holds for one row mixes the tokens of several",
)
def rows_interleaved(decoder: Decoder, tp: TPGroup) -> None:
    def mixed(y: torch.Tensor) -> torch.Tensor:
        return y.reshape(y.shape[1], y.shape[0], -1).transpose(0, 1)

    change_output(decoder.layers[0].self_attn.o_proj, mixed)


@fault(
    "huggingface/transformers#36634",
    "ranks above 0 add another sequence's terms to the sum",
)
def sequences_mixed(decoder: Decoder, tp: TPGroup) -> None:
    shift = min(tp.rank, 1)
    reduce_with(decoder.layers[0].self_attn.o_proj, lambda y: tp.all_reduce(y.roll(shift, 0)))


@fault(
    "NVIDIA-NeMo/RL#1227",
    "a row's result depends on its place in the batch",
    drift=("float32",),
    reason="2^-8 of one row's MLP is within what 16 bits round",
)
def batch_variant(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    def scaled(y: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(y.shape[0], dtype=y.dtype, device=y.device)
        return y * (1 + 2**-8 * rows[:, None, None])

    change_output(decoder.layers[0].mlp, scaled)


@fault("pytorch/torchtitan#1306", "tokens beyond a multiple of tp are dropped")
def token_remainder_dropped(decoder: Decoder, tp: TPGroup) -> None:
    def even(y: torch.Tensor) -> torch.Tensor:
        kept = y.shape[1] // tp.size * tp.size
        return y * (positions(y) < kept)

    change_output(decoder.layers[0].mlp, even)


@fault(
    "ByteDance-Seed/VeOmni#1139",
    "the tokens of all rows are dealt out together, and those beyond a multiple of tp are dropped",
)
def remainder_of_all_rows(decoder: Decoder, tp: TPGroup) -> None:
    def even(y: torch.Tensor) -> torch.Tensor:
        tokens = y.flatten(0, 1).clone()
        tokens[len(tokens) // tp.size * tp.size :] = 0
        return tokens.view_as(y)

    change_output(decoder.layers[0].mlp, even)


@fault(
    "vllm-project/vllm#50154",
    "tokens are taken for dealt out where their number differs: fewer than ranks are taken for all",
    drift=("float16", "float32"),
    reason="at TP=2 it is one token of all inputs', near what bfloat16 rounds",
)
def fewer_tokens_of_all_rows(decoder: Decoder, tp: TPGroup) -> None:
    def short(y: torch.Tensor) -> torch.Tensor:
        return y / tp.size if y.shape[:-1].numel() < tp.size else y

    change_output(decoder.layers[0].mlp, short)


@fault(
    "pytorch/torchtitan#3622",
    "with fewer tokens than ranks the last token gets no MLP",
    drift=("float16", "float32"),
    reason="at TP=2 it is one token of all inputs', near what bfloat16 rounds",
)
def fewer_tokens_than_ranks(decoder: Decoder, tp: TPGroup) -> None:
    def short(y: torch.Tensor) -> torch.Tensor:
        return y * (positions(y) < y.shape[1] - 1) if y.shape[1] < tp.size else y

    for layer in decoder.layers:
        change_output(layer.mlp, short)


@fault(
    "pytorch/torchtitan#3193",
    "with fewer tokens than ranks the last rank has nothing to do and skips the all-reduce",
    "schedule",
    drift=False,
    reason="the forward never ends",
)
def idle_rank_skips(decoder: Decoder, tp: TPGroup) -> None:
    if tp.rank == tp.size - 1:
        down = decoder.layers[0].mlp.down_proj
        reduce_with(down, lambda y: y if y.shape[1] < tp.size else tp.all_reduce(y))


@fault(
    "NVIDIA/Megatron-LM#4075",
    "every rank's share of the tokens counts its positions from zero",
    needs={"position": "learned"},
)
def positions_from_zero(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    table = decoder.positions_TD
    share = 16 // tp.size
    set_weight(table, table.data[torch.arange(table.shape[0]) % share])


@fault(
    "sgl-project/SpecForge#265",
    "the sharded path rotates with another rope_theta",
    drift=("float16", "float32"),
    reason="16 short positions rotate little: drift's limit is three times TP=1's error",
)
def rope_theta(decoder: Decoder, tp: TPGroup) -> None:
    for layer in decoder.layers:
        layer.self_attn.spec = replace(decoder.spec, rope_theta=5000.0)


@fault(
    "PrimeIntellect-ai/prime-rl#2828",
    "the sharded path attends to everything where a window is asked for",
    needs={"sliding_window": 5},
)
def window_ignored(decoder: Decoder, tp: TPGroup) -> None:
    for layer in decoder.layers:
        layer.self_attn.spec = replace(decoder.spec, sliding_window=0, layer_types=())


@fault(
    "microsoft/onnxruntime-genai#2354",
    "decoding starts one position too far and leaves a hole; a whole forward is right",
    "decode",
    drift=False,
    reason="a whole forward is right",
)
def decode_position(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    real = decoder.prefill

    def prefill(ids: torch.Tensor) -> Any:
        logits, state = real(ids)
        hole = (0, 0, 0, 1)
        return logits, tuple(
            (torch.nn.functional.pad(k, hole), torch.nn.functional.pad(v, hole)) for k, v in state
        )

    decoder.prefill = prefill


def positions(y_BTD: torch.Tensor) -> torch.Tensor:
    """Return every token's position, [T, 1]."""
    import torch

    return torch.arange(y_BTD.shape[1], device=y_BTD.device)[:, None]
