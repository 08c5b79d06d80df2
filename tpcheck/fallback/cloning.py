"""A second module tree over the same weights, some of its modules replaced.

Requirement: generation goes on in the model that serves it, on other threads, so a remedy may not
touch it: no hook, no patched forward, no parameter moved. It runs a tree of its own that shares
every tensor that it does not replace, and so costs no memory to have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Replace = Callable[[str, nn.Module], nn.Module | None]
"""(fqn, module) -> what stands in its place; None for a copy of its own."""

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_TABLES = ("_parameters", "_buffers", "_modules")


def shallow(module: nn.Module) -> Any:
    """Return a copy of one module with tables of its own; what they hold is shared."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__ = dict(module.__dict__)
    for name in (*_TABLES, *_HOOKS):
        if name in copy.__dict__:
            copy.__dict__[name] = copy.__dict__[name].copy()
    return copy


def without_wrapping(module: nn.Module) -> Any:
    """Return a shallow copy with neither hooks nor a forward of its own: the class's alone.

    That is where tensor parallelism is installed: torch's parallelize_module adds hooks,
    transformers puts a forward on the module.
    """
    copy = shallow(module)
    for name in _HOOKS:
        copy.__dict__[name].clear()
    copy.__dict__.pop("forward", None)
    return copy


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Return a shallow copy, hooks kept, that computes `forward` instead."""
    copy = shallow(module)
    copy.__dict__["forward"] = forward
    result: nn.Module = copy
    return result


def cloned(
    module: nn.Module, replace: Replace, copy: Callable[[nn.Module], Any] = shallow
) -> nn.Module:
    """Return a tree like `module` that shares its tensors; each module is copied by `copy`.

    A module that occurs twice does so in the copy too.
    """
    made: dict[int, nn.Module] = {}

    def visit(fqn: str, one: nn.Module) -> nn.Module:
        if id(one) not in made:
            other = replace(fqn, one)
            if other is None:
                other = copy(one)
                for name, child in one._modules.items():
                    if child is not None:
                        other._modules[name] = visit(f"{fqn}.{name}" if fqn else name, child)
            made[id(one)] = other
        return made[id(one)]

    return visit("", module)
