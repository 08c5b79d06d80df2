"""The reference decoder against transformers' own models, on the same files.

transformers casts to float32 inside RMSNorm, rope and softmax whatever dtype it runs in. As it is
it agrees with the reference to 1e-6 in float64; with those casts widened here, to 1e-12: that is
what shows that the two compute the same function and that the rest is rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.groups import single_group
from tests.models import MODELS, load_model, make_model
from tests.reference_jobs import relative_rms
from tpcheck.reference.checkpoint import Checkpoint, CheckpointWeights, load_decoder, read_spec
from tpcheck.reference.decoder import build_decoder

pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def wide_casts() -> Iterator[None]:
    """Let every cast to float32 in this test go to float64 instead, as transformers sees it."""
    true_float, true_to, true_softmax = (
        torch.Tensor.float,
        torch.Tensor.to,
        torch.nn.functional.softmax,
    )
    true_arange = torch.arange

    def widened(dtype: object) -> object:
        return torch.float64 if dtype is torch.float32 else dtype

    def to(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        args = tuple(widened(arg) for arg in args)
        kwargs = {name: widened(value) for name, value in kwargs.items()}
        return true_to(self, *args, **kwargs)

    def softmax(*args: object, **kwargs: object) -> torch.Tensor:
        kwargs = {name: widened(value) for name, value in kwargs.items()}
        return true_softmax(*args, **kwargs)

    def arange(*args: object, **kwargs: object) -> torch.Tensor:
        kwargs = {name: widened(value) for name, value in kwargs.items()}
        return true_arange(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch.Tensor, "to", to)
        patch.setattr(torch.nn.functional, "softmax", softmax)
        patch.setattr(torch, "arange", arange)
        yield
    assert torch.Tensor.float is true_float


def reference_logits(directory: Path, input_ids: torch.Tensor) -> torch.Tensor:
    tp = single_group(dtype=torch.float64, weight_dtype=torch.float32)
    return load_decoder(directory, tp)(input_ids)


def transformers_logits(directory: Path, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_model(directory)(input_ids, use_cache=False).logits


def input_ids(length: int = 17) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 101, (2, length), generator=generator)


@pytest.mark.parametrize("name", MODELS)
def test_ref_equals_transformers_to_1e_6(models: Path, name: str) -> None:
    directory = make_model(models / name, name)
    expected = transformers_logits(directory, input_ids())
    assert expected.dtype == torch.float64
    assert relative_rms(reference_logits(directory, input_ids()), expected) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_ref_equals_transformers_with_wide_casts_to_1e_12(
    models: Path, name: str, wide_casts: None
) -> None:
    directory = make_model(models / name, name)
    expected = transformers_logits(directory, input_ids())
    assert relative_rms(reference_logits(directory, input_ids()), expected) < 1e-12


def test_the_1e_12_comparison_sees_a_norm_epsilon_off_by_a_millionth(
    models: Path, wide_casts: None
) -> None:
    directory = make_model(models / "llama", "llama")
    spec = read_spec(directory)
    off = replace(spec, norm_eps=spec.norm_eps * (1 + 1e-6))
    tp = single_group(dtype=torch.float64, weight_dtype=torch.float32)
    logits = build_decoder(off, tp, CheckpointWeights(directory, tp))(input_ids())
    assert relative_rms(logits, transformers_logits(directory, input_ids())) > 2e-12


def test_the_hard_casts_are_what_the_1e_6_allows_for(models: Path) -> None:
    directory = make_model(models / "llama", "llama")
    expected = transformers_logits(directory, input_ids())
    assert relative_rms(reference_logits(directory, input_ids()), expected) > 1e-9


def test_a_sharded_index_reads_as_the_single_file_does(models: Path) -> None:
    single = make_model(models / "llama", "llama")
    sharded = make_model(models / "llama_index", "llama", max_shard_size="20KB")
    assert (sharded / "model.safetensors.index.json").exists()
    assert not (sharded / "model.safetensors").exists()
    assert sorted(Checkpoint(sharded).names) == sorted(Checkpoint(single).names)
    actual, expected = (reference_logits(path, input_ids()) for path in (sharded, single))
    assert torch.equal(actual, expected)


def test_a_tied_checkpoint_stores_no_head(models: Path) -> None:
    directory = make_model(models / "llama_tied", "llama_tied")
    assert "lm_head.weight" not in Checkpoint(directory).names


def test_weights_are_rounded_to_the_storage_dtype(models: Path) -> None:
    directory = make_model(models / "llama", "llama")
    tp = single_group(dtype=torch.float64, weight_dtype=torch.bfloat16)
    for name, (tensor, _) in load_decoder(directory, tp).shards().items():
        assert tensor.dtype == torch.float64
        assert torch.equal(tensor, tensor.bfloat16().double()), name
