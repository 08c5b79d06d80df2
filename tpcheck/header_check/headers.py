"""Read the headers of safetensors files, and nothing else of them.

Requirement: a checkpoint of hundreds of gigabytes is judged from a few megabytes, and nothing in a
file is believed before it is held against the file's own size: a header that claims more bytes than
there are, tensors that overlap or leave holes, or a shape that its bytes cannot hold is one
sentence that names the file.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from tpcheck.errors import SubjectError, TPCheckError
from tpcheck.files import is_file, read_json
from tpcheck.hf.config import describe_directory
from tpcheck.json_reader import brief, parse_json, refuse

INDEX = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 100_000_000
"""As the format's own readers have it: beyond, a length is no length."""

_MAX_DIMS = 64
_SIZES = 2**63
"""Above what a dim or an offset can be: products of many huge numbers would take for ever."""

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class Header(NamedTuple):
    """What a file says about one tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    """The byte of the file at which its elements begin."""


class Headers(NamedTuple):
    """Every tensor of a directory, and the files that hold them."""

    tensors: Mapping[str, Header]
    files: tuple[str, ...]


def read_headers(directory: Path) -> Headers:
    """Return every tensor of the files that the index names, or of all safetensors files.

    Raises:
        SubjectError: there is no safetensors file; says what there is.
        TPCheckError: a file is cut short or contradicts itself; names the file.
    """
    index = directory / INDEX
    wanted = _read_index(index) if index.is_file() else {}
    files = sorted(set(wanted.values())) or sorted(
        path.name for path in directory.glob("*.safetensors")
    )
    if not files:
        raise SubjectError(
            f"{directory}: no *.safetensors file is there; {describe_directory(directory)}"
        )
    tensors: dict[str, Header] = {}
    for file in files:
        for name, header in read_header(directory / file).items():
            if name in tensors:
                raise TPCheckError(
                    f"{directory / file}: holds {brief(name)}, which {tensors[name].file} holds too"
                )
            tensors[name] = header
    for name, file in wanted.items():
        if name not in tensors or tensors[name].file != file:
            raise TPCheckError(f"{index}: says that {file} holds {brief(name)}, but it does not")
    return Headers(tensors, tuple(files))


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise TPCheckError(
            f"{path}: weight_map={brief(files)}, but should say the file of each tensor"
        )
    for file in dict.fromkeys(files.values()):
        if not isinstance(file, str) or Path(file).name != file:
            raise TPCheckError(f"{path}: names {brief(file)}, but should name files beside it")
        if not is_file(path.parent / file):
            raise TPCheckError(
                f"{path}: names {brief(file)}, which is not there;"
                f" {describe_directory(path.parent)}"
            )
    return files


def read_header(path: Path) -> dict[str, Header]:
    """Return every tensor of one file.

    Raises:
        TPCheckError: the file cannot be read, is cut short or contradicts itself; names it.
    """
    fields, begin, size = _read_fields(path)
    return _tensors(path, fields, begin, size - begin)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the free text of a file's header.

    Raises:
        TPCheckError: the file cannot be read or its header is none; names it.
    """
    return dict(_read_fields(path)[0].get("__metadata__") or {})


def _read_fields(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header's entries, where the data begin, and the file's size, all in bytes."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe of that name must not hang us
            raise TPCheckError(f"{path}: is no regular file, but should be one")
        size = found.st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8:
                raise TPCheckError(
                    f"{path}: {size} bytes, but should begin with the 8 bytes of a header's length"
                )
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise TPCheckError(
                    f"{path}: its header should be {length} bytes long, but the file has {size}"
                    f" bytes in all: {_guess(path)}"
                )
            text = file.read(length)
    except OSError as error:
        raise TPCheckError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        fields = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise TPCheckError(f"{path}: its header is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise TPCheckError(f"{path}: its header is a {type(fields).__name__}, but should be object")
    metadata = fields.get("__metadata__")
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        refuse(f"{path}: __metadata__", metadata, "texts by name, as the format has it")
    return fields, 8 + length, size


def _guess(path: Path) -> str:
    with path.open("rb") as file:
        pointer = file.read(40).startswith(b"version https://git-lfs")
    return "it is a Git LFS pointer, fetch the file itself" if pointer else "it is cut short"


def _tensors(
    path: Path, fields: Mapping[str, Any], begin: int, data_bytes: int
) -> dict[str, Header]:
    """Hold every entry against the bytes that follow: none overlap, none are left over."""
    found: dict[str, Header] = {}
    ends: list[tuple[int, int, str]] = []
    for name, entry in fields.items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, stop) = _entry(f"{path}: {name:.200}", entry)
        bits = math.prod(shape) * _BITS[dtype]
        if stop - start != -(-bits // 8):
            raise TPCheckError(
                f"{path}: {name:.200}: {dtype}{list(shape)} is {-(-bits // 8)} bytes, but its"
                f" data_offsets {[start, stop]} hold {stop - start}"
            )
        found[name] = Header(path.name, dtype, shape, begin + start)
        ends.append((start, stop, name))
    at = 0
    for start, stop, name in sorted(ends):
        if start != at:
            raise TPCheckError(
                f"{path}: {name:.200}: begins at byte {start}, but should at {at}: tensors overlap"
                " or leave a hole"
            )
        at = stop
    if at != data_bytes:
        raise TPCheckError(
            f"{path}: its tensors are {at} bytes, but {data_bytes} bytes follow the header:"
            f" {'it is cut short' if at > data_bytes else 'something stands behind them'}"
        )
    return found


def _entry(where: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        refuse(f"{where}: dtype", dtype, f"one of {', '.join(_BITS)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMS:
        refuse(f"{where}: shape", shape, "a list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(f"{where}: data_offsets", offsets, "where its bytes begin and end")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _SIZES
        for value in values
    )
