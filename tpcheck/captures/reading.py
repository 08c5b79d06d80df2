"""A capture: one file, a folder of files, or a folder per rank.

Requirement: what other people's scripts write is read as it is, and whatever is wrong with one file
is a finding beside the tensors of the others. Ranks are told from names: a file or folder whose
name holds `rank0`, `rank_1`, `rank-00002` belongs to that rank, `--rank-pattern` says it
otherwise; all other files are one rank's. A path without any safetensors file is the user's
mistake; so is a pickle, which is never opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpcheck.captures.tensors import HeldTensor, Tensor, stored
from tpcheck.errors import TPCheckError
from tpcheck.files import read_json
from tpcheck.header_check.headers import read_header, read_metadata
from tpcheck.json_reader import parse_json

Source = str | Path | Mapping[str, torch.Tensor]
"""A file, a folder, or tensors by name."""

RANK_PATTERN = r"(?:^|[^A-Za-z])rank[-_]?(\d+)(?!\d)"
NO_RANKS = "none"
MAX_RANKS = 65_536

_PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one file, or with one rank's files: a finding."""

    where: str
    rank: int | None
    text: str
    tensor: str = ""


@dataclass(frozen=True, slots=True)
class Capture:
    """What was recorded: for each rank its tensors by name. `per_rank`: names told the ranks."""

    name: str
    ranks: tuple[Mapping[str, Tensor], ...]
    per_rank: bool
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    order: tuple[str, ...] = ()

    @property
    def names(self) -> dict[str, None]:
        """Every tensor that some rank holds."""
        return {name: None for rank in self.ranks for name in rank}


def read_capture(
    source: Source | Sequence[Source],
    *,
    rank_pattern: str | None = None,
    tp_size: int | None = None,
) -> Capture:
    """Return what a path, or each rank's own, holds; only headers are read.

    Raises:
        TPCheckError: nothing is there, it is no safetensors, or ranks cannot be told.
    """
    if isinstance(source, Mapping):
        return Capture("(tensors)", (_held(source),), per_rank=False)
    if isinstance(source, Sequence) and not isinstance(source, str):
        if not source:
            raise TPCheckError("a capture of no ranks: should hold at least one")
        parts = [read_capture(one, rank_pattern=NO_RANKS) for one in source]
        name = "(1 rank)" if len(parts) == 1 else f"({len(parts)} ranks)"
        return Capture(
            name if "(tensors)" in {p.name for p in parts} else parts[0].name,
            tuple(part.ranks[0] for part in parts),
            per_rank=True,
            problems=tuple(
                Problem(one.where, rank, one.text, one.tensor)
                for rank, part in enumerate(parts)
                for one in part.problems
            ),
            notes=tuple(note for part in parts for note in part.notes),
            order=parts[0].order,
        )
    path = Path(source)
    files, notes = _safetensors_files(path)
    by_rank = _by_rank(path, files, rank_pattern)
    per_rank = None not in by_rank
    ranks = {rank or 0: found for rank, found in by_rank.items()}
    forced = rank_pattern == NO_RANKS
    return _read(path, ranks, per_rank, notes, tp_size, forced=forced)


def _read(
    path: Path,
    ranks: Mapping[int, list[Path]],
    per_rank: bool,
    notes: list[str],
    tp_size: int | None,
    *,
    forced: bool,
) -> Capture:
    problems: list[Problem] = []
    metadata: list[dict[str, str]] = []
    held: list[dict[str, Tensor]] = []
    for rank in range(max(ranks) + 1):
        tensors, facts = _tensors(ranks.get(rank, []), rank if per_rank else None, problems)
        held.append(tensors)
        metadata += facts
    sizes = [one.get("tp_size", "") for one in metadata]
    said = sorted({int(size) for size in sizes if re.fullmatch("[0-9]{1,6}", size)})
    declared = max(said, default=0)
    if len(said) > 1 or (per_rank and 0 < declared < len(held)):
        text = (
            f"recorded at tp_size={' and '.join(map(str, said))} by their own words, by ranks up to"
            f" {len(held) - 1}: files of different runs"
        )
        problems.append(Problem(str(path), None, text))
    if declared > 1 and not per_rank and not forced:
        text = f"recorded at tp_size={declared} by its own words, but no rank is in its name"
        problems.append(Problem(str(path), None, text))
    wanted = max(len(held), min(declared, MAX_RANKS), tp_size or 0) if per_rank else 1
    absent = [rank for rank in range(wanted) if rank not in ranks] if per_rank else []
    if absent:
        shown = ", ".join(map(str, absent[:3])) + (", ..." if len(absent) > 3 else "")
        text = f"no file of rank {shown}, but {wanted} ranks should have recorded"
        problems.append(Problem(str(path), absent[0] if len(absent) == 1 else None, text))
    held += [{} for _ in range(wanted - len(held))]
    return Capture(
        str(path), tuple(held), per_rank, tuple(problems), tuple(notes), _order(metadata)
    )


