"""What a forward does below its own source: casts, choices and collectives, seen by dispatch modes.

Requirement: real code casts to float32 in norms and softmax, picks experts by top-k and calls
torch.distributed itself. None of that is announced, and each changes what a comparison may claim:
a hard cast is the noise floor of a float64 run, a top-k may flip on a rounding, a collective
belongs in the schedule. A dispatch mode sees all three in code nobody here wrote.

[Noise Floor] A narrowing op's result is moved by up to half an ulp of the narrow dtype, at random,
in a second run; the response of the output is what rounding at those casts can do to it.

Quantizers are no noise: codes.py.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from tpcheck.groups.base import Recorder, dtype_name
from tpcheck.observation.codes import CastKey, Codes, dtype_eps, plain_name, widest
from tpcheck.observation.dispatch_mode import PlainMode
from tpcheck.trace import NarrowCast

_CHOICES = {"aten::topk", "aten::argmax", "aten::max.dim"}
DISTRIBUTED = ("c10d", "_c10d_functional")
"""The namespaces of torch.distributed's operators."""
_BOOKKEEPING = {"wait_tensor", "wrap_tensor_autograd", "monitored_barrier"}
_OP_NAMES = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "allgather_base": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
}
"""One name per collective, however it was called."""


_EXACT = {
    f"aten::{name}"
    for name in (
        "cat clone stack embedding gather index.Tensor index_select where.self masked_fill.Scalar"
        " masked_fill.Tensor repeat constant_pad_nd neg relu abs zeros_like ones_like full_like"
        " new_zeros new_ones new_full new_empty empty_like zeros ones full empty.memory_format"
        " arange arange.start scalar_tensor triu tril _unsafe_view clamp clamp_min clamp_max amax"
        " amin maximum minimum sign"
    ).split()
}
"""Names with their overloads, as `aten::where.self`; see is_exact."""


class Choice:
    """One top-k (or argmax) of a forward: the chosen indices and how narrow each choice was.

    `margins`: row by row, the gap between the last chosen and the first rejected value, in units of
    the row's largest finite magnitude. `among`: how many candidates there were. `dim`: along which
    several were chosen, None for a single one.
    """

    __slots__ = ("among", "dim", "indices", "margins")

    def __init__(
        self, indices: torch.Tensor, margins: torch.Tensor, among: int, dim: int | None = None
    ) -> None:
        self.indices = indices
        self.margins = margins
        self.among = among
        self.dim = dim

    def __reduce__(self) -> tuple[Any, ...]:
        return (Choice, (self.indices, self.margins, self.among, self.dim))

    def flips(self, other: Choice) -> tuple[int, float]:
        """Return how many rows chose otherwise than `other` did, in whatever order, and the widest
        margin that `other` had in these rows: one narrow row says nothing of another.
        """
        if self.dim is None:
            flipped = self.indices != other.indices
        else:
            mine, theirs = self.indices.sort(self.dim)[0], other.indices.sort(self.dim)[0]
            flipped = (mine != theirs).any(self.dim)
        margins = other.margins[flipped]
        return margins.numel(), float(margins.max()) if margins.numel() else 0.0

    def comparable(self, other: Choice) -> bool:
        """Whether both chose as many among as many: a maximum over a sharded dim is another one."""
        return self.indices.shape == other.indices.shape and self.among == other.among

    def imposed(self, reference: Choice, rank: int) -> torch.Tensor | None:
        """Return `reference`'s indices in the place of this choice's, or None if it is another.

        A rank that routes its own tokens only takes its piece of one dim; the pads after the last
        token keep their own choice. A piece that most rows contradict is laid out otherwise.
        """
        if self.comparable(reference):
            return reference.indices.to(self.indices.device)
        mine, whole = self.indices, reference.indices
        if self.among != reference.among or mine.ndim != whole.ndim:
            return None
        dims = [dim for dim in range(mine.ndim) if mine.shape[dim] != whole.shape[dim]]
        if len(dims) != 1 or dims[0] == self.dim or mine.shape[dims[0]] > whole.shape[dims[0]]:
            return None
        dim, total = dims[0], whole.shape[dims[0]]
        start = min(rank * mine.shape[dim], total)
        piece = whole.narrow(dim, start, min(mine.shape[dim], total - start)).to(mine.device)
        imposed = mine.clone()
        own = imposed.narrow(dim, 0, piece.shape[dim])
        if own.numel() and float((own == piece).double().mean()) < 0.5:
            return None
        own.copy_(piece)
        return imposed


