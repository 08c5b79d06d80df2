"""Which of the offered named weights a subject's loader really used.

Requirement: a loader that skips a name, or loads one twice, at TP=N but not at TP=1 is a bug that
may cost a whole tensor. A name counts as consumed when an op reads the tensor that was yielded,
when its memory is handed on, as to a file that an engine loads, or when the subject keeps it. What
TP=1 itself skips (an inv_freq buffer, a tied head) may well be right, so counts are compared
between degrees, and what is odd at TP=1 is a remark.
"""

from __future__ import annotations

import contextlib
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tpcheck.errors import SubjectError
from tpcheck.groups.weights import NamedLoader, WeightSource, keyed_generator
from tpcheck.observation.dispatch import half_ulp_noise
from tpcheck.observation.dispatch_mode import PlainMode

_HANDED_ON = frozenset({"data_ptr", "numpy", "tolist", "untyped_storage", "_typed_storage"})
"""Methods that give values to what no dispatch mode sees, as torch.save and safetensors."""


class Consumption:
    """Counts, per name, how many yielded tensors were used.

    A tensor is settled two yields later, when no loop variable can hold it any more, so that a
    loader that frees as it goes never has more than three full tensors alive because of us.
    """

    def __init__(self, weights: WeightSource) -> None:
        self._pending: list[tuple[str, torch.Tensor]] = []
        self._read: set[int] = set()
        self._counts: dict[str, int] = {}
        self._weights = weights
        weights.on_yield = self._remember

    def counts(self) -> dict[str, int]:
        """Return name -> how often it was consumed; empty when no weight was asked for by name."""
        self._settle(keep=0)
        return dict.fromkeys(self._weights.offered, 0) | self._counts if self._counts else {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While open (during build), note which of the yielded tensors any op reads."""
        with _HandsOn(self), _Reads(self):
            yield
        self._settle(keep=0)

    def half_ulp(self, seed: int) -> Callable[[str, torch.Tensor], torch.Tensor]:
        """Return a `perturb` that moves every weight by up to half an ulp of its storage dtype."""
        return lambda name, tensor: half_ulp_noise(
            tensor, torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        )

    def note_reads(self, args: Sequence[Any]) -> None:
        if not self._pending:
            return
        for arg in args:
            if isinstance(arg, torch.Tensor) and type(arg) is torch.Tensor:
                self._read.add(_memory(arg))
            elif isinstance(arg, (list, tuple)):
                self.note_reads(arg)

    def _remember(self, name: str, tensor: torch.Tensor) -> None:
        self._settle(keep=1)
        self._read.discard(_memory(tensor))
        self._pending.append((name, tensor))

    def _settle(self, keep: int) -> None:
        while len(self._pending) > keep:
            name, tensor = self._pending.pop(0)
            # Two references are ours (this name, getrefcount's argument): more is the subject.
            kept = sys.getrefcount(tensor) > 2
            used = kept or _memory(tensor) in self._read
            self._counts[name] = self._counts.get(name, 0) + int(used)


def _memory(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():  # that we ask is no reading of the subject's
        return int(tensor.untyped_storage()._cdata)


class _HandsOn(TorchFunctionMode):
    def __init__(self, consumption: Consumption) -> None:
        super().__init__()
        self._consumption = consumption

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _HANDED_ON:
            self._consumption.note_reads(args[:1])
        return func(*args, **(kwargs or {}))


class _Reads(PlainMode):
    def __init__(self, consumption: Consumption) -> None:
        super().__init__()
        self._consumption = consumption

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._consumption.note_reads(args)
        return func(*args, **(kwargs or {}))


def one_ulp_off(
    seed: int, weight_dtype: torch.dtype
) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Return what moves every weight by an ulp of its storage dtype, up, down or not at all.

    The same on every rank, at every degree and in every compute dtype: another model of the same
    kind, whose roundings are new.
    """
    step = torch.finfo(weight_dtype).eps

    def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dtype.is_floating_point:
            return tensor
        generator = keyed_generator(f"{seed}\0ulp\0{name}")
        ulps = torch.randint(-1, 2, tensor.shape, generator=generator)
        stored = tensor.to("cpu", torch.float64) * (1 + step * ulps)
        return stored.to(weight_dtype).to(tensor)

    return moved


def offer_weights(weights: WeightSource, declared: Any) -> None:
    """Make `named_weights()` yield what the subject declares: a directory or a dict of shapes.

    Raises:
        SubjectError: the directory holds no safetensors, or the declaration has another form.
    """
    if declared is None:
        return
    if isinstance(declared, Mapping):
        weights.offer(
            (name, partial(weights.weight, name, tuple(shape))) for name, shape in declared.items()
        )
    elif isinstance(declared, (str, Path)):
        weights.offer(_directory_loaders(Path(declared), weights))
    else:
        raise SubjectError(
            f"weights={type(declared).__name__}, but should be a safetensors directory"
            " or a dict name -> shape"
        )


def _directory_loaders(directory: Path, weights: WeightSource) -> list[NamedLoader]:
    from safetensors import safe_open

    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise SubjectError(f"weights={str(directory)!r}: there is no *.safetensors file in it")
    loaders: list[NamedLoader] = []
    for file in files:
        with safe_open(str(file), framework="pt") as handle:
            names = list(handle.keys())
        loaders += [(name, partial(_load, file, name, weights)) for name in names]
    return loaders


def _load(file: Path, name: str, weights: WeightSource) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as handle:
        return weights.stored(handle.get_tensor(name))
