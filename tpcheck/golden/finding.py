"""Find the record of what a subject is now, or say by name why there is none.

Requirement: a record is found by its content address, whatever the subject is called, so that other
code on the same weights meets the record of those weights. Where there is none, the record that
stands in its place says what has changed: which weight, which field of the config. Runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcheck.errors import TPCheckError
from tpcheck.golden.records import Golden, Identity, Named, canonical, case_slug, slug
from tpcheck.golden.store import Entry, missing, read_data
from tpcheck.golden.tensors import Kept, unpack
from tpcheck.spec import Case


@dataclass(frozen=True, slots=True)
class Found:
    """A record that was found and read whole; else `problem` says what is wrong."""

    golden: Golden | None = None
    kept: Mapping[str, Kept] | None = None
    problem: str = ""


def find_record(
    folder: Path, entries: Sequence[Entry], label: str, named: Named, identity: Identity
) -> Found:
    """Return the record of an identity, or say why there is none."""
    of_it = [
        entry
        for entry in entries
        if entry.golden is not None
        and (entry.golden.address, entry.golden.named) == (identity.key.address, named)
    ]
    if of_it:
        return _read(
            folder, min(of_it, key=lambda e: (not is_of(e, label, named), e.state != "ok"))
        )
    lead = f"there is no record of {named[0]} {named[1]} in {folder}"
    record = f"tpcheck golden record {label} {folder} makes one"
    for entry in entries:
        if is_of(entry, label, named):
            if entry.golden is None:
                return Found(problem=f"{entry.file} is not to be trusted: {entry.problem}")
            changed = what_changed(identity, entry.golden.identity)
            return Found(
                problem=f"{lead} as the subject is now; {entry.file} is of another: {changed};"
                f" {record} in its place with --update"
            )
    return Found(problem=f"{lead}; {record}")


def _read(folder: Path, entry: Entry) -> Found:
    if entry.golden is None or entry.state != "ok":
        return Found(problem=entry.problem)
    try:
        return Found(entry.golden, unpack(read_data(folder, entry.golden), entry.golden))
    except TPCheckError as error:
        return Found(problem=str(error))


def is_of(entry: Entry, label: str, named: Named) -> bool:
    """Whether a record, or a file that should be one, is of this subject, case and dtype."""
    if entry.golden is not None:
        return entry.golden.subject == label and entry.golden.named == named
    start = f"{slug(label)}.{case_slug(named[0])}.{named[1]}."
    return entry.file.startswith(start) and entry.file.endswith(".json")


def named_records(entries: Sequence[Entry], label: str) -> tuple[Named, ...]:
    """Return every (case, dtype) that a subject's records are of or name, broken ones too."""
    ours = [e.golden.named for e in entries if e.golden is not None and e.golden.subject == label]
    broken = [
        (parts[1], parts[2])
        for e in entries
        if e.golden is None and e.file.endswith(".json")
        for parts in [e.file.split(".")]
        if len(parts) == 5 and parts[0] == slug(label) and _is_case(parts[1])
    ]
    return tuple(sorted(dict.fromkeys((*ours, *missing(entries, label), *broken))))


def named_of_weights(
    entries: Sequence[Entry], weights: Mapping[str, str], config: Mapping[str, Any]
) -> tuple[Named, ...]:
    """Return what `named_records` does, for every subject that was recorded with these files."""
    labels = {
        e.golden.subject
        for e in entries
        if e.golden is not None
        and e.golden.identity.source == "directory"
        and (e.golden.identity.weights, e.golden.identity.config) == (weights, config)
    }
    found = [one for label in sorted(labels) for one in named_records(entries, label)]
    return tuple(sorted(dict.fromkeys(found)))


def _is_case(text: str) -> bool:
    try:
        Case.parse(text)
    except TPCheckError:
        return False
    return True


def what_changed(identity: Identity, recorded: Identity) -> str:
    """Say in what a subject is not the one of a record: `weights: embed is another (1 of 21)`."""
    said = []
    parts = {
        "weights": (identity.weights, recorded.weights),
        "config": (identity.config, recorded.config),
        "inputs": (identity.inputs, recorded.inputs),
    }
    for name, (here, there) in parts.items():
        if getattr(identity.key, name) == getattr(recorded.key, name):
            continue
        names = [n for n in {**there, **here} if canonical(here.get(n)) != canonical(there.get(n))]
        first = names[0] if names else "where they are from"
        kind = "new" if first not in there else "gone" if first not in here else "another"
        said.append(f"{name}: {first} is {kind} ({len(names)} of {len({**there, **here})})")
    if identity.key.tpcheck != recorded.key.tpcheck:
        said.append(f"tpcheck {identity.key.tpcheck}, recorded by {recorded.key.tpcheck}")
    return "; ".join(said) or "dtype or case"
