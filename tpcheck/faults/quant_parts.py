"""One rank's quantized weights, opened: their stored tensors, for a fault to change and read again.

Requirement: a fault of quantization is what the bug is: another slice of a stored tensor, or the
right one read otherwise. The rank then holds what it loaded (its shards say so too), and computes
with the numbers that this stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpcheck.faults.planting import Decoder, full_weight, set_weight
from tpcheck.quantization import Quantization

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup
    from tpcheck.shard_plan.cuts import Cut
    from tpcheck.shard_plan.quant import Component, Held, StoredAs

OUT, IN = 0, 1
"""The dims of a linear's weight."""

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}

ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"
GATE, UP, DOWN = (f"{MLP}.{part}_proj.weight" for part in ("gate", "up", "down"))
QUERY, KEY, VALUE = (f"{ATTENTION}.{part}_proj.weight" for part in "qkv")


@dataclass(slots=True)
class Opened:
    """What one rank holds of a quantized weight; a fault replaces what it likes.

    parts: the stored tensors by suffix. quantization: how they are read. serving: (suffix, OUT or
    IN) -> for each of the rank's features the index in `parts` that serves it, in codes where they
    are packed.
    """

    parts: dict[str, torch.Tensor]
    quantization: Quantization
    serving: dict[tuple[str, int], torch.Tensor]
    weight: StoredAs
    cuts: tuple[Cut, ...]
    components: dict[str, Component]
    _read: Any
    _way: str

    def whole(self, suffix: str) -> torch.Tensor:
        """Return a whole stored tensor."""
        return self._slice(suffix, 0, 0, self.components[suffix].shape[0])

    def of(self, rank: int, suffix: str) -> torch.Tensor:
        """Return what another rank holds of a stored tensor."""
        from tpcheck.reference.sources import stored_part

        part = self._held(rank, suffix).cut
        return stored_part(self._read, self.weight, suffix, self.components[suffix], part)

    def features(self, rank: int) -> list[int]:
        """Return which features of the whole weight a rank has, along the dim that is cut."""
        return [feature for run in self.cuts[rank].runs for feature in range(*run.whole)]

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers that the parts now stand for."""
        from tpcheck.reference.quant import dequantize

        served = self.serving
        return dequantize(
            self.parts, self.quantization, lambda suffix, side: served[suffix, side], dtype
        )

    def _slice(self, suffix: str, dim: int, start: int, stop: int) -> torch.Tensor:
        part: torch.Tensor = self._read(self.weight, suffix, dim, start, stop)
        return part

    def _held(self, rank: int, suffix: str) -> Held:
        from tpcheck.shard_plan.quant import held

        return held(self.cuts[rank], self.components[suffix], self._way, self.weight.offset)

    def _serving(self, rank: int, suffix: str, side: int) -> torch.Tensor:
        import torch

        from tpcheck.shard_plan.quant import serving

        size, component = self.weight.shape[side], self.components[suffix]
        indices = serving(component, self._held(rank, suffix), self.cuts[rank], side, size)
        return torch.tensor(indices, dtype=torch.int64)


def opened(decoder: Decoder, tp: TPGroup, name: str) -> Opened:
    """Return what a rank holds of a quantized weight, as the plan says it."""
    from tpcheck.reference.layout import cut, logical_tensors
    from tpcheck.reference.sources import GeneratedWeights
    from tpcheck.shard_plan.quant import components, stored_as

    spec, plan, tensors = decoder.spec, decoder.plan, logical_tensors(decoder.spec)
    quantization = spec.quantization
    weight = stored_as(quantization, tensors, name)
    one = Opened(
        parts={},
        quantization=quantization,
        serving={},
        weight=weight,
        cuts=tuple(cut(spec, plan, rank, tensors[name]) for rank in range(tp.size)),
        components=components(quantization, weight.shape),
        _read=GeneratedWeights(tp, quantization).stored,
        _way=plan.policy.scales,
    )
    for suffix in one.components:
        one.parts[suffix] = one.of(tp.rank, suffix)
        for side in (OUT, IN):
            one.serving[suffix, side] = one._serving(tp.rank, suffix, side)
    return one


@contextmanager
def reread(decoder: Decoder, tp: TPGroup, name: str) -> Iterator[Opened]:
    """Open a rank's weight; what is left of it at the end is what the rank holds and uses."""
    one = opened(decoder, tp, name)
    yield one
    set_weight(parameter(decoder, name), one.numbers(tp.dtype).to(tp.device))
    module = name.removesuffix(".weight")
    for suffix, part in one.parts.items():
        key = f"{module}.{suffix}"
        decoder._shards[key] = (part, decoder._shards[key][1])


def parameter(decoder: Decoder, name: str) -> torch.nn.Parameter:
    """Return the parameter of a linear of a decoder, or of an expert's down projection."""
    path = name.removeprefix("model.").removesuffix(".weight")
    where, _, last = path.rpartition(".")
    module = decoder.get_submodule(where)
    linear = getattr(module, last, None)
    if linear is None:
        found: torch.nn.Parameter = module.down_Df
    else:
        found = linear.weight_fD if hasattr(linear, "weight_fD") else linear.weight_Df
    return found


def quantize_again(
    decoder: Decoder, tp: TPGroup, name: str, largest: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Quantize a rank's part online, with scales of what `largest` makes of its own maxima."""
    from tpcheck.reference.layout import cut, logical_tensors
    from tpcheck.reference.quantizing import Shared, quantize_part

    tensor = logical_tensors(decoder.spec)[name]
    part = cut(decoder.spec, decoder.plan, tp.rank, tensor)
    features = [list(range(size)) for size in tensor.shape]
    features[part.dim] = [index for run in part.runs for index in range(*run.whole)]
    dense = full_weight(tp, decoder, name)[features[OUT]][:, features[IN]]
    shared = Shared(features[OUT], features[IN], tensor.shape, largest)
    _, numbers = quantize_part(dense, decoder.spec.quantization, shared)
    set_weight(parameter(decoder, name), numbers.to(tp.dtype))


def quantized(how: Quantization, **fields: Any) -> dict[str, Any]:
    """Return spec fields of a quantized model: ranks get whole groups and words at 2, 3, 4, 8."""
    return {"intermediate_size": 192, "quantization": how, **fields}
