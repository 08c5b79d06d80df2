"""The content of a model directory in two digests: what it is, and what it holds. Torch-free.

Requirement: evidence belongs to the very bytes it was made from. A golden record, a report and a
receipt name them by SHA-256, over everything in the directory that makes the function: the config
and what changes how it is read (quantization, adapters, code), and every safetensors file with the
index. A server's start cannot wait for 140 GB, so the digest of a weight file is kept under its
real path, size, times, inode and device, and is read again when one of them differs.

[Settled] A file that changed in the last moments may change again without its times showing it
(clocks of file systems are coarse), so its digest is not kept. Nor do they show a second write to a
page that somebody maps and that is not on the disk yet; so a file is flushed before it is read.

[Adapters] Where adapter_config.json names another base, transformers loads the weights from there:
what lies here then is not the model, and gets no digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcheck.errors import TPCheckError
from tpcheck.files import json_of, read_bounded, read_json, write_private_text

CACHE_SCHEMA = "tpcheck.digests/1"

CONFIG_FILES = (
    "config.json",
    "params.json",  # the config of Mistral's own format
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "hf_quant_config.json",
    "adapter_config.json",  # transformers loads an adapter that lies beside the weights
)
"""Besides *.py, which `trust_remote_code` runs. What changes text only is left out: tokenizers,
generation_config.json, chat templates."""

_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_SETTLED_NS = 2_000_000_000
_MAX_KEPT = 10_000
_MAX_JSON_BYTES = 256 * 2**20
"""Of an index or an adapter's config: a larger file is neither."""

_READERS = 8
_SHA256 = re.compile(r"[0-9a-f]{64}")

Stamp = tuple[str, int, int, int, int, int]
"""Real path, size, mtime and ctime in nanoseconds, inode, device."""


@dataclass(frozen=True, slots=True)
class FileDigest:
    """One file of a model directory: its name there, its size in bytes and its SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ModelDigest:
    """What a model directory is. `files` are those that count, configs first, sorted by name."""

    config_sha256: str
    weights_sha256: str
    files: tuple[FileDigest, ...]

    def named(self) -> dict[str, str]:
        """Return each file's SHA-256 under its name, written so that JSON can hold it."""
        return {
            os.fsencode(one.name).decode(errors="backslashreplace"): one.sha256
            for one in self.files
        }


@dataclass(frozen=True, slots=True)
class DigestedModel:
    """A digest, and how the files looked when they were read: `assert_unchanged` compares."""

    directory: Path
    digest: ModelDigest
    stamps: Mapping[str, Stamp]

    def assert_unchanged(self) -> None:
        """Raise if any file that counts was written, replaced, added or taken away since.

        Raises:
            TPCheckError: names the directory and the first file that differs.
        """
        configs, weights = _names(self.directory)
        now = {name: _stamp(self.directory / name) for name in (*configs, *weights)}
        changed = sorted(
            name for name in {*now, *self.stamps} if now.get(name) != self.stamps.get(name)
        )
        if changed:
            raise TPCheckError(
                f"{self.directory}: {changed[0]} changed while it was in use, so nothing can be"
                " said of either version; run again on a directory that stays as it is"
            )


def digest_directory(
    directory: str | os.PathLike[str],
    *,
    paranoid: bool = False,
    cache: str | os.PathLike[str] | None = None,
) -> ModelDigest:
    """Return the digests of a model directory.

    Args:
        directory: holds config.json and safetensors.
        paranoid: read every byte again, whatever was kept.
        cache: the file that keeps digests; by default in XDG_CACHE_HOME or ~/.cache. One that is
            damaged, foreign or writable by others is not used.

    Raises:
        TPCheckError: no such directory, no config.json, no safetensors, a shard that the index
            names is missing, a file cannot be read or changes while it is read; names the path.

    Example:
        >>> digest_directory("no/such/model")
        Traceback (most recent call last):
        tpcheck.errors.TPCheckError: no/such/model: is no directory, but should be a model's
    """
    return digest_model(directory, paranoid=paranoid, cache=cache).digest


