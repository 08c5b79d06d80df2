"""State-space layers (Mamba and Mamba-2, alone or beside attention), engine by engine.

Requirement: these layers have heads and groups of their own: Falcon-H1-34B's 20 attention heads
divide by four ranks and its two groups of B and C do not. The first Mamba has no heads, only a
width.
"""

from __future__ import annotations

from tpcheck.engines.base import Finding, Rule
from tpcheck.engines.facts import Facts

WIDTH = "mamba_intermediate_size"
_HEADS = (WIDTH, "mamba_num_heads", "mamba_n_groups")
_AREA = "qkv_proj"
_HEADS_TEXT = "Tensor parallel world size must divide num heads."
_GROUPS_TEXT = (
    "If tensor parallel world size does not divide num_groups, then num_groups must equal 1."
)
_QUANTIZED_TEXT = (
    "Tensor parallel currently supported for quantized models only if tensor parallel world size"
    " divides num groups."
)


def _refused(facts: Facts, tp_size: int, said: str) -> Finding:
    heads, groups = facts.mamba_num_heads, facts.mamba_n_groups
    sizes = f"mamba_num_heads={heads}, mamba_n_groups={groups} at tp_size={tp_size}"
    return Finding("error", f"state-space layers: {said} ({sizes})", said)


def _mixer2(facts: Facts, tp_size: int) -> Finding | None:
    """Check what vLLM's MambaMixer2 asserts; SGLang's is a copy of it with one more."""
    heads, groups = facts.mamba_num_heads, facts.mamba_n_groups
    assert heads is not None
    assert groups is not None
    if heads % tp_size:
        return _refused(facts, tp_size, _HEADS_TEXT)
    if groups % tp_size == 0:
        return None
    if groups != 1:
        return _refused(facts, tp_size, _GROUPS_TEXT)
    return Finding("replicate", f"state-space layers: their one group is on all {tp_size} ranks")


def _sglang_mixer2(facts: Facts, tp_size: int) -> Finding | None:
    found = _mixer2(facts, tp_size)
    copied = found is not None and found.outcome == "replicate"
    if copied and facts.quant is not None and not _in_proj_is_left_out(facts):
        return _refused(facts, tp_size, _QUANTIZED_TEXT)
    return found


def _in_proj_is_left_out(facts: Facts) -> bool:
    ignored = facts.quant.ignored if facts.quant else ()
    return any("mamba" in name or "in_proj" in name for name in ignored)


def _width(facts: Facts, tp_size: int) -> Finding | None:
    width = facts.mamba_intermediate_size
    assert width is not None
    if width % tp_size == 0:
        return None
    text = f"{width} is not divisible by {tp_size}"
    return Finding("error", f"state-space layers: {text}", text)


def _megatron(facts: Facts, tp_size: int) -> Finding | None:
    heads, groups = facts.mamba_num_heads, facts.mamba_n_groups
    assert heads is not None
    assert groups is not None
    if heads % tp_size:
        return _refused(facts, tp_size, "nheads must be evenly divisble by tp_size")
    if groups % tp_size:
        return _refused(facts, tp_size, "ngroups must be evenly divisible by tp_size")
    if heads % groups:
        return _refused(facts, tp_size, "nheads must be evenly divisible by ngroups")
    return None


def _whole(facts: Facts, tp_size: int) -> Finding | None:
    """Say nothing: no plan names these layers, so each rank has them whole."""
    return None


def _has_no_heads(facts: Facts) -> bool:
    return facts.mamba_num_heads is None


VLLM = (
    Rule(
        "vllm.mamba2",
        "vllm/model_executor/layers/mamba/mamba_mixer2.py:316-341",
        _mixer2,
        _HEADS,
        _AREA,
    ),
    Rule(
        "vllm.mamba",
        "vllm/model_executor/layers/mamba/mamba_mixer.py:91-111; layers/linear.py:497",
        _width,
        (WIDTH,),
        _AREA,
        when=_has_no_heads,
    ),
)
SGLANG = (
    Rule(
        "sglang.mamba2",
        "sglang/srt/layers/attention/mamba/mamba.py:245-262",
        _sglang_mixer2,
        _HEADS,
        _AREA,
    ),
)
MEGATRON = (
    Rule(
        "megatron.mamba2",
        "megatron/core/ssm/mamba_mixer.py:262-274",
        _megatron,
        _HEADS,
        _AREA,
    ),
)
TRANSFORMERS = (
    Rule(
        "hf.whole_state_space",
        "transformers/models/*/configuration_*.py: base_model_tp_plan",
        _whole,
        (WIDTH,),
        _AREA,
        refuses=False,
    ),
)


def covers(rules: tuple[Rule, ...], facts: Facts) -> bool:
    """Whether an engine's rules say anything about this part's state-space layers."""
    about = [rule for rule in rules if WIDTH in rule.needs]
    return any(
        all(getattr(facts, name) is not None for name in rule.needs)
        and (rule.when is None or rule.when(facts))
        for rule in about
    )
