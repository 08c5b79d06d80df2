"""Where a rank was when the subject raised, or called: notes on its exception, lines of its code.

Requirement: the exception of a user's code says nothing of what tpcheck was doing: which of several
inputs it was, at which degree (TP=1 is run for every one of them), and that build(tp) is called
again in a process that keeps what the last call left.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tpcheck.errors import TPCheckError
from tpcheck.groups.base import RecordedGroup, dtype_name

_NOT_A_SUBJECTS = tuple(
    f"{folder}{os.sep}" for folder in (Path(__file__).parents[1], Path(torch.__file__).parent)
)

_built: set[str] = set()
"""Subjects that this process has built."""


@contextlib.contextmanager
def building(subject: str) -> Iterator[None]:
    """Note on what is raised while open that build(tp) ran here before, if it did."""
    try:
        yield
    except Exception as error:
        if subject in _built and not isinstance(error, TPCheckError):
            error.add_note(
                "build(tp) returned in this process before: what it changed outside itself"
                " (a library's groups, a config, a global) is as that call left it"
            )
        raise
    _built.add(subject)


@contextlib.contextmanager
def running(group: RecordedGroup, name: str, arguments: Sequence[torch.Tensor]) -> Iterator[None]:
    """Note on what is raised while open which input it is, its shapes, and what runs it."""
    try:
        yield
    except Exception as error:
        given = ", ".join(f"{dtype_name(x.dtype)} {list(x.shape)}" for x in arguments)
        error.add_note(f"input {name}: {given} [tp {group.size}, {dtype_name(group.dtype)}]")
        raise


def call_site() -> str:
    """Return the line of the subject that is being executed: `model.py:42`."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_A_SUBJECTS):
        frame = frame.f_back
    return "?" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