def digest_model(
    directory: str | os.PathLike[str],
    *,
    paranoid: bool = False,
    cache: str | os.PathLike[str] | None = None,
) -> DigestedModel:
    """Return what `digest_directory` does, and how the files looked. Raises as it does."""
    root = Path(directory)
    configs, weights = _names(root)
    _require_shards(root, weights)
    _require_own_base(root, configs)
    path = Path(cache) if cache is not None else default_cache()
    kept = {} if paranoid or path is None else _kept(path)
    found: dict[str, tuple[Stamp, str]] = {}
    left = []
    for name in weights:
        stamp = _stamp(root / name)
        if name.endswith(".safetensors") and stamp in kept:
            found[name] = stamp, kept[stamp]
        else:
            left.append(name)
    started = time.time_ns()
    read = _read_all(root, [*configs, *left])
    found |= read
    new = {
        stamp: sha256
        for name, (stamp, sha256) in read.items()
        if name.endswith(".safetensors") and max(stamp[2:4]) < started - _SETTLED_NS
    }
    if new and path is not None:
        _keep(path, new)
    files = {name: FileDigest(name, found[name][0][1], found[name][1]) for name in found}
    digest = ModelDigest(
        _combined("tpcheck config/1", [files[name] for name in configs]),
        _combined("tpcheck weights/1", [files[name] for name in weights]),
        tuple(files[name] for name in (*configs, *weights)),
    )
    return DigestedModel(root, digest, {name: stamp for name, (stamp, _) in found.items()})


def default_cache() -> Path | None:
    """Return where digests are kept; None where there is no home to keep them in."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the specification says that a relative one counts as not set
        return Path(base) / "tpcheck" / "digests.json"
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "tpcheck" / "digests.json" if os.path.isabs(home) else None


def _names(root: Path) -> tuple[list[str], list[str]]:
    """Return the names that count, sorted: configs and code, then weights and their index."""
    try:
        present = sorted(os.listdir(root))
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a zero byte
        raise TPCheckError(f"{root}: is no directory, but should be a model's") from error
    except OSError as error:
        raise TPCheckError(f"{root}: cannot be listed: {error.strerror}") from error
    configs = [name for name in present if name in CONFIG_FILES or name.endswith(".py")]
    weights = [n for n in present if n.endswith((".safetensors", ".safetensors.index.json"))]
    if not any(name.endswith(".safetensors") for name in weights):
        others = [name for name in present if name.endswith(_OTHER_WEIGHTS)]
        held = f"; {others[0]} is not read: convert it to safetensors" if others else ""
        raise TPCheckError(f"{root}: holds no *.safetensors, so it has no weights to digest{held}")
    if not {"config.json", "params.json"} & set(configs):
        raise TPCheckError(f"{root}: config.json is missing, so nothing says what the weights are")
    return configs, weights


def _require_shards(root: Path, weights: Iterable[str]) -> None:
    """Refuse an index that names what is not digested: a file missing, renamed or elsewhere."""
    present = set(weights)
    for name in sorted(present):
        if not name.endswith(".index.json"):
            continue
        path = root / name
        index = json_of(read_bounded(path, _MAX_JSON_BYTES), path)
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not all(isinstance(one, str) for one in files.values()):
            raise TPCheckError(f"{path}: weight_map should say the file of each tensor")
        for file in sorted(set(files.values()) - present):
            raise TPCheckError(f"{path}: names {file!r}, which is not in the directory")


def _require_own_base(root: Path, configs: Iterable[str]) -> None:
    """Refuse what [Adapters] says."""
    if "adapter_config.json" not in configs:
        return
    path = root / "adapter_config.json"
    value = json_of(read_bounded(path, _MAX_JSON_BYTES), path)
    base = value.get("base_model_name_or_path") if isinstance(value, dict) else None
    if base is None or (isinstance(base, str) and os.path.realpath(base) == os.path.realpath(root)):
        return
    raise TPCheckError(
        f"{path}: base_model_name_or_path={base!r:.80}, so the weights that are loaded are not"
        " those of this directory; merge the adapter into its base, and name the merged model"
    )


def _stamp(path: Path) -> Stamp:
    try:
        found = os.stat(path)
    except OSError as error:
        raise TPCheckError(f"{path}: cannot be read: {error.strerror}") from error
    return _stamp_of(path, found)


def _stamp_of(path: Path, found: os.stat_result) -> Stamp:
    if not stat.S_ISREG(found.st_mode):
        raise TPCheckError(f"{path}: is no regular file, but should be one")
    times = found.st_mtime_ns, found.st_ctime_ns
    return (os.path.realpath(path), found.st_size, *times, found.st_ino, found.st_dev)


def _read_all(root: Path, names: list[str]) -> dict[str, tuple[Stamp, str]]:
    """Read files and return their stamps and digests; large ones side by side."""
    paths = [root / name for name in names]
    if sum(_stamp(path)[1] for path in paths) < 2**24 or len(paths) == 1:
        return dict(zip(names, map(_read, paths), strict=True))
    from concurrent.futures import ThreadPoolExecutor

    # hashlib lets go of the interpreter's lock, so threads are enough
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1, len(paths))) as pool:
        return dict(zip(names, pool.map(_read, paths), strict=True))


def _read(path: Path) -> tuple[Stamp, str]:
    """Return one file's stamp and digest, both of the same bytes."""
    try:
        # a pipe of that name must not hang us; it is refused by its stamp
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:
            with contextlib.suppress(OSError):  # [Settled]; some file systems cannot
                os.fsync(descriptor)
            before = _stamp_of(path, os.fstat(descriptor))
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            after = _stamp_of(path, os.fstat(descriptor))
    except OSError as error:
        raise TPCheckError(f"{path}: cannot be read: {error.strerror}") from error
    if before != after or after != _stamp(path):
        raise TPCheckError(f"{path}: changed while it was read; try again when nobody writes it")
    return before, sha256


