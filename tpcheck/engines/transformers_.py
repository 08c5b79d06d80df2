"""transformers 5.23: the model's own tp plan, heads unchecked until the first forward.

Requirement: uneven widths are legal, a cut head or a KV head that is not replicated loads and then
fails in a view, and a model without a plan is refused with a text. Texts are torch's, for the batch
and length of `batch` and `seq_len` (1 and 7 where they are not given).
"""

from __future__ import annotations

from typing import Any

from tpcheck.engines import gated_delta, state_space
from tpcheck.engines.base import Engine, Finding, Rule, is_gpt_oss, padded_fix, width_fix
from tpcheck.engines.facts import Facts, ceil_div, chunks
from tpcheck.engines.transformers_plans import class_name, plan_of

_PLAN = "transformers/distributed/tensor_parallel.py:143-312"
_PARTIAL = "transformers/distributed/mixin.py:261"


def _no_plan(facts: Facts, tp_size: int) -> Finding | None:
    if tp_size == 1 or plan_of(facts) is not None:
        return None
    kind = facts.model_type or ""
    name = facts.architecture or class_name(kind)
    text = (
        f"`tp_size={tp_size}` was requested, but `{name}` has no `tp_plan`. Pass `tp_plan` in"
        " `DistributedConfig`, add `base_model_tp_plan` to the model's config, or set `tp_size=1`."
    )
    return Finding("error", text, text, fix="pass a tp_plan")


def _nvfp4(facts: Facts, tp_size: int) -> Finding | None:
    if tp_size == 1:
        return None
    text = (
        "NVFP4 quantization does not support tensor parallelism yet because its scale metadata does"
        " not have a sharding plan."
    )
    return Finding("error", text, text)


def _heads(facts: Facts, tp_size: int) -> Finding | None:
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(facts, name)
        if heads is None or heads % tp_size == 0 or (facts.uses_mla and name != _Q):
            continue
        reason, text = f"{name}={heads} is cut inside heads at tp_size={tp_size}", None
        if facts.head_dim:
            batch, seq_len = facts.batch or 1, facts.seq_len or 7
            widths = chunks(heads * facts.head_dim, tp_size)
            width = next((one for one in widths if one % facts.head_dim), 0)
            size = batch * seq_len * width
            text = (
                f"shape '[{batch}, {seq_len}, -1, {facts.head_dim}]' is invalid for input of size"
                f" {size}"
            )
            reason = f"{text} ({name}={heads}, at the first forward)"
        return Finding("late_error", reason, text, fix=padded_fix(facts, tp_size, name))
    return None


_Q = "num_attention_heads"


def _cut_before_taken_apart(facts: Facts, tp_size: int) -> Finding | None:
    """Each rank cuts its rows of the fused tensor as if they were all: it has others' pieces."""
    if tp_size == 1:
        return None
    reason = (
        "gqkv_proj and gate_up_proj of the checkpoint are cut over the ranks before they are taken"
        " apart: a rank's q_proj holds rows of other projections"
    )
    return Finding("silent_wrong", reason, fix="store the projections apart")


def _expert_strides(facts: Facts, tp_size: int) -> Finding | None:
    width = facts.moe_intermediate_size
    assert width is not None
    item = 2 if facts.dtype in ("bfloat16", "float16") else 4
    if all(local * item % 16 == 0 for local in {*chunks(width, tp_size)}):
        return None
    text = "strides should be multiple of 16 bytes"
    grain = tp_size * 16 // item
    fix = f"pad moe_intermediate_size to {-(-width // grain) * grain}"
    local = ceil_div(width, tp_size)
    reason = f"{text} (moe_intermediate_size={width}, {local} x {item} bytes a rank)"
    return Finding("late_error", reason, text, fix=fix)


def _blocks(facts: Facts, tp_size: int) -> Finding | None:
    assert facts.block is not None
    if tp_size == 1:
        return None
    for linear in facts.linears:
        if not facts.quantized(linear) or not _is_split(facts, linear.name):
            continue
        by_rows = linear.style == "rows"
        parts = [linear.in_features] if by_rows else [part.size for part in linear.parts]
        for size in parts:
            found = _scales(facts, tp_size, linear.name, size or 0, facts.block[by_rows])
            if found:
                return found
    return None


