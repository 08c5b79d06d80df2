"""What this machine would run a model on, read without torch or CUDA. Torch-free.

Requirement: a server's start is held against what was proven, before torch is imported and in well
under a second. So GPUs, driver and NCCL are read from NVML where its bindings are installed, from
/proc and from package metadata. What cannot be read is None, never a guess: whoever compares has to
refuse then.

[NCCL Settings] NCCL takes its variables from the environment, then from NCCL_CONF_FILE or
.nccl.conf in the home that the password database names, HOME or not, then from /etc/nccl.conf; of
a variable that stands twice the first counts (misc/param.cc). A file that nobody sees changes an
algorithm as well as a variable does, so all three are read, as NCCL reads them. Where a file lies
changes nothing: NCCL_CONF_FILE itself is a setting only if what it names was not read.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc/driver/nvidia")
ETC = Path("/etc/nccl.conf")
DEVICES = Path("/dev")

SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")
HIDDEN = "(hidden)"

_NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11", "nvidia-nccl")
_NCCL_FILE = re.compile(r"libnccl\.so\.(\d+\.\d+\.\d+)$")
_LIBRARY_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/local/lib",
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: its model as the driver spells it, its UUID."""

    model: str
    uuid: str


def visible_gpus(environ: Mapping[str, str] = os.environ) -> tuple[str, ...] | None:
    """Return the models of the GPUs that CUDA would show to this process; None if unknown."""
    found = _nvml_gpus()
    if found is None:
        found = _proc_gpus()
    if found is None:
        return None
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return tuple(gpu.model for gpu in found)
    return _chosen(found, wanted, environ.get("CUDA_DEVICE_ORDER", ""))


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver; None where there is none or it cannot be read."""
    text = _text(PROC / "version")
    found = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)*)\s", text or "")
    return found[1] if found else None


def nccl_version(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the version of the NCCL library that would be loaded; None if unknown."""
    replaced = environ.get("VLLM_NCCL_SO_PATH")
    if replaced:
        return _version_of_file(Path(replaced))
    packages = {package_version(name) for name in _NCCL_PACKAGES} - {None}
    if packages:
        # two of them: which one is loaded depends on how torch was built
        return packages.pop() if len(packages) == 1 else None
    files = {_version_of_file(Path(folder) / "libnccl.so.2") for folder in _LIBRARY_FOLDERS}
    files -= {None}
    return files.pop() if len(files) == 1 else None


def nccl_settings(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return every NCCL_ setting in force, from [NCCL Settings], without a secret's value."""
    named, home = environ.get("NCCL_CONF_FILE"), user_home()
    user = Path(named) if named else home and home / ".nccl.conf"
    text = _text(user) if user else None
    found = _conf(_text(ETC)) | _conf(text)
    found |= {name: value for name, value in environ.items() if name.startswith("NCCL_")}
    if named and text is not None:
        del found["NCCL_CONF_FILE"]
    return {name: without_secret(name, found[name]) for name in sorted(found)}


def user_home() -> Path | None:
    """Return where NCCL looks for .nccl.conf, whatever HOME says; None for a user without entry."""
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return None


def without_secret(name: str, value: str) -> str:
    """Return a variable's value, or that it is hidden where the name sounds like a secret's."""
    sound = name.upper().replace("NCCL_IB_PKEY", "")  # the number of a partition, no key to it
    return HIDDEN if any(word in sound for word in SECRET_WORDS) else value


def torch_version() -> str | None:
    """Return torch.__version__ of the torch that would be imported, without importing it.

    That is not its package's version: of 2.9.1+cu128 the wheel on PyPI is called 2.9.1.
    """
    try:
        found = importlib.util.find_spec("torch")
    except (ImportError, ValueError):  # a finder of somebody's, or a stand-in without a spec
        return None
    if found is None or found.origin is None:
        return None
    text = _text(Path(found.origin).with_name("version.py"))
    said = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text or "", re.MULTILINE)
    return said[1] if said else None


def version_here(name: str) -> str | None:
    """Return what a report calls the version of torch or another package; None if unknown."""
    return torch_version() if name == "torch" else package_version(name)


def package_version(name: str) -> str | None:
    """Return the version of an installed package, without importing it; None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvml_gpus() -> list[Gpu] | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            handles = [
                pynvml.nvmlDeviceGetHandleByIndex(index)
                for index in range(pynvml.nvmlDeviceGetCount())
            ]
            return [
                Gpu(_as_text(pynvml.nvmlDeviceGetName(h)), _as_text(pynvml.nvmlDeviceGetUUID(h)))
                for h in handles
            ]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _as_text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _proc_gpus() -> list[Gpu] | None:
    """Return the GPUs whose device this process can see, in the order of their bus."""
    if not PROC.is_dir():
        return []  # without the driver there is no GPU to CUDA
    try:
        folders = sorted((PROC / "gpus").iterdir())
    except OSError:
        return None
    found = []
    for folder in folders:
        fields = _fields(_text(folder / "information") or "")
        model, minor = fields.get("Model"), fields.get("Device Minor")
        if not model or minor is None:
            return None
        # a container sees /proc of the host, but is given some devices only
        if (DEVICES / f"nvidia{minor}").exists():
            found.append(Gpu(model, fields.get("GPU UUID", "")))
    return found


def _chosen(found: list[Gpu], wanted: str, order: str) -> tuple[str, ...] | None:
    """Return what CUDA_VISIBLE_DEVICES leaves; CUDA stops at the first entry that is nothing."""
    chosen: list[Gpu] = []
    alike = len({gpu.model for gpu in found}) <= 1
    for entry in (part.strip() for part in wanted.split(",")):
        if entry.startswith("MIG"):
            return None  # a slice, whose model is not that of its GPU
        if entry.isdecimal():
            if not alike and order != "PCI_BUS_ID":
                return None  # CUDA counts the fastest first, and does not say how
            some = found[int(entry) : int(entry) + 1]
        else:
            some = [gpu for gpu in found if entry and gpu.uuid.startswith(entry)]
        if len(some) != 1:
            break
        chosen += some
    return tuple(gpu.model for gpu in chosen)


def _conf(text: str | None) -> dict[str, str]:
    """Return the settings in a file's text; none where there is no file."""
    found: dict[str, str] = {}
    for line in (text or "").split("\n"):  # a line ends there and nowhere else
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#") and name.startswith("NCCL_"):
            found.setdefault(name, value.removesuffix("\r"))
    return found


def _version_of_file(path: Path) -> str | None:
    found = _NCCL_FILE.search(os.path.realpath(path))
    return found[1] if found and path.exists() else None


def _fields(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def _text(path: Path) -> str | None:
    try:
        # no newline is translated, and bytes that are no text stay different from each other
        return path.read_bytes().decode(errors="backslashreplace") if path.is_file() else None
    except OSError:
        return None
