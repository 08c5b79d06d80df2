"""Recording: writes down the program that one rank runs while it runs.

Requirement: calls are seen at the level users write (F.linear, softmax, view), and where a sharded
weight comes from is part of the program. Values that depend on no weight and no input (masks, rope
tables) are kept as values; control flow is what it was in this run. Simulated ranks only: a program
holds the tensors it saw.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Mapping, MutableSequence
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name

from tpcheck.groups.base import RecordedGroup
from tpcheck.observation.modules import TracePoint
from tpcheck.observation.program import (
    CONSTANT,
    COPIES,
    INPUT,
    UNKNOWN,
    WEIGHT,
    Constant,
    ModuleMark,
    Program,
    Ref,
    Sequence_,
    Slice,
    Step,
)
from tpcheck.trace import Collective

MAX_CONSTANT = 16
"""Elements up to which a value is kept as a value: more cannot be read."""

MAX_BYTES = 1 << 27
"""What a recording holds on to: every tensor it saw, so that no address is used twice."""

_NOISE = set(
    "shape dtype device ndim requires_grad is_cuda layout grad_fn is_leaf itemsize".split()
)
_RANDOM = set(
    "rand randn randint rand_like randn_like randint_like randperm bernoulli multinomial normal"
    " normal_ uniform_ random_ bernoulli_".split()
)


class Recording(TorchFunctionMode):
    """While active, writes every torch call, weight and collective of one rank to its program.

    Args:
        inputs: input id -> arguments of forward, known by name in the program.
        programs: the program is appended here at once, so that what fails leaves it behind.
    """

    def __init__(
        self,
        group: RecordedGroup,
        inputs: Mapping[str, tuple[torch.Tensor, ...]],
        programs: MutableSequence[Program],
    ) -> None:
        super().__init__()
        self.program = Program(group.rank, group.size)
        programs.append(self.program)
        self._group = group
        self._quiet = False
        self._failing: Step | None = None
        self._open: list[tuple[str, torch.Tensor | None]] = []
        self._refs: dict[int, Ref] = {}
        self._places: dict[tuple[Any, ...], Ref] = {}
        self._constants: set[Ref] = set()
        self._tainted: set[int] = set()
        self._alive: list[Any] = []
        self._bytes = 0
        for name, arguments in inputs.items():
            for position, tensor in enumerate(arguments):
                self._append(Step(INPUT, (name, position), holds=_storages([tensor])), tensor)

    def __enter__(self) -> Recording:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._group.interceptor = self._collective
        for name in ("weight", "named_weights"):
            setattr(self._group, name, getattr(self, f"_{name}")(getattr(self._group, name)))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, Exception):
            self.program.error = f"{type(error).__name__}: {error}"
            if self._failing is not None and self._failing.raises == type(error).__name__:
                self.program.steps.append(self._failing)
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def mark(self, points: Mapping[str, TracePoint]) -> None:
        """Note where each traced module begins and ends."""
        for fqn, point in points.items():
            module = point.module
            module.register_forward_pre_hook(self._enter(fqn), prepend=True, with_kwargs=True)
            module.register_forward_hook(self._leave(fqn, point))

    def finish(self, outputs: Mapping[str, torch.Tensor]) -> None:
        """Note what the subject returned."""
        with self._silence():
            for name, tensor in outputs.items():
                self.program.outputs[name] = self._capture(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind, name = _described(func)
        if self._quiet or (kind == "get" and name in _NOISE):
            return func(*args, **kwargs)
        if kind == "set":
            result = func(*args, **kwargs)
            if name == "data":  # the tensor now is another one; views of what it was stay
                self._alias(args[0], args[1])
            return result
        tensors = list(_tensors((args, kwargs)))
        versions = [_version(tensor) for tensor in tensors]
        before = self._captured(args, kwargs)
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            raised = type(error).__name__
            self._failing = Step(_spelled(func, name), *before, self._fqn, raises=raised)
            raise
        written = [t for t, v in zip(tensors, versions, strict=True) if _version(t) != v]
        if written or next(_tensors(result), None) is not None:
            self._note(func, name, before, (args, kwargs), result, written)
        return result

    def _note(
        self, func: Any, name: str, before: Any, given: Any, result: Any, written: list[Any]
    ) -> None:
        """Append the step that a call was."""
        arguments, keywords = before
        results = list(_tensors(result))
        constant = not any(isinstance(part, Ref) for part in _parts((arguments, keywords)))
        if name in _RANDOM and constant:
            return  # drawn or unset: known by its value alone
        if written:
            self._tainted |= set() if constant else set(_storages(written))
            arguments, keywords = self._with_targets(arguments, keywords, given, written)
        function = _spelled(func, name)
        if name in _RANDOM or "dropout" in name:
            function = UNKNOWN + name
        first = next(_tensors(given), None)
        step = Step(
            function,
            arguments,
            keywords,
            self._fqn,
            same=not written and isinstance(result, torch.Tensor) and _alike(result, first, name),
            writes=_storages(written),
            holds=_storages(results),
            many=not isinstance(result, torch.Tensor),
            result=result if isinstance(result, torch.Tensor) else None,
        )
        if written and all(any(r is w for w in written) for r in results):
            self.program.steps.append(step)
            return
        refs = self._append(step, result)
        if constant:
            self._constants |= set(refs)

    def _with_targets(
        self, arguments: tuple[Any, ...], keywords: Any, given: Any, written: list[Any]
    ) -> tuple[tuple[Any, ...], Any]:
        """Put back what is written to as a reference: a value cannot be written to."""
        args, kwargs = given

        def put(old: Any, value: Any) -> Any:
            return self._ref(value) if any(value is w for w in written) else old

        arguments = tuple(put(o, v) for o, v in zip(arguments, args, strict=True))
        keywords = tuple((k, put(old, kwargs[k])) for k, old in keywords)
        return arguments, keywords

    def _collective(
        self, group: RecordedGroup, call: Collective, x: torch.Tensor, run: Any
    ) -> torch.Tensor:
        numbers = [int(p.partition("=")[2]) for p in call.detail.split(", ") if "=" in p]
        how: list[Any] = [*numbers] or [call.detail]
        with self._silence():
            index = len(self.program.steps)
            step = Step(call.op, (self._capture(x), *how), fqn=self._fqn)
            self.program.steps.append(step)
            result: torch.Tensor = run(x)
            self.program.steps[index] = replace(step, result=result)
            self._bind(index, result)
        return result

    def _weight(self, real: Any) -> Any:
        def weight(name: str, *shape: Any, std: Any = None, dtype: Any = None) -> torch.Tensor:
            with self._silence():
                tensor: torch.Tensor = real(name, *shape, std=std, dtype=dtype)
                self._note_weight(name, tensor, std)
            return tensor

        return weight

    def _named_weights(self, real: Any) -> Any:
        def named_weights() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in real():
                with self._silence():
                    self._note_weight(name, tensor, None)
                yield name, tensor

        return named_weights

    def _note_weight(self, name: str, tensor: torch.Tensor, std: float | None) -> None:
        keywords = () if std is None else (("std", std),)
        self.program.weights[name, *tensor.shape] = tensor.to(self._group.dtype, copy=True)
        step = Step(WEIGHT, (name, *tensor.shape), keywords, holds=_storages([tensor]))
        (ref,) = self._append(step, tensor)
        if tensor.dtype != self._group.dtype:
            self._append(Step(".to", (ref, tensor.dtype), holds=_storages([tensor])), tensor)

    @property
    def _fqn(self) -> str:
        return self._open[-1][0] if self._open else ""

    @contextlib.contextmanager
    def _silence(self) -> Iterator[None]:
        """While open, nothing is recorded: what tpcheck does is no part of the program."""
        quiet, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = quiet

    def _enter(self, fqn: str) -> Any:
        def enter(_module: Any, args: Any, kwargs: Any) -> None:
            self._open.append((fqn, next(_tensors((args, kwargs)), None)))

        return enter

    def _leave(self, fqn: str, point: TracePoint) -> Any:
        def leave(_module: Any, _args: Any, output: Any) -> None:
            _, given = self._open.pop()
            result = next(_tensors(output), None)
            if fqn in self.program.modules or given is None or result is None:
                return
            with self._silence():
                self.program.modules[fqn] = ModuleMark(
                    self._capture(given),
                    self._capture(result),
                    tuple(given.shape),
                    tuple(result.shape),
                    point.in_placement,
                    point.out_placement,
                    given.dtype.is_floating_point,
                )

        return leave

    def _append(self, step: Step, result: Any) -> list[Ref]:
        self.program.steps.append(step)
        return self._bind(len(self.program.steps) - 1, result)

    def _bind(self, index: int, result: Any) -> list[Ref]:
        made = list(_tensors(result))
        single = isinstance(result, torch.Tensor)
        refs = [Ref(index, -1 if single else position) for position in range(len(made))]
        for ref, tensor in zip(refs, made, strict=True):
            self._know(tensor, ref)
        return refs

    def _know(self, tensor: torch.Tensor, ref: Ref) -> None:
        if self._bytes > MAX_BYTES:
            self.program.refusal = f"the program holds more than {MAX_BYTES >> 20} MiB of tensors"
            return
        self._alive.append(tensor)
        self._bytes += tensor.nbytes
        self._refs[id(tensor)] = ref
        self._places[_place(tensor)] = ref

    def _alias(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        self._alive.append(tensor)
        self._refs[id(tensor)] = self._ref(value)

    def _ref(self, tensor: torch.Tensor) -> Ref:
        """Return what a tensor is; a parameter is what it was made of, by its address."""
        ref = self._refs.get(id(tensor)) or self._places.get(_place(tensor))
        return self._unknown(tensor) if ref is None else ref

    def _unknown(self, tensor: torch.Tensor) -> Ref:
        """Note a tensor that no recorded call made: by value, or as an input if it is large."""
        value = _constant(tensor)
        step = Step(CONSTANT, (value,), holds=_storages([tensor]))
        if value is None:
            with self._silence():
                flat = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                name = hashlib.blake2b(flat, digest_size=8).hexdigest()
                self.program.unknown[name] = tensor.detach().clone()
            step = Step(INPUT, (name, 0), holds=_storages([tensor]))
        (ref,) = self._append(step, tensor)
        if value is not None:
            self._constants.add(ref)
        return ref

    def _capture(self, value: torch.Tensor) -> Ref | Constant:
        ref = self._ref(value)
        clean = ref in self._constants and not self._tainted & set(_storages([value]))
        constant = _constant(value) if clean else None
        return ref if constant is None else constant

    def _captured(self, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], Any]:
        keywords = tuple((key, self._tree(value)) for key, value in kwargs.items())
        return tuple(self._tree(value) for value in args), keywords

    def _tree(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._capture(value)
        if isinstance(value, list):
            return Sequence_(tuple(map(self._tree, value)))
        if isinstance(value, tuple):
            return tuple(map(self._tree, value))
        if isinstance(value, slice):
            return Slice(*map(self._tree, (value.start, value.stop, value.step)))
        return value


def _described(func: Any) -> tuple[str, str]:
    """Return "get", "set" or "call", and the name."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__") and hasattr(func, "__self__"):
        return name.strip("_"), func.__self__.__name__
    return "call", name


