"""Logits of a model that fits no single device: the reference decoder, one layer at a time.

Requirement: the oracle of a 70B model runs where 140 GB do not fit. It is the reference decoder of
`ref:DIR` at TP=1, so its logits have the bits of the run that holds every weight (transient says
how); memory is one layer in the compute dtype, and the activations. All inputs go through a layer
before it is dropped, so that a checkpoint is read once, however many cases a record has. Experts
are the exception: one at a time is in memory, so that each input reads those that it asks for.

[Resuming] With a scratch folder a run that was killed goes on after its last whole layer, with the
same bits; anything that could change them starts over, with a warning that says what it was
(stream_scratch). That the weights stay as they are is held against their files at every layer.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from tpcheck.environment import collect
from tpcheck.errors import SubjectError
from tpcheck.groups.base import RecordedGroup, Recorder
from tpcheck.groups.weights import MemoryStore, WeightSource
from tpcheck.reference.checkpoint import Checkpoint, CheckpointWeights, read_spec
from tpcheck.reference.decoder import require_ids
from tpcheck.reference.layout import logical_tensors
from tpcheck.reference.stream_scratch import LOG, Scratch, opened, tensor_digest
from tpcheck.reference.tensor_files import INDEX
from tpcheck.reference.transient import TransientDecoder
from tpcheck.spec import ModelSpec

DTYPES = ("float64", "float32", "bfloat16", "float16")
_STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MATTERS = (
    *("tpcheck", "torch", "cpu", "cpu_capability", "num_threads", "variables"),
    *("float32_matmul_precision", "deterministic_algorithms"),
)
"""What of an environment can move a bit of a sum on a CPU."""

Progress = Callable[[int, int, str], None]
"""Called with (steps done, all steps, text); a step is a layer, the last one is the head."""


def stream_logits(
    directory: str | Path,
    input_ids: torch.Tensor,
    *,
    dtype: str,
    weight_dtype: str | None = None,
    scratch: str | Path | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Return what the model in a directory gives for one input; see `stream_many`."""
    return stream_many(
        directory,
        [input_ids],
        dtype=dtype,
        weight_dtype=weight_dtype,
        scratch=scratch,
        progress=progress,
    )[0]


def stream_many(
    directory: str | Path,
    inputs: Sequence[torch.Tensor],
    *,
    dtype: str,
    weight_dtype: str | None = None,
    scratch: str | Path | None = None,
    progress: Progress | None = None,
) -> list[torch.Tensor]:
    """Return what the model in a directory gives for each input, reading every layer once.

    The bits are those of `load_decoder(directory, tp)(input_ids)` in a group of one with the same
    dtypes and the same number of threads.

    Args:
        directory: a Hugging Face model directory, as `ref:DIR` reads it.
        inputs: int64 ids [batch, tokens] each; shapes may differ.
        dtype: to compute in, one of DTYPES.
        weight_dtype: what weights are rounded to first; as stored when not given.
        scratch: a folder for [Resuming]; made if need be, and removed at the end.
        progress: see Progress; its text says how long the rest may take.

    Returns:
        Logits [batch, tokens, vocab] in `dtype`, one for each input.

    Raises:
        SubjectError: ids, files or tensors are not what config.json makes them, or a file changed
            while it was read; names the file and the tensor.
        PlanError: config.json is malformed, or describes what the reference decoder cannot do.
        TPCheckError: the scratch folder cannot be used.

    Example:
        >>> stream_many("nowhere", [], dtype="int8")
        Traceback (most recent call last):
        tpcheck.errors.SubjectError: dtype='int8', but should be one of float64, float32, ...
    """
    chosen, directory = _named(dtype, "dtype"), Path(directory)
    scratch = None if scratch is None else Path(scratch)
    rounded = None if weight_dtype is None else _named(weight_dtype, "weight_dtype")
    spec = read_spec(directory)
    for input_ids in inputs:
        require_ids(input_ids, 0, spec)
        if not input_ids.numel():
            raise SubjectError(f"input_ids={list(input_ids.shape)}, but should hold a token")
    if not inputs:
        return []
    if scratch is not None and scratch.resolve() == directory.resolve():
        raise SubjectError(
            f"{scratch}: is the model's own directory, but should be a scratch folder"
        )
    names = ("config.json", INDEX, *Checkpoint(directory).files)
    before = _stamps(directory, names)
    tp = group_of_one(chosen, rounded or stored_dtype(directory))
    with torch.no_grad():
        decoder = TransientDecoder(spec, tp, CheckpointWeights(directory, tp))
        with opened(scratch, _key(spec, tp, inputs, before)) as kept:
            return _Run(directory, decoder, chosen, before, kept, progress).logits(inputs)


