"""--weights on nested models: every part against its own config, and every uneven way to split."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_header_check import Tensors, change, findings
from tpcheck.header_check.dimensions import Block, Dim, Expected, constant
from tpcheck.header_check.tiling import Cuts, cuts_at, tiling_problems
from tpcheck.hf.config import read_config
from tpcheck.planning import plan
from tpcheck.shard_plan import Span
from tpcheck.spec import ModelSpec

TEXT = {
    **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
TOWER = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "image_size": 28, "patch_size": 14},
}
ROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
AUDIO = {
    **{"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64},
    **{"num_mel_bins": 16, "max_source_positions": 20, "model_type": "qwen2_audio_encoder"},
}
MODELS: dict[str, dict[str, Any]] = {
    "Llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**TOWER, "model_type": "clip_vision_model"},
        "image_token_index": 63,
    },
    "Gemma3": {
        "text_config": {**TEXT, "head_dim": 16},
        "vision_config": {**TOWER, "vision_use_head": False},
        "mm_tokens_per_image": 4,
    },
    "Qwen2VL": {
        "text_config": {**TEXT, **ROPE},
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4},
    },
    "Qwen2_5_VL": {
        "text_config": {**TEXT, **ROPE},
        "vision_config": {
            **{"depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64},
            **{"num_heads": 4, "fullatt_block_indexes": [1]},
        },
    },
    "Qwen2Audio": {"text_config": {**TEXT, "model_type": "qwen2"}, "audio_config": AUDIO},
}
"""Class prefix in transformers → its config, a decoder and a tower."""


def save_nested(kind: str, directory: Path) -> Path:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**MODELS[kind])
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_nested("Llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture
def copied(llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llava, tmp_path / "model"))


@pytest.mark.parametrize("kind", MODELS)
def test_every_part_is_what_its_config_says(kind: str, tmp_path: Path) -> None:
    found = findings(save_nested(kind, tmp_path), 1, 2, 4)
    assert (found["problems"], found["tiled"], found["compared"]) == ([], [1, 2, 4], True)
    joins = [note for note in found["notes"] if "belong to no part" in note]
    assert len(joins) == (0 if kind.startswith("Qwen2VL") or kind == "Qwen2_5_VL" else 1)
    assert found["notes"] == joins


def test_hub_names_have_the_class_of_the_tower_in_them(copied: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("vision_tower.")]:
            inner = name.removeprefix("vision_tower.")
            tensors[f"vision_tower.vision_model.{inner}"] = tensors.pop(name)

    assert findings(change(copied, rename))["problems"] == []


@pytest.mark.parametrize(
    ("name", "rows", "problem"),
    [
        (
            "vision_tower.encoder.layers.0.mlp.fc1.weight",
            63,
            "shape=[63, 32], but should be [64, 32]",
        ),
        (
            "vision_tower.embeddings.position_embedding.weight",
            4,
            "shape=[4, 32], but should be [5, 32]",
        ),
        (
            "language_model.model.layers.1.self_attn.k_proj.weight",
            16,
            "shape=[16, 64], but should be [32, 64]",
        ),
        (
            "vision_tower.encoder.layers.1.self_attn.q_proj.bias",
            0,
            "is missing, but should be [32]",
        ),
        ("language_model.lm_head.weight", 0, "is missing, but should be [64, 64]"),
    ],
)
def test_a_change_in_any_part_is_told_by_its_name_in_the_file(
    copied: Path, name: str, rows: int, problem: str
) -> None:
    def edit(tensors: Tensors) -> None:
        whole = tensors.pop(name)
        if rows:
            tensors[name] = whole[:rows]

    found = findings(change(copied, edit))
    assert (found["problems"], found["tiled"]) == ([f"{name}: {problem}"], [])


def test_a_tower_without_a_table_is_said_and_nothing_is_called_proven(copied: Path) -> None:
    fields = read_config(copied)
    fields["vision_config"]["model_type"] = "new_tower"
    (copied / "config.json").write_text(json.dumps(fields))
    found = findings(copied)
    assert (found["problems"], found["tiled"], found["compared"]) == ([], [], True)
    assert found["notes"][0].startswith(
        "vision_config: model_type='new_tower' has no table of tensors, those that do: clip_vision"
    )


def test_the_decoder_of_a_nested_model_is_held_to_the_nested_config(copied: Path) -> None:
    fields = read_config(copied)
    wide = {**fields, "text_config": {**fields["text_config"], "num_key_value_heads": 4}}
    (copied / "config.json").write_text(json.dumps(wide))
    assert "k_proj" in findings(copied)["problems"][0]


# -- ways to split that are not even


def tensors_of(spec: ModelSpec) -> list[Expected]:
    """Return a fused projection, its output and an MLP, as a checkpoint of this spec has them."""
    heads, kv, dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    query, key = Block("query", heads, dim), Block("kv", kv, dim)
    width = Block("intermediate", spec.intermediate_size)
    return [
        Expected((Dim((query, key, key)), constant(spec.hidden_size))),
        Expected((constant(spec.hidden_size), Dim((query,)))),
        Expected((Dim((width, width)), constant(spec.hidden_size))),
        Expected((Dim((Block("vocab", spec.vocab_size),)), constant(spec.hidden_size))),
    ]


@pytest.mark.parametrize(
    ("heads", "kv", "width", "tp_size", "way"),
    [
        (8, 4, 96, 4, ""),
        (8, 4, 96, 3, "heads"),
        (9, 9, 96, 2, "heads"),
        (8, 2, 100, 4, ""),
        (8, 8, 90, 4, "widths"),
        (40, 10, 96, 4, "KV heads"),
        (25, 25, 100, 4, "heads"),
        (12, 3, 50, 5, "heads"),
    ],
)
def test_what_the_reference_chooses_tiles_the_stored_tensors(
    heads: int, kv: int, width: int, tp_size: int, way: str
) -> None:
    spec = ModelSpec(67, 64, width, 1, heads, kv, 8)
    cuts = cuts_at(spec, None, tp_size)
    assert isinstance(cuts, Cuts), cuts
    assert way in cuts.way
    assert bool(way) == bool(cuts.way)
    for tensor in tensors_of(spec):
        assert tiling_problems(tensor, tensor.shape, cuts.spans, tp_size) == []


def spans(sizes: list[int]) -> tuple[Span, ...]:
    edges = [sum(sizes[:rank]) for rank in range(len(sizes) + 1)]
    return tuple(Span(*edges[rank : rank + 2]) for rank in range(len(sizes)))


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 5, 7, 8])
def test_what_uneven_engines_choose_tiles_the_stored_tensors(tp_size: int) -> None:
    config = {
        **{"model_type": "llama", "num_attention_heads": 40, "num_key_value_heads": 10},
        **{"head_dim": 64, "hidden_size": 2560, "intermediate_size": 8960, "vocab_size": 50257},
    }
    deepspeed, exllama = (
        plan(config, engine, tp_size)[0].sizes for engine in ("deepspeed", "exllamav2")
    )
    dtensor = plan({"vocab_size": 50257}, "pytorch-dtensor", tp_size)[0].sizes
    queries = [size // 64 for size in deepspeed["self_attn.q_proj"]["shard_sizes"]]
    held = {
        "query": spans(queries),
        "kv": spans([size // 4 for size in queries]),
        "intermediate": spans(deepspeed["mlp"]["shard_sizes"]),
        "vocab": spans(dtensor["vocab"]["per_rank"]),
    }
    spec = ModelSpec(50257, 2560, 8960, 1, 40, 10, 64)
    for tensor in tensors_of(spec):
        assert tiling_problems(tensor, tensor.shape, held, tp_size) == []
    split = exllama["split"]
    held |= {
        "kv": spans(split["kv_heads"]),
        "query": spans([4 * size for size in split["kv_heads"]]),
        "intermediate": spans(split["intermediate"]),
    }
    for tensor in tensors_of(spec):
        assert tiling_problems(tensor, tensor.shape, held, tp_size) == []


def test_a_rank_without_the_kv_heads_its_queries_need_is_found() -> None:
    spec = ModelSpec(64, 64, 96, 1, 8, 2, 8)
    fused, *_ = tensors_of(spec)
    held = {"query": (Span(0, 6), Span(6, 8)), "kv": (Span(0, 1), Span(1, 2))}
    assert tiling_problems(fused, fused.shape, held, 2) == [
        "1 ranks hold 72:80 of dim 0, but should 2 [kv]"
    ]