class Watch(PlainMode):
    """See, and where asked change, what a forward does.

    Args:
        recorder: where torch.distributed calls of the subject's own are logged.
        wanted: the dtype the subject was asked to compute in; whatever it computes in a narrower
            one counts as a cast, because code may hold its weights in float32 from the start.
        perturb: a generator; narrowing results are moved by up to half an ulp with it.
        codes: what keeps the quantizers of this forward.
        pinned: choices of a reference forward, in order; top-k returns these indices instead.
        rank: whose piece of them, where this rank chooses for its own tokens only.
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        wanted: torch.dtype | None = None,
        perturb: torch.Generator | None = None,
        codes: Codes | None = None,
        pinned: Sequence[Choice] | None = None,
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.choices: list[Choice] = []
        self.unpinned = 0
        self._recorder = recorder
        self._wanted = wanted
        self._perturb = perturb
        self._pinned = pinned
        self._rank = rank
        self._casts: dict[CastKey, int] = {}
        self.codes = codes or Codes()
        self._open = False
        self._logged = False

    @property
    def casts(self) -> tuple[NarrowCast, ...]:
        """Narrowing casts so far, one entry per (module, source, target)."""
        counts = Counter(self._casts)
        counts.update(self.codes.rounding)
        return tuple(NarrowCast(*key, count) for key, count in counts.items())

    @property
    def saw_something(self) -> bool:
        """Whether this forward cast, chose, or called torch.distributed."""
        return bool(self._casts or self.codes.found or self.choices or self._logged)

    def __enter__(self) -> Self:
        self._recorder.on_send = self.codes.send
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._recorder.on_send = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._recorder.inside:
            return func(*args, **kwargs)
        if func.namespace in DISTRIBUTED:
            self._log_collective(func, args)
            return func(*args, **kwargs)
        self._close()
        name = func.name().removesuffix(".default")
        if name in _CHOICES:
            return self._choose(name, func, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            result = self._seen(func, args, result)
            self.codes.follow(func, args, (result,))
        elif isinstance(result, tuple) and any(isinstance(x, torch.Tensor) for x in result):
            result = tuple(
                self._seen(func, args, x) if isinstance(x, torch.Tensor) else x for x in result
            )
            self.codes.follow(func, args, result)
        return result

    def _seen(self, func: Any, args: tuple[Any, ...], result: torch.Tensor) -> torch.Tensor:
        """Note a result that is narrower than its operands, or than what the subject was given."""
        fqn, source = self._recorder.fqn, widest(args)
        if self.codes.note(func, fqn, source, result) or not result.dtype.is_floating_point:
            return result
        cast = source is not None and dtype_eps(result.dtype) > dtype_eps(source)
        narrow = self._wanted is not None and dtype_eps(result.dtype) > dtype_eps(self._wanted)
        if not cast and (not narrow or is_exact(func) or is_view(func)):
            return result
        key = (fqn, dtype_name(source or result.dtype), dtype_name(result.dtype))
        self._casts[key] = self._casts.get(key, 0) + 1
        if self._perturb is None:
            return result
        moved = half_ulp_noise(result, self._perturb)
        return result.copy_(moved) if _writes(func) else moved

    def _choose(
        self, name: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        result = func(*args, **kwargs)
        indices = result if name == "aten::argmax" else result[1]
        values = args[0]
        if not values.dtype.is_floating_point or values.ndim == 0:
            return result
        dim, keepdim = _choice_dim(name, args, kwargs)
        if dim is None:
            return result
        position = len(self.choices)
        smallest = name == "aten::topk" and not _largest(args, kwargs)
        margins = _margins(-values if smallest else values, indices, dim, keepdim)
        several = dim if name == "aten::topk" else None
        if several is None:
            margins = margins.view(indices.shape)
        choice = Choice(indices.clone(), margins.cpu(), values.shape[dim], several)
        self.choices.append(choice)
        if self._pinned is None:
            return result
        pinned = None
        if position < len(self._pinned):
            pinned = choice.imposed(self._pinned[position], self._rank)
        if pinned is None:
            self.unpinned += 1
            return result
        if name == "aten::argmax":
            return pinned.clone()
        at = pinned if keepdim else pinned.unsqueeze(dim)
        chosen = values.gather(dim, at)
        return (chosen if keepdim else chosen.squeeze(dim)), pinned.clone()

    def _log_collective(self, func: Any, args: tuple[Any, ...]) -> None:
        op = func.name().split("::")[1].split(".")[0].strip("_")
        op = _OP_NAMES.get(op, op)
        if op in _BOOKKEEPING:
            return
        tensor = _first_tensor(args)
        self._close()
        shape = () if tensor is None else tuple(tensor.shape)
        dtype = "" if tensor is None else str(tensor.dtype).removeprefix("torch.")
        self.codes.send(op, "", args)
        self._recorder.enter(op, shape, dtype, "torch.distributed")
        self._recorder.inside = False
        self._open = self._logged = True

    def _close(self) -> None:
        """A torch.distributed call is over for certain once the next op runs."""
        if self._open:
            self._open = False
            self._recorder.exit()


@functools.cache
def is_view(func: Any) -> bool:
    """A view shares its operand's memory: replacing it would lose what is written through it."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


