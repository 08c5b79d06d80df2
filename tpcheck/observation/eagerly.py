"""torch.compile'd code runs eagerly here, and a subject is known to have asked for its compiler.

Requirement: every op of a subject is seen, and a case takes no longer for every rank's compiler.
torch compiles nothing that a dispatch mode watches; but it does compile the mode itself, a minute
of it and of warnings. So the compiler is off, and a report says that compiled code ran without.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import ExitStack
from typing import Any

import torch

_inside: list[Eagerly] = []
"""Simulated ranks take turns: torch's compiler comes back when the last one has left."""
_on_leaving = ExitStack()


class Eagerly:
    """A context without torch's compiler. `compiled`: whether something asked for it there."""

    def __init__(self) -> None:
        self.compiled = False

    def __enter__(self) -> None:
        if not _inside:
            _turn_off()
        _inside.append(self)

    def __exit__(self, *_: object) -> None:
        _inside.remove(self)
        if not _inside:
            _on_leaving.close()


def _turn_off() -> None:
    if "torch._dynamo.eval_frame" in sys.modules:
        _without_compiler()
        return
    compiling = torch.compile  # to load torch's compiler takes a second: not before it is asked for

    def compile_(*args: Any, **options: Any) -> Any:
        if torch.compile is compile_:  # not so for a name of it that outlives this context
            torch.compile = compiling
            _without_compiler()
        return compiling(*args, **options)

    torch.compile = compile_
    _on_leaving.callback(setattr, torch, "compile", compiling)


def _without_compiler() -> None:
    frames: Any = importlib.import_module("torch._dynamo.eval_frame")
    _on_leaving.enter_context(torch.compiler.set_stance("force_eager"))
    ask = frames._callback_from_stance  # asked by whatever is compiled, at each call

    def noted(callback: Any) -> Any:
        for one in _inside:
            one.compiled |= callback not in (None, False)
        return ask(callback)

    frames._callback_from_stance = noted
    _on_leaving.callback(setattr, frames, "_callback_from_stance", ask)
