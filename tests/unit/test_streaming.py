"""A reference streamed layer by layer: the bits of the whole one, one layer in memory, resumed."""

from __future__ import annotations

import json
import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import quantized_models as made
from tests.models import GPT_OSS_CONFIG, MODELS, SMALL, make_model
from tpcheck.errors import PlanError, SubjectError, TPCheckError
from tpcheck.quantization import Quantization
from tpcheck.reference import stream_scratch, streaming
from tpcheck.reference.checkpoint import CheckpointWeights, load_decoder
from tpcheck.reference.embedding import HEAD_ROWS
from tpcheck.reference.moe import LateExpert
from tpcheck.reference.stream_scratch import MANIFEST, Scratch, opened
from tpcheck.reference.streaming import (
    DTYPES,
    group_of_one,
    stored_dtype,
    stream_logits,
    stream_many,
)
from tpcheck.reference.transient import TransientDecoder, TransientWeights
from tpcheck.reference.weights import RankWeights

pytest.importorskip("transformers")

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **EXPERTS,
        "shared_expert_intermediate_size": 56,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", **EXPERTS, "head_dim": 16},
}
GROUPS = {"type": "int", "strategy": "group", "group_size": 32, "num_bits": 4}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "desc_act": True,
    "sym": False,
    "checkpoint_format": "gptq",
}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["gate"],
}
TWO_OF_THREE = {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
QUANTIZED: dict[str, Callable[[Path], Path]] = {
    "gptq": lambda path: made.by_us(
        path, Quantization("gptq", 32, symmetric=False, desc_act=True), GPTQ
    ),
    "awq_experts": lambda path: made.by_us(
        path, Quantization("awq", 32, symmetric=False), AWQ, **TWO_OF_THREE
    ),
    "pack_int4": lambda path: made.by_compressed_tensors(path, {**GROUPS, "symmetric": False}),
    "fp8_block": made.fp8_block,
    "fp8_experts": made.fp8_experts,
    "gpt_oss_mxfp4": made.gpt_oss,
}
NAMES = (*MODELS, *MIXTURES, "gpt_oss", *QUANTIZED)
LAYERS = 4

Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        if name in QUANTIZED:
            return QUANTIZED[name](root / name)
        fields = GPT_OSS_CONFIG if name == "gpt_oss" else MIXTURES.get(name, {})
        base = name if name in MODELS else "llama"
        return make_model(root / name, base, **{**({} if name in MODELS else SMALL), **fields})

    return get


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    return make_model(tmp_path / "deep", "llama", num_hidden_layers=LAYERS)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.quantizers.quantizer_finegrained_fp8 as fp8

    monkeypatch.setattr(fp8, "is_accelerate_available", lambda: True)


def ids(*shape: int, vocab: int = 101) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(sum(shape)))


INPUTS = (ids(2, 17), ids(1, 1), ids(3, 5))