def _combined(kind: str, files: Iterable[FileDigest]) -> str:
    whole = hashlib.sha256(f"{kind}\n".encode())
    for file in files:
        # a name may hold anything but a slash and a zero byte
        whole.update(f"{file.sha256} {file.size} ".encode() + os.fsencode(file.name) + b"\0")
    return whole.hexdigest()


def _kept(path: Path) -> dict[Stamp, str]:
    """Return what the cache holds; nothing where it cannot be trusted or understood."""
    try:
        found = os.lstat(path)
        ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        if not ours or stat.S_IMODE(found.st_mode) & 0o022:
            return {}
        value: Any = read_json(path)
        if value["schema"] != CACHE_SCHEMA:
            return {}
        return dict(_entry(item) for item in value["files"])
    except (TPCheckError, OSError, KeyError, TypeError, ValueError):
        return {}


def _entry(item: Any) -> tuple[Stamp, str]:
    name, *numbers, sha256 = item
    size, mtime, ctime, inode, device = numbers
    if not isinstance(name, str) or not all(type(number) is int for number in numbers):
        raise ValueError("not a kept digest")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError("not a digest")
    return (name, size, mtime, ctime, inode, device), sha256


def _keep(path: Path, new: Mapping[Stamp, str]) -> None:
    """Add digests to the cache, one for each path; that it cannot be written costs time only."""
    import json

    by_path = {stamp[0]: (stamp, sha256) for stamp, sha256 in _kept(path).items()}
    for stamp, sha256 in new.items():
        by_path.pop(stamp[0], None)  # the newest stand last, the oldest go first
        by_path[stamp[0]] = (stamp, sha256)
    rows = [[*stamp, sha256] for stamp, sha256 in list(by_path.values())[-_MAX_KEPT:]]
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private_text(json.dumps({"schema": CACHE_SCHEMA, "files": rows}), path)
    except (TPCheckError, OSError, ValueError):
        return
