"""quantization_config as a Quantization: what published configs say, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tpcheck.errors import PlanError
from tpcheck.hf.quantization import read_quantization
from tpcheck.quantization import Quantization

LINEARS = tuple(
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 10)
    for name in (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
FP8_CHANNEL = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
FP8_TOKEN = {**FP8_CHANNEL, "strategy": "token", "dynamic": True}
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


def compressed(format_: str, weights: Any, inputs: Any = None, **fields: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
        **fields,
    }


def read(fields: Any, model_type: str = "llama") -> Quantization:
    found = read_quantization({"model_type": model_type, "quantization_config": fields})
    assert found is not None
    return found


READ: dict[str, tuple[dict[str, Any], Quantization]] = {
    "deepseek": ({**FP8, "fmt": "e4m3"}, Quantization("fp8", 128, 128, activations="group")),
    "fp8 per tensor": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]},
        Quantization("fp8", 0, 0, activations="token"),
    ),
    "gptq": (GPTQ, Quantization("gptq", 128, bits=4, desc_act=True)),
    "gptq v2, one group, 8 bits": (
        {**GPTQ, "bits": 8, "group_size": -1, "sym": False, "checkpoint_format": "gptq_v2"},
        Quantization("gptq", 0, bits=8, symmetric=False, desc_act=True, zeros_as_is=True),
    ),
    "gptq as tools write it": (
        {**GPTQ, "damp_percent": 0.01, "true_sequential": True, "model_file_base_name": "model"},
        Quantization("gptq", 128, bits=4, desc_act=True),
    ),
    "awq": ({**AWQ, "version": "GEMM"}, Quantization("awq", 128, symmetric=False)),
    "w4a16": (compressed("pack-quantized", INT4), Quantization("pack-quantized", 128, bits=4)),
    "w4a16 asymmetric, ordered": (
        compressed("pack-quantized", {**INT4, "symmetric": False, "actorder": "group"}),
        Quantization("pack-quantized", 128, symmetric=False, desc_act=True),
    ),
    "w4a16 with an order that only chose codes": (
        compressed("pack-quantized", {**INT4, "actorder": "weight"}),
        Quantization("pack-quantized", 128),
    ),
    "w8a16": (
        compressed("pack-quantized", {"num_bits": 8, "type": "int", "group_size": -1}),
        Quantization("pack-quantized", 0, bits=8),
    ),
    "fp8 dynamic": (
        compressed("float-quantized", FP8_CHANNEL, FP8_TOKEN),
        Quantization("fp8", 0, 1, activations="token"),
    ),
    "fp8 per tensor, weights only": (
        compressed("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        Quantization("fp8", 0, 0),
    ),
    "fp8 blocks": (
        compressed(
            "float-quantized",
            {**FP8_CHANNEL, "strategy": "block", "block_structure": "128x64"},
            {**FP8_TOKEN, "strategy": "group", "group_size": 64},
        ),
        Quantization("fp8", 64, 128, activations="group"),
    ),
    "w8a8": (
        compressed("int-quantized", {**FP8_CHANNEL, "type": "int"}, {**FP8_TOKEN, "type": "int"}),
        Quantization("int8", 0, 1, activations="token"),
    ),
    "mxfp4": (
        compressed("mxfp4-pack-quantized", {**INT4, "type": "float", "group_size": 32}),
        Quantization("mxfp4", 32),
    ),
    "nvfp4": (
        compressed(
            "nvfp4-pack-quantized",
            {**INT4, "type": "float", "group_size": 16, "strategy": "tensor_group"},
        ),
        Quantization("nvfp4", 16),
    ),
    "a quantized cache": (
        compressed("float-quantized", FP8_CHANNEL, kv_cache_scheme=CACHE),
        Quantization("fp8", 0, 1, kv_cache="tensor"),
    ),
    "a quantized cache per head": (
        compressed(
            "float-quantized", FP8_CHANNEL, kv_cache_scheme={**CACHE, "strategy": "attn_head"}
        ),
        Quantization("fp8", 0, 1, kv_cache="head"),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_published_config_is_read(name: str) -> None:
    fields, expected = READ[name]
    assert read(fields) == expected


def test_no_config_is_no_quantization_and_the_old_spelling_is_read() -> None:
    assert read_quantization({"model_type": "llama"}) is None
    assert read_quantization({"quantization_config": None}) is None
    old = {"model_type": "llama", "compression_config": compressed("pack-quantized", INT4)}
    assert read_quantization(old) == Quantization("pack-quantized", 128)


def test_gpt_oss_quantizes_its_experts_only() -> None:
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    for fields in ({"modules_to_not_convert": left}, {}):
        found = read({"quant_method": "mxfp4", **fields}, "gpt_oss")
        assert (found.format, found.group_size) == ("mxfp4", 32)
        assert not found.converts("model.layers.3.self_attn.q_proj.weight")
        assert found.converts("model.layers.3.mlp.experts.7.down_proj.weight")


def left_dense(fields: dict[str, Any]) -> set[str]:
    found = read(fields)
    return {name for name in LINEARS if not found.converts(f"{name}.weight")}


def of_layer(layer: int, part: str = "") -> set[str]:
    return {name for name in LINEARS if name.startswith(f"model.layers.{layer}.{part}")}


def ending(*ends: str) -> set[str]:
    return {name for name in LINEARS if name.endswith(ends)}


LISTS: list[tuple[dict[str, Any], set[str]]] = [
    ({**FP8, "modules_to_not_convert": ["model.layers.1"]}, of_layer(1)),
    ({**FP8, "modules_to_not_convert": ["model.layers.1."]}, of_layer(1)),
    ({**FP8, "modules_to_not_convert": ["model.layers.1.mlp"]}, of_layer(1, "mlp")),
    ({**FP8, "modules_to_not_convert": ["mlp"]}, set()),
    ({**FP8, "modules_to_not_convert": ["down_proj", "norm"]}, ending("down_proj")),
    (
        {**FP8, "modules_to_not_convert": ["model.layers.*.self_attn"]},
        ending("q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    ({**FP8, "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]}, set()),
    ({**AWQ, "modules_to_not_convert": ["gate"]}, set()),
    (
        {**FP8, "modules_to_not_convert": ["model.layers.0.block_sparse_moe", "w2"]},
        of_layer(0, "mlp") | ending("down_proj"),
    ),
    (
        {
            **GPTQ,
            "modules_in_block_to_quantize": [
                ["self_attn.q_proj", "self_attn.k_proj"],
                ["mlp.up_proj"],
            ],
        },
        set(LINEARS) - ending("q_proj", "k_proj", "up_proj"),
    ),
    ({**GPTQ, "dynamic": {r"-:model\.layers\.10\..*": {}}}, of_layer(10)),
    (
        compressed("pack-quantized", INT4, ignore=["lm_head", "model.layers.1.mlp.up_proj"]),
        {"model.layers.1.mlp.up_proj"},
    ),
    (
        compressed("pack-quantized", INT4, ignore=["model.layers.1", "re:.*o_proj"]),
        ending("o_proj"),
    ),
    (compressed("pack-quantized", INT4, ignore=["re:model.layers.1"]), of_layer(1) | of_layer(10)),
]


@pytest.mark.parametrize(("fields", "expected"), LISTS)
def test_lists_leave_out_what_their_tools_leave_out(
    fields: dict[str, Any], expected: set[str]
) -> None:
    assert left_dense(fields) == expected


def test_lists_agree_with_the_tools_themselves() -> None:
    pytest.importorskip("transformers")
    from compressed_tensors.utils.match import match_name
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = ["model.layers.1", "up_proj", "model.layers.*.mlp", "mlp.down_proj", "layers.0.mlp"]
    for name in names:
        expected = {one for one in LINEARS if not should_convert_module(one, [name])}
        assert left_dense({**FP8, "modules_to_not_convert": [name]}) == expected
    for name in ["model.layers.1.mlp.up_proj", "re:.*up", "re:up", "re:model.layers.[01].mlp.*"]:
        expected = {one for one in LINEARS if match_name(one, name)}
        assert left_dense(compressed("pack-quantized", INT4, ignore=[name])) == expected


def test_targets_may_name_the_layers() -> None:
    fields = compressed("pack-quantized", INT4)
    fields["config_groups"]["group_0"]["targets"] = ["re:.*down_proj$", LINEARS[0]]
    fields["ignore"] = ["model.layers.1.mlp.down_proj"]
    wanted = (ending("down_proj") | {LINEARS[0]}) - {"model.layers.1.mlp.down_proj"}
    assert left_dense(fields) == set(LINEARS) - wanted


def test_a_long_list_of_norms_costs_nothing() -> None:
    norms = [
        f"model.layers.{layer}.{part}"
        for layer in range(94)
        for part in ("input_layernorm", "post_attention_layernorm", "mlp.gate")
    ]
    assert read({**FP8, "modules_to_not_convert": ["lm_head", *norms]}).skip == ()


PACKED = "pack-quantized"
STATIC = ": the reference decoder computes the scales of activations as they come"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "quant_method=None, but should be one of fp8, gptq, awq, mxfp4, compressed-tensors"),
    ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes', but should be one of fp8"),
    ({"quant_method": "mxfp4"}, "quant_method='mxfp4', but should be another: mxfp4 is gpt_oss's"),
    (
        {**FP8, "activation_scheme": "static"},
        f"activation_scheme='static', but should be 'dynamic'{STATIC}",
    ),
    ({**FP8, "scale_fmt": "ue8m0"}, "scale_fmt='ue8m0', but should be 'float': the reference"),
    ({**FP8, "weight_block_size": [128]}, "weight_block_size=[128], but should be two whole"),
    ({**FP8, "weight_block_size": [128, 0]}, "weight_block_size=0, but should be a whole number"),
    ({**FP8, "fmt": "e5m2"}, "fmt='e5m2', but should be 'e4m3'"),
    (
        {**FP8, "modules_to_not_convert": "lm_head"},
        "modules_to_not_convert='lm_head', but should be a list",
    ),
    (
        {**FP8, "modules_to_not_convert": ["a(*"]},
        "modules_to_not_convert='a(*', but should be a pattern",
    ),
    (
        {**FP8, "rotation": "hadamard"},
        "rotation='hadamard', but should be absent: the reference decoder does not know it",
    ),
    ({**GPTQ, "bits": 3}, "bits=3, but should be one of 4, 8 for gptq"),
    ({**GPTQ, "bits": None}, "bits=None, but should be a whole number of at least 1"),
    ({**GPTQ, "group_size": 0}, "group_size=0, but should be a whole number of at least 1"),
    ({**GPTQ, "desc_act": "yes"}, "desc_act='yes', but should be true or false"),
    (
        {**GPTQ, "checkpoint_format": "marlin"},
        "checkpoint_format='marlin', but should be 'gptq' or 'gptq_v2'",
    ),
    ({**GPTQ, "lm_head": True}, "lm_head=True, but should be absent"),
    ({**GPTQ, "is_marlin_format": True}, "is_marlin_format=True, but should be absent"),
    ({**GPTQ, "dynamic": {"+:.*": {"bits": 8}}}, "but should be of -: rules: all layers have one"),
    ({**AWQ, "version": "gemv"}, "version='gemv', but should be 'gemm': the others pack in"),
    ({**AWQ, "zero_point": False}, "zero_point=False, but should be True"),
    ({**AWQ, "bits": 8}, "bits=8, but should be 4 for awq"),
    (compressed("dense", INT4), "format='dense', but should be one of pack-quantized,"),
    (compressed("marlin-24", INT4), "format='marlin-24', but should be one of pack-quantized,"),
    (
        compressed("float-quantized", INT4),
        "weights='int4', but should be float8 where format='float-quantized'",
    ),
    (
        compressed(PACKED, {**INT4, "num_bits": 3}),
        "weights='int3', but should be int4 or int8 where",
    ),
    (
        compressed(PACKED, {**INT4, "strategy": "block"}),
        "weights.block_structure=None, but should be two",
    ),
    (
        compressed(PACKED, {**INT4, "strategy": "row"}),
        "weights.strategy='row', but should be tensor,",
    ),
    (
        compressed(PACKED, {**INT4, "group_size": None}),
        "weights.group_size=None, but should be a whole",
    ),
    (
        compressed(PACKED, {**INT4, "actorder": "up"}),
        "weights.actorder='up', but should be null, weight",
    ),
    (
        compressed(PACKED, {**INT4, "sparsity": 2}),
        "config_groups.group_0.weights.sparsity=2, but should be absent",
    ),
    (
        compressed(PACKED, INT4, {**FP8_TOKEN}),
        "input_activations='float8', but should be null where weights are pack-quantized",
    ),
    (
        compressed("float-quantized", FP8_CHANNEL, {**FP8_TOKEN, "dynamic": False}),
        f"input_activations.dynamic=False, but should be True{STATIC}",
    ),
    (
        compressed("float-quantized", FP8_CHANNEL, {**FP8_TOKEN, "strategy": "tensor"}),
        "input_activations.strategy='tensor', but should be token or group",
    ),
    (
        compressed(
            "float-quantized", FP8_CHANNEL, {**FP8_TOKEN, "strategy": "group", "group_size": 64}
        ),
        "input_activations.group_size=64, but should be the weights' own, 0",
    ),
    (
        compressed("int-quantized", {**FP8_CHANNEL, "type": "int", "symmetric": False}),
        "symmetric=False, but should be True for int8",
    ),
    (
        compressed(PACKED, INT4, kv_cache_scheme={**CACHE, "dynamic": True}),
        "kv_cache_scheme.dynamic=True, but should be False",
    ),
    (
        compressed(PACKED, INT4, kv_cache_scheme={**CACHE, "num_bits": 4}),
        "kv_cache_scheme.num_bits=4, but should be 8",
    ),
    (
        compressed(PACKED, INT4, kv_cache_scheme={**CACHE, "strategy": "channel"}),
        "kv_cache_scheme.strategy='channel', but should be tensor or attn_head",
    ),
    (
        compressed(PACKED, INT4, quantization_status="frozen"),
        "quantization_status='frozen', but should be 'compressed'",
    ),
    (
        compressed(PACKED, INT4, transform_config={"config_groups": {"R1": {}}}),
        "transform_config={'config_groups': {'R1': {}}}, but should be absent",
    ),
    (
        compressed(PACKED, INT4, sparsity_config={"format": "sparse-24-bitmask"}),
        "but should be absent: the reference decoder does not know it",
    ),
    (
        compressed(PACKED, INT4, config_groups={}),
        "config_groups={}, but should be an object of groups",
    ),
    (
        compressed(PACKED, INT4, ignore=["Linear"]),
        "config_groups.targets=['Linear'], but should be names of layers that ignore leaves",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_the_reference_cannot_do_names_field_and_value(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError) as error:
        read(fields)
    assert str(error.value).startswith("config: quantization_config.")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_groups_that_differ_are_refused_and_alike_ones_are_one() -> None:
    fields = compressed(PACKED, INT4)
    groups = fields["config_groups"]
    groups["group_0"]["targets"] = ["re:.*self_attn"]
    groups["group_1"] = {**groups["group_0"], "targets": ["re:.*mlp"]}
    assert left_dense(fields) == set()
    groups["group_1"] = {**groups["group_1"], "weights": {**INT4, "num_bits": 8}}
    with pytest.raises(PlanError, match=r"group_1\.weights=.*should be as in group_0: the ref"):
        read(fields)


@pytest.mark.parametrize(("model_type", "method"), [("gpt2", "gptq"), ("gpt_oss", "awq")])
def test_a_method_that_a_model_has_no_names_for_is_refused(model_type: str, method: str) -> None:
    with pytest.raises(PlanError, match=f"quant_method='{method}', but should be"):
        read({"gptq": GPTQ, "awq": AWQ}[method], model_type)