def whole(directory: Path, input_ids: torch.Tensor, dtype: str, **given: torch.dtype) -> Any:
    """Return the logits of the decoder that holds every weight."""
    tp = group_of_one(getattr(torch, dtype), given.get("weight_dtype", stored_dtype(directory)))
    with torch.no_grad():
        return load_decoder(directory, tp)(input_ids)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual, expected)
    assert expected.isfinite().all()
    assert expected.std() > 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_streamed_has_the_bits_of_whole(models: Make, name: str, dtype: str) -> None:
    directory = models(name)
    for actual, input_ids in zip(stream_many(directory, INPUTS, dtype=dtype), INPUTS, strict=True):
        assert_same_bits(actual, whole(directory, input_ids, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_several_steps_has_the_bits_of_whole(
    tmp_path: Path, dtype: str, tied: bool
) -> None:
    vocab = 2 * HEAD_ROWS + 131
    fields = {"vocab_size": vocab, "hidden_size": 44, "num_attention_heads": 2}
    directory = make_model(
        tmp_path / "wide", "llama", **fields, tie_word_embeddings=tied, num_hidden_layers=1
    )
    for shape in ((1, 1), (1, 7), (2, 33)):
        input_ids = ids(*shape, vocab=vocab)
        actual = stream_logits(directory, input_ids, dtype=dtype)
        assert_same_bits(actual, whole(directory, input_ids, dtype))


def test_a_head_step_that_is_off_by_a_row_is_seen(
    models: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_rows = TransientWeights.rows

    def rows(self: TransientWeights, name: str, start: int, stop: int) -> torch.Tensor:
        found = true_rows(self, name, start, stop)
        return found.roll(1, 0) if name == "lm_head.weight" else found

    expected = whole(models("llama"), INPUTS[0], "float64")
    monkeypatch.setattr(TransientWeights, "rows", rows)
    actual = stream_logits(models("llama"), INPUTS[0], dtype="float64")
    assert not torch.equal(actual, expected)


def test_weights_are_rounded_to_a_weight_dtype_that_is_given(models: Make) -> None:
    directory = models("llama")
    assert stored_dtype(directory) == torch.float32
    actual = stream_logits(directory, INPUTS[0], dtype="float64", weight_dtype="bfloat16")
    expected = whole(directory, INPUTS[0], "float64", weight_dtype=torch.bfloat16)
    assert_same_bits(actual, expected)
    assert not torch.equal(actual, whole(directory, INPUTS[0], "float64"))


def test_the_stored_dtype_holds_every_tensor_exactly(models: Make, tmp_path: Path) -> None:
    for kinds, expected in (
        ((torch.bfloat16,), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
    ):
        tensors = {str(kind): torch.zeros(3, dtype=kind) for kind in kinds}
        save_file(tensors | {"codes": torch.zeros(3).byte()}, tmp_path / "model.safetensors")
        assert stored_dtype(tmp_path) == expected
    assert stored_dtype(models("fp8_block")) == torch.float32


def test_several_inputs_read_every_layer_once_and_only_rows_that_are_asked_for(
    models: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int, int]] = []
    true_slice = CheckpointWeights.slice

    def noted(self: Any, name: str, shape: tuple[int, ...], dim: int, start: int, stop: int) -> Any:
        read.append((name, start, stop))
        return true_slice(self, name, shape, dim, start, stop)

    monkeypatch.setattr(CheckpointWeights, "slice", noted)
    inputs = (ids(1, 3), ids(2, 2))
    stream_many(models("llama"), inputs, dtype="float32")
    rows = [start for name, start, stop in read if name.startswith("model.embed")]
    assert sorted(rows) == sorted(row for one in inputs for row in one.unique().tolist())
    others = [name for name, *_ in read if not name.startswith("model.embed")]
    assert len(others) == len(set(others))
    assert {name.split(".")[2] for name in others if ".layers." in name} == {"0", "1"}


def note_what_is_held(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Let a layer be read only when nothing of those before it is in memory."""
    read: list[weakref.ref[Any]] = []
    true_layer, true_load = TransientDecoder.layer, TransientWeights.load

    def load(self: TransientWeights, name: str) -> torch.Tensor:
        found = true_load(self, name)
        if ".layers." in name:
            read.append(weakref.ref(found))
        return found

    def layer(self: TransientDecoder, index: int) -> Any:
        assert all(one() is None for one in read), f"layer {index} finds another in memory"
        found = true_layer(self, index)
        read.extend(weakref.ref(weight) for weight in found.parameters())
        return found

    monkeypatch.setattr(TransientDecoder, "layer", layer)
    monkeypatch.setattr(TransientWeights, "load", load)
    return read


def test_no_layer_is_held_when_the_next_is_read(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = note_what_is_held(monkeypatch)
    stream_many(deep, INPUTS, dtype="float64")
    assert len(read) == LAYERS * 9 * 2, "nine weights a layer, as read and as parameters"


@pytest.mark.parametrize("by", ["source", "decoder"])
def test_a_layer_that_stays_in_memory_is_seen(
    deep: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    kept: list[Any] = []
    true_through = streaming._Run._through

    def through(self: Any, layer: int, xs: Any) -> Any:
        kept.append(self._decoder.layer(layer))
        return true_through(self, layer, xs)

    if by == "source":
        monkeypatch.setattr(TransientWeights, "load", RankWeights.load)
    else:
        monkeypatch.setattr(streaming._Run, "_through", through)
    note_what_is_held(monkeypatch)
    with pytest.raises(AssertionError, match="finds another in memory"):
        stream_many(deep, INPUTS, dtype="float64")


def test_experts_are_read_one_by_one_and_only_where_tokens_come(
    models: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Any]] = []
    read: list[str] = []
    true_init = LateExpert.__init__

    def init(self: LateExpert, name: str, spec: Any, weights: Any) -> None:
        true_init(self, name, spec, weights)
        true_make = self.make

        def make() -> Any:
            assert all(one() is None for one in held), f"{name} finds another expert in memory"
            expert = true_make()
            held.append(weakref.ref(expert))
            read.append(name)
            return expert

        self.make = make  # type: ignore[assignment]

    monkeypatch.setattr(LateExpert, "__init__", init)
    one_token = ids(1, 1)
    assert_same_bits(
        stream_logits(models("mixtral"), one_token, dtype="float64"),
        whole(models("mixtral"), one_token, "float64"),
    )
    assert len(read) == 2 * SMALL["num_hidden_layers"], "two of eight experts in each layer"


# Resuming.


class Ended(Exception):
    """Ends a run in a test, as a kill does but for the process."""


def end_in_layer(
    layer: int, monkeypatch: pytest.MonkeyPatch, directory: Path, scratch: Path, dtype: str
) -> None:
    """Run a model with a scratch folder until it is in a layer, counted from 0."""
    true_layer = TransientDecoder.layer

    def ending(self: TransientDecoder, index: int) -> Any:
        if index == layer:
            raise Ended
        return true_layer(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(TransientDecoder, "layer", ending)
        with pytest.raises(Ended):
            stream_many(directory, INPUTS, dtype=dtype, scratch=scratch)


def resumed(directory: Path, scratch: Path, dtype: str, **given: Any) -> tuple[int, Any]:
    """Return the first layer that a run took up, and what it gave."""
    steps: list[int] = []
    found = stream_many(
        directory,
        given.pop("inputs", INPUTS),
        dtype=dtype,
        scratch=scratch,
        progress=lambda done, total, text: steps.append(done),
        **given,
    )
    return steps[0], found


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_ended_run_goes_on_after_its_last_whole_layer_with_the_same_bits(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    scratch = tmp_path / "new" / "scratch"
    for layer in range(1, LAYERS):
        end_in_layer(layer, monkeypatch, deep, scratch, dtype)
        assert len(list(scratch.iterdir())) == 2, "a manifest and what it names"
        first, found = resumed(deep, scratch, dtype)
        assert first == layer
        assert not scratch.exists()
        for actual, input_ids in zip(found, INPUTS, strict=True):
            assert_same_bits(actual, whole(deep, input_ids, dtype))


@pytest.mark.parametrize("off", [-1, 1])
def test_a_layer_skipped_or_run_twice_on_resuming_changes_the_logits(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: int
) -> None:
    end_in_layer(2, monkeypatch, deep, tmp_path / "scratch", "float64")
    true_load = Scratch.load

    def load(self: Scratch, *given: Any) -> Any:
        done, xs = true_load(self, *given)
        return done + off, xs

    monkeypatch.setattr(Scratch, "load", load)
    first, found = resumed(deep, tmp_path / "scratch", "float64")
    assert first == 2 + off
    assert not torch.equal(found[0], whole(deep, INPUTS[0], "float64"))


def warned(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(record.getMessage() for record in caplog.records)


def other_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def same_size_and_time(directory: Path) -> None:
    """Change one weight and put size and modification time back."""
    path = directory / "model.safetensors"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\x01")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def other_epsilon(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-3}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_weights, "files"),
        (same_size_and_time, "files"),
        (other_epsilon, "config, files"),
    ],
)
def test_another_model_starts_over(
    deep: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Path], None],
    named: str,
) -> None:
    end_in_layer(2, monkeypatch, deep, tmp_path / "scratch", "float64")
    change(deep)
    first, found = resumed(deep, tmp_path / "scratch", "float64")
    assert first == 0
    assert f"was made with other {named}; starting over" in warned(caplog)
    assert_same_bits(found[0], whole(deep, INPUTS[0], "float64"))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"dtype": "float32"}, "dtype"),
        ({"weight_dtype": "bfloat16"}, "weight dtype"),
        ({"inputs": (INPUTS[0].flip(0), *INPUTS[1:])}, "inputs"),
        ({"inputs": INPUTS[:2]}, "inputs"),
        ({"inputs": INPUTS[::-1]}, "inputs"),
    ],
)
def test_another_run_starts_over(
    deep: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    given: dict[str, Any],
    named: str,
) -> None:
    end_in_layer(2, monkeypatch, deep, tmp_path / "scratch", "float64")
    first, found = resumed(deep, tmp_path / "scratch", **{"dtype": "float64", **given})
    assert first == 0
    assert f"was made with other {named}; starting over" in warned(caplog)
    rounded = {"weight_dtype": torch.bfloat16} if "weight_dtype" in given else {}
    inputs, dtype = given.get("inputs", INPUTS), given.get("dtype", "float64")
    for actual, input_ids in zip(found, inputs, strict=True):
        assert_same_bits(actual, whole(deep, input_ids, dtype, **rounded))


def test_another_number_of_threads_starts_over(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    end_in_layer(2, monkeypatch, deep, tmp_path / "scratch", "float64")
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        first, _ = resumed(deep, tmp_path / "scratch", "float64")
    finally:
        torch.set_num_threads(before)
    assert first == 0
    assert "was made with other environment" in warned(caplog)


def blob(scratch: Path) -> Path:
    (path,) = scratch.glob("*.safetensors")
    return path


def edit(scratch: Path, **fields: Any) -> None:
    path = scratch / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap_inputs(scratch: Path) -> None:
    tensors = load_file(blob(scratch))
    tensors["00000"] = tensors["00000"].flip(0).contiguous()
    save_file(tensors, blob(scratch))


def other_dtype(scratch: Path) -> None:
    save_file({name: x.float() for name, x in load_file(blob(scratch)).items()}, blob(scratch))


def fewer(scratch: Path) -> None:
    tensors = load_file(blob(scratch))
    del tensors["00002"]
    save_file(tensors, blob(scratch))


def a_pipe(scratch: Path) -> None:
    (scratch / MANIFEST).unlink()
    os.mkfifo(scratch / MANIFEST)


def a_pipe_for_activations(scratch: Path) -> None:
    path = blob(scratch)
    path.unlink()
    os.mkfifo(path)


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "last byte": (lambda scratch: flip(blob(scratch), -1), "not those of its digest"),
    "header": (lambda scratch: flip(blob(scratch), 9), "header"),
    "cut short": (lambda scratch: os.truncate(blob(scratch), 3000), "cut short"),
    "empty": (lambda scratch: os.truncate(blob(scratch), 0), "0 bytes"),
    "gone": (lambda scratch: blob(scratch).unlink(), "cannot be read"),
    "another layer": (lambda scratch: edit(scratch, done=1), "not those of its digest"),
    "beyond": (lambda scratch: edit(scratch, done=LAYERS + 3), "not those of its digest"),
    "no number": (lambda scratch: edit(scratch, done="2"), "should count layers"),
    "a bool": (lambda scratch: edit(scratch, done=True), "should count layers"),
    "elsewhere": (lambda scratch: edit(scratch, activations="../x"), "a file beside"),
    "no digest": (lambda scratch: edit(scratch, sha256=None), "lacks"),
    "other schema": (lambda scratch: edit(scratch, schema="x"), "is no tpcheck.stream/1"),
    "a list": (lambda scratch: (scratch / MANIFEST).write_text("[]"), "is no tpcheck.stream/1"),
    "half": (lambda scratch: os.truncate(scratch / MANIFEST, 200), "is not JSON"),
    "no text": (lambda scratch: (scratch / MANIFEST).write_bytes(b"\xff\xfe"), "is not JSON"),
    "rows swapped": (swap_inputs, "not those of its digest"),
    "narrower": (other_dtype, "should be"),
    "fewer": (fewer, "holds 2 inputs"),
    "a pipe": (a_pipe, "no regular file"),
    "a pipe for activations": (a_pipe_for_activations, "no regular file"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_scratch_folder_starts_over_and_says_why(
    deep: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    spoil, reason = SPOILED[how]
    end_in_layer(2, monkeypatch, deep, tmp_path / "scratch", "float64")
    spoil(tmp_path / "scratch")
    first, found = resumed(deep, tmp_path / "scratch", "float64")
    assert first == 0
    assert reason in warned(caplog)
    assert "starting over" in warned(caplog)
    for actual, input_ids in zip(found, INPUTS, strict=True):
        assert_same_bits(actual, whole(deep, input_ids, "float64"))
    assert not (tmp_path / "scratch").exists()


def test_what_else_lies_in_the_scratch_folder_stays(deep: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for name in ("mine.txt", "mine.safetensors"):
        (scratch / name).write_text("mine")
    stream_logits(deep, INPUTS[0], dtype="float32", scratch=scratch)
    assert sorted(path.name for path in scratch.iterdir()) == ["mine.safetensors", "mine.txt"]


def test_two_runs_do_not_share_a_scratch_folder(deep: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    with opened(scratch, {}), pytest.raises(TPCheckError, match="another run keeps its layers"):
        stream_logits(deep, INPUTS[0], dtype="float32", scratch=scratch)
    stream_logits(deep, INPUTS[0], dtype="float32", scratch=scratch)


def test_what_a_kill_leaves_of_a_file_that_was_being_written_is_taken_away(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_tensors: Any, path: Path) -> None:
        path.with_name(".tmp2sYyWs").write_bytes(b"half of it")  # as safetensors names it
        raise Ended

    scratch = tmp_path / "scratch"
    with monkeypatch.context() as patch:
        patch.setattr(stream_scratch, "save_file", killed)
        with pytest.raises(Ended):
            stream_logits(deep, INPUTS[0], dtype="float32", scratch=scratch)
    assert scratch.exists()
    stream_logits(deep, INPUTS[0], dtype="float32", scratch=scratch)
    assert not scratch.exists()


def test_a_scratch_folder_that_cannot_be_is_an_error_before_anything_is_run(
    deep: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TPCheckError, match="cannot be used as scratch"):
            stream_logits(deep, INPUTS[0], dtype="float32", scratch=path)
    with pytest.raises(SubjectError, match="is the model's own directory"):
        stream_logits(deep, INPUTS[0], dtype="float32", scratch=deep)


def test_a_full_disk_costs_the_scratch_and_not_the_run(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_tensors: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream_scratch, "save_file", full)
    actual = stream_logits(deep, INPUTS[0], dtype="float64", scratch=tmp_path / "scratch")
    assert_same_bits(actual, whole(deep, INPUTS[0], "float64"))
    assert warned(caplog).count("cannot be kept: [Errno 28] No space left on device") == 1
    assert not (tmp_path / "scratch").exists()


# What goes wrong.


def at_layer(layer: int, act: Callable[[], Any]) -> Callable[[int, int, str], None]:
    return lambda done, total, text: act() if done == layer else None


def test_a_file_that_changes_while_it_is_read_ends_the_run(deep: Path) -> None:
    for step in (1, LAYERS):
        with pytest.raises(SubjectError, match=r"model\.safetensors: changed while it was read"):
            stream_logits(
                deep,
                INPUTS[0],
                dtype="float32",
                progress=at_layer(step, lambda: (deep / "model.safetensors").touch()),
            )


def test_a_file_that_is_cut_short_while_it_is_read_is_named_with_its_tensor(deep: Path) -> None:
    path = deep / "model.safetensors"
    with pytest.raises(SubjectError, match=r"model\.safetensors: .*\.weight: the file ends at"):
        stream_logits(
            deep, INPUTS[0], dtype="float32", progress=at_layer(1, lambda: os.truncate(path, 9000))
        )


def without(directory: Path, name: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    save_file(tensors, directory / "model.safetensors")


def reshaped(directory: Path, name: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, directory / "model.safetensors")


def configured(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


NAME = "model.layers.3.mlp.up_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "missing": (lambda path: without(path, NAME), SubjectError, NAME),
    "shape": (lambda path: reshaped(path, NAME), SubjectError, NAME),
    "cut": (
        lambda path: os.truncate(path / "model.safetensors", 9000),
        SubjectError,
        "model.safetensors: cannot be read",
    ),
    "config": (lambda path: configured(path, model_type="bert"), PlanError, "bert"),
    "field": (lambda path: configured(path, hidden_size="x"), PlanError, "hidden_size"),
    "gone": (lambda path: (path / "config.json").unlink(), SubjectError, "config.json"),
    "empty": (lambda path: (path / "model.safetensors").unlink(), SubjectError, "safetensors"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_ref_refuses_is_refused_with_the_same_words(
    deep: Path, tmp_path: Path, how: str
) -> None:
    spoil, kind, named = BROKEN[how]
    spoil(deep)
    with pytest.raises(kind) as of_ref:
        load_decoder(deep, group_of_one(torch.float32, torch.float32))
    with pytest.raises(kind) as of_stream:
        stream_logits(deep, INPUTS[0], dtype="float32", scratch=tmp_path / "scratch")
    assert str(of_stream.value) == str(of_ref.value)
    assert named in str(of_stream.value)
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize(
    ("input_ids", "reason"),
    [
        (INPUTS[0].int(), "but should be .batch, tokens. int64"),
        (INPUTS[0][0], "but should be .batch, tokens. int64"),
        (INPUTS[0] + 101, "should lie below vocab_size=101"),
        (-INPUTS[0] - 1, "should lie below vocab_size=101"),
        (INPUTS[0][:, :0], "should hold a token"),
    ],
)
def test_ids_that_no_model_can_read_are_refused(
    models: Make, input_ids: torch.Tensor, reason: str
) -> None:
    with pytest.raises(SubjectError, match=reason):
        stream_logits(models("llama"), input_ids, dtype="float32")


def test_dtypes_are_named_as_they_are_on_the_command_line(models: Make) -> None:
    for given in ({"dtype": "bf16"}, {"dtype": "float32", "weight_dtype": "float8"}):
        with pytest.raises(SubjectError, match="but should be one of float64, float32, bfloat16"):
            stream_logits(models("llama"), INPUTS[0], **given)


def test_no_inputs_give_no_logits(models: Make) -> None:
    assert stream_many(models("llama"), [], dtype="float32") == []


def test_nothing_global_is_left_behind(models: Make) -> None:
    assert torch.is_grad_enabled()
    first = stream_logits(models("llama"), INPUTS[0], dtype="bfloat16")
    torch.manual_seed(3)
    assert torch.equal(first, stream_logits(models("llama"), INPUTS[0], dtype="bfloat16"))
    assert torch.is_grad_enabled()
    assert not first.requires_grad


# Progress.


def test_progress_counts_layers_and_the_head_and_says_how_long_the_rest_takes(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(streaming.time, "monotonic", lambda: float(next(seconds)))
    said: list[tuple[int, int, str]] = []
    stream_logits(deep, INPUTS[0], dtype="float32", progress=lambda *one: said.append(one))
    assert [one[:2] for one in said] == [(step, LAYERS + 1) for step in range(LAYERS + 2)]
    assert said[0][2] == "layer 1 of 4"
    # a quarter of the layers took 10 s; the head is three tenths of one of them
    assert said[1][2] == "layer 2 of 4, about 33 s left"
    assert said[4][2].startswith("head, about ")
    assert said[5][2] == "done"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (89, "89 s"), (91, "2 min"), (3601, "61 min"), (9e3, "2.5 h")],
)
def test_durations_are_rounded_up(seconds: float, text: str) -> None:
    assert streaming._duration(seconds) == text


def test_why_a_run_starts_over_goes_to_stderr_when_nobody_configures_logging() -> None:
    assert not stream_scratch.LOG.handlers
    assert stream_scratch.LOG.isEnabledFor(logging.WARNING)
