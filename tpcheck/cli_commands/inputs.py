"""What a command reads: nothing that it writes may take its place.

Requirement: a report is never written over the subject, the weights or the evidence that it is
about. In a directory only what makes the model or the capture is kept from it, because a report may
well lie beside them, and the next run replaces it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tpcheck.errors import TPCheckError
from tpcheck.model_digest import CONFIG_FILES

Inputs = Mapping[str, str | Path | None]
"""Files and directories under the names that the user gave them by."""

_OF_A_DIRECTORY = (".py", ".safetensors", ".safetensors.index.json")


def subject_inputs(subject: str) -> Inputs:
    """Return the directory or the Python file that a subject's name points to."""
    kind, _, rest = subject.partition(":")
    if kind in ("hf", "ref"):
        return {subject: Path(rest).expanduser()}
    location = subject.rpartition(":")[0]
    file = location if location.endswith(".py") else f"{location.replace('.', '/')}.py"
    return {subject: Path(file).expanduser()}


def assert_no_input(name: str, path: Path, inputs: Inputs) -> None:
    """Refuse to write where something lies that is read.

    Raises:
        TPCheckError: names both.
    """
    target = os.path.realpath(path)
    for other, read in inputs.items():
        place = os.path.realpath(read) if read is not None and str(read) != "-" else ""
        if target == place and os.path.exists(place):
            raise TPCheckError(f"{name}={path}, but should differ from {other}")
        if target.startswith(place + os.sep) and os.path.isdir(place) and _counts(target):
            raise TPCheckError(f"{name}={path}, but should be no file of {other}")


def _counts(path: str) -> bool:
    name = os.path.basename(path)
    return os.path.exists(path) and (name in CONFIG_FILES or name.endswith(_OF_A_DIRECTORY))