def stored_dtype(directory: str | Path) -> torch.dtype:
    """Return the narrowest dtype that holds every floating tensor of a directory as it is stored.

    Float8 codes do not count: they are read as they are.

    Raises:
        SubjectError: files are missing, or cannot be read; names them.
    """
    checkpoint = Checkpoint(directory)
    found = {_STORED[kind] for kind in map(checkpoint.dtype, checkpoint.names) if kind in _STORED}
    # bfloat16 is what is left where nothing but codes is stored, which no checkpoint of ours is
    return reduce(torch.promote_types, sorted(found, key=str)) if found else torch.bfloat16


def group_of_one(dtype: torch.dtype, weight_dtype: torch.dtype) -> RecordedGroup:
    """Return a TPGroup of one rank on the CPU: its collectives are the identity."""
    return RecordedGroup(
        rank=0,
        size=1,
        device=torch.device("cpu"),
        dtype=dtype,
        weight_dtype=weight_dtype,
        weights=WeightSource(seed=0, dtype=dtype, weight_dtype=weight_dtype, store=MemoryStore()),
        recorder=Recorder(),
    )


class _Run:
    """One pass over the layers, from the first or from where an earlier run was ended."""

    def __init__(
        self,
        directory: Path,
        decoder: TransientDecoder,
        dtype: torch.dtype,
        before: dict[str, list[int]],
        kept: Scratch | None,
        progress: Progress | None,
    ) -> None:
        self._directory, self._decoder, self._dtype = directory, decoder, dtype
        self._before = before
        self._kept, self._progress = kept, progress
        self._work = _work(decoder.spec)

    def logits(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        decoder, count = self._decoder, len(self._decoder.layers)
        first, xs_BTD = self._start(inputs)
        started = time.monotonic()
        for layer in range(first, count):
            self._say(layer, f"layer {layer + 1} of {count}", started, first)
            xs_BTD = self._through(layer, xs_BTD)
            self._require_unchanged()
            if self._kept is not None:
                self._kept.save(layer + 1, xs_BTD)
        self._say(count, "head", started, first)
        logits_BTV = decoder.scores(xs_BTD)
        self._require_unchanged()
        self._say(count + 1, "done", started, first)
        if self._kept is not None:
            self._kept.remove()
        return logits_BTV

    def _start(self, inputs: Sequence[torch.Tensor]) -> tuple[int, list[torch.Tensor]]:
        """Return the first layer to run and what goes into it."""
        spec = self._decoder.spec
        shapes = [(*input_ids.shape, spec.hidden_size) for input_ids in inputs]
        if self._kept is not None:
            done, xs_BTD = self._kept.load(shapes, self._dtype)
            if done:
                LOG.info("going on after layer %s of %s", done, spec.num_hidden_layers)
                return done, xs_BTD
        return 0, [self._decoder.embed(input_ids) for input_ids in inputs]

    def _through(self, layer: int, xs_BTD: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        held = self._decoder.layer(layer)
        return [held(x_BTD) for x_BTD in xs_BTD]

    def _require_unchanged(self) -> None:
        now = _stamps(self._directory, self._before)
        changed = [name for name, stamp in now.items() if stamp != self._before[name]]
        if changed:
            raise SubjectError(
                f"{self._directory / min(changed)}: changed while it was read, so the layers are"
                " not of one model; run again on a directory that stays as it is"
            )

    def _say(self, step: int, text: str, started: float, first: int) -> None:
        if self._progress is None:
            return
        run, left = sum(self._work[first:step]), sum(self._work[step:])
        if run and left:
            text += f", about {_duration((time.monotonic() - started) / run * left)} left"
        self._progress(step, len(self._work), text)


def _work(spec: ModelSpec) -> list[int]:
    """Return how many weights each step multiplies: every layer's, and the head's."""
    layers = [0] * spec.num_hidden_layers
    for name, tensor in logical_tensors(spec).items():
        if name.startswith("model.layers."):
            layers[int(name.split(".")[2])] += math.prod(tensor.shape)
    return [*layers, spec.vocab_size * spec.hidden_size]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _named(dtype: str, what: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise SubjectError(f"{what}={dtype!r}, but should be one of {', '.join(DTYPES)}")
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen


def _stamps(directory: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Return how files look: size, times, inode and device; of what is not there, nothing."""
    found: dict[str, list[int]] = {}
    for name in names:
        try:
            now = (directory / name).stat()
        except OSError:
            found[name] = []  # whatever is needed and is not there is said by those who read it
        else:
            found[name] = [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino, now.st_dev]
    return found


def _key(
    spec: ModelSpec,
    tp: RecordedGroup,
    inputs: Sequence[torch.Tensor],
    stamps: dict[str, list[int]],
) -> dict[str, Any]:
    """Return everything that the activations after a layer are a function of, as JSON."""
    around = collect()
    return {
        "config": hashlib.sha256(repr(spec).encode()).hexdigest(),
        "dtype": str(tp.dtype),
        "environment": {name: around[name] for name in _MATTERS},
        "inputs": [tensor_digest(input_ids) for input_ids in inputs],
        "weight dtype": str(tp.weight_dtype),
        "files": stamps,
    }
