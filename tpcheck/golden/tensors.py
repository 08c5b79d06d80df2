"""A record's tensors: logits to named tensors to safetensors bytes, and back.

Requirement: the reader holds every tensor's name, dtype and shape against what the manifest says,
so that a file which fits its digest and was made by hand is refused like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tpcheck.errors import TPCheckError
from tpcheck.golden.records import SCHEMA, Golden, Logits
from tpcheck.golden.sketches import (
    SUMS,
    TOP,
    Sketch,
    as_positions,
    chosen_positions,
    largest,
    positions_of,
    sketch,
    taken,
)

Tensors = dict[str, torch.Tensor]
_Layout = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a record holds a subject to. `oracle` and `top_oracle` are None where there is none.

    positions, top: where logits were kept, and which; top_oracle: their values. argmax: of the
    deployed logits, per position. whole_*: everything, in a full record.
    """

    deployed: Sketch
    argmax: torch.Tensor
    positions: list[int]
    top: torch.Tensor
    oracle: Sketch | None
    top_oracle: torch.Tensor | None
    whole_deployed: torch.Tensor | None
    whole_oracle: torch.Tensor | None


def pack(
    deployed: Mapping[str, torch.Tensor],
    oracle: Mapping[str, torch.Tensor] | None,
    *,
    case_id: str,
    full: bool,
) -> bytes:
    """Return the safetensors bytes of a record: the same for the same logits."""
    from safetensors.torch import save

    tensors: Tensors = {}
    for key, logits in deployed.items():
        wide = None if oracle is None else oracle[key]
        positions = chosen_positions(_real(logits).shape, f"{case_id} {key}")
        top = largest(logits if wide is None else wide, positions)
        tensors |= _sketch_tensors(f"{key}.deployed", sketch(logits))
        tensors[f"{key}.deployed.argmax"] = argmax(logits)
        tensors[f"{key}.top.indices"] = top
        tensors[f"{key}.top.deployed"] = taken(logits, positions, top)
        if wide is not None:
            tensors |= _sketch_tensors(f"{key}.oracle", sketch(wide))
            tensors[f"{key}.top.oracle"] = taken(wide, positions, top)
        if full:
            tensors[f"{key}.deployed"] = _real(logits)
            tensors |= {} if wide is None else {f"{key}.oracle": _real(wide)}
    data: bytes = save(tensors, {"schema": SCHEMA})
    return data


def unpack(data: bytes, golden: Golden) -> dict[str, Kept]:
    """Return what a record keeps, by input.

    Raises:
        TPCheckError: it is no safetensors file, or holds other tensors than the manifest says;
            names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: Tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise TPCheckError(f"{golden.data.file}: is no safetensors file: {error}") from error
    layout = {
        name: form
        for key, one in golden.logits.items()
        for name, form in _layout(key, one, golden).items()
    }
    for name in sorted(layout.keys() | tensors.keys()):
        held = tensors.get(name)
        found = None if held is None else (_name(held.dtype), tuple(held.shape))
        if found != layout.get(name):
            raise TPCheckError(
                f"{golden.data.file}: {name} is {_shown(found)}, but should be"
                f" {_shown(layout.get(name))}, as {golden.file} says"
            )
    return {key: _kept(tensors, key, one, golden) for key, one in golden.logits.items()}


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the index of the largest value at every position, int32 [positions]."""
    rows = as_positions(logits)
    if rows.shape[1] == 0:
        return torch.zeros(rows.shape[0], dtype=torch.int32)
    return rows.to(torch.float64).argmax(1).to(torch.int32)


def _sketch_tensors(name: str, made: Sketch) -> Tensors:
    return {f"{name}.{field}": getattr(made, field) for field in Sketch.__slots__}


def _kept(tensors: Tensors, key: str, one: Logits, golden: Golden) -> Kept:
    exact = bool(golden.oracle_dtype)

    def read(name: str) -> Sketch:
        return Sketch(*(tensors[f"{key}.{name}.{field}"] for field in Sketch.__slots__))

    positions = chosen_positions(_real_shape(one), f"{golden.case_id} {key}")
    top = tensors[f"{key}.top.indices"]
    _, values = positions_of(_real_shape(one))
    if top.numel() and not (0 <= int(top.min()) and int(top.max()) < values):
        raise TPCheckError(f"{golden.data.file}: {key}.top.indices are not all below {values}")
    return Kept(
        deployed=read("deployed"),
        argmax=tensors[f"{key}.deployed.argmax"],
        positions=positions,
        top=top,
        oracle=read("oracle") if exact else None,
        top_oracle=tensors[f"{key}.top.oracle"] if exact else None,
        whole_deployed=tensors.get(f"{key}.deployed"),
        whole_oracle=tensors.get(f"{key}.oracle"),
    )


def _layout(key: str, one: Logits, golden: Golden) -> _Layout:
    """Return the dtype and shape of every tensor that a record keeps of one input."""
    shape = _real_shape(one)
    positions, values = positions_of(shape)
    chosen = len(chosen_positions(_real_shape(one), f"{golden.case_id} {key}"))
    few = (chosen, min(TOP, values))
    exact = ["oracle"] if golden.oracle_dtype else []
    narrow, wide = (_REAL.get(name, name) for name in (one.dtype, one.oracle_dtype))
    layout: _Layout = {
        f"{key}.deployed.argmax": ("int32", (positions,)),
        f"{key}.top.indices": ("int32", few),
        f"{key}.top.deployed": (narrow, few),
    }
    for name in ("deployed", *exact):
        layout[f"{key}.{name}.sums"] = ("float64", (positions, SUMS))
        layout[f"{key}.{name}.rms"] = ("float64", (positions,))
        layout[f"{key}.{name}.strange"] = ("int32", (positions, 3))
    if exact:
        layout[f"{key}.top.oracle"] = (wide, few)
    if golden.full:
        layout[f"{key}.deployed"] = (narrow, shape)
        layout |= {f"{key}.oracle": (wide, shape)} if exact else {}
    return layout


_REAL = {"complex64": "float32", "complex128": "float64"}


def _real_shape(one: Logits) -> tuple[int, ...]:
    return (*one.shape, 2) if one.dtype in _REAL else one.shape


def _real(x: torch.Tensor) -> torch.Tensor:
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).contiguous()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(form: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if form is None else f"{form[0]} {list(form[1])}"
