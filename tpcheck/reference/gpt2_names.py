"""GPT-2's checkpoint names: Conv1D weights are [in, out], and q, k, v are fused in one tensor.

Requirement: the decoder knows one set of names; this table says where GPT-2 keeps each.
Hub checkpoints omit the `transformer.` prefix that save_pretrained writes. Torch-free.
"""

from __future__ import annotations

from tpcheck.reference.layout import logical_tensors
from tpcheck.reference.stored import Stored
from tpcheck.spec import ModelSpec

_ENDS = {
    "model.embed_tokens": "wte",
    "model.embed_positions": "wpe",
    "model.norm": "ln_f",
}
_MODULES = {
    "input_layernorm": "ln_1",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def gpt2_stored(spec: ModelSpec, names: tuple[str, ...]) -> dict[str, Stored]:
    """Return where a GPT-2 checkpoint with these tensor names stores each logical tensor."""
    prefix = "transformer." if any(name.startswith("transformer.") for name in names) else ""
    return {name: _stored(prefix, name) for name in logical_tensors(spec)}


def _stored(prefix: str, name: str) -> Stored:
    module, _, leaf = name.rpartition(".")
    if module in _ENDS:
        return Stored(f"{prefix}{_ENDS[module]}.{leaf}")
    if not module.startswith("model.layers."):
        return Stored(name)
    layer, _, inner = module.removeprefix("model.layers.").partition(".")
    transposed = leaf == "weight" and not inner.endswith("layernorm")
    if inner in _FUSED:
        fused = f"{prefix}h.{layer}.attn.c_attn.{leaf}"
        return Stored(fused, transposed, _FUSED.index(inner), len(_FUSED))
    return Stored(f"{prefix}h.{layer}.{_MODULES[inner]}.{leaf}", transposed)
