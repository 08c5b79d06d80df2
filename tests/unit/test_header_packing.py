"""Scales and packed weights of more tools in --weights: fp8 per tensor, NVFP4, bitsandbytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.test_header_check import LAYER, Tensors, change, findings, save

Store = Callable[[torch.Tensor], Tensors]


def per_tensor(shape: tuple[int, ...]) -> Store:
    def store(weight: torch.Tensor) -> Tensors:
        sizes = tuple(weight.shape[0] if size < 0 else size for size in shape)
        return {
            "weight": weight.to(torch.float8_e4m3fn),
            "weight_scale": torch.ones(sizes),
            "input_scale": torch.ones(()),
        }

    return store


def nvfp4(weight: torch.Tensor) -> Tensors:
    out, into = weight.shape
    return {
        "weight": torch.zeros(out, into // 2, dtype=torch.uint8),
        "weight_scale": torch.ones(out, into // 16).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.ones(()),
        "input_scale": torch.ones(()),
    }


def nvfp4_packed(weight: torch.Tensor) -> Tensors:
    stored = nvfp4(weight)
    return {
        "weight_packed": stored["weight"],
        "weight_scale": stored["weight_scale"],
        "weight_global_scale": torch.ones(1),
        "input_global_scale": torch.ones(1),
    }


def bitsandbytes(weight: torch.Tensor) -> Tensors:
    count = weight.numel()
    return {
        "weight": torch.zeros(count // 2, 1, dtype=torch.uint8),
        "weight.absmax": torch.zeros(-(-count // 64), dtype=torch.uint8),
        "weight.quant_map": torch.zeros(16),
        "weight.nested_absmax": torch.zeros(-(-count // 64 // 256)),
        "weight.nested_quant_map": torch.zeros(256),
        "weight.quant_state.bitsandbytes__nf4": torch.zeros(99, dtype=torch.uint8),
    }


def eight_bits(weight: torch.Tensor) -> Tensors:
    rows = torch.zeros(weight.shape[0])
    return {
        "weight": weight.to(torch.int8),
        "SCB": rows,
        "weight_format": torch.zeros((), dtype=torch.uint8),
    }


_FLOAT4 = {"num_bits": 4, "type": "float", "group_size": 16}
METHODS: dict[str, tuple[Store, dict[str, Any]]] = {
    "fp8": (per_tensor(()), {"quant_method": "fp8"}),
    "fp8 of one": (per_tensor((1,)), {"quant_method": "fp8"}),
    "fp8 per row": (per_tensor((-1,)), {"quant_method": "fp8"}),
    "fp8 per row, 2-d": (per_tensor((-1, 1)), {"quant_method": "fp8"}),
    "nvfp4": (nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "nvfp4 packed": (
        nvfp4_packed,
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": _FLOAT4}}},
    ),
    "bitsandbytes": (bitsandbytes, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes 8": (eight_bits, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 128 inputs to every weight are two runs of 64, and q_proj has one head to a rank
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    return save("Llama", tmp_path_factory.mktemp("plain"), **sizes)


@pytest.fixture
def copied(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


def quantize(directory: Path, method: str, edit: Callable[[Tensors], Any] = lambda _: None) -> Path:
    store, fields = METHODS[method]

    def change_all(tensors: Tensors) -> None:
        for name in [name for name in tensors if "_proj.weight" in name]:
            module = name.removesuffix("weight")
            stored = store(tensors.pop(name))
            tensors.update({f"{module}{end}": tensor for end, tensor in stored.items()})
        edit(tensors)

    return change(directory, change_all, quantization_config=fields)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_of_this_form_is_what_its_config_says(method: str, copied: Path) -> None:
    found = findings(quantize(copied, method), 1, 2)
    assert (found["problems"], found["tiled"]) == ([], [1, 2])
    [note] = found["notes"]
    assert note.endswith(
        "scales are held to presence, shape and dtype; their values are in no header"
    )


DOWN = f"{LAYER}mlp.down_proj."


@pytest.mark.parametrize(
    ("method", "end", "tensor", "problem"),
    [
        (
            "fp8",
            "weight_scale",
            torch.ones(3),
            "shape=[3], but should be [] or [1] or [128] or [128, 1]",
        ),
        ("fp8", "weight_scale", None, "is missing, but should be [] or [1] or [128] or [128, 1]"),
        (
            "fp8",
            "weight_scale",
            torch.ones((), dtype=torch.int32),
            "dtype=I32, but should be F32 or BF16 or F16 or F8_E8M0",
        ),
        ("fp8", "input_scale", torch.ones(2), "shape=[2], but should be [] or [1]"),
        (
            "nvfp4",
            "weight",
            torch.zeros(128, 256, dtype=torch.uint8),
            "shape=[128, 256], but should be [128, 128]",
        ),
        (
            "nvfp4",
            "weight_scale",
            torch.ones(128, 16),
            "dtype=F32, but should be F8_E4M3 or F8_E4M3FNUZ",
        ),
        ("nvfp4", "weight_scale_2", None, "is missing, but should be [] or [1]"),
        ("nvfp4 packed", "weight_global_scale", None, "is missing, but should be [] or [1]"),
        (
            "bitsandbytes",
            "weight",
            torch.zeros(128 * 256, 1, dtype=torch.uint8),
            "shape=[32768, 1], but should be [16384, 1]",
        ),
        (
            "bitsandbytes",
            "weight.absmax",
            torch.zeros(500, dtype=torch.uint8),
            "shape=[500], but should be [512] or [256] or [128] or [64] or [32] or [16] or [8]",
        ),
        ("bitsandbytes", "weight.quant_map", None, "is missing, but should be [16]"),
        ("bitsandbytes 8", "SCB", torch.zeros(127), "shape=[127], but should be [128]"),
    ],
)
def test_one_change_is_one_problem(
    copied: Path, method: str, end: str, tensor: torch.Tensor | None, problem: str
) -> None:
    def edit(tensors: Tensors) -> None:
        tensors.pop(f"{DOWN}{end}")
        if tensor is not None:
            tensors[f"{DOWN}{end}"] = tensor

    found = findings(quantize(copied, method, edit))
    assert found["problems"] == [f"{DOWN}{end}: {problem}"]


@pytest.mark.parametrize(
    ("method", "width", "end", "grain"),
    [
        ("nvfp4", 144, "weight_scale", "4.5 blocks of 16"),
        ("bitsandbytes", 192, "weight.absmax", "1.5 blocks of 64"),
    ],
)
def test_a_scale_that_two_ranks_would_share(
    tmp_path: Path, method: str, width: int, end: str, grain: str
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": width, "head_dim": 32}
    found = findings(quantize(save("Llama", tmp_path, **sizes), method), 1, 2)
    [problem] = [one for one in found["problems"] if f"down_proj.{end} " in one]
    assert f"which is {grain}" in problem
    assert found["tiled"] == [1]


def test_a_run_over_the_end_of_a_row_is_cut_only_where_it_ends(tmp_path: Path) -> None:
    # rows of 96 values: 48 rows of q_proj are 72 runs of 64, but 48 values of a row of o_proj none
    sizes = {"hidden_size": 96, "intermediate_size": 192, "head_dim": 24}
    found = findings(quantize(save("Llama", tmp_path, **sizes), "bitsandbytes"), 2)
    cut = {one.partition(" ")[0].split(".")[4] for one in found["problems"] if "absmax" in one}
    assert cut == {"o_proj", "down_proj"}
