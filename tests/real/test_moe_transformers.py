"""The reference decoder's experts against transformers' Mixtral, Qwen2-MoE, Qwen3-MoE and gpt-oss.

Both read the same files, in each form that save_pretrained writes: one tensor per expert, as on the
Hub, and transformers 5's own, all experts in one (gpt-oss's only form). transformers takes softmax,
norms and rope in float32 whatever it runs in: that is what 1e-6 allows for, and with its casts
widened here what is left is rounding.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.groups import single_group
from tests.models import load_model, make_model
from tests.reference_jobs import Run, on_ranks, relative_rms
from tpcheck.errors import IllegalDegreeError, PlanError, SubjectError
from tpcheck.reference.checkpoint import load_decoder, read_spec

pytest.importorskip("transformers")

HEADS: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 8}
SIZES: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    **HEADS,
}
TIGHT_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5, **HEADS},
    "mixtral_window": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "sliding_window": 5,
        **HEADS,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", **SIZES, **HEADS, "norm_topk_prob": True},
    "qwen3_moe_raw": {"model_type": "qwen3_moe", **SIZES, **HEADS, "attention_bias": True},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **SIZES,
        "num_key_value_heads": 1,
        "shared_expert_intermediate_size": 36,
    },
    "qwen2_moe_tied": {
        "model_type": "qwen2_moe",
        **SIZES,
        "num_key_value_heads": 1,
        "shared_expert_intermediate_size": 36,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {**GPT_OSS, "sliding_window": 5},
    "gpt_oss_clamped": {
        **GPT_OSS,
        "sliding_window": 3,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        "swiglu_limit": 0.5,
        "swiglu_alpha": 1.2,
        "attention_bias": False,
        "rope_parameters": TIGHT_YARN,
    },
}
FORMS = ("one_each", "all_in_one")
Get = Callable[..., Path]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """Return the directory of a model, in either form."""
    root = tmp_path_factory.mktemp("experts")

    def get(name: str, form: str = "one_each") -> Path:
        hub = make_model(root / name, "llama", **MODELS[name])
        fused = root / f"{name}_{form}"
        if form == "all_in_one" and not fused.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_model(hub, torch.float32).save_pretrained(fused, save_original_format=False)
        return hub if form == "one_each" else fused

    return get


def ids(length: int = 17) -> torch.Tensor:
    return torch.randint(0, 101, (2, length), generator=torch.Generator().manual_seed(1))


def transformers_logits(directory: Path, dtype: torch.dtype) -> torch.Tensor:
    model = load_model(directory, dtype)
    model.set_experts_implementation("eager")  # the others do not run in float64
    with torch.no_grad():
        return model(ids(), use_cache=False).logits


def reference_logits(directory: Path, dtype: torch.dtype) -> torch.Tensor:
    return load_decoder(directory, single_group(dtype=dtype, weight_dtype=torch.float32))(ids())


@pytest.fixture
def wide_casts() -> Iterator[None]:
    """Let transformers' casts to float32 go to float64 in this test."""
    true_to, true_softmax = torch.Tensor.to, torch.nn.functional.softmax
    true_arange = torch.arange

    def widened(value: object) -> object:
        return torch.float64 if value is torch.float32 else value

    def widening(call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wide(*args: object, **kwargs: object) -> torch.Tensor:
            named = {name: widened(value) for name, value in kwargs.items()}
            return call(*map(widened, args), **named)

        return wide

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch.Tensor, "to", widening(true_to))
        patch.setattr(torch.nn.functional, "softmax", widening(true_softmax))
        patch.setattr(torch, "arange", widening(true_arange))
        yield


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_ref_equals_transformers_to_1e_6(models: Get, name: str, form: str) -> None:
    directory = models(name, form)
    for dtype in (torch.float32, torch.float64):
        expected = transformers_logits(directory, dtype)
        assert expected.dtype == dtype
        assert relative_rms(reference_logits(directory, dtype), expected) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_ref_equals_transformers_with_wide_casts_to_1e_12(
    models: Get, name: str, wide_casts: None
) -> None:
    directory = models(name)
    expected = transformers_logits(directory, torch.float64)
    assert relative_rms(reference_logits(directory, torch.float64), expected) < 1e-12


def test_the_two_forms_are_two_forms(models: Get) -> None:
    kinds = {}
    for form in FORMS:
        with safe_open(models("mixtral", form) / "model.safetensors", framework="pt") as file:
            kinds[form] = {name for name in file.keys() if "layers.0" in name and "expert" in name}
    assert "model.layers.0.block_sparse_moe.experts.4.w2.weight" in kinds["one_each"]
    assert kinds["all_in_one"] == {
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_every_degree_reads_its_own_slices(models: Get, name: str, form: str) -> None:
    directory = models(name, form)
    (whole,) = on_ranks(Run(directory, ids(7), weight_dtype=torch.float32), 1)
    for size in (2, 3):
        for reply in on_ranks(Run(directory, ids(7), weight_dtype=torch.float32), size):
            assert relative_rms(reply.logits, whole.logits) < 1e-12
            for weight, (local, _) in reply.shards.items():
                expected = whole.shards[weight][0].numel()
                if ".experts." in weight or ".shared_expert." in weight:
                    assert local.numel() * size == expected
                if weight.endswith("mlp.gate.weight"):
                    assert local.numel() == expected


def test_a_degree_that_no_expert_divides_by_is_refused(models: Get) -> None:
    spec = read_spec(models("qwen2_moe"))
    assert (spec.moe_intermediate_size, spec.shared_expert_intermediate_size) == (24, 36)
    message = "layers.*.self_attn: num_attention_heads=6, but should be divisible by tp_size=8"
    with pytest.raises(IllegalDegreeError) as error:
        on_ranks(Run(models("qwen2_moe"), ids()), 8)
    assert str(error.value).startswith(message)
    assert "shared_expert_intermediate_size=36, but should be divisible by tp_size=8" in str(
        error.value
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "phrase"),
    [("drop", "missing"), ("cut", "but config.json makes it"), ("add", "gives no use for")],
)
def test_a_checkpoint_that_does_not_fit_is_named(
    models: Get, tmp_path: Path, form: str, change: str, phrase: str
) -> None:
    source = models("mixtral", form)
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in sorted(tensors) if ".experts." in name)
    tensor = tensors.pop(name)
    if change != "drop":
        tensors[name] = tensor if change == "add" else tensor[..., :-1].contiguous()
    if change == "add":
        tensors[f"{name.rpartition('experts')[0]}experts.bias"] = torch.zeros(5)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(SubjectError) as error:
        load_decoder(tmp_path, single_group())
    assert phrase in str(error.value)


def test_a_model_with_dense_layers_between_is_refused(models: Get, tmp_path: Path) -> None:
    config = json.loads((models("qwen3_moe") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mlp_only_layers": [1]}))
    with pytest.raises(PlanError, match=r"mlp_only_layers=\[1\], but should be \[\]"):
        read_spec(tmp_path)
