"""The reference decoder is the same function at every degree, with the collectives it promises."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.groups import single_group
from tests.models import GPT2, SMALL
from tests.reference_jobs import Reply, Run, alone, ids_for, on_ranks, relative_rms, unmoved_weights
from tpcheck.errors import IllegalDegreeError, PlanError, SubjectError
from tpcheck.hf.config import spec_from_config
from tpcheck.placement import Replicate
from tpcheck.reference.checkpoint import Checkpoint, load_decoder, read_spec
from tpcheck.reference.decoder import build_decoder
from tpcheck.reference.layout import logical_tensors
from tpcheck.shard_plan import legal_tp_sizes
from tpcheck.sharding import tiling_problems, unshard
from tpcheck.spec import ModelSpec

GQA = ModelSpec(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=24,
    num_key_value_heads=4,
    head_dim=4,
    max_position_embeddings=32,
)
BIASES: dict[str, Any] = {
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "lm_head_bias": True,
}
SPECS = {
    "gqa": GQA,
    "mha": replace(GQA, num_key_value_heads=24),
    "mqa": replace(GQA, num_key_value_heads=1),
    "qk_norm_per_head": replace(GQA, qk_norm="per_head"),
    "qk_norm_across_heads": replace(GQA, qk_norm="across_heads"),
    "qk_norm_across_copied_heads": replace(GQA, num_key_value_heads=2, qk_norm="across_heads"),
    "biases": replace(GQA, **BIASES),
    "tied": replace(GQA, tie_word_embeddings=True),
    "vocab_divides": replace(GQA, vocab_size=96),
    "vocab_leaves_ranks_empty": replace(GQA, vocab_size=9),
    "window": replace(GQA, sliding_window=3),
    "gpt2": replace(
        GQA,
        **BIASES,
        num_key_value_heads=24,
        mlp="plain",
        norm_type="layer",
        position="learned",
        hidden_act="gelu_new",
    ),
}
DEGREES = (2, 3, 4, 6, 8, 12, 24)


@pytest.fixture(scope="module")
def whole() -> dict[str, Reply]:
    """Every spec at TP=1."""
    return alone(SPECS)


CASES = [
    (name, size) for name, spec in SPECS.items() for size in DEGREES if size in legal_tp_sizes(spec)
]


def test_the_grid_reaches_kv_replication_and_odd_degrees() -> None:
    assert ("gqa", 8) in CASES
    assert ("gqa", 24) in CASES
    assert ("gqa", 3) not in CASES
    assert ("mqa", 3) in CASES
    assert len(CASES) > 60


@pytest.mark.parametrize(("name", "size"), CASES)
def test_every_degree_is_the_same_function(whole: dict[str, Reply], name: str, size: int) -> None:
    spec = SPECS[name]
    replies = on_ranks(Run(spec, ids_for(spec), poison=True), size)
    for reply in replies:
        assert torch.equal(reply.logits, replies[0].logits)
        assert relative_rms(reply.logits, whole[name].logits) < 1e-12
        assert relative_rms(reply.decoded, whole[name].logits) < 1e-12


@pytest.mark.parametrize(("name", "size"), [case for case in CASES if case[1] in (2, 3, 8)])
def test_placements_say_where_weights_and_activations_are(
    whole: dict[str, Reply], name: str, size: int
) -> None:
    spec = SPECS[name]
    replies = on_ranks(Run(spec, ids_for(spec)), size)
    assert list(replies[0].shards) == list(whole[name].shards)
    assert set(replies[0].shards) == set(logical_tensors(spec))
    for weight, (expected, _) in whole[name].shards.items():
        entries = [reply.shards[weight] for reply in replies]
        locals_, placements = [entry[0] for entry in entries], [entry[1] for entry in entries]
        assert tiling_problems(expected.shape, placements, locals_, expected) == [], weight
    assert list(replies[0].points) == list(whole[name].points)
    for fqn, (x, y, _, _) in whole[name].points.items():
        points = [reply.points[fqn] for reply in replies]
        for expected, local, placement in ((x, 0, 2), (y, 1, 3)):
            actual = unshard(
                [point[local] for point in points],
                [point[placement] for point in points],
                expected.shape,
            )
            assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-12), fqn


@pytest.mark.parametrize("name", SPECS)
def test_trace_points_are_declared_in_order_of_execution(name: str) -> None:
    spec = SPECS[name]
    decoder = build_decoder(spec, single_group())
    order: list[str] = []
    for fqn, (module, before, after) in decoder.trace_points.items():
        module.register_forward_hook(lambda *_, fqn=fqn: order.append(fqn))
        assert dict(decoder.named_modules())[fqn] is module
        assert before is not None
        assert after is not None
    decoder(ids_for(spec))
    assert order == list(decoder.trace_points)


@pytest.mark.parametrize(("name", "size"), [("gqa", 1), ("gqa", 4), ("qk_norm_across_heads", 8)])
def test_one_all_reduce_per_attention_and_per_mlp(name: str, size: int) -> None:
    spec = SPECS[name]
    extra = 2 * spec.num_hidden_layers if spec.qk_norm == "across_heads" else 0
    for reply in on_ranks(Run(spec, ids_for(spec)), size):
        assert Counter(reply.collectives) == {
            "all_reduce": 1 + 2 * spec.num_hidden_layers + extra,
            "all_gather": 1,
        }


@pytest.mark.parametrize("name", SPECS)
def test_generated_logits_are_of_ordinary_size(name: str) -> None:
    spec = replace(SPECS[name], num_hidden_layers=8)
    for dtype in (torch.float64, torch.bfloat16):
        logits = build_decoder(spec, single_group(dtype=dtype))(ids_for(spec))
        assert logits.dtype == dtype
        assert 0.1 < float(logits.double().square().mean().sqrt()) < 30


@pytest.mark.parametrize("name", SPECS)
def test_every_weight_moves_the_logits(name: str) -> None:
    spec = SPECS[name]
    unmoved = unmoved_weights(build_decoder(spec, single_group()), ids_for(spec))
    # softmax does not see what is added to every score alike
    assert [weight for weight in unmoved if "k_proj.bias" not in weight] == []


def test_a_token_sees_no_later_token_and_no_further_than_its_window() -> None:
    spec = replace(GQA, sliding_window=3, num_hidden_layers=1)
    decoder = build_decoder(spec, single_group())
    ids = ids_for(spec, 9)
    moved = ids.clone()
    moved[:, 4] = (ids[:, 4] + 1) % spec.vocab_size
    changed = (decoder(ids) != decoder(moved)).any(-1).any(0).tolist()
    assert changed == [False] * 4 + [True] * 3 + [False] * 2


def test_float64_is_never_narrowed() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Dtypes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[torch.dtype] = set()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                self.seen.add(out.dtype)
            return out

    for spec in SPECS.values():
        decoder = build_decoder(spec, single_group())
        with Dtypes() as dtypes:
            decoder(ids_for(spec))
        assert dtypes.seen == {torch.float64}


def test_an_illegal_degree_is_refused_before_a_weight_moves() -> None:
    tp = single_group(size=5)
    with pytest.raises(IllegalDegreeError, match="num_attention_heads=24"):
        build_decoder(GQA, tp)


@pytest.mark.parametrize(
    ("ids", "phrase"),
    [
        (torch.zeros(3, dtype=torch.int64), r"but should be \[batch, tokens\] int64"),
        (torch.zeros(1, 3), r"float32, but should be"),
        (torch.tensor([[101]]), "but should lie below vocab_size=101"),
        (torch.tensor([[-1]]), "ids from -1 to -1"),
        (torch.zeros(1, 33, dtype=torch.int64), "33 tokens, but should be at most"),
    ],
)
def test_ids_out_of_range_are_refused(ids: torch.Tensor, phrase: str) -> None:
    with pytest.raises(SubjectError, match=phrase):
        build_decoder(SPECS["gpt2"], single_group())(ids)


# Checkpoints.


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A llama directory, written without transformers."""
    config = {"model_type": "llama", **SMALL}
    (tmp_path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(2)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) * 0.2
        for name, tensor in logical_tensors(spec_from_config(config)).items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def change(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors of a model directory."""
    path = directory / "model.safetensors"
    stored = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, path)


def group() -> Any:
    return single_group(weight_dtype=torch.float32)


@pytest.mark.parametrize("size", [2, 6])
def test_ranks_of_a_checkpoint_are_the_same_function(model: Path, size: int) -> None:
    spec = read_spec(model)
    run = Run(model, ids_for(spec), weight_dtype=torch.float32)
    (one,) = on_ranks(run, 1)
    for reply in on_ranks(run, size):
        assert relative_rms(reply.logits, one.logits) < 1e-12


def test_ranks_read_their_slices_and_not_the_file(tmp_path: Path) -> None:
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("no /proc to tell what was read")
    rows, columns = 4096, 2048
    path = tmp_path / "model.safetensors"
    save_file({"big": torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)}, path)
    size = path.stat().st_size
    checkpoint = Checkpoint(tmp_path)
    before = bytes_read()
    part = checkpoint.slice("big", 0, 512, 768)
    assert part.nbytes <= bytes_read() - before < part.nbytes + 50_000, "the slice and the header"
    assert torch.equal(part[:, 0], torch.arange(512, 768, dtype=torch.float32) * columns)
    assert part.untyped_storage().nbytes() == part.nbytes
    checkpoint.slice("big", 0, 0, rows)
    # none of it is in memory a second time, as pages of a mapped file
    assert resident_bytes(smaps.read_text(), str(path)) < size / 20
    # a cut through every row comes from the mapped file, of which the kernel maps whole blocks
    assert torch.equal(checkpoint.slice("big", 1, 7, 9)[0], torch.tensor([7.0, 8.0]))
    assert resident_bytes(smaps.read_text(), str(path)) > size * 0.9


def bytes_read() -> int:
    """Return how many bytes this process has read by plain reads, from files or what not."""
    return int(Path("/proc/self/io").read_text().split()[1])


def resident_bytes(smaps: str, path: str) -> int:
    """Return how much of a mapped file was read into this process."""
    total, inside = 0, False
    for line in smaps.splitlines():
        head = line.split()[0]
        if not head.endswith(":"):
            inside = line.endswith(path)
        elif inside and head == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


def test_slices_of_both_dims_and_empty_ones(model: Path) -> None:
    checkpoint = Checkpoint(model)
    name = "model.layers.0.mlp.down_proj.weight"
    full = load_file(model / "model.safetensors")[name]
    assert checkpoint.shape(name) == tuple(full.shape)
    assert torch.equal(checkpoint.slice(name, 0, 3, 9), full[3:9])
    assert torch.equal(checkpoint.slice(name, 1, 3, 9), full[:, 3:9])
    empty = checkpoint.slice(name, 1, 5, 5)
    assert (tuple(empty.shape), empty.dtype) == ((48, 0), torch.float32)


def test_missing_files_are_named_with_what_is_there(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SubjectError, match=r"config\.json is not there; the directory does not"):
        load_decoder(tmp_path / "nowhere", group())
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(SubjectError, match=r"it holds config\.json, pytorch_model\.bin$"):
        load_decoder(model, group())
    (model / "config.json").unlink()
    with pytest.raises(SubjectError, match=r"config\.json is not there; it holds pytorch_model"):
        load_decoder(model, group())


def test_tensors_that_are_missing_extra_or_of_another_shape_are_named(model: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    kept = load_file(model / "model.safetensors")[name]
    change(model, **{name: None})
    with pytest.raises(SubjectError, match=f"1 tensor missing: {name} "):
        load_decoder(model, group())
    change(model, **{name: kept, "model.layers.0.self_attn.q_proj.bias": torch.ones(48)})
    with pytest.raises(SubjectError, match=r"no use for: model\.layers\.0\.self_attn\.q_proj"):
        load_decoder(model, group())
    change(model, **{name: kept.T.contiguous(), "model.layers.0.self_attn.q_proj.bias": None})
    with pytest.raises(SubjectError, match=r"shape=\[48, 16\], but config\.json makes it \[16, 48"):
        load_decoder(model, group())


def test_derived_tables_and_a_tied_heads_copy_are_ignored(model: Path) -> None:
    change(model, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    load_decoder(model, group())
    config = {"model_type": "llama", **SMALL, "tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(config))
    tied = load_decoder(model, group())
    assert "lm_head.weight" not in tied.shards()
    assert torch.equal(tied.lm_head.weight_vD, tied.embed_tokens.weight_vD)


def test_damaged_files_are_subject_errors(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SubjectError, match=r"model\.safetensors: cannot be read"):
        load_decoder(model, group())


@pytest.mark.parametrize(
    ("index", "phrase"),
    [
        ("{", "not JSON"),
        ('{"weight_map": 3}', "weight_map should say the file of each tensor"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names 'gone.safetensors', which is not"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "which is not there"),
        ('{"weight_map": {"a": "model.safetensors"}}', "holds 'a', but it does not"),
    ],
)
def test_a_malformed_index_is_named(model: Path, index: str, phrase: str) -> None:
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SubjectError, match=phrase):
        load_decoder(model, group())


def test_a_checkpoint_can_go_away_after_loading(model: Path) -> None:
    decoder = load_decoder(model, single_group(dtype=torch.float32, weight_dtype=torch.float32))
    ids = ids_for(decoder.spec)
    before = decoder(ids)
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(0)  # a weight that is still mapped would end the process here
    assert torch.equal(decoder(ids), before)


# config.json


LLAMA = {"model_type": "llama", **SMALL}


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({"model_type": "mamba"}, "model_type='mamba', but should be one of llama, mistral"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "48"}, "hidden_size='48', but should be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0, but should be a whole number of at least"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4, but should divide"),
        ({"rms_norm_eps": -1.0}, "norm_eps=-1.0, but should be a positive number"),
        ({"hidden_act": "swish9"}, "hidden_act='swish9', but should be one of silu"),
        ({"attention_bias": "yes"}, "attention_bias='yes', but should be true or false"),
        ({"head_dim": 7}, "head_dim=7, but should be even"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, but should be 1.0"),
        ({"quantization_config": {"bits": 4}}, "quant_method=None, but should be one of fp8, gptq"),
        (
            {"rope_scaling": {"rope_type": "dynamic"}},
            "rope_type='dynamic', but should be one of default",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0, but should be a positive"),
        ({"rope_scaling": 3}, "rope_scaling=3, but should be one set of parameters"),
        ({"rope_parameters": {"full_attention": {}}}, "but should be one set of parameters"),
        ({"rope_parameters": {"attention_factor": 2.0}}, "attention_factor=2.0, but should be 1.0"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            "max_window_layers=1, but should be 0 or at least num_hidden_layers=2",
        ),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "layer_types=.*but should all be full_attention, or all be",
        ),
        ({"model_type": "mistral", "layer_types": 5}, "layer_types=5, but should all be"),
    ],
)
def test_what_the_reference_cannot_do_is_named(fields: dict[str, Any], phrase: str) -> None:
    with pytest.raises(PlanError, match=phrase):
        spec_from_config({**LLAMA, **fields})


@pytest.mark.parametrize("name", ["scale_attn_by_inverse_layer_idx", "add_cross_attention"])
def test_gpt2_variants_are_named(name: str) -> None:
    with pytest.raises(PlanError, match=f"{name}=True, but should be False"):
        spec_from_config({"model_type": "gpt2", **GPT2, name: True})


def test_both_spellings_of_rope_are_one_spec() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    spec = spec_from_config({**LLAMA, **old})
    assert spec == spec_from_config({**LLAMA, **new})
    assert ModelSpec.from_fields(spec.to_fields()) == spec


def test_windows_are_read_where_the_model_uses_them() -> None:
    def window(**fields: Any) -> int:
        return spec_from_config({**LLAMA, **fields}).sliding_window

    assert window(model_type="mistral") == 4096
    assert window(model_type="mistral", sliding_window=None) == 0
    assert window(model_type="qwen2", sliding_window=9) == 0
    qwen = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9}
    assert window(**qwen, max_window_layers=0) == 9
    assert window(**qwen, max_window_layers=28) == 0
    assert window(**qwen, layer_types=["sliding_attention"] * 2) == 9


def test_a_config_that_is_no_object_is_named(tmp_path: Path) -> None:
    for text, phrase in (("[]", "a list, but should be"), ("{", "not JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(PlanError, match=phrase):
            read_spec(tmp_path)


def test_size_one_holds_every_weight_whole() -> None:
    decoder = build_decoder(GQA, single_group())
    for name, (tensor, placement) in decoder.shards().items():
        expected = logical_tensors(GQA)[name]
        assert tuple(tensor.shape) == expected.shape
        assert placement == Replicate() or expected.split