def _held(tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not isinstance(name, str) or not plain or tensor.is_quantized or tensor.is_meta:
            raise TPCheckError(
                f"{name!r} is {type(tensor).__name__}, but should be a dense tensor with values"
            )
    return {name: HeldTensor(tensor) for name, tensor in tensors.items()}


def _safetensors_files(path: Path) -> tuple[list[Path], list[str]]:
    """Return the files of a path, and what stands beside them unread."""
    if path.is_dir():
        try:
            entries = sorted(path.iterdir())
            inner = [one for folder in entries if folder.is_dir() for one in _entries(folder)]
            deeper = [next(one.rglob("*.safetensors"), None) for one in inner if one.is_dir()]
        except OSError as error:
            raise TPCheckError(f"{path}: cannot be read: {error.strerror}") from error
        both = [*entries, *sorted(inner)]
        found = [one for one in both if one.suffix == ".safetensors"]
        pickles = [one.name for one in both if one.suffix in _PICKLES]
        if any(deeper):
            deep = next(filter(None, deeper))
            raise TPCheckError(
                f"{path}: {deep.relative_to(path)} lies deeper than one folder and would not be"
                " read; name a folder nearer to it, or move it up"
            )
        if not found:
            raise TPCheckError(f"{path}: no *.safetensors file is there{_way_out(pickles)}")
        unread = [f"{path}: {name} is not read: a pickle can run code" for name in pickles]
        return found, unread[:3]
    if path.suffix in _PICKLES:
        raise TPCheckError(f"{path}: is not read: a pickle can run code{_way_out([path.name])}")
    if not path.exists():
        raise TPCheckError(f"{path}: is not there, but should be a safetensors file or a folder")
    if not path.is_file():
        raise TPCheckError(f"{path}: is no file and no folder, but should be a safetensors file")
    if path.suffix != ".safetensors":
        raise TPCheckError(f"{path}: should end in .safetensors, the only format that is read")
    return [path], []


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def _way_out(pickles: Sequence[str]) -> str:
    if not pickles:
        return ""
    return (
        f"; {pickles[0]} is a pickle: where you trust it, write it anew with"
        " safetensors.torch.save_file(torch.load(path, weights_only=True), 'new.safetensors')"
    )


def _by_rank(
    root: Path, files: Iterable[Path], rank_pattern: str | None
) -> dict[int | None, list[Path]]:
    """Group files by the rank in their names; all under None where names tell of no rank."""
    files = list(files)
    if rank_pattern == NO_RANKS or (root.is_file() and rank_pattern is None):
        return {None: files}
    pattern = _rank_regex(rank_pattern)
    found: dict[int | None, list[Path]] = {}
    for file in files:
        name = file.name if root.is_file() else file.relative_to(root).as_posix()
        told = {int(digits) for digits in pattern.findall(name) if digits.isdigit()}
        if len(told) > 1:
            raise TPCheckError(
                f"{file}: its name holds several ranks, {sorted(told)}; say which with"
                " --rank-pattern, a regular expression whose one group is the rank"
            )
        found.setdefault(min(told, default=None), []).append(file)
    if None in found and len(found) > 1:
        ranked = next(files[0] for rank, files in found.items() if rank is not None)
        raise TPCheckError(
            f"{root}: {ranked.name} is named after a rank, {found[None][0].name} is not; say which"
            f" belong to a rank with --rank-pattern, or read all as one with --rank-pattern"
            f" {NO_RANKS}"
        )
    highest = max((rank for rank in found if rank is not None), default=0)
    if highest >= MAX_RANKS:
        raise TPCheckError(f"{root}: rank {highest} is in a name, but ranks go up to {MAX_RANKS}")
    return found


def _rank_regex(text: str | None) -> re.Pattern[str]:
    try:
        pattern = re.compile(text or RANK_PATTERN, re.IGNORECASE | re.ASCII)
    except re.error as error:
        raise TPCheckError(f"--rank-pattern={text!r}: is no regular expression: {error}") from error
    if pattern.groups != 1:
        raise TPCheckError(
            f"--rank-pattern={text!r} has {pattern.groups} groups, but should have one: the rank's"
            r" digits, as in 'gpu(\d+)'"
        )
    return pattern


def _tensors(
    files: Sequence[Path], rank: int | None, problems: list[Problem]
) -> tuple[dict[str, Tensor], list[dict[str, str]]]:
    found: dict[str, Tensor] = {}
    metadata = []
    for path in files:
        if not path.is_file():
            problems.append(Problem(str(path), rank, "is no regular file"))
            continue
        try:
            headers = read_header(path)
            metadata.append(read_metadata(path))
        except TPCheckError as error:
            problems.append(Problem(str(path), rank, str(error).removeprefix(f"{path}: ")))
            continue
        for name, header in headers.items():
            if name in found:
                text = f"is in {found[name].where} and in {path}: which one counts is not known"
                if rank is None:
                    text += (
                        "; if each is a rank's, say which with --rank-pattern, a regular expression"
                        " whose one group is the rank"
                    )
                problems.append(Problem(str(path), rank, text, name))
                continue
            found[name] = stored(path, header)
    for folder in dict.fromkeys(path.parent for path in files):
        problems += _index_problems(folder, rank, found)
    return found, metadata


def _index_problems(folder: Path, rank: int | None, found: Mapping[str, Tensor]) -> list[Problem]:
    """Hold an index beside the files against what they hold."""
    problems = []
    for path in sorted(folder.glob("*.safetensors.index.json")):
        if not path.is_file():  # a pipe of that name must not hang us
            problems.append(Problem(str(path), rank, "is no regular file"))
            continue
        try:
            index: Any = read_json(path)
        except TPCheckError as error:
            problems.append(Problem(str(path), rank, str(error).removeprefix(f"{path}: ")))
            continue
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict):
            problems.append(Problem(str(path), rank, "weight_map is missing"))
            continue
        for name, file in files.items():
            if name not in found and isinstance(file, str):
                text = f"is in {file} according to {path}, but it is not there"
                problems.append(Problem(str(path), rank, text, name))
    return problems


def _order(metadata: Iterable[Mapping[str, str]]) -> tuple[str, ...]:
    """Return the order that the recorder wrote down: a JSON list of names."""
    for facts in metadata:
        try:
            names = parse_json(facts.get("order", ""))
        except (ValueError, RecursionError):
            continue
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return tuple(names)
    return ()
