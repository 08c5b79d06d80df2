"""Slices of stored codes and scales, against slices of the whole tensor; and no more than those."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.groups import single_group
from tests.unit.test_reference import bytes_read, resident_bytes
from tpcheck.hf.config import spec_from_config
from tpcheck.reference.checkpoint import Checkpoint, CheckpointWeights
from tpcheck.reference.layout import logical_tensors
from tpcheck.reference.quantized_names import QuantizedPart
from tpcheck.reference.quantized_reading import read_part
from tpcheck.reference.stored import Stored
from tpcheck.shard_plan.quant import StoredAs, quantized

EXPERTS, ROWS, BLOCKS = 3, 6, 4


def spans(size: int) -> list[tuple[int, int]]:
    return [(start, stop) for start in range(size + 1) for stop in range(start, size + 1)]


@pytest.mark.parametrize("part", [0, 1])
def test_interleaved_blocks_of_gpt_oss_are_cut_by_rows(tmp_path: Path, part: int) -> None:
    whole = torch.arange(EXPERTS * 2 * ROWS * BLOCKS * 16).remainder(251).to(torch.uint8)
    whole = whole.view(EXPERTS, 2 * ROWS, BLOCKS, 16)
    save_file({"b": whole}, tmp_path / "model.safetensors")
    stored = Stored("b", part=part, parts=2, index=1, among=EXPERTS, interleaved=True)
    codes = QuantizedPart(stored, (ROWS, BLOCKS * 16), ("U8",), block=16)
    assert codes.stored_shape == tuple(whole.shape)
    expected = whole[1, part::2].reshape(ROWS, -1)
    for start, stop in spans(ROWS):
        actual = read_part(Checkpoint(tmp_path), codes, 0, start, stop)
        assert torch.equal(actual, expected[start:stop])


def test_blocks_of_gpt_oss_are_cut_by_columns_inside_a_block_too(tmp_path: Path) -> None:
    whole = torch.arange(EXPERTS * ROWS * BLOCKS * 16).remainder(251).to(torch.uint8)
    save_file({"b": whole.view(EXPERTS, ROWS, BLOCKS, 16)}, tmp_path / "model.safetensors")
    codes = QuantizedPart(
        Stored("b", index=2, among=EXPERTS), (ROWS, BLOCKS * 16), ("U8",), block=16
    )
    expected, checkpoint = whole.view(EXPERTS, ROWS, -1)[2], Checkpoint(tmp_path)
    for start, stop in spans(BLOCKS * 16)[::7]:
        actual = read_part(checkpoint, codes, 1, start, stop)
        assert torch.equal(actual, expected[:, start:stop])
    assert read_part(checkpoint, codes, 1, 5, 5).shape == (ROWS, 0)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dim", [0, 1])
def test_one_scale_is_read_whichever_shape_it_has(
    tmp_path: Path, shape: tuple[int, ...], dim: int
) -> None:
    save_file({"s": torch.tensor(0.5).reshape(shape).clone()}, tmp_path / "model.safetensors")
    part = QuantizedPart(Stored("s"), (1, 1), ("F32",))
    assert read_part(Checkpoint(tmp_path), part, dim, 0, 1).tolist() == [[0.5]]
    empty = read_part(Checkpoint(tmp_path), part, dim, 0, 0)
    assert tuple(empty.shape) == ((0, 1) if dim == 0 else (1, 0))


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_scales_of_rows_are_cut_whichever_shape_they_have(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    scales = torch.arange(5.0)
    save_file({"s": scales.reshape(shape).clone()}, tmp_path / "model.safetensors")
    part = QuantizedPart(Stored("s"), (5, 1), ("F32",))
    for start, stop in spans(5):
        actual = read_part(Checkpoint(tmp_path), part, 0, start, stop)
        assert torch.equal(actual, scales[start:stop, None])
    assert torch.equal(read_part(Checkpoint(tmp_path), part, 1, 0, 1), scales[:, None])


def test_ranks_read_their_slices_of_codes_and_scales_and_not_the_file(tmp_path: Path) -> None:
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("no /proc/self/smaps to read what is resident")
    config = {
        "model_type": "llama",
        "vocab_size": 16,
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 32,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec, path = spec_from_config(config), tmp_path / "model.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in logical_tensors(spec).items():
        if not quantized(spec, name, tensor):
            tensors[name] = torch.zeros(tensor.shape)
            continue
        rows, columns = tensor.shape
        tensors[name] = (torch.arange(rows * columns) % 57).to(torch.float8_e4m3fn).view(rows, -1)
        blocks = (-(-rows // 128), -(-columns // 128))
        tensors[f"{name}_scale_inv"] = torch.arange(blocks[0] * blocks[1]).float().view(blocks)
    save_file(tensors, path)

    name = "model.layers.0.mlp.gate_proj"
    whole, scales = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"]
    weights, weight = CheckpointWeights(tmp_path, single_group()), StoredAs(name, (4096, 2048))
    held = resident_bytes(smaps.read_text(), str(path))
    assert held < whole.nbytes / 16, "holding a checkpoint against its config reads headers only"
    before = bytes_read()
    part = weights.stored(weight, "weight", 0, 512, 1024)
    assert torch.equal(part.view(torch.uint8), whole[512:1024].view(torch.uint8))
    assert torch.equal(weights.stored(weight, "weight_scale_inv", 0, 4, 8), scales[4:8])
    assert part.untyped_storage().nbytes() == part.nbytes == whole.nbytes / 8
    assert part.nbytes <= bytes_read() - before < part.nbytes + 50_000, "these and the header"
    weights.stored(weight, "weight", 0, 0, 4096)
    assert bytes_read() - before > whole.nbytes
    # none of it is in memory a second time, as pages of a mapped file
    assert resident_bytes(smaps.read_text(), str(path)) < whole.nbytes / 16
