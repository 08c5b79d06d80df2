"""Linear attention with a gated delta rule (Qwen3-Next, Qwen3.5), engine by engine.

Requirement: these layers have key and value heads of their own, beside attention's: 16 and 32 where
attention has 16 and 2. Their convolution runs over keys, queries and values together, so a degree
can divide its width and still cut a head.
"""

from __future__ import annotations

from tpcheck.engines.base import Finding, Rule
from tpcheck.engines.facts import Facts, Linear, round_up

NEEDS = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
)
_HEADS = NEEDS[:2]
_AREA = "qkv_proj"
_DIVIDE = "{} is not divisible by {}"
_MULTIPLE = "linear_num_value_heads ({}) must be a multiple of linear_num_key_heads ({})."


def _counts(facts: Facts) -> tuple[int, int]:
    keys, values = facts.linear_num_key_heads, facts.linear_num_value_heads
    assert keys is not None
    assert values is not None
    return keys, values


def _widths(facts: Facts) -> tuple[int, int]:
    """Return all keys' and all values' features."""
    keys, values = _counts(facts)
    assert facts.linear_key_head_dim is not None
    assert facts.linear_value_head_dim is not None
    return keys * facts.linear_key_head_dim, values * facts.linear_value_head_dim


def _projection(facts: Facts) -> Linear | None:
    name = "linear_attn.in_proj_qkvz"
    return next((linear for linear in facts.linears if linear.name == name), None)


def _cut_heads(facts: Facts, tp_size: int) -> Finding | None:
    """Return what the first forward says of heads that no view can separate."""
    for name, heads in zip(_HEADS, _counts(facts), strict=True):
        if heads % tp_size:
            reason = f"{name}={heads} is cut inside heads at tp_size={tp_size}"
            return Finding("late_error", reason, fix=_fix(facts, tp_size))
    return None


def _fix(facts: Facts, tp_size: int) -> str:
    keys, values = _counts(facts)
    padded = round_up(keys, tp_size)
    return f"pad linear_num_key_heads to {padded} and values to {padded * max(1, values // keys)}"


def _refused(facts: Facts, tp_size: int, size: int, what: str, *, text: bool) -> Finding:
    said = _DIVIDE.format(size, tp_size) if text else ""
    reason = said or f"{what}={size} is not divisible by tp_size={tp_size} (a bare assert, no text)"
    return Finding("error", f"linear attention: {reason}", said, fix=_fix(facts, tp_size))


def _vllm(facts: Facts, tp_size: int) -> Finding | None:
    keys, values = _widths(facts)
    value_heads = _counts(facts)[1]
    conv = 2 * keys + values
    if conv % tp_size:
        return _refused(facts, tp_size, conv, "conv1d", text=True)
    projection = _projection(facts)
    for part in projection.parts if projection else ():
        if part.size % tp_size:
            return _refused(facts, tp_size, part.size, "in_proj_qkvz", text=False)
    if value_heads % tp_size:
        # Qwen3-Next keeps b and a of a head together, the others each by itself
        together = projection is not None and len(projection.parts) == 1
        gates = 2 * value_heads if together else value_heads
        if gates % tp_size:
            return _refused(facts, tp_size, gates, "in_proj_ba", text=False)
        return _refused(facts, tp_size, value_heads, "A_log", text=True)
    return _cut_heads(facts, tp_size)


def _sglang(facts: Facts, tp_size: int) -> Finding | None:
    keys, values = _widths(facts)
    gates = 2 * _counts(facts)[1]
    for what, size in (
        ("conv1d", 2 * keys + values),
        ("in_proj_qkvz", 2 * keys + 2 * values),
        ("in_proj_ba", gates),
        ("out_proj", values),
    ):
        if size % tp_size:
            return _refused(facts, tp_size, size, what, text=True)
    return _cut_heads(facts, tp_size)


def _sglang_cpu(facts: Facts, tp_size: int) -> Finding | None:
    keys, values = _counts(facts)
    if keys % tp_size == 0 and values % tp_size == 0:
        return None
    padded = round_up(keys, tp_size)
    held = padded * values // keys
    reason = (
        f"linear attention: {keys} key heads padded to {padded}, {values} value heads to {held}"
    )
    return Finding("pad", reason, None, {"linear_heads": {"keys": padded, "values": held}})


def _megatron(facts: Facts, tp_size: int) -> Finding | None:
    keys, values = _counts(facts)
    if values % keys:
        text = _MULTIPLE.format(values, keys)
        return Finding("error", text, text)
    for name, heads in zip(_HEADS, (keys, values), strict=True):
        if heads % tp_size:
            text = (
                f"self.{name}={heads} must be a multiple of"
                f" (self.tensor_model_parallel_size={tp_size} * self.context_parallel_size=1)."
            )
            return Finding("error", text, text, fix=_fix(facts, tp_size))
    return None


def _exllamav3(facts: Facts, tp_size: int) -> Finding | None:
    if tp_size == 1:
        return None
    keys, values = _counts(facts)
    key_dim, value_dim = facts.linear_key_head_dim, facts.linear_value_head_dim
    assert key_dim is not None
    assert value_dim is not None
    if values % keys:
        text = "num_k_heads doesn't divide num_v_heads"
        return Finding("error", text, text)
    together, left = 1, keys
    while together * key_dim < 128 and left % 2 == 0:
        together, left = 2 * together, left // 2
    whole = all(together * dim % 128 == 0 for dim in (key_dim, value_dim))
    if whole and together * key_dim >= 128:
        return None
    text = "Model's K/V heads cannot divide into 128-channel tensors"
    return Finding("error", f"linear attention: {text}", text)


def _gathered(facts: Facts, tp_size: int) -> Finding | None:
    """Say nothing: every projection's output is gathered, so any number of heads runs."""
    return None


_VLLM_SOURCE = "vllm/model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py (00545a8a)"
_SGLANG_SOURCE = "sglang/srt/models/qwen3_next.py (0201bc80)"

VLLM = (Rule("vllm.gated_delta", _VLLM_SOURCE, _vllm, NEEDS, _AREA),)
SGLANG = (
    Rule(
        "sglang.gated_delta",
        _SGLANG_SOURCE,
        _sglang,
        NEEDS,
        _AREA,
        when=lambda facts: facts.device == "cuda",
    ),
    Rule(
        "sglang.cpu_linear_heads_pad",
        "sglang/srt/configs/update_config.py (041d7c58)",
        _sglang_cpu,
        _HEADS,
        _AREA,
        when=lambda facts: facts.device == "cpu",
        refuses=False,
    ),
)
MEGATRON = (
    Rule(
        "megatron.gated_delta",
        "megatron/core/transformer/transformer_config.py:1495-1509",
        _megatron,
        _HEADS,
        _AREA,
    ),
)
TRANSFORMERS = (
    Rule(
        "hf.gathered_linear_attention",
        "transformers/models/qwen3_next/configuration_qwen3_next.py:77-79",
        _gathered,
        _HEADS,
        _AREA,
        refuses=False,
    ),
)
EXLLAMAV3 = (
    Rule(
        "exllamav3.gated_delta",
        "exllamav3/modules/gated_delta_net.py:950-964",
        _exllamav3,
        NEEDS,
        _AREA,
    ),
)


def covers(rules: tuple[Rule, ...]) -> bool:
    """Whether an engine's rules say anything about linear attention."""
    return any(_HEADS[0] in rule.needs for rule in rules)