@functools.lru_cache(maxsize=2048)
def _spelled(func: Any, name: str) -> str:
    """Return how a function is written: `F.linear`, `torch.cat`, `.view` or `=T` for a property."""
    if getattr(func, "__name__", "") == "__get__":
        return f"={name}"
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"torch.ops.{func}"
    path = resolve_name(func) or ""
    for prefix, short in (
        ("torch.Tensor.", "."),
        ("torch.nn.functional.", "F."),
        ("torch.", "torch."),
    ):
        if path.startswith(prefix):
            return short + path.removeprefix(prefix)
    return UNKNOWN + name


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _parts(tree: Any) -> Iterator[Any]:
    if isinstance(tree, tuple):
        for item in tree:
            yield from _parts(item)
    elif isinstance(tree, Sequence_):
        yield from _parts(tree.items)
    elif isinstance(tree, Slice):
        yield from _parts((tree.start, tree.stop, tree.step))
    else:
        yield tree


def _storages(tensors: Any) -> tuple[int, ...]:
    return tuple({t.untyped_storage()._cdata for t in tensors})


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _alike(result: torch.Tensor, first: torch.Tensor | None, name: str) -> bool:
    """Whether a call only handed on what it was given, as a copy or as a view of all of it."""
    if first is None or result.dtype != first.dtype or result.shape != first.shape:
        return False
    return name in COPIES or result is first or _place(result) == _place(first)


def _constant(tensor: torch.Tensor) -> Constant | None:
    if tensor.numel() > MAX_CONSTANT:
        return None
    values = tuple(tensor.detach().reshape(-1).tolist())
    return Constant(tuple(tensor.shape), str(tensor.dtype), values)
