"""Where a checkpoint keeps the stored tensors of its quantized weights, and in which dtypes.

Requirement: the plan's components (shard_plan: quant) have one name, shape and dtype each in a
checkpoint, whichever tool wrote it. What differs is small: a scale is called weight_scale or
weight_scale_inv, and gpt-oss has the codes of all experts in blocks. Torch-free.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from tpcheck.errors import SubjectError
from tpcheck.reference.layout import logical_tensors
from tpcheck.reference.stored import Stored
from tpcheck.shard_plan.quant import Component, components, quantized, stored_as
from tpcheck.spec import ModelSpec

FLOATS = ("F64", "F32", "F16", "BF16")
_DTYPES = {"float8_e4m3fn": ("F8_E4M3",), "int8": ("I8",), "int32": ("I32",), "uint8": ("U8",)}
_ALIASES = {"weight_scale": "weight_scale_inv", "weight_scale_inv": "weight_scale"}
_GPT_OSS = {"weight_packed": "_blocks", "weight_scale": "_scales"}
_BLOCK = 16
"""Bytes, of two codes each, in which gpt-oss stores a row."""


@dataclass(frozen=True, slots=True)
class QuantizedPart:
    """One stored tensor: a component of this `shape` lies in `stored`, in one of these dtypes.

    `block` above 0: its last dim is stored as blocks of so many.
    """

    stored: Stored
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    block: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The whole stored tensor's shape."""
        shape = self.stored.stored_shape(self.shape)
        if not self.block:
            return shape
        return (*shape[:-1], -(-shape[-1] // self.block), self.block)


def quantized_parts(
    spec: ModelSpec, have: Collection[str], stored: Mapping[str, Stored]
) -> dict[str, QuantizedPart]:
    """Return where each component of each quantized weight lies, by `module.suffix`.

    Args:
        have: the names of the checkpoint's tensors.
        stored: where a checkpoint keeps each logical tensor that is not quantized.

    Raises:
        SubjectError: quantized experts lie in one tensor, in a way that nobody publishes.
    """
    if spec.quantization is None:
        return {}
    parts: dict[str, QuantizedPart] = {}
    tensors = logical_tensors(spec)
    for name, tensor in tensors.items():
        if not quantized(spec, name, tensor):
            continue
        weight = stored_as(spec.quantization, tensors, name)
        for suffix, component in components(spec.quantization, weight.shape).items():
            place = _gpt_oss if spec.model_type == "gpt_oss" else _place
            parts[f"{weight.name}.{suffix}"] = place(stored[name], suffix, component, have)
    return parts


def _place(
    dense: Stored, suffix: str, component: Component, have: Collection[str]
) -> QuantizedPart:
    if dense.among:
        raise SubjectError(
            f"{dense.name}: experts are quantized all in one tensor, but should have one each,"
            " as the Hub has them: save_pretrained(..., save_original_format=True)"
        )
    module = dense.name.removesuffix(".weight")
    other = f"{module}.{_ALIASES.get(suffix, suffix)}"
    name = other if f"{module}.{suffix}" not in have and other in have else f"{module}.{suffix}"
    return QuantizedPart(replace(dense, name=name), component.shape, dtypes_of(component))


def _gpt_oss(
    dense: Stored, suffix: str, component: Component, have: Collection[str]
) -> QuantizedPart:
    stored = replace(dense, name=f"{dense.name}{_GPT_OSS[suffix]}", transposed=False)
    block = _BLOCK if suffix == "weight_packed" else 0
    return QuantizedPart(stored, component.shape, dtypes_of(component), block)


def dtypes_of(component: Component) -> tuple[str, ...]:
    """Return the dtypes that a component may be stored in; a scale may be in any wide one."""
    return _DTYPES.get(component.dtype, FLOATS)
