"""What a quantized directory that does not fit is called, in full: one error, exit 2.

The directories are written without transformers: a GPTQ and a compressed-tensors model of one
layer, by tpcheck's own quantizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.groups import single_group
from tpcheck.cli import main
from tpcheck.errors import SubjectError
from tpcheck.hf.config import spec_from_config
from tpcheck.reference.checkpoint import load_decoder
from tpcheck.reference.layout import logical_tensors
from tpcheck.reference.quantizing import quantize
from tpcheck.shard_plan.quant import quantized

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True},
    "ordered": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
    "pack": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16},
            }
        },
    },
    "fp8": {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "dynamic"},
}
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def write(kind: str) -> Path:
        config = {**MODEL, "quantization_config": CONFIGS[kind]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        spec, generator = spec_from_config(config), torch.Generator().manual_seed(1)
        assert spec.quantization is not None
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in logical_tensors(spec).items():
            whole = torch.randn(tensor.shape, generator=generator) * 0.2
            module = name.removesuffix(".weight")
            if not quantized(spec, name, tensor):
                tensors[name] = whole
                continue
            for suffix, part in quantize(whole, spec.quantization).items():
                tensors[f"{module}.{suffix}"] = part
            if kind == "pack":
                tensors[f"{module}.weight_shape"] = torch.tensor(tensor.shape)
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return write


def change(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors of a directory."""
    path = directory / "model.safetensors"
    stored = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_directories_are_read_as_they_are(make: Any, kind: str) -> None:
    load_decoder(make(kind), single_group())


ONES = torch.ones(4, 32, dtype=torch.float16)
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "a missing scale": (
        "gptq",
        {f"{DOWN}.scales": None},
        f"1 tensor missing: {DOWN}.scales [llama, gptq]",
    ),
    "a scale per other groups": (
        "gptq",
        {f"{DOWN}.scales": ONES[:2]},
        f"{DOWN}.scales: shape=[2, 32], but config.json makes it [4, 32] [llama, gptq]",
    ),
    "codes in another dtype": (
        "gptq",
        {f"{DOWN}.qweight": torch.zeros(8, 32, dtype=torch.int64)},
        f"{DOWN}.qweight: dtype=I64, but config.json makes it I32 [llama, gptq]",
    ),
    "scales of a whole number's dtype": (
        "gptq",
        {f"{DOWN}.scales": ONES.to(torch.int16)},
        f"{DOWN}.scales: dtype=I16, but config.json makes it F64 or F32 or F16 or BF16"
        " [llama, gptq]",
    ),
    "a layer that is quantized but should not be": (
        "fp8",
        {"lm_head.weight": torch.zeros(16, 32).to(torch.float8_e4m3fn)},
        "lm_head.weight: dtype=F8_E4M3, but config.json makes it F64 or F32 or F16 or BF16"
        " [llama, fp8]",
    ),
    "static activation scales": (
        "fp8",
        {f"{DOWN}.input_scale": torch.ones(1)},
        f"1 tensor that config.json gives no use for: {DOWN}.input_scale; the reference decoder"
        " computes the scales of activations as they come [llama, fp8]",
    ),
    "scales of a cache that config.json knows nothing of": (
        "fp8",
        {"model.layers.0.self_attn.k_scale": torch.ones(1)},
        "1 tensor that config.json gives no use for: model.layers.0.self_attn.k_scale;"
        " a quantized cache needs kv_cache_scheme there [llama, fp8]",
    ),
    "a scale per row for one per tensor": (
        "fp8",
        {f"{DOWN}.weight_scale": torch.ones(32, 1)},
        f"{DOWN}.weight_scale: shape=[32, 1], but config.json makes it [1, 1] [llama, fp8]",
    ),
    "a bias that is not zero": (
        "gptq",
        {f"{DOWN}.bias": torch.ones(32)},
        f"1 tensor that config.json gives no use for: {DOWN}.bias [llama, gptq]",
    ),
    "groups out of order": (
        "gptq",
        {f"{DOWN}.g_idx": (torch.arange(64) // 16).flip(0).int()},
        f"{DOWN}.g_idx: feature 0 is in group 3, but should be feature // 16 where config.json"
        " says desc_act=false",
    ),
    "groups that are none": (
        "ordered",
        {f"{DOWN}.g_idx": (torch.arange(64) // 15).int()},
        f"{DOWN}.g_idx: feature 60 is in group 4, but should be from 0 to 3",
    ),
    "another weight_shape": (
        "pack",
        {f"{DOWN}.weight_shape": torch.tensor([32, 60])},
        f"{DOWN}.weight_shape=[32, 60], but config.json makes it [32, 64] [llama, pack-quantized]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_do_not_fit_are_one_error(make: Any, case: str) -> None:
    kind, tensors, message = WRONG[case]
    directory = make(kind)
    change(directory, **tensors)
    with pytest.raises(SubjectError) as error:
        load_decoder(directory, single_group())
    assert str(error.value) == f"{directory}: {message}"


def test_zero_biases_that_gptq_tools_add_change_nothing(make: Any) -> None:
    directory = make("gptq")
    change(directory, **{f"{DOWN}.bias": torch.zeros(32)})
    load_decoder(directory, single_group())


def test_scales_may_leave_dims_of_length_one_out(make: Any) -> None:
    directory = make("fp8")
    whole = load_decoder(directory, single_group())
    scale = load_file(directory / "model.safetensors")[f"{DOWN}.weight_scale"]
    for shape in ([], [1]):
        change(directory, **{f"{DOWN}.weight_scale": scale.reshape(shape).clone()})
        decoder = load_decoder(directory, single_group())
        down = decoder.shards()[f"{DOWN}.weight_scale"][0]
        assert torch.equal(down, whole.shards()[f"{DOWN}.weight_scale"][0])


def command_line(directory: Path, capsys: Any, monkeypatch: Any) -> tuple[object, str, str]:
    """Return the exit code, stdout and stderr of a run at TP 2."""
    words = ["tpcheck", "run", f"ref:{directory}", "--tp", "2", "--backend", "sim", "--no-progress"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, *capsys.readouterr()


@pytest.mark.parametrize("case", ["a missing scale", "groups out of order"])
def test_the_command_line_prints_one_error_and_exits_with_2(
    make: Any, case: str, capsys: Any, monkeypatch: Any
) -> None:
    kind, tensors, message = WRONG[case]
    directory = make(kind)
    change(directory, **tensors)
    code, printed, errors = command_line(directory, capsys, monkeypatch)
    assert (code, printed, errors) == (2, "", f"error: {directory}: {message}\n")


def test_a_field_that_cannot_be_done_is_one_error_and_exits_with_2(
    make: Any, capsys: Any, monkeypatch: Any
) -> None:
    directory = make("fp8")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["activation_scheme"] = "static"
    (directory / "config.json").write_text(json.dumps(config))
    code, printed, errors = command_line(directory, capsys, monkeypatch)
    assert (code, printed) == (2, "")
    assert errors == (
        "error: config: quantization_config.activation_scheme='static', but should be 'dynamic':"
        " the reference decoder computes the scales of activations as they come\n"
    )
