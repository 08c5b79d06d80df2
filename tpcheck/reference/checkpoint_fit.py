"""Whether a checkpoint's tensors are those that its config.json needs.

Requirement: a tensor that is missing, extra, or of another shape or dtype is one error that names
it, before anything is read: a bias or a scale that nobody reads is a different function.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from tpcheck.errors import SubjectError
from tpcheck.reference.layout import logical_tensors
from tpcheck.reference.quantized_names import FLOATS, QuantizedPart
from tpcheck.reference.stored import Stored
from tpcheck.reference.tensor_files import Checkpoint
from tpcheck.shard_plan.quant import quantized
from tpcheck.spec import ModelSpec


class Needed(NamedTuple):
    """A stored tensor that the decoder reads. One of `small` may leave dims of length 1 out."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    small: bool = False


def require_fit(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    stored: Mapping[str, Stored],
    parts: Mapping[str, QuantizedPart],
) -> None:
    """Hold a checkpoint against what its config needs.

    Args:
        stored: where it keeps each logical tensor.
        parts: where it keeps each part of those that are quantized.

    Raises:
        SubjectError: tensors are missing, extra, or of another shape or dtype; names the first
            three, and what was expected.
    """
    where, have = f"{checkpoint.directory}: ", set(checkpoint.names)
    needed = {one.name: one for one in _needed(spec, stored, parts)}
    missing = [name for name in needed if name not in have]
    if missing:
        raise SubjectError(f"{where}{_listed('missing', missing)}{_kind(spec)}")
    extra = [
        name
        for name in checkpoint.names
        if name not in needed and not _changes_nothing(checkpoint, name, have, spec)
    ]
    if extra:
        listed = _listed("that config.json gives no use for", extra)
        raise SubjectError(f"{where}{listed}{_why_extra(extra[0])}{_kind(spec)}")
    for one in needed.values():
        _require_shape_and_dtype(checkpoint, one, spec)
    tensors = logical_tensors(spec)
    for name, part in parts.items():
        note = f"{part.stored.name.rpartition('.')[0]}.weight_shape"
        if name.endswith(".weight_packed") and note in have:
            weight = tensors[f"{name.removesuffix('.weight_packed')}.weight"]
            _require_weight_shape(checkpoint, note, weight.shape, spec)


def _needed(
    spec: ModelSpec, stored: Mapping[str, Stored], parts: Mapping[str, QuantizedPart]
) -> Iterator[Needed]:
    for name, tensor in logical_tensors(spec).items():
        if not quantized(spec, name, tensor):
            shape = stored[name].stored_shape(tensor.shape)
            yield Needed(stored[name].name, shape, FLOATS, name.endswith("_scale"))
    for name, part in parts.items():
        small = name.endswith(("_scale", "_scale_inv"))
        yield Needed(part.stored.name, part.stored_shape, part.dtypes, small)


def _require_shape_and_dtype(checkpoint: Checkpoint, one: Needed, spec: ModelSpec) -> None:
    actual, dtype = checkpoint.shape(one.name), checkpoint.dtype(one.name)
    where = f"{checkpoint.directory}: {one.name}"
    same = actual == one.shape or (one.small and _squeezed(actual) == _squeezed(one.shape))
    if not same or (actual != one.shape and len(_squeezed(actual)) > 1):
        raise SubjectError(
            f"{where}: shape={list(actual)}, but config.json makes it {list(one.shape)}"
            f"{_kind(spec)}"
        )
    if dtype not in one.dtypes:
        raise SubjectError(
            f"{where}: dtype={dtype}, but config.json makes it {' or '.join(one.dtypes)}"
            f"{_kind(spec)}"
        )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _require_weight_shape(
    checkpoint: Checkpoint, note: str, shape: tuple[int, ...], spec: ModelSpec
) -> None:
    """Raise where compressed-tensors' own note of a weight's shape says another one."""
    actual = checkpoint.whole(note).tolist()
    if actual != list(shape):
        raise SubjectError(
            f"{checkpoint.directory}: {note}={actual}, but config.json makes it {list(shape)}"
            f"{_kind(spec)}"
        )


def _changes_nothing(
    checkpoint: Checkpoint, name: str, have: Collection[str], spec: ModelSpec
) -> bool:
    """Whether a tensor may be left unread: derived, noted twice, or zeros that GPTQ's tools add."""
    derived = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
    tied_head = spec.tie_word_embeddings and name == "lm_head.weight"
    if tied_head or name.endswith(derived):
        return True
    module, _, leaf = name.rpartition(".")
    if leaf == "weight_shape":
        return f"{module}.weight_packed" in have
    added = leaf == "bias" and f"{module}.qweight" in have
    return added and not checkpoint.whole(name).any()


def _why_extra(name: str) -> str:
    leaf = name.rpartition(".")[2]
    if leaf.startswith(("input_", "activation_scale", "output_")):
        return "; the reference decoder computes the scales of activations as they come"
    if leaf in ("k_scale", "v_scale", "kv_scale"):
        return "; a quantized cache needs kv_cache_scheme there"
    return ""


def _kind(spec: ModelSpec) -> str:
    kind = spec.model_type
    return f" [{kind}]" if spec.quantization is None else f" [{kind}, {spec.quantization.format}]"


def _listed(what: str, names: list[str]) -> str:
    """Say `2 tensors missing: a, b`, at most three by name."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} {what}: {shown}"