def _is_split(facts: Facts, name: str) -> bool:
    return "self_attn" not in name or plan_of(facts) in ("heads", "gathered")


def _scales(facts: Facts, tp_size: int, name: str, size: int, block: int) -> Finding | None:
    local = ceil_div(size, tp_size)
    if size == 0 or local % block == 0:
        return None
    blocks = chunks(ceil_div(size, block), tp_size)
    needed = ceil_div(local, block)
    sizes = {
        "weight_per_rank": local,
        "scale_blocks": ceil_div(size, block),
        "scale_blocks_per_rank": blocks[0],
        "blocks_needed_per_rank": needed,
        "misaligned_rows": (
            f"rank1 starts at row {local} = block {local / block:g} but gets scale blocks"
            f" {blocks[0]}..{blocks[0] + blocks[1] - 1}"
        ),
    }
    fix = width_fix(facts, tp_size, name, local)
    if any(count != needed for count in blocks):
        reason = f"{name}: scale blocks {blocks} over the ranks, {needed} needed; not checked"
        return Finding("late_error", reason, None, sizes, fix)
    return Finding("silent_wrong", f"{name}: {sizes['misaligned_rows']}", None, sizes, fix)


def _widths(facts: Facts, tp_size: int) -> Finding | None:
    uneven = _uneven(facts, tp_size)
    if not uneven:
        return None
    name, (sizes, _) = next(iter(uneven.items()))
    return Finding("uneven", f"{name}: {sizes[0]} wide on the first rank, {sizes[-1]} on the last")


def _split_sizes(facts: Facts) -> dict[str, tuple[int | None, bool]]:
    """Return weight → (the size that is split, whether it is the input side)."""
    if plan_of(facts) == "lm_head":
        return {"lm_head": (facts.vocab_size, False)}
    width, shared = facts.intermediate_size, facts.shared_expert_intermediate_size
    found: dict[str, tuple[int | None, bool]] = {}
    if plan_of(facts) == "gathered":
        heads, kv_heads, dim = facts.num_attention_heads, facts.num_key_value_heads, facts.head_dim
        if heads and kv_heads and dim:
            found["self_attn.o_proj"] = (heads * dim, True)
            found["self_attn.qkv_proj"] = ((heads + 2 * kv_heads) * dim, False)
        found["mlp.gate_up_proj"] = (2 * width if width else None, False)
    else:
        found["mlp.gate_proj"] = (width, False)
    found["mlp.down_proj"] = (width, True)
    found["mlp.shared_expert.gate_proj"] = (shared, False)
    found["lm_head"] = (None if facts.tied else facts.vocab_size, False)
    return found


def _uneven(facts: Facts, tp_size: int) -> dict[str, tuple[list[int], bool]]:
    return {
        name: (chunks(size, tp_size), is_input)
        for name, (size, is_input) in _split_sizes(facts).items()
        if size and size % tp_size
    }


def _all_but_head(facts: Facts, tp_size: int) -> Finding | None:
    if tp_size == 1:
        return None
    return Finding("replicate", "no base plan: everything but lm_head is on every rank")


def _shapes(facts: Facts, tp_size: int) -> dict[str, Any] | None:
    """Return the shapes of rank 0's weights."""
    hidden = facts.hidden_size
    if hidden is None:
        return None
    plan = plan_of(facts)
    whole = 1 if plan in ("lm_head", "whole") else tp_size
    shapes: dict[str, list[int]] = {}
    heads, kv_heads, dim = facts.num_attention_heads, facts.num_key_value_heads, facts.head_dim
    if heads and kv_heads and dim and not facts.uses_mla:
        queries, keys = heads * dim, kv_heads * dim
        if plan == "gathered":
            rows = queries + 2 * keys
            shapes["self_attn.qkv_proj.weight"] = [ceil_div(rows, whole), hidden]
        else:
            shapes["self_attn.q_proj.weight"] = [ceil_div(queries, whole), hidden]
            shapes["self_attn.k_proj.weight"] = [ceil_div(keys, whole), hidden]
        shapes["self_attn.o_proj.weight"] = [hidden, ceil_div(queries, whole)]
    elif heads and facts.v_head_dim:
        shapes["self_attn.o_proj.weight"] = [hidden, ceil_div(heads * facts.v_head_dim, whole)]
    shapes |= _mlp_shapes(facts, hidden, 1 if plan == "lm_head" else tp_size, plan == "gathered")
    if facts.vocab_size and not facts.tied:
        shapes["lm_head.weight"] = [ceil_div(facts.vocab_size, tp_size), hidden]
    return {"rank0_shapes": shapes, "uneven": _uneven_shapes(facts, tp_size, hidden)}


