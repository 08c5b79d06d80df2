"""`ref:DIR`: a local Hugging Face directory in the reference decoder.

Requirement: every rank reads its own slices only, so a 70B checkpoint is never read whole by one.
What the directory holds is held against what the decoder needs before anything is read: a tensor
that is missing, extra or of another shape is an error, because a checkpoint's bias that nobody
reads is a different function.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tpcheck.errors import SubjectError, TPCheckError
from tpcheck.files import read_json
from tpcheck.groups.base import RecordedGroup
from tpcheck.hf_config import describe_directory, read_config, spec_from_config
from tpcheck.reference.decoder import Decoder, build_decoder
from tpcheck.reference.expert_names import expert_stored
from tpcheck.reference.gpt2_names import gpt2_stored
from tpcheck.reference.layout import logical_tensors
from tpcheck.reference.stored import Stored
from tpcheck.spec import ModelSpec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_decoder(directory: str | Path, tp: RecordedGroup) -> Decoder:
    """Return this rank's part of the model in a directory.

    Raises:
        SubjectError: files or tensors are missing, extra or of another shape.
        PlanError: config.json is malformed, or describes what the reference decoder cannot do.
        IllegalDegreeError: the model cannot be split over tp.size ranks.
    """
    return build_decoder(read_spec(directory), tp, CheckpointWeights(directory, tp))


def read_spec(directory: str | Path) -> ModelSpec:
    """Return the spec of a model directory. Reads config.json only."""
    return spec_from_config(read_config(Path(directory)))


class Checkpoint:
    """The tensors of a directory, in one safetensors file or several with an index."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._handles: dict[str, Any] = {}
        self._files = self._map_names()

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, as stored."""
        return tuple(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Reads the file's header only."""
        return tuple(self._open(self._file(name)).get_slice(name).get_shape())

    def slice(
        self, name: str, dim: int, start: int, stop: int, index: int | None = None
    ) -> torch.Tensor:
        """Return indices start to stop of `dim`, in the dtype stored.

        With an `index` that is done within one tensor of a stack, and dims are counted in it.

        Reads those bytes only, as far as pages allow: a cut along dim 1 takes a few bytes of every
        row, so that the kernel may read most of that tensor. What stays in memory is the slice.
        """
        whole = self._open(self._file(name)).get_slice(name)
        stack = () if index is None else (index,)
        if start == stop:  # safetensors refuses empty slices
            shape = list(whole.get_shape())[len(stack) :]
            shape[dim] = 0
            some = whole[(*stack, *(slice(0, 1) for _ in shape))]
            return torch.empty(shape, dtype=some.dtype)
        # A view of the mapped file: copied, so that the weights outlive the file and its mapping.
        part: torch.Tensor = whole[(*stack, *[slice(None)] * dim, slice(start, stop))]
        return part.clone(memory_format=torch.contiguous_format)

    def _file(self, name: str) -> str:
        if name not in self._files:
            raise SubjectError(f"{self.directory}: tensor {name!r} is missing")
        return self._files[name]

    def _map_names(self) -> dict[str, str]:
        """Return which file holds each tensor."""
        if (self.directory / INDEX).is_file():
            return self._read_index()
        if (self.directory / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        raise SubjectError(
            f"{self.directory}: neither {SINGLE} nor {INDEX} is there;"
            f" {describe_directory(self.directory)}"
        )

    def _read_index(self) -> dict[str, str]:
        path = self.directory / INDEX
        try:
            index = read_json(path)
        except TPCheckError as error:
            raise SubjectError(f"{path}: {error}") from error
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise SubjectError(f"{path}: weight_map should say the file of each tensor")
        held: dict[str, set[str]] = {}
        for file in sorted(set(files.values())):
            if Path(file).name != file or not (self.directory / file).is_file():
                raise SubjectError(
                    f"{path}: names {file!r}, which is not there;"
                    f" {describe_directory(self.directory)}"
                )
            held[file] = set(self._open(file).keys())
        for name, file in files.items():
            if name not in held[file]:
                raise SubjectError(f"{path}: says that {file} holds {name!r}, but it does not")
        return files

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            try:
                path = str(self.directory / file)
                self._handles[file] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise SubjectError(f"{self.directory / file}: cannot be read: {error}") from error
        return self._handles[file]


class CheckpointWeights:
    """A directory as the decoder's source of weights, held against what its config needs.

    Raises:
        SubjectError: files or tensors are missing, extra or of another shape.
        PlanError: config.json is malformed, or describes what the reference decoder cannot do.
    """

    def __init__(self, directory: str | Path, tp: RecordedGroup) -> None:
        self._tp = tp
        self._checkpoint = Checkpoint(directory)
        spec = read_spec(directory)
        self._stored = stored_tensors(spec, self._checkpoint.names)
        _require_fit(self._checkpoint, spec, self._stored)

    def slice(
        self, name: str, shape: tuple[int, ...], dim: int, start: int, stop: int
    ) -> torch.Tensor:
        """Return a slice of the logical tensor `name`, rounded to the storage dtype and cast."""
        stored = self._stored[name]
        index = stored.index if stored.among else None
        part = self._checkpoint.slice(stored.name, *stored.locate(shape, dim, start, stop), index)
        if stored.transposed:
            part = part.T
        return self._tp.weights.stored(part).to(self._tp.device)


@lru_cache(maxsize=4)
def stored_tensors(spec: ModelSpec, names: tuple[str, ...]) -> Mapping[str, Stored]:
    """Return where a checkpoint with these names stores each logical tensor."""
    if spec.model_type == "gpt2":
        return gpt2_stored(spec, names)
    if spec.num_experts:
        return expert_stored(spec, names)
    return {name: Stored(name) for name in logical_tensors(spec)}


def _require_fit(checkpoint: Checkpoint, spec: ModelSpec, stored: Mapping[str, Stored]) -> None:
    """Raise when tensors are missing, of another shape, or not read by the decoder."""
    where = checkpoint.directory
    have, used = set(checkpoint.names), {entry.name for entry in stored.values()}
    missing = [entry.name for entry in stored.values() if entry.name not in have]
    if missing:
        raise SubjectError(f"{where}: {_listed('missing', missing)} [{spec.model_type}]")
    extra = [name for name in checkpoint.names if name not in used and not _ignorable(name, spec)]
    if extra:
        listed = _listed("that config.json gives no use for", extra)
        raise SubjectError(f"{where}: {listed} [{spec.model_type}]")
    for name, tensor in logical_tensors(spec).items():
        expected = stored[name].stored_shape(tensor.shape)
        actual = checkpoint.shape(stored[name].name)
        if actual != expected:
            raise SubjectError(
                f"{where}: {stored[name].name}: shape={list(actual)}, but config.json makes it"
                f" {list(expected)} [{spec.model_type}]"
            )


def _ignorable(name: str, spec: ModelSpec) -> bool:
    """Whether a tensor changes nothing: tables that are derived, and a tied head's own copy."""
    derived = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
    tied_head = spec.tie_word_embeddings and name == "lm_head.weight"
    return tied_head or name.endswith(derived)


def _listed(what: str, names: list[str]) -> str:
    """Say `2 tensors missing: a, b`, at most three by name."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} {what}: {shown}"
