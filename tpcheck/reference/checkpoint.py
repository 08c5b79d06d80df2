"""`ref:DIR`: a local Hugging Face directory in the reference decoder.

Requirement: every rank reads its own slices only, so a 70B checkpoint is never read whole by one.
What the directory holds is held against what the decoder needs before anything is read
(checkpoint_fit). Quantized weights are given as they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from tpcheck.groups.base import RecordedGroup
from tpcheck.hf.config import read_config, spec_from_config
from tpcheck.reference.checkpoint_fit import require_fit
from tpcheck.reference.decoder import Decoder, build_decoder
from tpcheck.reference.expert_names import expert_stored
from tpcheck.reference.gpt2_names import gpt2_stored
from tpcheck.reference.layout import logical_tensors
from tpcheck.reference.quantized_names import quantized_parts
from tpcheck.reference.quantized_reading import read_part, read_small, require_groups
from tpcheck.reference.stored import Stored
from tpcheck.reference.tensor_files import Checkpoint
from tpcheck.shard_plan.quant import StoredAs
from tpcheck.spec import ModelSpec

__all__ = ["Checkpoint", "CheckpointWeights", "load_decoder", "read_spec", "stored_tensors"]


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
        names = self._checkpoint.names
        self._quantization = spec.quantization
        self._stored = stored_tensors(spec, names)
        self._parts = quantized_parts(spec, frozenset(names), self._stored)
        require_fit(self._checkpoint, spec, self._stored, self._parts)

    def slice(
        self, name: str, shape: tuple[int, ...], dim: int, start: int, stop: int
    ) -> torch.Tensor:
        """Return a slice of the logical tensor `name`, rounded to the storage dtype and cast.

        Scales, those of a quantized cache, are not rounded.
        """
        stored = self._stored[name]
        if name.endswith("_scale"):
            scales = read_small(self._checkpoint, stored.name, shape, dim, start, stop)
            return scales.to(torch.promote_types(self._tp.dtype, torch.float32)).to(self._tp.device)
        index = stored.index if stored.among else None
        where = stored.locate(shape, dim, start, stop)
        part = self._checkpoint.slice(stored.name, *where, index)[stored.own(where[0])]
        if stored.transposed:
            part = part.T
        return self._tp.weights.stored(part).to(self._tp.device)

    def stored(
        self, weight: StoredAs, suffix: str, dim: int, start: int, stop: int
    ) -> torch.Tensor:
        """Return a slice of one stored tensor of a quantized weight, as it is stored."""
        part = self._parts[f"{weight.name}.{suffix}"]
        piece = read_part(self._checkpoint, part, dim, start, stop)
        if suffix.endswith("g_idx"):
            assert self._quantization is not None
            name = f"{self._checkpoint.directory}: {part.stored.name}"
            require_groups(name, piece, self._quantization, start, weight.shape[1])
        return piece


@lru_cache(maxsize=4)
def stored_tensors(spec: ModelSpec, names: tuple[str, ...]) -> Mapping[str, Stored]:
    """Return where a checkpoint with these names stores each logical tensor."""
    if spec.model_type == "gpt2":
        return gpt2_stored(spec, names)
    if spec.num_experts:
        return expert_stored(spec, names)
    return {name: Stored(name) for name in logical_tensors(spec)}
