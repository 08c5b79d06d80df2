"""No code out of a file: an audit hook that stands in the way of unpickling, exec and new imports.

Requirement: while a reader reads, nothing is unpickled, compiled, executed or imported that the
file brought. Python tells audit hooks of every `pickle.find_class`, `exec`, `compile`, `import` and
`marshal.loads`; a pickle that asks for no class, and torch's `weights_only` unpickler, tell nobody,
so that their doors (`torch.load`, `pickle.load`, ...) are closed by name. What is raised here a
reader may swallow: all that was seen is in the list that the context yields.

What is let through: code of modules that are installed (a reader that imports late), and what the
pool of ranks unpickles from its own private pipe (tpcheck/groups, and subjects.py, which ships
closures to it), and the subject's own code (loading.py): running that is what a user asks for.
"""

from __future__ import annotations

import ast
import contextlib
import marshal
import pickle
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_PLACES = tuple(
    {
        *(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib")),
        *(str(Path(sysconfig.get_path(name)).resolve()) for name in ("purelib", "platlib")),
        *(str(ROOT / name) for name in ("tpcheck", "tests", "benchmarks")),
    }
)
_PIPE = tuple(str(ROOT / "tpcheck" / name) for name in ("groups", "subjects.py", "loading.py"))
_OWN = tuple(str(ROOT / name) for name in ("tpcheck", "tests", "benchmarks"))
_RUNNERS = ("/_pytest/", "/pluggy/", "/hypothesis/", "/typer/")
"""The first three compile what they show of a failed test, typer the annotations of commands."""

_WATCHED = ("pickle.find_class", "exec", "compile", "import", "marshal.loads", "os.system")
_DOORS = ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (marshal, "loads"))

_seen: list[list[str]] = []
"""One list per open context; the hook itself cannot be taken away again."""


class CodeFromFile(AssertionError):
    """A reader was about to run what stands in a file."""


@contextlib.contextmanager
def no_code_from_files() -> Iterator[list[str]]:
    """Raise wherever code would come out of a file; yield what was seen, swallowed or not."""
    _install()
    found: list[str] = []
    _seen.append(found)
    kept = [(module, name, getattr(module, name)) for module, name in _doors()]
    try:
        for module, name, true in kept:
            setattr(module, name, _closed(f"{module.__name__}.{name}", true, found))
        yield found
    finally:
        for module, name, true in kept:
            setattr(module, name, true)
        _seen[:] = [one for one in _seen if one is not found]  # equal lists are not the same


def _doors() -> list[tuple[Any, str]]:
    torch = sys.modules.get("torch")
    return [*_DOORS, *([(torch, "load")] if torch is not None else [])]


def _closed(name: str, true: Any, found: list[str]) -> Any:
    def refuse(frame: types.FrameType) -> None:
        if not _is_anothers(frame) and not _importing(frame):
            found.append(f"{name} was called")
            raise CodeFromFile(found[-1])

    def opened(*args: Any, **kwargs: Any) -> Any:
        refuse(sys._getframe(1))
        return true(*args, **kwargs)

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        refuse(sys._getframe(1))
        true.__init__(self, *args, **kwargs)

    # others make classes of their own from a class
    return type(true.__name__, (true,), {"__init__": made}) if isinstance(true, type) else opened


def _install() -> None:
    if not hasattr(_install, "done"):
        _install.done = True  # type: ignore[attr-defined]
        sys.addaudithook(_hook)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _seen or event not in _WATCHED:
        return
    frame = sys._getframe(1)
    if _is_installed(event, args) or _is_anothers(frame):
        return
    if _importing(frame) and not _is_of_a_file(event, args):
        return
    text = f"{event} {str(args)[:100]}"
    for found in _seen:
        found.append(text)
    raise CodeFromFile(text)


def _is_installed(event: str, args: tuple[Any, ...]) -> bool:
    """Say whether the code is that of an installed module."""
    if event == "exec":
        code = args[0]
        return isinstance(code, types.CodeType) and _lies_here(code.co_filename)
    if event == "compile":
        # ast.parse makes no code: tracebacks ask it where a line's columns are
        parsing = str(args[1]) == "<unknown>" and _caller_is_ast()
        return parsing or _lies_here(str(args[1]))
    if event == "import":
        name, path = args[0], args[1]
        return path is None or _lies_here(str(path)) or name in sys.modules
    return False


def _caller_is_ast() -> bool:
    return sys._getframe(3).f_code.co_filename == ast.__file__


def _is_of_a_file(event: str, args: tuple[Any, ...]) -> bool:
    """Say whether code has a file's path; what a module makes of itself is called <string>."""
    if event == "exec":
        return not getattr(args[0], "co_filename", "<").startswith("<")
    return event == "import" or (event == "compile" and not str(args[1]).startswith("<"))


def _lies_here(path: str) -> bool:
    return path.startswith(_PLACES) or path.startswith("<frozen ")


def _importing(frame: types.FrameType | None) -> bool:
    """Say whether a module that is being imported asks: dataclasses and the like make code."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _is_anothers(frame: types.FrameType | None) -> bool:
    """Say whether the nearest of the code that counts is the pool of ranks, or the test runner."""
    while frame is not None:
        path = frame.f_code.co_filename
        if path == __file__:  # a door that let somebody through
            frame = frame.f_back
            continue
        if path.startswith(_PIPE) or any(part in path for part in _RUNNERS):
            return True
        if path.startswith(_OWN):
            return False
        frame = frame.f_back
    return True
