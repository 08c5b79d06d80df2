"""How the weights of a decoder's linear layers are stored: codes, and the scales they share.

Requirement: which features share a scale is said once, without torch; the plan, the shards and the
arithmetic follow from it. The words are those of HF's quantization_config where it has one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpcheck.errors import PlanError
from tpcheck.json_reader import brief

FORMATS = ("fp8", "int8", "gptq", "awq", "pack-quantized", "mxfp4", "nvfp4")

_BITS = {
    "fp8": (8,),
    "int8": (8,),
    "gptq": (4, 8),
    "awq": (4,),
    "pack-quantized": (4, 8),
    "mxfp4": (4,),
    "nvfp4": (4,),
}
_ACTIVATION_BITS = {"fp8": "float8_e4m3fn", "int8": "int8", "mxfp4": "float4_e2m1"}


@dataclass(frozen=True, slots=True)
class Quantization:
    """What the weights of the linear layers between embedding and head are stored as.

    `group_size` input features share a scale, 0: all of them. `block_rows` output features share
    one, 1: each has its own, 0: all of them. So fp8 is per tensor with 0 and 0, per channel with 0
    and 1, and in DeepSeek's blocks with 128 and 128.

    `symmetric`: no zero points. `zeros_as_is`: GPTQ's v2 stores zero points as they are, v1 less
    one. `desc_act`: GPTQ's act-order, the group of an input feature is looked up. `fused`: q, k and
    v are quantized as one tensor, and so are gate and up.

    `online`: the checkpoint is not quantized, the weights are when they are loaded.

    `activations`: what shares a scale among the inputs of these layers, which are then rounded too:
    "none" (they are not), "token" or "group" (group_size features of a token); computed as they
    come. `kv_cache`: "none", or e4m3 with one stored scale per "tensor" or per "head".

    `skip`: layers whose name contains one of these stay unquantized (modules_to_not_convert), or
    begins as a pattern behind `re:` says.
    """

    format: str
    group_size: int = 0
    block_rows: int = 1
    bits: int = 0
    symmetric: bool = True
    desc_act: bool = False
    zeros_as_is: bool = False
    fused: bool = False
    online: bool = False
    activations: str = "none"
    kv_cache: str = "none"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require("format", self.format, FORMATS)
        object.__setattr__(self, "bits", self.bits or _BITS[self.format][0])
        object.__setattr__(self, "skip", tuple(self.skip))
        _require("bits", self.bits, _BITS[self.format], self.format)
        for name in ("group_size", "block_rows"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise PlanError(
                    f"quantization: {name}={brief(value)}, but should be a whole number of at"
                    f" least 0"
                )
        if self.format in ("mxfp4", "nvfp4") and self.group_size == 0:
            raise PlanError(f"quantization: group_size=0, but {self.format} should have groups")
        plain = self.format in ("fp8", "int8")
        if not plain:
            _require("block_rows", self.block_rows, (1,), self.format)
        asymmetric = self.format in ("gptq", "awq", "pack-quantized")
        _require("symmetric", self.symmetric, (True, False) if asymmetric else (True,), self.format)
        ordered = self.format in ("gptq", "pack-quantized")
        _require("desc_act", self.desc_act, (False, True) if ordered else (False,), self.format)
        v2 = (False, True) if self.format == "gptq" else (False,)
        _require("zeros_as_is", self.zeros_as_is, v2, self.format)
        _require("online", self.online, (False, True) if plain else (False,), self.format)
        _require("fused", self.fused, (False,) if self.online else (False, True))
        rounds = self.format in _ACTIVATION_BITS
        ways = ("none", "token", "group") if rounds else ("none",)
        _require("activations", self.activations, ways, self.format)
        if self.activations == "group" and self.group_size == 0:
            raise PlanError("quantization: group_size=0, but activations='group' should have one")
        _require("kv_cache", self.kv_cache, ("none", "tensor", "head"))
        if not all(isinstance(name, str) and name for name in self.skip):
            raise PlanError(f"quantization: skip={brief(self.skip)}, but should be names of layers")

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Quantization:
        """Make one from a dict of its fields."""
        try:
            return cls(**fields)
        except TypeError as error:
            reason = str(error).removeprefix("Quantization.__init__() ")
            raise PlanError(f"quantization: {reason}") from error

    @property
    def pack(self) -> int:
        """How many codes a stored word holds; 1 where a code is an element of its own."""
        words = {"gptq": 32, "awq": 32, "pack-quantized": 32, "mxfp4": 8, "nvfp4": 8}
        return words.get(self.format, self.bits) // self.bits

    @property
    def activation_grid(self) -> str:
        """The grid that activations are rounded to, "" where they are not."""
        return "" if self.activations == "none" else _ACTIVATION_BITS[self.format]

    def converts(self, name: str) -> bool:
        """Return whether the layer of this name is quantized."""
        return not any(_names(skipped, name.removesuffix(".weight")) for skipped in self.skip)

    def describe(self) -> str:
        """Return how a user would name it: `fp8, block [128, 128]`."""
        if self.block_rows > 1 or (self.block_rows == 0 and self.group_size):
            scales = f"block [{self.block_rows or 'all'}, {self.group_size or 'all'}]"
        elif self.group_size:
            scales = f"group_size={self.group_size}"
        else:
            scales = "per channel" if self.block_rows else "per tensor"
        return f"{self.format}, {scales}" + (", desc_act" if self.desc_act else "")

    def to_fields(self) -> dict[str, Any]:
        """Return the fields as a plain dict."""
        return dataclasses.asdict(self)


def _names(skipped: str, layer: str) -> bool:
    if skipped.startswith("re:"):
        return re.match(skipped.removeprefix("re:"), layer) is not None
    return skipped in layer


def _require(name: str, value: object, allowed: tuple[object, ...], format_: str = "") -> None:
    if value in allowed and type(value) in {type(one) for one in allowed}:
        return
    where = f" for {format_}" if format_ else ""
    shown = ", ".join(map(str, allowed))
    many = "one of " if len(allowed) > 1 else ""
    raise PlanError(f"quantization: {name}={brief(value)}, but should be {many}{shown}{where}")
