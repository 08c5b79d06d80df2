"""The tensors of vision and audio towers, in the symbols of `families`.

Requirement: a tower's weights are held to its own config like a decoder's. Symbols of its own: c
channels, p patch side, t frames in a patch, x patches of an image, y those and the class, m mel
bins, s audio positions, 3 a convolution's width, G the features that the merger joins, g what comes
out of it.
"""

from __future__ import annotations

from tpcheck.header_check.families import Family

_SIDES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_ATTENTION = {
    "self_attn.q_proj.weight": "Q D",
    "self_attn.k_proj.weight": "K D",
    "self_attn.v_proj.weight": "U D",
    "self_attn.out_proj.weight": "D O",
}
_CLIP_LAYER = {
    **_ATTENTION,
    "layer_norm1.weight": "D",
    "layer_norm2.weight": "D",
    "mlp.fc1.weight": "I D",
    "mlp.fc2.weight": "D I",
}
_CLIP_BIASES = (
    *_SIDES,
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", "pre_layrnorm", "post_layernorm"),
)
_QWEN = {
    "patch_embed.proj.weight": "D c t p p",
    "merger.ln_q.weight": "D",
    "merger.mlp.0.weight": "G G",
    "merger.mlp.2.weight": "g G",
}
_QWEN_LAYER = {
    "norm1.weight": "D",
    "norm2.weight": "D",
    "attn.qkv.weight": "Q+K+U D",
    "attn.proj.weight": "D O",
}


def _tower(**fields: object) -> Family:
    return Family(prefix="", head={}, dense={}, **fields)  # type: ignore[arg-type]


_QWEN2_VL = _tower(
    layers="blocks.{i}.",
    outside=_QWEN,
    layer={**_QWEN_LAYER, "mlp.fc1.weight": "I D", "mlp.fc2.weight": "D I"},
    biases=lambda config: (
        *("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2"),
        *("merger.ln_q", "merger.mlp.0", "merger.mlp.2"),
    ),
)
_QWEN2_5_VL = _tower(
    layers="blocks.{i}.",
    outside=_QWEN,
    layer={
        **_QWEN_LAYER,
        "mlp.gate_proj.weight": "I D",
        "mlp.up_proj.weight": "I D",
        "mlp.down_proj.weight": "D I",
    },
    biases=lambda config: (
        *("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        *("merger.mlp.0", "merger.mlp.2"),
    ),
)

TOWERS: dict[str, Family] = {
    "clip_vision_model": _tower(
        layers="encoder.layers.{i}.",
        outside={
            "embeddings.class_embedding": "D",
            "embeddings.patch_embedding.weight": "D c p p",
            "embeddings.position_embedding.weight": "y D",
            "pre_layrnorm.weight": "D",
            "post_layernorm.weight": "D",
        },
        layer=_CLIP_LAYER,
        biases=lambda config: _CLIP_BIASES,
    ),
    "siglip_vision_model": _tower(
        layers="encoder.layers.{i}.",
        outside={
            "embeddings.patch_embedding.weight": "D c p p",
            "embeddings.position_embedding.weight": "x D",
            "post_layernorm.weight": "D",
        },
        layer=_CLIP_LAYER,
        biases=lambda config: (*_CLIP_BIASES, "embeddings.patch_embedding"),
    ),
    "qwen2_vl_vision": _QWEN2_VL,
    "qwen2_vl": _QWEN2_VL,
    "qwen2_5_vl_vision": _QWEN2_5_VL,
    "qwen2_5_vl": _QWEN2_5_VL,
    "qwen2_audio_encoder": _tower(
        layers="layers.{i}.",
        outside={
            "conv1.weight": "D m 3",
            "conv2.weight": "D D 3",
            "embed_positions.weight": "s D",
            "layer_norm.weight": "D",
        },
        layer={
            **_ATTENTION,
            "self_attn_layer_norm.weight": "D",
            "final_layer_norm.weight": "D",
            "fc1.weight": "I D",
            "fc2.weight": "D I",
        },
        biases=lambda config: (
            *("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj"),
            *("self_attn_layer_norm", "final_layer_norm", "fc1", "fc2"),
            *("conv1", "conv2", "layer_norm"),
        ),
    ),
}
"""model_type of a tower → what its checkpoints hold."""
