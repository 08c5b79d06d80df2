"""Quantized directories in the reference decoder, against transformers and the formats' own tools.

Each is a small model made by transformers from a seed, then quantized (tests/quantized_models).

    case                made by                           held against, at TP=1
    fp8_block           transformers' Fp8Quantize         transformers' dequantized forward
    fp8_experts         the same, Qwen3-MoE               the same
    pack_int4, _zeros,  compressed-tensors' compressors   the same
    _int8; fp8_channel,
    _tensor, _blocks;
    int8; mxfp4
    nvfp4               compressed-tensors' compressors   transformers' model with weights that
                                                          compressed-tensors dequantizes in float64;
                                                          from_pretrained does it in bfloat16
    gpt_oss             tpcheck's quantizer (transformers transformers' dequantized forward
                        needs Triton for it)
    gptq, _ordered,     tpcheck's quantizer (GPTQModel    transformers' model with weights read
    _v2; awq,           needs a newer torch with CUDA,    element by element; transformers itself
    awq_mixtral         AutoAWQ needs Triton)             asks for those tools

By hand, once: AutoAWQ 0.2.9's dequantize_gemm and AutoGPTQ 0.7.1's qlinear_cuda in torch give, of
such awq, gptq (4 and 8 bits) and gptq_ordered files, the weights of this decoder bit for bit.

transformers takes norms, rope and softmax in float32, and so do some dequantizers: that is what
1e-6 allows for. Activations that are rounded are held against compressed-tensors' own forward, and
against DeepSeek's and vLLM's rule written out, with those casts widened: to 1e-12.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tpcheck
from tests import quantized_models as made
from tests.groups import single_group
from tests.models import load_model
from tests.reference_jobs import relative_rms
from tpcheck.quantization import Quantization
from tpcheck.reference.checkpoint import CheckpointWeights, load_decoder, read_spec
from tpcheck.reference.decoder import build_decoder

pytest.importorskip("transformers")

INT = {"type": "int", "symmetric": True}
FLOAT = {"type": "float", "symmetric": True}
TOKEN = {"strategy": "token", "dynamic": True, "num_bits": 8}
GROUPS = {"strategy": "group", "group_size": 32}
U8, E4M3 = torch.uint8, torch.float8_e4m3fn
COMPRESSED: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "pack_int4": ({**INT, **GROUPS, "num_bits": 4}, None),
    "pack_int4_zeros": ({**INT, **GROUPS, "num_bits": 4, "symmetric": False}, None),
    "pack_int8": ({**INT, "strategy": "channel", "num_bits": 8}, None),
    "fp8_channel": ({**FLOAT, "strategy": "channel", "num_bits": 8}, {**FLOAT, **TOKEN}),
    "fp8_tensor": ({**FLOAT, "strategy": "tensor", "num_bits": 8}, {**FLOAT, **TOKEN}),
    "fp8_blocks": (
        {**FLOAT, "strategy": "block", "block_structure": [32, 32], "num_bits": 8},
        {**FLOAT, **GROUPS, "dynamic": True, "num_bits": 8},
    ),
    "int8": ({**INT, "strategy": "channel", "num_bits": 8}, {**INT, **TOKEN}),
    "mxfp4": ({**FLOAT, **GROUPS, "num_bits": 4, "scale_dtype": U8, "zp_dtype": U8}, None),
    "nvfp4": (
        {
            **FLOAT,
            **{"strategy": "tensor_group", "group_size": 16, "num_bits": 4},
            **{"scale_dtype": E4M3, "zp_dtype": E4M3},
        },
        None,
    ),
}
GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
    "damp_percent": 0.1,
}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["gate"],
}
EXPERTS = {"num_hidden_layers": 1, "num_experts_per_tok": 2}
OURS: dict[str, tuple[Quantization, dict[str, Any], dict[str, Any]]] = {
    "gptq": (Quantization("gptq", 32), GPTQ, {}),
    "gptq_ordered": (
        Quantization("gptq", 32, symmetric=False, desc_act=True),
        {**GPTQ, "desc_act": True, "sym": False},
        {},
    ),
    "gptq_v2": (
        Quantization("gptq", 0, bits=8, symmetric=False, zeros_as_is=True),
        {**GPTQ, "bits": 8, "group_size": -1, "sym": False, "checkpoint_format": "gptq_v2"},
        {},
    ),
    "awq": (Quantization("awq", 32, symmetric=False), AWQ, {}),
    "awq_mixtral": (
        Quantization("awq", 32, symmetric=False),
        AWQ,
        {"model_type": "mixtral", "num_local_experts": 3, **EXPERTS},
    ),
}
PLAIN = ("fp8_block", "fp8_experts", "gpt_oss")
DEQUANTIZED = (*PLAIN, *(name for name in COMPRESSED if name != "nvfp4"))
Get = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Get:
    root = tmp_path_factory.mktemp("quantized")

    def get(name: str) -> Path:
        if name in COMPRESSED:
            return made.by_compressed_tensors(root / name, *COMPRESSED[name])
        if name in OURS:
            quantization, config, fields = OURS[name]
            return made.by_us(root / name, quantization, config, **fields)
        if name == "fp8_experts":
            return made.fp8_experts(root / name)
        return made.gpt_oss(root / name) if name == "gpt_oss" else made.fp8_block(root / name)

    return get


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let transformers load fp8 without accelerate, which it asks for and does not use here."""
    import transformers.quantizers.quantizer_finegrained_fp8 as fp8

    monkeypatch.setattr(fp8, "is_accelerate_available", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def ids() -> torch.Tensor:
    return torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(1))