@functools.cache
def is_exact(func: Any) -> bool:
    """Whether an op moves or makes values without rounding them."""
    return plain_name(func) + "".join(func.name().partition(".")[1:]) in _EXACT


@functools.cache
def _writes(func: Any) -> bool:
    return any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns)


def half_ulp_noise(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return `x` moved by at most half an ulp per element before rounding back to its dtype."""
    wide = x.detach().to("cpu", torch.float64)
    noise = torch.rand(wide.shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1)
    moved = wide * (1 + noise * (dtype_eps(x.dtype) / 2))
    return torch.where(wide.isfinite(), moved, wide).to(x.device, x.dtype)


def _first_tensor(args: Any) -> torch.Tensor | None:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg
        if isinstance(arg, (list, tuple)):
            found = _first_tensor(arg)
            if found is not None:
                return found
    return None


def _choice_dim(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int | None, bool]:
    position = 2 if name == "aten::topk" else 1
    default = -1 if name == "aten::topk" else None
    dim = args[position] if len(args) > position else kwargs.get("dim", default)
    keepdim = args[2] if name != "aten::topk" and len(args) > 2 else kwargs.get("keepdim", False)
    return dim, name == "aten::topk" or bool(keepdim)


def _largest(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return bool(args[3] if len(args) > 3 else kwargs.get("largest", True))


def _margins(values: torch.Tensor, indices: torch.Tensor, dim: int, keepdim: bool) -> torch.Tensor:
    """Return the relative gap between what was chosen and what was not, row by row.

    What is masked out with an infinity is no candidate: it sets no scale, and is no rival.
    """
    at = indices if keepdim else indices.unsqueeze(dim)
    wide = values.detach().to(torch.float64)
    chosen = wide.gather(dim, at).amin(dim)
    if values.shape[dim] <= at.shape[dim] or values.numel() == 0:
        return torch.full_like(chosen, math.inf)
    rejected = wide.scatter(dim, at, -math.inf).amax(dim)
    scale = torch.where(wide.isfinite(), wide.abs(), 0.0).amax(dim)
    gap = (chosen - rejected) / scale.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(chosen == rejected, 0.0, gap.nan_to_num(math.inf, math.inf))
