"""Known bugs, each as a one-line change of the reference decoder at TP > 1.

Requirement: every check has a fault only it, or a named other, catches; `tpcheck selfcheck` plants
them all and a surviving one fails the build. A fault changes instances of one rank's decoder, never
a class, so simulated ranks do not share it. Each names the public thread it re-makes. Torch-free at
import, so that the list can be shown at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tpcheck.errors import SubjectError

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup
    from tpcheck.reference.decoder import Decoder

Plant = Callable[["Decoder", "TPGroup"], None]


@dataclass(frozen=True, slots=True)
class Fault:
    """One bug.

    caught_by: the check that has to fail. needs: spec fields it takes to show. min_tp: the smallest
    degree at which it does anything. drift: whether drift alone sees it in bfloat16; where it
    cannot, `reason` says why. dtypes: the deployed dtypes in which it shows, all when empty.
    """

    name: str
    thread: str
    description: str
    caught_by: str
    plant: Plant
    needs: Mapping[str, Any] = field(default_factory=dict)
    min_tp: int = 2
    drift: bool = True
    reason: str = ""
    dtypes: tuple[str, ...] = ()


FAULTS: dict[str, Fault] = {}


def _fault(
    thread: str, description: str, caught_by: str = "structural", **options: Any
) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        name = plant.__name__
        if name in FAULTS:
            raise SubjectError(f"fault {name!r} is defined twice")
        FAULTS[name] = Fault(name, thread, description, caught_by, plant, **options)
        return plant

    return register


class _Seam:
    """A TPGroup with one collective replaced, for one module of one rank."""

    def __init__(self, tp: TPGroup, **replaced: Callable[..., torch.Tensor]) -> None:
        self._tp = tp
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tp, name)


def _reduce(module: Any, all_reduce: Callable[..., torch.Tensor]) -> None:
    """Give one module another all-reduce."""
    module.tp = _Seam(module.tp, all_reduce=all_reduce)


def _set(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    parameter.data = value.clone()


def _full(tp: TPGroup, decoder: Decoder, name: str) -> torch.Tensor:
    """The whole generated weight behind a logical name."""
    from tpcheck.reference.layout import logical_tensors

    return tp.weight(name, *logical_tensors(decoder.spec)[name].shape)


# Reductions.


@_fault("vllm-project/tpu-inference#3435", "no all-reduce after the MLP of layer 0")
def missing_all_reduce(decoder: Decoder, tp: TPGroup) -> None:
    _reduce(decoder.layers[0].mlp.down_proj, lambda y: y)


@_fault("vllm-project/vllm#49366", "the MLP of layer 0 is all-reduced twice")
def double_all_reduce(decoder: Decoder, tp: TPGroup) -> None:
    _reduce(decoder.layers[0].mlp.down_proj, lambda y: tp.all_reduce(tp.all_reduce(y)))


@_fault("sgl-project/sglang#32963", "the attention output sums only half of the ranks")
def half_the_group(decoder: Decoder, tp: TPGroup) -> None:
    mine = tp.rank < (tp.size + 1) // 2
    o_proj = decoder.layers[0].self_attn.o_proj
    _reduce(o_proj, lambda y: tp.all_reduce(y if mine else y * 0))


@_fault("deepspeedai/DeepSpeed#2834", "the residual is added on every rank before the all-reduce")
def residual_before_reduce(decoder: Decoder, tp: TPGroup) -> None:
    layer, residual = decoder.layers[0], []
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: residual.append(args))
    down = lambda y: tp.all_reduce(y + residual[-1][0]) - residual.pop()[0]  # noqa: E731
    _reduce(layer.mlp.down_proj, down)


@_fault(
    "sgl-project/sglang#35535", "a replicated term is added to the partials, so it counts tp times"
)
def replicated_term(decoder: Decoder, tp: TPGroup) -> None:
    _reduce(decoder.layers[0].self_attn.o_proj, lambda y: tp.all_reduce(y + 0.01 * y.new_ones(())))


@_fault("pytorch/pytorch#162692", "the mean over ranks is taken for the sum")
def average_for_sum(decoder: Decoder, tp: TPGroup) -> None:
    _reduce(decoder.layers[-1].mlp.down_proj, lambda y: tp.all_reduce(y, "avg"))


@_fault("pytorch/pytorch#165962", "max over partials is taken for their sum")
def max_for_sum(decoder: Decoder, tp: TPGroup) -> None:
    _reduce(decoder.layers[-1].mlp.down_proj, lambda y: tp.all_reduce(y, "max"))


# Biases.

_BIASED = {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}


@_fault(
    "huggingface/text-generation-inference#1036",
    "the row-parallel bias is added on every rank before the all-reduce",
    needs=_BIASED,
)
def double_bias(decoder: Decoder, tp: TPGroup) -> None:
    down = decoder.layers[0].mlp.down_proj
    bias, down.bias_D = down.bias_D, None
    _reduce(down, lambda y: tp.all_reduce(y + bias))


@_fault("Wenyueh/MinivLLM#80", "the row-parallel bias is dropped when sharded", needs=_BIASED)
def dropped_bias(decoder: Decoder, tp: TPGroup) -> None:
    decoder.layers[0].self_attn.o_proj.bias_D = None


@_fault(
    "PaddlePaddle/FastDeploy#5247",
    "the bias is divided by tp for a sum that then adds it once",
    needs=_BIASED,
)
def divided_bias(decoder: Decoder, tp: TPGroup) -> None:
    bias = decoder.layers[0].mlp.down_proj.bias_D
    _set(bias, bias.data / tp.size)


@_fault("awslabs/slapo#10", "every rank's column-parallel bias is rank 0's", needs=_BIASED)
def column_bias_of_rank_0(decoder: Decoder, tp: TPGroup) -> None:
    bias = _full(tp, decoder, "model.layers.0.mlp.up_proj.bias")
    _set(decoder.layers[0].mlp.up_proj.bias_f, bias.chunk(tp.size)[0])


# Layout.


@_fault("NVIDIA/Megatron-LM#360", "the fused [gate; up] weight is cut in one piece")
def gate_up_contiguous(decoder: Decoder, tp: TPGroup) -> None:
    names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]
    import torch

    fused = torch.cat([_full(tp, decoder, name) for name in names]).chunk(tp.size)[tp.rank]
    mlp = decoder.layers[0].mlp
    for projection, half in zip((mlp.gate_proj, mlp.up_proj), fused.chunk(2), strict=True):
        _set(projection.weight_fD, half)


@_fault(
    "NVIDIA-NeMo/Automodel#1324",
    "the fused [q; k; v] weight is cut in one piece",
    needs={"num_key_value_heads": 8},
)
def qkv_contiguous(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    attention = decoder.layers[0].self_attn
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    fused = torch.cat([_full(tp, decoder, name) for name in names]).chunk(tp.size)[tp.rank]
    for part, piece in zip("qkv", fused.chunk(3), strict=True):
        _set(getattr(attention, f"{part}_proj").weight_fD, piece)


@_fault("vllm-project/vllm-gguf-plugin#103", "every rank loads rank 0's piece of the gate")
def shard_of_rank_0(decoder: Decoder, tp: TPGroup) -> None:
    gate = _full(tp, decoder, "model.layers.0.mlp.gate_proj.weight")
    _set(decoder.layers[0].mlp.gate_proj.weight_fD, gate.chunk(tp.size)[0])


@_fault("vllm-project/vllm#42803", "ranks hold their neighbour's piece of the attention output")
def neighbours_shard(decoder: Decoder, tp: TPGroup) -> None:
    weight = _full(tp, decoder, "model.layers.0.self_attn.o_proj.weight")
    piece = weight.chunk(tp.size, 1)[(tp.rank + 1) % tp.size]
    _set(decoder.layers[0].self_attn.o_proj.weight_Df, piece)


@_fault(
    "ndif-team/nnsight#719", "logits are gathered interleaved instead of one shard after another"
)
def interleaved_gather(decoder: Decoder, tp: TPGroup) -> None:
    def gather(x: torch.Tensor, dim: int) -> torch.Tensor:
        return tp.all_gather(x.unsqueeze(-1), -1).flatten(-2)

    decoder.lm_head.tp = _Seam(tp, all_gather=gather)


@_fault(
    "NVIDIA/Megatron-LM#4841",
    "the sharded state dict declares the wrong dim; the forward is right",
    "tiling",
    drift=False,
    reason="the forward is right",
)
def wrong_shard_dim(decoder: Decoder, tp: TPGroup) -> None:
    from tpcheck.placement import Shard

    name = "model.layers.0.mlp.down_proj.weight"
    decoder._shards[name] = (decoder._shards[name][0], Shard(0))


# Heads and KV heads.


@_fault("vllm-project/vllm-ascend#3366", "with tp above the KV heads a rank holds the wrong one")
def wrong_kv_head(decoder: Decoder, tp: TPGroup) -> None:
    kv, d = decoder.spec.num_key_value_heads, decoder.spec.head_dim
    held = max(1, kv // tp.size)
    for part in "kv":
        weight = _full(tp, decoder, f"model.layers.0.self_attn.{part}_proj.weight")
        rows = weight.view(kv, d, -1).roll(-held, 0)
        first = tp.rank * held if kv >= tp.size else tp.rank * kv // tp.size
        piece = rows[first : first + held].flatten(0, 1)
        _set(getattr(decoder.layers[0].self_attn, f"{part}_proj").weight_fD, piece)


@_fault("deepspeedai/DeepSpeed#5428", "the value heads are permuted against the query heads")
def permuted_value_heads(decoder: Decoder, tp: TPGroup) -> None:
    o_proj = decoder.layers[0].self_attn.o_proj
    d = decoder.spec.head_dim
    o_proj.register_forward_pre_hook(
        lambda _, args: (args[0].unflatten(-1, (-1, d)).flip(-1).flatten(-2),)
    )


@_fault(
    "vllm-project/vllm#38191", "k_norm holds rank 0's weight", needs={"qk_norm": "across_heads"}
)
def k_norm_of_rank_0(decoder: Decoder, tp: TPGroup) -> None:
    norm = decoder.layers[0].self_attn.q_norm
    weight = _full(tp, decoder, "model.layers.0.self_attn.q_norm.weight")
    _set(norm.weight_hd, weight.chunk(tp.size)[0].view_as(norm.weight_hd))


# Padding and vocabulary.


@_fault(
    "ByteDance-Seed/VeOmni#1139",
    "the last FFN column of the last rank is never read",
    drift=False,
    reason="one column of a wide FFN can stay below bfloat16's rounding",
)
def dropped_column(decoder: Decoder, tp: TPGroup) -> None:
    if tp.rank == tp.size - 1:
        decoder.layers[0].mlp.down_proj.weight_Df.data[:, -1] = 0


@_fault("pegainfer-project/pegainfer#760", "the vocabulary's padding is not cut off the logits")
def padded_logits(decoder: Decoder, tp: TPGroup) -> None:
    decoder.lm_head.vocab_size = None


@_fault("vllm-project/vllm#41972", "memory that nobody wrote reaches the residual stream")
def uninitialised_operand(decoder: Decoder, tp: TPGroup) -> None:
    _reduce(decoder.layers[0].mlp.down_proj, lambda y: tp.all_reduce(y + y.new_full((), 1e4)))


@_fault("vllm-project/vllm#20843", "the embedding masks one row too few")
def embedding_row_shared(decoder: Decoder, tp: TPGroup) -> None:
    embed = decoder.embed_tokens
    real = tp.all_reduce

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        return real(x + 0.05 * embed.weight_vD[0])

    _reduce(embed, all_reduce)


@_fault(
    "tenstorrent/tt-metal#51428",
    "the tied head scores rank 0's rows on every rank",
    needs={"tie_word_embeddings": True},
)
def tied_head_of_rank_0(decoder: Decoder, tp: TPGroup) -> None:
    rows = _full(tp, decoder, "model.embed_tokens.weight")[: decoder.lm_head.weight_vD.shape[0]]
    from tpcheck.reference.linear import frozen

    decoder.lm_head.weight_vD = frozen(rows.clone())


# Norms.


@_fault(
    "EleutherAI/gpt-neox#1424",
    "the norm across heads takes its statistic over the rank's own heads",
    needs={"qk_norm": "across_heads"},
)
def local_norm(decoder: Decoder, tp: TPGroup) -> None:
    norm = decoder.layers[0].self_attn.q_norm
    norm.full_size //= tp.size
    _reduce(norm, lambda squares: squares)


@_fault(
    "vllm-project/vllm#16311",
    "the sharded path builds its norms with eps 1e-5 for 1e-6",
    drift=False,
    reason="moves logits by 1e-6 relative, far below bfloat16's rounding",
)
def norm_eps(decoder: Decoder, tp: TPGroup) -> None:
    for layer in decoder.layers:
        layer.input_layernorm.eps = layer.post_attention_layernorm.eps = 1e-5


# Dtypes and scales.


@_fault(
    "NVIDIA/TransformerEngine#1761",
    "partials are reduced in bfloat16 whatever the activations are",
    "drift",
    dtypes=("float16", "float32"),
)
def bfloat16_wire(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    for layer in decoder.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            _reduce(module, lambda y: tp.all_reduce(y.to(torch.bfloat16)).to(y.dtype))


@_fault("vllm-project/vllm#55345", "partials above 65504 are cast to float16 without saturation")
def float16_overflow(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    scale = 1e5
    _reduce(
        decoder.layers[0].mlp.down_proj,
        lambda y: tp.all_reduce((y * scale).to(torch.float16)).to(y.dtype) / scale,
    )


@_fault(
    "sgl-project/sglang#26436",
    "one rank's attention is scaled by 1 + 2^-7",
    drift=False,
    reason="2^-7 on one rank is bfloat16's own step; a whole model dilutes it",
)
def scaled_rank(decoder: Decoder, tp: TPGroup) -> None:
    factor = 1 + 2**-7 if tp.rank == tp.size - 1 else 1.0
    _reduce(decoder.layers[0].self_attn.o_proj, lambda y: tp.all_reduce(y * factor))


# Ranks, calls and configuration.


@_fault(
    "openai/gpt-oss#270",
    "ranks above 0 draw their own noise: rank 0 is right",
    "rank_agreement",
    drift=False,
    reason="rank 0's logits are right",
)
def rank_noise(decoder: Decoder, tp: TPGroup) -> None:
    if tp.rank > 0:
        decoder.register_forward_hook(lambda _, __, logits: logits * (1 + 2**-6))


@_fault(
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


@_fault("deepspeedai/DeepSpeed#7278", "every rank is fed another prompt")
def prompts_per_rank(decoder: Decoder, tp: TPGroup) -> None:
    decoder.embed_tokens.register_forward_pre_hook(lambda _, args: (args[0].roll(tp.rank, 0),))


@_fault("NVIDIA-NeMo/RL#1227", "a hook keeps the first batch row only")
def first_row_only(decoder: Decoder, tp: TPGroup) -> None:
    decoder.layers[0].self_attn.register_forward_hook(lambda _, __, y: y[:1].expand_as(y))


@_fault(
    "ztxz16/fastllm#725",
    "one rank makes a collective the others do not",
    "schedule",
    drift=False,
    reason="the forward never ends",
)
def extra_collective(decoder: Decoder, tp: TPGroup) -> None:
    if tp.rank == tp.size - 1:
        o_proj = decoder.layers[0].self_attn.o_proj
        _reduce(o_proj, lambda y: tp.all_reduce(tp.all_gather(y, 0)[: y.shape[0]]))


@_fault(
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
        _reduce(decoder.layers[0].mlp.down_proj, all_reduce)


@_fault(
    "vllm-project/vllm-ascend#11885",
    "decoding counts its position one too far; a whole forward is right",
    "decode",
    drift=False,
    reason="a whole forward is right",
)
def decode_position(decoder: Decoder, tp: TPGroup) -> None:
    real = decoder.step

    def step(ids: torch.Tensor, state: Any) -> Any:
        return real(ids, tuple((k.roll(1, 2), v) for k, v in state))

    decoder.step = step  # type: ignore[method-assign]


@_fault("meta-pytorch/gpt-fast", "the sharded path rotates with another rope_theta")
def rope_theta(decoder: Decoder, tp: TPGroup) -> None:
    from dataclasses import replace

    for layer in decoder.layers:
        layer.self_attn.spec = replace(decoder.spec, rope_theta=5000.0)