def _mlp_shapes(facts: Facts, hidden: int, tp_size: int, fused: bool) -> dict[str, list[int]]:
    width, experts = facts.moe_intermediate_size, facts.num_experts
    shapes = {}
    if width and experts:
        local = ceil_div(width, tp_size)
        fused_out = (
            [experts, hidden, 2 * local] if _transposed(facts) else [experts, 2 * local, hidden]
        )
        down = [experts, local, hidden] if _transposed(facts) else [experts, hidden, local]
        shapes["mlp.experts.gate_up_proj"] = fused_out
        shapes["mlp.experts.down_proj"] = down
    if facts.intermediate_size:
        local = ceil_div(facts.intermediate_size, tp_size)
        name = "mlp.gate_up_proj.weight" if fused else "mlp.gate_proj.weight"
        rows = ceil_div(2 * facts.intermediate_size, tp_size) if fused else local
        shapes[name] = [rows, hidden]
        shapes["mlp.down_proj.weight"] = [hidden, local]
    return shapes


def _transposed(facts: Facts) -> bool:
    return is_gpt_oss(facts)


def _uneven_shapes(facts: Facts, tp_size: int, hidden: int) -> dict[str, list[list[int]]]:
    return {
        f"{name}.weight": [[hidden, size] if is_input else [size, hidden] for size in sizes]
        for name, (sizes, is_input) in _uneven(facts, tp_size).items()
    }


RULES = (
    Rule("hf.no_plan", _PARTIAL, _no_plan, area="model", role="text"),
    Rule(
        "hf.nvfp4",
        "transformers/quantizers/quantizer_nvfp4.py:82-88",
        _nvfp4,
        ("quant",),
        "model",
        when=lambda facts: facts.method == "nvfp4",
    ),
    Rule(
        "hf.heads",
        _PLAN,
        _heads,
        area="qkv_proj",
        when=lambda facts: plan_of(facts) == "heads",
    ),
    Rule(
        "hf.fused_checkpoint",
        "transformers/conversion_mapping.py:427-444",
        _cut_before_taken_apart,
        area="qkv_proj",
        when=lambda facts: facts.model_type == "hrm_text",
    ),
    Rule(
        "hf.moe_stride",
        "transformers/integrations/moe.py + torch grouped_mm",
        _expert_strides,
        ("moe_intermediate_size",),
        "experts",
        when=lambda facts: plan_of(facts) != "lm_head",
    ),
    Rule(
        "hf.fp8_block",
        "transformers/integrations/finegrained_fp8.py; distributed/tensor_parallel.py",
        _blocks,
        ("quant",),
        when=lambda facts: facts.block is not None,
    ),
    Rule(
        "hf.replicated",
        "transformers/models/gpt_oss/modeling_gpt_oss.py:566",
        _all_but_head,
        area="model",
        when=lambda facts: plan_of(facts) == "lm_head",
    ),
    *gated_delta.TRANSFORMERS,
    *state_space.TRANSFORMERS,
    Rule("hf.uneven", _PLAN, _widths, refuses=False),
)

_READ_METHODS = frozenset("fp8 nvfp4 mxfp4".split())
"""Methods whose behaviour under a plan was read; the others are planned as if unquantized."""


def _unknown_format(method: str) -> bool:
    return method not in _READ_METHODS


ENGINE = Engine(
    "transformers",
    "5.23.0",
    RULES,
    (("any", (), _shapes),),
    splits_towers=False,
    unknown_format=_unknown_format,
)
