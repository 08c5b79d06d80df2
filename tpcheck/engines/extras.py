"""What a model has besides its matrices: biases, norms, sinks, and a tower's convolutions.

Requirement: together they are below one percent, but a count that leaves them out can be held to
nothing. What a model type has is data, read from the model classes of transformers 5.23; a type
that is not here has what most have: two norms in a layer without biases, and what its config says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tpcheck.engines.facts import Facts

Config = Mapping[str, Any]


class Small(NamedTuple):
    """`norms` in a layer and `final` ones behind it; `norm_bias` gives each a second vector.

    `qk` norms are of one head ("head") or of all ("all"). `biases` are letters: q, k, v, o of
    attention, g and u of gate and up, d of down, e of the embedding's norm, h of the head.
    """

    norms: int = 2
    final: int = 1
    norm_bias: bool = False
    qk: str = ""
    biases: str = ""


class Vector(NamedTuple):
    """So many elements: `split` names what ranks share them out by, "" what they all hold."""

    elements: int
    split: str = ""


_PLAIN = Small()
_QWEN2 = Small(biases="qkv")
_TWO_MORE = Small(norms=4)
_OLD = Small(norm_bias=True, biases="qkvoud")
_SMALL: dict[str, Small] = {
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "glm"), _QWEN2),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), _QWEN2),
    **dict.fromkeys(("qwen3", "qwen3_moe"), Small(qk="head")),
    "gemma2": _TWO_MORE,
    "gemma3_text": Small(norms=4, qk="head"),
    "glm4": Small(norms=4, biases="qkv"),
    "exaone4": Small(qk="head"),
    **dict.fromkeys(("olmo2", "olmoe", "flex_olmo"), Small(qk="all")),
    "olmo": Small(norms=0, final=0),
    **dict.fromkeys(("cohere", "cohere2"), Small(norms=1)),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gpt_neox", "opt"), _OLD),
    "bloom": _OLD._replace(biases="qkvoude"),
    "starcoder2": _OLD,
    "phi": _OLD._replace(norms=1, biases="qkvoudh"),
    "gptj": Small(norms=1, norm_bias=True, biases="udh"),
    "codegen": Small(norms=1, norm_bias=True, biases="udh"),
    "falcon": Small(norms=1, norm_bias=True),
    "persimmon": Small(norm_bias=True, qk="head with bias", biases="qkvoud"),
    "phimoe": Small(norm_bias=True),
    "nemotron": Small(norm_bias=True),
    "bitnet": Small(norms=3),
    "gpt_oss": Small(biases="qkvo"),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), _OLD),
    **dict.fromkeys(("qwen2_vl_vision",), Small(final=0, norm_bias=True, biases="qkvoud")),
    **dict.fromkeys(("qwen2_5_vl_vision",), Small(final=0, biases="qkvogud")),
    "qwen2_audio_encoder": _OLD._replace(biases="qvoud"),
}

UNCOUNTED = frozenset(
    "doge longcat_flash jamba jetmoe minimax gemma3n_text gemma3n deepseek_v32 qwen3_next"
    " qwen3_5_text qwen3_5_moe_text olmo_hybrid llama4_text llama4 mamba mamba2 nemotron_h"
    " granitemoehybrid zamba2 bamba falcon_h1 lfm2 lfm2_moe kimi_linear deepseek_v4".split()
)
"""Model types with layers of other kinds than attention and an MLP: their bytes are not counted."""


def small_of(facts: Facts, fields: Config) -> Small:
    """Return what a part has, its config's own words before those of its type."""
    small = _SMALL.get(facts.model_type or "", _PLAIN)
    said = {letters: fields.get(name) for name, letters in _FLAGS.items() if name in fields}
    biases = set(small.biases)
    for letters, value in said.items():
        # GLM's attention_bias leaves o_proj without one: a type's own letters are what is meant
        meant = set(letters) & biases or set(letters)
        biases = biases | meant if value is True else biases
        biases = biases - set(letters) if value is False else biases
    if facts.model_type == "falcon" and fields.get("new_decoder_architecture"):
        small = small._replace(norms=2)
    return small._replace(biases="".join(sorted(biases)))


_FLAGS = {"attention_bias": "qkvo", "mlp_bias": "gud", "qkv_bias": "qkv", "enable_bias": "qkvoud"}
"""Field → the biases that it switches on or off."""


