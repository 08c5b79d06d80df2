"""A subject's code, by module name or by file: loaded as it stands, and never mistaken for older.

Requirement: a load that ends early is a SubjectError that says where, `sys.exit` included: a script
without a guard leaves with its own code, and 0 would read as a PASS. A notebook edits a file and
runs it again in one process, so a name given as text is loaded again when its file changed; and
warm ranks that imported what this process has since reloaded are ended, because their verdict
would be one on the old code.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from tpcheck.errors import SubjectError, TPCheckError

FILE_MODULE = "_tpcheck_subject_"
"""What the module of a subject file is called by, so that no name of the user's is taken."""

_Stamp = tuple[int, int]

_stamps: dict[str, _Stamp] = {}
"""By module: its source file's mtime and size when it was loaded for a subject's name."""

_specs: dict[str, Any] = {}
"""By module: the spec it was last seen with. Loading a module again gives it another."""

_installed: set[str] = set()
"""Modules that no user edits: not looked at again."""

_INSTALLED = tuple(f"{prefix}{os.sep}" for prefix in {sys.prefix, sys.base_prefix})


class _AsItStands(SourceFileLoader):
    """Compiles the file itself: cached bytecode is trusted to the second, an edit may be faster."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def file_module_name(path: str) -> str:
    """Return the name under which a subject file is loaded."""
    digest = hashlib.blake2b(path.encode(), digest_size=6).hexdigest()
    return f"{FILE_MODULE}{Path(path).stem}_{digest}"


def load_module(name: str, label: str) -> ModuleType:
    """Import a module that a subject names.

    Raises:
        SubjectError: it is not there, or it fails to load.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    known = name in sys.modules
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise SubjectError(
                f"{label}: there is no module {error.name!r} on the path"
                " (run where it can be imported, or give path/file.py:attr)"
            ) from error
        raise SubjectError(f"{label}: importing {name} failed: {error}{_where(error)}") from error
    except (Exception, SystemExit) as error:
        raise SubjectError(f"{label}: importing {name} failed: {_told(error)}") from error
    if not known or name not in _stamps:
        _stamp(name, getattr(module, "__file__", None))
        _watch_modules()
    return module


def load_file(path: str) -> ModuleType:
    """Load a subject file, with its folder on the path; once, until `forget_changed`.

    Raises:
        SubjectError: it fails to load.
    """
    name = file_module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=_AsItStands(name, path))
    if spec is None or spec.loader is None:
        raise SubjectError(f"subject file {path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(Path(path).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        _stamp(name, path)
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if isinstance(error, TPCheckError) or not isinstance(error, (Exception, SystemExit)):
            raise
        raise SubjectError(f"subject file {path} failed to load: {_told(error)}") from error
    _watch_modules()
    return module


def forget_changed(name: str) -> None:
    """Load a module again if its file changed since a subject's name last loaded it.

    Args:
        name: of the module, for a subject file that of `file_module_name`.
    """
    module, before = sys.modules.get(name), _stamps.get(name)
    if module is None or before is None or before == _stamp_of(module.__file__):
        return
    if name.startswith(FILE_MODULE):
        del sys.modules[name]  # the next use loads it
        return
    try:
        importlib.reload(module)
    except (Exception, SystemExit) as error:
        raise SubjectError(f"importing {name} again failed: {_told(error)}") from error
    _stamp(name, module.__file__)


def end_outdated_ranks() -> None:
    """End warm ranks if this process loaded a module again that they may have imported before."""
    outdated = [
        name for name, spec in _specs.items() if _spec_of(sys.modules.get(name)) is not spec
    ]
    for name in outdated:
        del _specs[name]
    _watch_modules()
    pools = sys.modules.get("tpcheck.groups.pool")
    if outdated and pools is not None:
        pools.close_pools()


def _watch_modules() -> None:
    """Remember what is loaded of the code that a user may edit."""
    for name in sys.modules.keys() - _specs.keys() - _installed:
        module = sys.modules[name]
        file = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(file, str) and not file.startswith(_INSTALLED):
            _specs[name] = _spec_of(module)
        else:
            _installed.add(name)


def _spec_of(module: ModuleType | None) -> Any:
    return getattr(module, "__dict__", {}).get("__spec__")


def _stamp(name: str, file: str | None) -> None:
    stamp = _stamp_of(file)
    if stamp is not None:
        _stamps[name] = stamp


def _stamp_of(file: str | None) -> _Stamp | None:
    with contextlib.suppress(OSError, TypeError):
        status = os.stat(file)  # type: ignore[arg-type]
        return status.st_mtime_ns, status.st_size
    return None


def _told(error: BaseException) -> str:
    """Return what stopped a load, and in which line of the user's."""
    if isinstance(error, SystemExit):
        what = f"it ends with sys.exit({error.code!r})"
        return f"{what}{_where(error)}; guard a script's end with if __name__ == '__main__':"
    return f"{type(error).__name__}: {error}{_where(error)}"


def _where(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return ""  # says so itself
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<", *_INSTALLED)) and frame.filename != __file__
    ]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
