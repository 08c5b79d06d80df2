"""--weights: saved models pass, one change each is caught, and no file is believed blindly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tpcheck.engines.facts import Quant
from tpcheck.errors import TPCheckError
from tpcheck.header_check import header_findings, read_headers
from tpcheck.header_check.dimensions import Block, Dim, Expected, constant
from tpcheck.header_check.packing import is_left_out, storing
from tpcheck.header_check.tiling import Cuts, cuts_at, tiling_problems
from tpcheck.hf.config import read_config
from tpcheck.shard_plan import Span
from tpcheck.spec import ModelSpec

BASE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": BASE,
    "Mistral": BASE,
    "Qwen2": BASE,
    "Qwen3": {**BASE, "head_dim": 24},
    "Phi3": {**BASE, "pad_token_id": 0},
    "Gemma": {**BASE, "head_dim": 24},
    "Gemma2": {**BASE, "head_dim": 24},
    "Mixtral": {**BASE, "num_local_experts": 4},
    "Qwen2Moe": {**BASE, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "Qwen3Moe": {**BASE, **EXPERTS, "num_experts": 4, "head_dim": 24},
    "GptOss": {**BASE, "num_local_experts": 4, "head_dim": 24},
    "GPT2": {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "OPT": {
        **{"vocab_size": 64, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32},
    },
    "DeepseekV3": {
        **{**BASE, **EXPERTS, **LATENT, "num_key_value_heads": 4, "v_head_dim": 16},
        **{"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
        **{"n_group": 1, "topk_group": 1},
    },
}
"""Class prefix in transformers → its config."""

Tensors = dict[str, torch.Tensor]


def save(family: str, directory: Path, **changes: Any) -> Path:
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **changes})
    kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}{kind}")(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    return directory


def findings(directory: Path, *tp_sizes: int) -> dict[str, Any]:
    """Return what is found at several degrees together."""
    found = header_findings(directory, read_config(directory), tp_sizes or (2,))
    each = [found.to_json(tp_size) for tp_size in tp_sizes or (2,)]
    return {
        "problems": list(dict.fromkeys(one for held in each for one in held["problems"])),
        "tiled": [held["tp_size"] for held in each if held["tiled"]],
        "notes": list(dict.fromkeys(one for held in each for one in held["notes"])),
        "tensors": found.tensors,
        "compared": found.compared,
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("Llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def change(directory: Path, edit: Callable[[Tensors], Any], **config: Any) -> Path:
    """Rewrite a model's tensors, and fields of its config."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(packed, directory / "model.safetensors")
    fields = {**read_config(directory), **config}
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


# -- what transformers saves


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_what_its_config_says(family: str, tmp_path: Path) -> None:
    found = findings(save(family, tmp_path), 1, 2, 4)
    assert (found["problems"], found["notes"], found["tiled"]) == ([], [], [1, 2, 4])
    assert found["tensors"] > 10


