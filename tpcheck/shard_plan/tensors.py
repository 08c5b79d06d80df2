"""The decoder's weights: their Hugging Face names, shapes, and what splits them.

Requirement: which dim of which weight is split, and by what, is said once; the modules, their
shards and their placements follow from it, costs are counted from it, and a checkpoint is held
against the same table. A bias that the spec does not have is absent here, which is how modules
know.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpcheck.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A whole weight. `split` is what `dim` counts: "query", "kv", "vocab" or a width, or "".

    A width is "intermediate", "moe_intermediate" or "shared_expert_intermediate".
    """

    shape: tuple[int, ...]
    split: str = ""
    dim: int = 0


def logical_tensors(spec: ModelSpec) -> dict[str, LogicalTensor]:
    """Return every weight of a spec by its name, in order of execution."""
    vocab_shape = (spec.vocab_size, spec.hidden_size)
    tensors = {"model.embed_tokens.weight": LogicalTensor(vocab_shape, "vocab")}
    if spec.position == "learned":
        shape = (spec.max_position_embeddings, spec.hidden_size)
        tensors["model.embed_positions.weight"] = LogicalTensor(shape)
    for layer in range(spec.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        tensors |= _norm(f"{prefix}.input_layernorm", spec)
        tensors |= _attention(f"{prefix}.self_attn", spec)
        tensors |= _norm(f"{prefix}.post_attention_layernorm", spec)
        feed_forward = _experts if spec.num_experts else _mlp
        tensors |= feed_forward(f"{prefix}.mlp", spec)
    tensors |= _norm("model.norm", spec)
    if not spec.tie_word_embeddings:
        tensors["lm_head.weight"] = LogicalTensor(vocab_shape, "vocab")
    if spec.lm_head_bias:
        tensors["lm_head.bias"] = LogicalTensor((spec.vocab_size,), "vocab")
    return tensors


def _attention(prefix: str, spec: ModelSpec) -> dict[str, LogicalTensor]:
    queries = spec.num_attention_heads * spec.head_dim
    keys = spec.num_key_value_heads * spec.head_dim
    tensors: dict[str, LogicalTensor] = {}
    for name, rows, split in (
        ("q_proj", queries, "query"),
        ("k_proj", keys, "kv"),
        ("v_proj", keys, "kv"),
    ):
        tensors |= _column(f"{prefix}.{name}", rows, split, spec.hidden_size, spec.attention_bias)
    if spec.qk_norm == "per_head":
        for name in ("q_norm", "k_norm"):
            tensors[f"{prefix}.{name}.weight"] = LogicalTensor((spec.head_dim,))
    if spec.qk_norm == "across_heads":
        tensors[f"{prefix}.q_norm.weight"] = LogicalTensor((queries,), "query")
        tensors[f"{prefix}.k_norm.weight"] = LogicalTensor((keys,), "kv")
    if spec.quantization is not None and spec.quantization.kv_cache != "none":
        per_head = spec.quantization.kv_cache == "head"
        scale = (
            LogicalTensor((spec.num_key_value_heads,), "kv") if per_head else LogicalTensor((1,))
        )
        tensors |= {f"{prefix}.k_scale": scale, f"{prefix}.v_scale": scale}
    if spec.attention_sinks:
        tensors[f"{prefix}.sinks"] = LogicalTensor((spec.num_attention_heads,), "query")
    return tensors | _row(
        f"{prefix}.o_proj", queries, "query", spec.hidden_size, spec.attention_out_bias
    )


def _mlp(prefix: str, spec: ModelSpec) -> dict[str, LogicalTensor]:
    names = ("gate_proj", "up_proj") if spec.mlp == "gated" else ("up_proj",)
    size, hidden, bias = spec.intermediate_size, spec.hidden_size, spec.mlp_bias
    return _feed_forward(prefix, names, size, "intermediate", hidden, bias)


def _experts(prefix: str, spec: ModelSpec) -> dict[str, LogicalTensor]:
    """The router, every expert, and the shared expert behind its own gate."""
    names, hidden = ("gate_proj", "up_proj"), spec.hidden_size
    tensors = {f"{prefix}.gate.weight": LogicalTensor((spec.num_experts, hidden))}
    if spec.router_bias:
        tensors[f"{prefix}.gate.bias"] = LogicalTensor((spec.num_experts,))
    size, shared = spec.moe_intermediate_size, spec.shared_expert_intermediate_size
    for expert in range(spec.num_experts):
        where, split = f"{prefix}.experts.{expert}", "moe_intermediate"
        tensors |= _feed_forward(where, names, size, split, hidden, spec.mlp_bias)
    if shared:
        tensors[f"{prefix}.shared_expert_gate.weight"] = LogicalTensor((1, hidden))
        where, split = f"{prefix}.shared_expert", "shared_expert_intermediate"
        tensors |= _feed_forward(where, names, shared, split, hidden, bias=False)
    return tensors


def _feed_forward(
    prefix: str, columns: tuple[str, ...], size: int, split: str, hidden: int, bias: bool
) -> dict[str, LogicalTensor]:
    tensors: dict[str, LogicalTensor] = {}
    for name in columns:
        tensors |= _column(f"{prefix}.{name}", size, split, hidden, bias)
    return tensors | _row(f"{prefix}.down_proj", size, split, hidden, bias)


def _column(name: str, rows: int, split: str, columns: int, bias: bool) -> dict[str, LogicalTensor]:
    tensors = {f"{name}.weight": LogicalTensor((rows, columns), split)}
    if bias:
        tensors[f"{name}.bias"] = LogicalTensor((rows,), split)
    return tensors


def _row(name: str, columns: int, split: str, rows: int, bias: bool) -> dict[str, LogicalTensor]:
    tensors = {f"{name}.weight": LogicalTensor((rows, columns), split, dim=1)}
    if bias:
        tensors[f"{name}.bias"] = LogicalTensor((rows,))
    return tensors


def _norm(name: str, spec: ModelSpec) -> dict[str, LogicalTensor]:
    tensors = {f"{name}.weight": LogicalTensor((spec.hidden_size,))}
    if spec.norm_type == "layer":
        tensors[f"{name}.bias"] = LogicalTensor((spec.hidden_size,))
    return tensors
