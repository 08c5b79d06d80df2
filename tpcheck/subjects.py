"""Subjects: what is tested, how it is named, and how it travels to the ranks.

Requirement: any callable `build(tp) -> forward` is a subject. A name (`package.module:attr`,
`path/file.py:attr`, `builtin:NAME`, `hf:DIR`, `ref:DIR`) or an importable function travels by name,
a closure by cloudpickle over the pool's private pipe. What cannot travel is one SubjectError that
names the captured object. Importing this module loads no torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from tpcheck.errors import SubjectError
from tpcheck.loading import (
    FILE_MODULE,
    end_outdated_ranks,
    file_module_name,
    forget_changed,
    load_file,
    load_module,
)
from tpcheck.spec import ModelSpec

_MARK = "__tpcheck_subject__"
DEFAULT_SEQ_LEN = 16
"""Longest input of a model directory, whose config allows thousands: short enough for CPU ranks."""

_LOADERS = {
    "builtin": "tpcheck.adapters.reference:load_builtin",
    "ref": "tpcheck.adapters.reference:load_directory",
    "hf": "tpcheck.adapters.transformers:load_directory",
}
"""Adapters make subjects and stand to the right of this module, so they are found by name."""

Build = TypeVar("Build", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class SubjectOptions:
    """What `@tpcheck.subject` declares; see CONTRACT, the subject.

    `unquantized`, not to be declared: the same model before quantization, where that is known.
    """

    vocab_size: int = 0
    seq_len: int = 0
    inputs: Callable[..., Any] | None = None
    spec: ModelSpec | None = None
    specs: Any = None
    weights: Any = None
    float64: bool = True
    sweep: bool = True
    logits: str = "all"
    unquantized: SubjectRef | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """A resolved subject: a name for reports, the build function, its options."""

    name: str
    build: Callable[..., Any]
    options: SubjectOptions


@dataclass(frozen=True, slots=True)
class SubjectRef:
    """How a subject travels: `kind` is name, file, builtin, hf, ref or pickled.

    `value` is the name or path, or the cloudpickle bytes; `attr` what to take from a module.
    """

    kind: str
    value: str | bytes
    attr: str = ""
    label: str = ""


def subject(
    vocab_size: int = 0,
    seq_len: int = 0,
    *,
    inputs: Callable[..., Any] | None = None,
    spec: ModelSpec | Mapping[str, Any] | None = None,
    specs: Any = None,
    weights: Any = None,
    float64: bool = True,
    sweep: bool = True,
    logits: str = "all",
) -> Callable[[Build], Build]:
    """Declare how tpcheck should feed and weigh `build(tp) -> forward`.

    Args:
        vocab_size: token ids are drawn below it.
        seq_len: the longest input the subject can take; lengths up to it are swept.
        inputs: `fn(generator[, batch, seq_len]) -> tensor | tuple` instead of token ids.
        spec: the model in HF fields; the plan then decides which degrees are legal.
        specs: a Hypothesis strategy of specs; then `build(tp, spec)`.
        weights: a safetensors directory or a dict name -> shape, for `tp.named_weights()`.
        float64: False when the subject cannot run in float64: only drift can then judge it.
        sweep: False pins batch and length.
        logits: "rank0" when only rank 0 returns them.

    Raises:
        SubjectError: an option is out of range, or neither vocab_size, inputs nor a spec is given.
    """
    if callable(vocab_size):
        raise SubjectError("subject: used without brackets, but should be @tpcheck.subject(...)")
    if logits not in ("all", "rank0"):
        raise SubjectError(f'subject: logits={logits!r}, but should be "all" or "rank0"')
    for name, value in (("vocab_size", vocab_size), ("seq_len", seq_len)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise SubjectError(f"subject: {name}={value!r}, but should be a whole number >= 0")
    if isinstance(spec, Mapping):
        spec = ModelSpec.from_fields(spec)
    if spec is not None and not isinstance(spec, ModelSpec):
        raise SubjectError(f"subject: spec={spec!r}, but should be a ModelSpec or a dict of fields")
    if inputs is not None and not callable(inputs):
        raise SubjectError(f"subject: inputs={inputs!r}, but should be fn(generator, ...)")
    if inputs is None and not vocab_size and spec is None and specs is None:
        raise SubjectError(
            "subject: give vocab_size= (more than 0) or inputs=, so that tpcheck can feed it"
        )
    if spec is not None:
        vocab_size = vocab_size or spec.vocab_size
        seq_len = seq_len or min(DEFAULT_SEQ_LEN, spec.max_position_embeddings)
    options = SubjectOptions(
        vocab_size=vocab_size,
        seq_len=seq_len or DEFAULT_SEQ_LEN,
        inputs=inputs,
        spec=spec,
        specs=specs,
        weights=weights,
        float64=float64,
        sweep=sweep,
        logits=logits,
    )

    def mark(build: Build) -> Build:
        if not callable(build):
            raise SubjectError(f"subject: {build!r} is not callable; decorate build(tp)")
        try:
            setattr(build, _MARK, options)
        except AttributeError:
            marked = functools.partial(build)
            setattr(marked, _MARK, options)
            return marked  # type: ignore[return-value]
        return build

    return mark


def make_ref(target: str | Callable[..., Any] | SubjectRef) -> SubjectRef:
    """Return how `target`, a subject's name or a callable, travels to the ranks.

    Raises:
        SubjectError: the name has no known form, or the callable cannot be shipped.
    """
    if isinstance(target, SubjectRef):
        return target
    if isinstance(target, str):
        ref = _parse_name(target)
        value = str(ref.value)
        if ref.kind in ("file", "name"):
            forget_changed(file_module_name(value) if ref.kind == "file" else value)
    elif callable(target):
        ref = _ref_of_callable(target)
    else:
        raise SubjectError(f"subject={target!r}, but should be a name or a callable build(tp)")
    end_outdated_ranks()
    return ref


def resolve(ref: SubjectRef) -> Subject:
    """Load the subject a reference stands for, on whichever process this is.

    Raises:
        SubjectError: nothing is there, or it is no subject.
        PlanError: a model directory's config.json is malformed.
    """
    loader = _LOADERS.get(ref.kind)
    if loader is not None:
        module, _, function = loader.partition(":")
        loaded: Subject = getattr(importlib.import_module(module), function)(str(ref.value))
        return loaded
    build = load_callable(ref)
    options = getattr(build, _MARK, None)
    if not isinstance(options, SubjectOptions):
        raise SubjectError(
            f"{ref.label}: not a subject, but should be decorated with"
            " @tpcheck.subject(vocab_size=..., seq_len=...) or @tpcheck.subject(inputs=...)"
        )
    return Subject(ref.label, build, options)


def assert_takes_the_group(subject: Subject) -> None:
    """Refuse a build that cannot be called as every rank will call it.

    Raises:
        SubjectError: it takes something else than the group, and a spec if specs= is declared.
    """
    takes_spec = subject.options.specs is not None
    try:
        signature = inspect.signature(subject.build)
    except (TypeError, ValueError):
        return  # it is written in C and does not say
    called_with = ("one argument, the TPGroup", "two arguments, the TPGroup and a spec of specs=")
    try:
        signature.bind(*("tp", "spec")[: 1 + takes_spec])
    except TypeError:
        names = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        taken = inspect.Signature(names)
        hint = "; a spec comes second where specs= is declared" if "spec" in str(taken) else ""
        raise SubjectError(
            f"{subject.name}: takes {taken}, but should take {called_with[takes_spec]}"
            f"{'' if takes_spec else hint}"
        ) from None


def list_builtins() -> list[tuple[str, str]]:
    """Return (name, description) of every builtin subject."""
    module, _, _ = _LOADERS["builtin"].partition(":")
    builtins: list[tuple[str, str]] = importlib.import_module(module).list_builtins()
    return builtins


def _parse_name(name: str) -> SubjectRef:
    kind, colon, rest = name.partition(":")
    if colon and kind in ("builtin", "hf", "ref"):
        if not rest:
            raise SubjectError(f"subject={name!r}, but should say what after {kind}:")
        value = rest if kind == "builtin" else os.path.abspath(os.path.expanduser(rest))
        return SubjectRef(kind, value, label=name)
    location, colon, attr = name.rpartition(":")
    if not colon or not location or not attr:
        raise SubjectError(
            f"subject={name!r}, but should be package.module:attr, path/file.py:attr,"
            " builtin:NAME, hf:DIR or ref:DIR"
        )
    if location.endswith(".py") or os.sep in location:
        path = Path(location).expanduser().absolute()
        if not path.is_file():
            raise SubjectError(f"subject={name!r}: there is no file {location}")
        return SubjectRef("file", str(path), attr, name)
    return SubjectRef("name", location, attr, name)


def load_callable(ref: SubjectRef) -> Callable[..., Any]:
    """Load what a reference by name, file or pickle stands for, on whichever process this is.

    Raises:
        SubjectError: nothing is there, or it is not callable.
    """
    if ref.kind == "pickled":
        build: Callable[..., Any] = pickle.loads(ref.value)  # type: ignore[arg-type]
        return build
    if ref.kind == "file":
        module = load_file(str(ref.value))
    else:
        module = load_module(str(ref.value), ref.label)
    found: Any = module
    for part in ref.attr.split("."):
        if not hasattr(found, part):
            raise SubjectError(f"{ref.label}: {_has_not(found, part)}")
        found = getattr(found, part)
    if not callable(found):
        raise SubjectError(f"{ref.label}: {ref.attr} is {type(found).__name__}, not callable")
    result: Callable[..., Any] = found
    return result


def _has_not(found: Any, part: str) -> str:
    """Say that an attribute is missing, and which subjects there are instead."""
    where = Path(found.__file__).name if getattr(found, "__file__", None) else repr(found)
    there = [name for name, value in vars(found).items() if hasattr(value, _MARK)]
    subjects = f"; its subjects: {', '.join(there)}" if there else ""
    return f"{where} has no attribute {part!r}{subjects}"


def _ref_of_callable(build: Callable[..., Any]) -> SubjectRef:
    module, qualname = _place(build)
    label = f"{module}:{qualname}"
    if isinstance(build, functools.partial):
        label = "{}:partial({})".format(*_place(build.func))
    if _importable(build, module, qualname):
        if module.startswith(FILE_MODULE):
            return SubjectRef("file", str(sys.modules[module].__file__), qualname, label)
        return SubjectRef("name", module, qualname, label)
    return SubjectRef("pickled", _pickle(build, label), label=label)


def _place(build: Callable[..., Any]) -> tuple[str, str]:
    module = getattr(build, "__module__", None) or ""
    return module, getattr(build, "__qualname__", "") or type(build).__qualname__


def _importable(build: Callable[..., Any], module: str, qualname: str) -> bool:
    if module in ("", "__main__") or "<" in qualname:
        return False
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if found is not build:
        return False
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _pickle(build: Callable[..., Any], label: str) -> bytes:
    import cloudpickle

    with contextlib.ExitStack() as stack:
        module = sys.modules.get(getattr(build, "__module__", "") or "")
        if module is not None and not _findable(module):
            cloudpickle.register_pickle_by_value(module)
            stack.callback(cloudpickle.unregister_pickle_by_value, module)
        try:
            data: bytes = cloudpickle.dumps(build)
        except Exception as error:
            raise SubjectError(
                f"{label}: cannot be sent to the ranks, because {_unshippable(build)}"
                f" ({type(error).__name__}: {error}); make it inside build(tp) instead"
            ) from error
    return data


def _findable(module: ModuleType) -> bool:
    if module.__name__ == "__main__":
        return True  # cloudpickle already takes __main__ by value
    try:
        return importlib.util.find_spec(module.__name__) is not None
    except (ImportError, ValueError):
        return False


def _unshippable(build: Callable[..., Any]) -> str:
    """Name the captured object that does not pickle."""
    import cloudpickle

    bound: dict[str, Any] = {}
    while isinstance(build, functools.partial):
        bound |= {f"argument {i}": value for i, value in enumerate(build.args)} | build.keywords
        build = build.func
    try:
        closure = inspect.getclosurevars(build)
    except TypeError:
        return "it does not pickle"
    everything = (
        ("binds", bound),
        ("captures", closure.nonlocals),
        ("uses the global", closure.globals),
    )
    for kind, captured in everything:
        for name, value in captured.items():
            try:
                cloudpickle.dumps(value)
            except Exception:
                return f"it {kind} {name!r}, a {type(value).__module__}.{type(value).__qualname__}"
    return "it does not pickle"


def with_spec(subject_: Subject, spec: ModelSpec) -> Subject:
    """Return the subject that a drawn spec makes of one that takes specs."""
    options = replace(
        subject_.options,
        spec=spec,
        vocab_size=subject_.options.vocab_size or spec.vocab_size,
        seq_len=min(subject_.options.seq_len or DEFAULT_SEQ_LEN, spec.max_position_embeddings),
    )
    return replace(subject_, options=options)