def test_biases_ties_and_several_files(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        **BASE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert findings(tmp_path)["problems"] == []


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_all_experts_in_one_tensor(family: str, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, save_original_format=False)
    names = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    found = findings(tmp_path, 2, 4)
    assert (found["problems"], found["tiled"]) == ([], [2, 4])


def test_hub_names_of_gpt2_have_no_prefix(tmp_path: Path) -> None:
    save("GPT2", tmp_path)

    def drop_prefix(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    assert findings(change(tmp_path, drop_prefix))["problems"] == []


def test_a_degree_that_is_not_even_is_proven_as_the_reference_splits_it(llama: Path) -> None:
    found = findings(llama, 2, 3)
    assert (found["problems"], found["tiled"]) == ([], [2, 3])
    [note] = found["notes"]
    assert note.startswith("tp 3: not even, proven as the reference decoder splits it: heads ")


def test_an_unknown_family_is_not_guessed(copied: Path) -> None:
    found = findings(change(copied, lambda tensors: None, model_type="brand_new"))
    assert (found["problems"], found["tiled"]) == ([], [])
    [note] = found["notes"]
    assert note.startswith("model_type='brand_new' has no table of tensors, those that do: llama,")
    assert found["compared"] is False


# -- one change each

LAYER = "model.layers.0."


def _cut(name: str, rows: int) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = tensors[name][:rows]

    return edit


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (
            _cut(f"{LAYER}mlp.up_proj.weight", 127),
            f"{LAYER}mlp.up_proj.weight: shape=[127, 64], but should be [128, 64]",
        ),
        (
            _cut(f"{LAYER}self_attn.k_proj.weight", 24),
            f"{LAYER}self_attn.k_proj.weight: shape=[24, 64], but should be [32, 64]",
        ),
        (
            lambda tensors: tensors.pop("model.layers.1.self_attn.o_proj.weight"),
            "model.layers.1.self_attn.o_proj.weight: is missing, but should be [64, 64]",
        ),
        (
            lambda tensors: tensors.pop("lm_head.weight"),
            "lm_head.weight: is missing, but should be [64, 64]",
        ),
        (
            lambda tensors: tensors.update({f"{LAYER}self_attn.q_proj.bias": torch.ones(64)}),
            f"{LAYER}self_attn.q_proj.bias: shape=[64] is there, but config.json gives no use"
            " for it",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).int()}),
            "model.norm.weight: dtype=I32, but should be F64 or F32 or F16 or BF16",
        ),
    ],
    ids=["wrong shape", "half a head", "missing", "missing head", "unexpected", "dtype"],
)
def test_one_change_is_one_problem(
    copied: Path, edit: Callable[[Tensors], Any], problem: str
) -> None:
    found = findings(change(copied, edit))
    assert (found["problems"], found["tiled"]) == ([problem], [])


def test_the_same_problem_in_every_layer_is_one_line(copied: Path) -> None:
    found = findings(change(copied, lambda tensors: None, intermediate_size=256))
    assert found["problems"] == [
        f"model.layers.*.mlp.{name}.weight (2 tensors, the first {LAYER}mlp.{name}.weight):"
        f" shape={shape}, but should be {wanted}"
        for name, shape, wanted in (
            ("gate_proj", [128, 64], [256, 64]),
            ("up_proj", [128, 64], [256, 64]),
            ("down_proj", [64, 128], [64, 256]),
        )
    ]


# -- quantized checkpoints, packed here as the tools pack them

GROUP, BLOCK = 16, 16


def pack(values: torch.Tensor, dim: int, bits: int = 4) -> torch.Tensor:
    """Pack unsigned integers along a dim into int32, the lowest bits first."""
    per = 32 // bits
    moved = values.long().movedim(dim, -1)
    lanes = moved.reshape(*moved.shape[:-1], -1, per)
    shifted = lanes << (torch.arange(per) * bits)
    return shifted.sum(-1).to(torch.int32).movedim(-1, dim)