def transformers_model(directory: Path, *, dequantize: bool = True) -> Any:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Mxfp4Config

    method = json.loads((directory / "config.json").read_text())["quantization_config"]
    kinds = {"compressed-tensors": CompressedTensorsConfig, "mxfp4": Mxfp4Config}
    kind = kinds.get(method["quant_method"])
    how = {"quantization_config": kind(dequantize=True)} if kind and dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager", local_files_only=True, **how
    )
    if getattr(model.config, "num_local_experts", 0):
        model.set_experts_implementation("eager")
    return model.eval().double()


def forward(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(), use_cache=False).logits


def reference(directory: Path, *, activations: bool = True) -> torch.Tensor:
    spec = read_spec(directory)
    assert spec.quantization is not None
    if not activations:
        spec = replace(spec, quantization=replace(spec.quantization, activations="none"))
    tp = single_group(dtype=torch.float64, weight_dtype=torch.bfloat16)
    return build_decoder(spec, tp, WideWeights(directory, tp))(ids())


class WideWeights(CheckpointWeights):
    """Leaves what is not quantized in float32, as transformers does."""

    def slice(self, name: str, shape: Any, dim: int, start: int, stop: int) -> torch.Tensor:
        tp, self._tp = self._tp, single_group(dtype=torch.float64, weight_dtype=torch.float32)
        part = super().slice(name, shape, dim, start, stop)
        self._tp = tp
        return part


@contextmanager
def wide_casts() -> Iterator[None]:
    """Let every cast to float32 go to float64 instead."""

    def widened(value: object) -> object:
        return torch.float64 if value is torch.float32 else value

    def widening(call: Callable[..., Any]) -> Callable[..., Any]:
        def wide(*args: object, **kwargs: object) -> Any:
            named = {name: widened(value) for name, value in kwargs.items()}
            return call(*map(widened, args), **named)

        return wide

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch.Tensor, "to", widening(torch.Tensor.to))
        patch.setattr(torch.nn.functional, "softmax", widening(torch.nn.functional.softmax))
        patch.setattr(torch, "arange", widening(torch.arange))
        yield


# The weights: TP=1 is the function that transformers computes from the same files.


@pytest.mark.parametrize("name", DEQUANTIZED)
def test_ref_equals_transformers_dequantized_forward_to_1e_6(models: Get, name: str) -> None:
    expected = forward(transformers_model(models(name)))
    actual = reference(models(name), activations=False)
    assert expected.dtype == actual.dtype == torch.float64
    assert relative_rms(actual, expected) < 1e-6