def vectors(facts: Facts, fields: Config, layers: int, sparse: int) -> Iterator[Vector]:
    """Yield everything small of one part. Facts must have hidden_size, heads and head_dim."""
    small = small_of(facts, fields)
    hidden, heads, head_dim = facts.hidden_size, facts.num_attention_heads, facts.head_dim
    assert hidden is not None
    assert heads is not None
    assert head_dim is not None
    sides = 2 if small.norm_bias else 1
    yield Vector(sides * hidden * (small.norms * layers + small.final))
    if not facts.uses_mla:
        yield from _attention(facts, small, hidden, layers)
    width = facts.intermediate_size
    if width and layers > sparse:
        times = layers - sparse
        gates = sum(letter in small.biases for letter in ("gu" if facts.gated else "u"))
        yield Vector(gates * width * times, "intermediate")
        yield Vector(("d" in small.biases) * hidden * times)
    if "e" in small.biases:
        yield Vector(2 * hidden)
    if "h" in small.biases and facts.vocab_size:
        yield Vector(facts.vocab_size, "vocab")
    yield from _of_a_type(facts, fields, hidden, layers, sparse)


def _attention(facts: Facts, small: Small, hidden: int, layers: int) -> Iterator[Vector]:
    heads, head_dim = facts.num_attention_heads, facts.head_dim
    assert heads is not None
    assert head_dim is not None
    kv_heads, values = facts.num_key_value_heads or heads, facts.v_head_dim or head_dim
    yield Vector(("q" in small.biases) * heads * head_dim * layers, "query")
    keys = ("k" in small.biases) * head_dim + ("v" in small.biases) * values
    yield Vector(keys * kv_heads * layers, "kv")
    yield Vector(("o" in small.biases) * hidden * layers)
    if small.qk == "all":
        yield Vector((heads + kv_heads) * head_dim * layers)
    elif small.qk:
        yield Vector((4 if "bias" in small.qk else 2) * head_dim * layers)


def _of_a_type(
    facts: Facts, fields: Config, hidden: int, layers: int, sparse: int
) -> Iterator[Vector]:
    """Yield what only one model type has."""
    kind, experts = facts.model_type, facts.num_experts or 0
    latent = _count(fields, "kv_lora_rank")
    if facts.uses_mla:
        yield Vector((latent + _count(fields, "q_lora_rank")) * layers)
    if kind in ("deepseek_v3", "glm4_moe", "ernie4_5_moe"):
        yield Vector(experts * sparse)  # e_score_correction_bias
    if kind == "qwen2_moe":
        yield Vector(hidden * sparse)  # shared_expert_gate
    if kind == "gpt_oss":
        assert facts.num_attention_heads is not None
        width = facts.expert_width or 0
        yield Vector(facts.num_attention_heads * layers, "query")  # sinks
        yield Vector((experts + experts * hidden) * sparse)
        yield Vector(2 * experts * width * sparse, "moe_intermediate")
    if kind == "bitnet":
        yield Vector((facts.intermediate_size or 0) * layers)  # ffn_sub_norm
    if facts.role == "tower":
        yield Vector(_tower(facts, fields, hidden))


def _tower(facts: Facts, fields: Config, hidden: int) -> int:
    """Return what stands before and behind a tower's layers, whole on every rank."""
    kind = facts.model_type
    patch = _count(fields, "patch_size") or 14
    channels = _count(fields, "num_channels") or _count(fields, "in_channels") or 3
    pixels = hidden * channels * patch * patch
    patches = (_count(fields, "image_size") // patch) ** 2
    if kind == "clip_vision_model":
        return pixels + hidden + (patches + 1) * hidden + 2 * hidden  # the class, a norm before
    if kind == "siglip_vision_model":
        return pixels + hidden + patches * hidden
    if kind in ("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen2_vl", "qwen2_5_vl"):
        merged = (_count(fields, "spatial_merge_size") or 2) ** 2 * hidden
        out = _count(fields, "out_hidden_size") or _count(fields, "hidden_size")
        norm = hidden if "5" in kind else 2 * hidden
        frames = _count(fields, "temporal_patch_size") or 2
        return pixels * frames + norm + merged * (merged + 1) + out * (merged + 1)
    if kind == "qwen2_audio_encoder":
        mels, places = _count(fields, "num_mel_bins"), _count(fields, "max_source_positions")
        return hidden * (3 * mels + 1) + hidden * (3 * hidden + 1) + places * hidden
    return pixels + patches * hidden


def joining(config: Config, tower: int, hidden: int) -> int:
    """Return the elements between a tower and its decoder, whole on every rank."""
    kind = config.get("model_type")
    if kind == "llava":
        biases = 0 if config.get("multimodal_projector_bias") is False else 2 * hidden
        return tower * hidden + hidden * hidden + biases
    if kind == "gemma3":
        return tower * hidden + tower
    return tower * hidden + hidden if kind == "qwen2_audio" else 0


def _count(fields: Config, name: str) -> int:
    value = fields.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