def gptq(weight: torch.Tensor) -> Tensors:
    into, out = weight.T.shape
    codes = torch.randint(0, 16, (into, out))
    zeros = torch.randint(0, 16, (into // GROUP, out))
    return {
        "qweight": pack(codes, 0),
        "qzeros": pack(zeros, 1),
        "scales": torch.ones(into // GROUP, out, dtype=torch.float16),
        "g_idx": torch.arange(into, dtype=torch.int32) // GROUP,
    }


def awq(weight: torch.Tensor) -> Tensors:
    into, out = weight.T.shape
    return {
        "qweight": pack(torch.randint(0, 16, (into, out)), 1),
        "qzeros": pack(torch.randint(0, 16, (into // GROUP, out)), 1),
        "scales": torch.ones(into // GROUP, out, dtype=torch.float16),
    }


def fp8(weight: torch.Tensor) -> Tensors:
    out, into = weight.shape
    scale = torch.ones(-(-out // BLOCK), -(-into // BLOCK))
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def compressed(weight: torch.Tensor) -> Tensors:
    out, into = weight.shape
    return {
        "weight_packed": pack(torch.randint(0, 16, (out, into)), 1),
        "weight_scale": torch.ones(out, into // GROUP, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([out, into]),
    }


_CT_WEIGHTS = {"num_bits": 4, "type": "int", "group_size": GROUP, "strategy": "group"}
METHODS: dict[str, tuple[Callable[[torch.Tensor], Tensors], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}),
    "compressed-tensors": (
        compressed,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": _CT_WEIGHTS}},
            "ignore": ["lm_head"],
        },
    ),
}


def quantize(directory: Path, method: str, **config: Any) -> Path:
    """Quantize every matrix of the layers as this method's tools store it."""
    store, fields = METHODS[method]

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if "_proj.weight" in name]:
            module = name.removesuffix("weight")
            stored = store(tensors.pop(name))
            tensors.update({f"{module}{end}": tensor for end, tensor in stored.items()})

    return change(directory, edit, **{"quantization_config": fields, **config})


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_model_is_what_its_config_says(method: str, copied: Path) -> None:
    found = findings(quantize(copied, method), 1, 2)
    assert (found["problems"], found["tiled"]) == ([], [1, 2])


_DOWN = f"{LAYER}mlp.down_proj."


@pytest.mark.parametrize(
    ("method", "edit", "problem"),
    [
        (
            "gptq",
            _cut(f"{_DOWN}scales", 7),
            f"{_DOWN}scales: shape=[7, 64], but should be [8, 64]",
        ),
        (
            "gptq",
            lambda tensors: tensors.update({f"{_DOWN}qweight": pack(torch.ones(128, 64), 1)}),
            f"{_DOWN}qweight: shape=[128, 8], but should be [16, 64]",
        ),
        (
            "gptq",
            lambda tensors: tensors.update({f"{_DOWN}qweight": pack(torch.ones(128, 64), 0, 8)}),
            f"{_DOWN}qweight: shape=[32, 64], but should be [16, 64]",
        ),
        (
            "gptq",
            lambda tensors: tensors.pop(f"{_DOWN}qzeros"),
            f"{_DOWN}qzeros: is missing, but should be [8, 8]",
        ),
        (
            "awq",
            lambda tensors: tensors.update({f"{_DOWN}qweight": pack(torch.ones(128, 64), 0)}),
            f"{_DOWN}qweight: shape=[16, 64], but should be [128, 8]",
        ),
        (
            "awq",
            lambda tensors: tensors.update({f"{_DOWN}qzeros": torch.ones(8, 8)}),
            f"{_DOWN}qzeros: dtype=F32, but should be I32",
        ),
        (
            "fp8",
            _cut(f"{_DOWN}weight_scale_inv", 3),
            f"{_DOWN}weight_scale_inv: shape=[3, 8], but should be [4, 8]",
        ),
        (
            "fp8",
            lambda tensors: tensors.pop(f"{_DOWN}weight_scale_inv"),
            f"{_DOWN}weight_scale_inv: is missing, but should be [4, 8]",
        ),
        (
            "fp8",
            lambda tensors: tensors.update({f"{_DOWN}weight": torch.ones(64, 128)}),
            f"{_DOWN}weight: dtype=F32, but should be F8_E4M3 or F8_E4M3FNUZ",
        ),
        (
            "compressed-tensors",
            lambda tensors: tensors.update({f"{_DOWN}weight_scale": torch.ones(64, 7)}),
            f"{_DOWN}weight_scale: shape=[64, 7], but should be [64, 8]",
        ),
    ],
    ids=[
        *("gptq scale too short", "gptq packed along out", "gptq 8 bits", "gptq no zeros"),
        *("awq packed along in", "awq zeros not packed", "fp8 scale too short", "fp8 no scale"),
        *("fp8 not quantized", "ct scale too short"),
    ],
)
def test_one_change_of_a_quantized_model(
    copied: Path, method: str, edit: Callable[[Tensors], Any], problem: str
) -> None:
    found = findings(change(quantize(copied, method), edit))
    assert found["problems"] == [problem]


def test_modules_left_out_are_expected_as_they_are(copied: Path) -> None:
    fields = {**METHODS["fp8"][1], "modules_to_not_convert": ["o_proj"]}
    quantize(copied, "fp8", quantization_config=fields)
    kept = {f"model.layers.{i}.self_attn.o_proj.weight": torch.ones(64, 64) for i in (0, 1)}

    def restore(tensors: Tensors) -> None:
        for name, tensor in kept.items():
            tensors.pop(f"{name}_scale_inv")
            tensors[name] = tensor.bfloat16()

    assert len(findings(copied)["problems"]) == 2  # o_proj is fp8, and has a scale nobody reads
    assert findings(change(copied, restore))["problems"] == []


@pytest.mark.parametrize(
    ("method", "tensor", "grain"),
    [
        ("gptq", "scales", "3.5 groups of 16"),
        ("awq", "scales", "3.5 groups of 16"),
        ("fp8", "weight_scale_inv", "3.5 blocks of 16"),
        ("compressed-tensors", "weight_scale", "3.5 groups of 16"),
    ],
)
def test_a_scale_that_two_ranks_would_share(
    tmp_path: Path, method: str, tensor: str, grain: str
) -> None:
    found = findings(quantize(save("Llama", tmp_path, intermediate_size=112), method), 1, 2)
    down = [one for one in found["problems"] if f"down_proj.{tensor} " in one]
    kind = "block" if method == "fp8" else "group"
    assert down == [
        f"model.layers.*.mlp.down_proj.{tensor} (2 tensors, the first {_DOWN}{tensor}): rank 0 ends"
        f" at element 56 of 112, which is {grain}, but should be a whole number of them: the {kind}"
        " belongs to two ranks [tp 2]"
    ]
    assert found["tiled"] == [1]


def test_one_scale_for_all_is_held_by_every_rank(copied: Path) -> None:
    fields = {"quant_method": "gptq", "bits": 4, "group_size": -1}

    def one_group(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith((".scales", ".qzeros")):
                tensors[name] = tensors[name][:1]

    found = findings(change(quantize(copied, "gptq"), one_group, quantization_config=fields), 2)
    assert (found["problems"], found["tiled"]) == ([], [2])


def test_act_order_cannot_be_proven_from_headers(copied: Path) -> None:
    fields = {**METHODS["gptq"][1], "desc_act": True}
    found = findings(quantize(copied, "gptq", quantization_config=fields))
    assert found["problems"] == []
    assert found["notes"][0] == (
        "desc_act=true: g_idx says which scales a rank needs, and no header holds it"
    )


def test_gpt_oss_experts_in_mxfp4(tmp_path: Path) -> None:
    save("GptOss", tmp_path, hidden_size=64, intermediate_size=96)
    experts = ("gate_up_proj", "down_proj")

    def store(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(experts)]:
            among, into, out = tensors.pop(name).shape
            blocks = torch.zeros(among, out, into // 32, 16, dtype=torch.uint8)
            tensors[f"{name}_blocks"] = blocks
            tensors[f"{name}_scales"] = torch.zeros(among, out, into // 32, dtype=torch.uint8)

    fields = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    found = findings(change(tmp_path, store, quantization_config=fields), 1, 2)
    # 96 columns of down_proj are 3 blocks: at two ranks the one in the middle belongs to both
    assert [one.partition(" ")[0] for one in found["problems"]] == [
        f"model.layers.*.mlp.experts.down_proj_{end}" for end in ("blocks", "scales")
    ]
    assert all("which is 1.5 blocks of 32" in one for one in found["problems"])
    assert found["tiled"] == [1]


def test_the_fp8_table_agrees_with_transformers_own_layer() -> None:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer = FP8Linear(72, 40, block_size=(16, 16))
    how = storing(Quant("fp8", (16, 16), bits=8))
    assert how is not None
    expected = how.stores(Quant("fp8", (16, 16), bits=8), constant(40), constant(72))
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert {name: one.shape for name, one in expected.items()} == {
        name: shapes[name] for name in ("weight", "weight_scale_inv")
    }


def test_which_modules_a_list_leaves_out() -> None:
    def left_out(*ignored: str) -> bool:
        return is_left_out("model.layers.3.mlp.gate.weight", Quant("fp8", ignored=ignored))

    assert left_out("mlp.gate")
    assert left_out("model.layers.*.mlp.gate")
    assert left_out(r"re:.*mlp\.gate$")
    assert not left_out("mlp.gate_proj", "layers.30", "re:(", "lm_head")


# -- the proof itself

SPEC = ModelSpec(64, 64, 128, 1, 8, 2, 8)
FUSED = Expected((Dim((Block("query", 8, 8), Block("kv", 2, 8), Block("kv", 2, 8))), constant(4)))


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_heads_are_tiled_with_and_without_copies(tp_size: int) -> None:
    cuts = cuts_at(SPEC, None, tp_size)
    assert isinstance(cuts, Cuts)
    assert cuts.way == ""
    assert tiling_problems(FUSED, (96, 4), cuts.spans, tp_size) == []


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ((Span(0, 4), Span(5, 8)), "no rank holds 32:40 of dim 0"),
        ((Span(0, 5), Span(4, 8)), "2 ranks hold 32:40 of dim 0, but should 1 [query]"),
        ((Span(0, 8), Span(0, 8)), "2 ranks hold 0:64 of dim 0, but should 1 [query]"),
        ((Span(0, 4), Span(4, 9)), "2 ranks hold 64:72 of dim 0, but should 1 [kv]"),
    ],
    ids=["hole", "overlap", "all twice", "into the keys"],
)
def test_a_wrong_span_is_found(query: tuple[Span, ...], problem: str) -> None:
    spans = {"query": query, "kv": (Span(0, 1), Span(1, 2))}
    assert tiling_problems(FUSED, (96, 4), spans, 2) == [problem]


def test_a_tensor_half_a_head_short_is_not_tiled() -> None:
    cuts = cuts_at(SPEC, None, 2)
    assert isinstance(cuts, Cuts)
    [problem] = tiling_problems(FUSED, (92, 4), cuts.spans, 2)
    assert problem.startswith("rank 1: global slices [88:96] of dim 0, but should lie within 0:92")


def test_uneven_heads_tile_their_weights_but_cut_a_scale() -> None:
    spans = {"query": (Span(0, 6), Span(6, 8)), "kv": (Span(0, 2), Span(1, 2))}
    assert tiling_problems(FUSED, (96, 4), spans, 2) == []
    scales = Expected((Dim((Block("query", 8, 8),), 32, "block"), constant(1)))
    [problem] = tiling_problems(scales, (2, 1), spans, 2)
    assert problem.startswith("rank 0 ends at element 48 of 64, which is 1.5 blocks of 32, but")


# -- files that lie

HEADER = {"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def written(path: Path, header: Any, data: int = 16, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + bytes(data))
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {**HEADER["x"], **changes}}


TWICE = b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"x":{}}'
APART = {
    "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        (HEADER, 12, None, "its tensors are 16 bytes, but 12 bytes follow the header: it is cut"),
        (HEADER, 20, None, "its tensors are 16 bytes, but 20 bytes follow the header: something"),
        (HEADER, 16, 10**9, "its header should be 1000000000 bytes long, but the file has"),
        (HEADER, 16, 2**63, "its header should be 9223372036854775808 bytes long, but the file"),
        (HEADER, 16, 20, "its header is not JSON: "),
        (b"\xff{}", 0, None, "its header is not JSON: "),
        (b"[" * 50_000, 0, None, "its header is not JSON: "),
        (TWICE, 16, None, "its header is not JSON: the key 'x' stands twice in one object"),
        (
            b'{"x": 1e999}',
            16,
            None,
            "its header is not JSON: 1e999 is beyond what a float can hold",
        ),
        ([], 0, None, "its header is a list, but should be object"),
        (entry(shape=[2, 3]), 16, None, "x: F32[2, 3] is 24 bytes, but its data_offsets [0, 16]"),
        (entry(shape=[-2, -2]), 16, None, "x: shape=[-2, -2], but should be a list of sizes"),
        (entry(shape=[True, 4]), 16, None, "x: shape=[True, 4], but should be a list of sizes"),
        (entry(dtype="F31"), 16, None, "x: dtype='F31', but should be one of F64, "),
        (entry(data_offsets=[16, 0]), 16, None, "x: data_offsets=[16, 0], but should be where"),
        (entry(data_offsets=[0]), 16, None, "x: data_offsets=[0], but should be where its bytes"),
        ({"x": 3}, 16, None, "x: dtype=None, but should be one of F64, "),
        (APART, 12, None, "y: begins at byte 4, but should at 8: tensors overlap or leave a hole"),
    ],
)
def test_a_lying_header_is_one_sentence_that_names_the_file(
    tmp_path: Path, header: Any, data: int, length: int | None, message: str
) -> None:
    path = written(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(TPCheckError) as caught:
        read_headers(tmp_path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, but should begin with the 8 bytes of a header's length"),
        (b"1234567", "7 bytes, but should begin with the 8 bytes of a header's length"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer, fetch the"),
    ],
    ids=["empty", "seven bytes", "lfs"],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(TPCheckError, match=message):
        read_headers(tmp_path)


def test_what_can_be_read_is_read(tmp_path: Path) -> None:
    header = {**HEADER, "__metadata__": {"format": "pt"}}
    written(tmp_path / "model.safetensors", header)
    found = read_headers(tmp_path)
    assert found.files == ("model.safetensors",)
    assert {name: (one.dtype, one.shape) for name, one in found.tensors.items()} == {
        "x": ("F32", (2, 2))
    }


def test_only_headers_are_read(tmp_path: Path) -> None:
    size = 2**40  # a sparse file: reading it would take a terabyte
    shape = [size // 4]
    path = written(
        tmp_path / "model.safetensors",
        {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}},
        data=0,
    )
    os.truncate(path, path.stat().st_size + size)
    assert read_headers(tmp_path).tensors["x"].shape == (size // 4,)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "gone.safetensors"}, "names 'gone.safetensors', which is not there; it holds"),
        ({"x": "../a.safetensors"}, "names '../a.safetensors', but should name files beside it"),
        ({"x": 3}, "names 3, but should name files beside it"),
        ({"y": "a.safetensors"}, "says that a.safetensors holds 'y', but it does not"),
        ({}, r"weight_map={}, but should say the file of each tensor"),
        (
            {"x": "a.safetensors", "y": "b.safetensors"},
            "b.safetensors: holds 'x', which a.safetensors holds too",
        ),
    ],
    ids=["gone", "elsewhere", "no text", "not in it", "empty", "twice"],
)
def test_an_index_that_lies(tmp_path: Path, weight_map: Any, message: str) -> None:
    for name in ("a", "b"):
        written(tmp_path / f"{name}.safetensors", HEADER)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TPCheckError, match=message):
        read_headers(tmp_path)


def test_no_safetensors_file_at_all(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(TPCheckError, match=r"no \*\.safetensors file is there; it holds"):
        read_headers(tmp_path)