def read_by_elements(directory: Path) -> dict[str, torch.Tensor]:
    """Return the dense weights of a GPTQ or AWQ directory."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        parts = {
            leaf: tensors.pop(f"{module}.{leaf}")
            for leaf in ("qweight", "qzeros", "scales", "g_idx")
            if f"{module}.{leaf}" in tensors
        }
        if config["quant_method"] == "awq":
            weight = made.awq_weight(parts)
        else:
            v2 = config["checkpoint_format"] == "gptq_v2"
            weight = made.gptq_weight(parts, config["bits"], v2=v2)
        tensors[f"{module}.weight"] = weight.float().contiguous()
    return tensors


def read_by_compressed_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return the dense weights of an NVFP4 directory, dequantized in float64."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    tensors = load_file(directory / "model.safetensors")
    arguments = QuantizationArgs(**COMPRESSED["nvfp4"][0])
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        packed, module = tensors.pop(name), name.removesuffix(".weight_packed")
        codes = unpack_fp4_from_uint8(packed, len(packed), packed.shape[1] * 2, torch.float64)
        scale = tensors.pop(f"{module}.weight_scale").double()
        whole = tensors.pop(f"{module}.weight_global_scale").double()
        tensors[f"{module}.weight"] = dequantize(
            codes, scale, args=arguments, dtype=torch.float64, global_scale=whole
        ).float()
    return tensors


@pytest.mark.parametrize("name", [*OURS, "nvfp4"])
def test_ref_equals_transformers_with_the_tools_weights_to_1e_6(
    models: Get, name: str, tmp_path: Path
) -> None:
    directory = models(name)
    read = read_by_compressed_tensors if name == "nvfp4" else read_by_elements
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(read(directory), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load_model(tmp_path)
    if name == "awq_mixtral":
        model.set_experts_implementation("eager")
    assert relative_rms(reference(directory), forward(model)) < 1e-6


def test_transformers_reads_nvfp4_to_the_bfloat16_that_it_dequantizes_in(models: Get) -> None:
    expected = forward(transformers_model(models("nvfp4")))
    assert 2**-12 < relative_rms(reference(models("nvfp4")), expected) < 2**-7


# Activations that are rounded.


@pytest.mark.parametrize("name", ["fp8_channel", "fp8_tensor", "fp8_blocks"])
def test_activations_are_rounded_as_compressed_tensors_does(models: Get, name: str) -> None:
    with wide_casts():
        expected = forward(transformers_model(models(name), dequantize=False))
    assert relative_rms(reference(models(name)), expected) < 1e-12
    assert relative_rms(reference(models(name), activations=False), expected) > 1e-3


def round_inputs(model: Any, group: int, grid: str) -> None:
    """Round what every linear but the head takes, the largest of a group to the grid's end.

    Source: DeepSeek-V3's act_quant (e4m3, 448, groups of 128) and vLLM's dynamic int8 (127).
    """

    def rounded(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        x = args[0].unflatten(-1, (-1, group or args[0].shape[-1]))
        ends = 448.0 if grid == "e4m3" else 127.0
        scale = x.abs().amax(-1, keepdim=True) / ends
        codes = (x / scale).to(E4M3) if grid == "e4m3" else (x / scale).round()
        return ((codes.to(x.dtype) * scale).flatten(-2),)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(rounded)


@pytest.mark.parametrize(
    ("name", "group", "grid"), [("fp8_block", 128, "e4m3"), ("int8", 0, "int")]
)
def test_activations_are_rounded_as_engines_do(
    models: Get, name: str, group: int, grid: str
) -> None:
    with wide_casts():
        model = transformers_model(models(name))
        round_inputs(model, group, grid)
        expected = forward(model)
    assert relative_rms(reference(models(name)), expected) < 1e-12
    assert relative_rms(reference(models(name), activations=False), expected) > 1e-3


# Every degree.


OVER_GLOO = ("fp8_block", "gptq_ordered", "awq", "pack_int4_zeros", "fp8_channel", "int8", "mxfp4")
OVER_GLOO += ("nvfp4", "gpt_oss")


@pytest.mark.parametrize("name", [*DEQUANTIZED, *OURS, "nvfp4"])
def test_every_degree_passes(models: Get, name: str) -> None:
    backend = "gloo" if name in OVER_GLOO else "sim"
    report = tpcheck.run(f"ref:{models(name)}", (2, 3, 4), backend=backend)
    assert [verdict.outcome for verdict in report.verdicts] == ["PASS"] * 3
    assert {verdict.tp_size for verdict in report.verdicts} == {2, 3, 4}


@pytest.mark.parametrize("name", ["fp8_block", "gptq", "awq", "pack_int4_zeros", "int8", "nvfp4"])
def test_codes_and_scales_are_as_stored_whatever_the_dtypes_are(models: Get, name: str) -> None:
    stored = load_file(models(name) / "model.safetensors")
    tp = single_group(dtype=torch.float64, weight_dtype=torch.bfloat16)
    shards = load_decoder(models(name), tp).shards()
    module = "model.layers.0.self_attn.k_proj."
    leaves = {one.removeprefix(module) for one in shards if one.startswith(module)}
    assert leaves & {"scales", "weight_scale", "weight_scale_inv"}
    for leaf in leaves:
        actual, expected = shards[f"{module}{leaf}"][0], stored[f"{module}{leaf}"]
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(("strategy", "shape"), [("tensor", [1]), ("attn_head", [12, 1, 1])])
def test_a_quantized_cache_has_its_stored_scales(
    models: Get, tmp_path: Path, strategy: str, shape: list[int]
) -> None:
    source = models("fp8_channel")
    config = json.loads((source / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False}
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        for part in "kv":
            scales = torch.rand(shape, generator=torch.Generator().manual_seed(layer)) / 100 + 0.01
            tensors[f"model.layers.{layer}.self_attn.{part}_scale"] = scales
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tp = single_group(dtype=torch.float64, weight_dtype=torch.bfloat16)
    decoder = load_decoder(tmp_path, tp)
    name = "model.layers.1.self_attn.v_scale"
    assert torch.equal(decoder.shards()[name][0], tensors[name].double().flatten())
    assert relative_rms(decoder(ids()), load_decoder(source, tp)(ids())) > 1e-4
    report = tpcheck.run(f"ref:{tmp_path}", (2, 3), backend="sim")
    assert report.outcome == "PASS"
