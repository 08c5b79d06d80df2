"""What `tpcheck probe` finds, as one JSON record, and how it differs from another machine's.

Requirement: "the same model, other bits" is settled by two probes: what is reduced differently is
named per degree, dtype and size, and makes the exit code 1; what merely surrounds it (versions,
hardware, variables) is named, because it explains, and decides nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from tpcheck.errors import TPCheckError
from tpcheck.numerics.order import Tree
from tpcheck.probes.json_form import read_probe, to_json
from tpcheck.probes.sweep import MessageProbe, ProbeReport
from tpcheck.render.probe import format_order
from tpcheck.subjects import SubjectRef, load_callable, make_ref

Record = dict[str, Any]


def probe_record(report: ProbeReport, other: ProbeReport | None, path: str = "") -> Record:
    """Return what was found, with `against`: how it differs from the other report.

    Raises:
        TPCheckError: the two have no message in common.
    """
    against = None if other is None else {"path": path, **differences(report, other)}
    return {**to_json(report), "against": against}


def exit_code(record: Record) -> int:
    """Return 1 when the reduction differs from the one it is held against, else 0."""
    return 1 if record["against"] and record["against"]["differences"] else 0


def read_other(
    path: str | os.PathLike[str] | None,
    tp_sizes: Sequence[int],
    dtypes: Sequence[str],
    sizes: Sequence[int],
) -> ProbeReport | None:
    """Return the report to hold a probe of these messages against, before any rank is started.

    Raises:
        TPCheckError: the file is no probe report, or has none of these messages.
    """
    if path is None:
        return None
    other = read_probe(path)
    _require_common([*product(tp_sizes, dtypes, sizes)], list(_by_message(other)))
    return other


def collective_ref(name: str | None) -> SubjectRef | None:
    """Return how a user's collective travels to the ranks, once it was seen to load.

    Raises:
        TPCheckError: the name has another form than module:fn or file.py:fn.
        SubjectError: nothing is there, or it is not callable.
    """
    if name is None:
        return None
    location, _, function = name.rpartition(":")
    if not location or not function or location in ("builtin", "hf", "ref"):
        raise TPCheckError(
            f"--collective={name!r}, but should be package.module:fn or path/file.py:fn, a"
            " function that returns the sum of a tensor over the default process group"
        )
    if location.endswith(".py") and not Path(location).expanduser().is_file():
        raise TPCheckError(f"--collective={name!r}: there is no file {location}")
    ref = make_ref(name)
    load_callable(ref)
    return ref


def differences(report: ProbeReport, other: ProbeReport) -> Record:
    """Return what differs from another report: the reductions, and apart what surrounds them.

    Raises:
        TPCheckError: no message was probed in both.
    """
    here, there = _by_message(report), _by_message(other)
    common = [key for key in here if key in there]
    _require_common(list(here), list(there))
    found = [_difference(key, *one) for key in common for one in _differing(here[key], there[key])]
    return {
        "differences": [*found, *_switch_differences(report, other)],
        "compared": len(common),
        "only_here": [_named(key) for key in here if key not in there],
        "only_there": [_named(key) for key in there if key not in here],
        "environment": dict(_surroundings(report, other)),
    }


_Key = tuple[int, str, int]


def _by_message(report: ProbeReport) -> dict[_Key, MessageProbe]:
    return {(one.tp_size, one.dtype, one.count): one for one in report.messages}


def _named(key: _Key) -> Record:
    return {"tp_size": key[0], "dtype": key[1], "count": key[2]}


def _difference(key: _Key, field: str, actual: str, expected: str) -> Record:
    return {**_named(key), "field": field, "actual": actual, "expected": expected}


def _differing(here: MessageProbe, there: MessageProbe) -> Iterator[tuple[str, str, str]]:
    """Yield (field, here, there) of what two probes of one message say differently."""
    if here.order != there.order or here.wire != there.wire:
        for field in ("order", "wire"):
            if getattr(here, field) != getattr(there, field):
                yield field, str(getattr(here, field)), str(getattr(there, field))
    else:
        yield from _differing_chunks(here, there)
    for field in ("repeatable", "disagreeing_ranks"):
        if getattr(here, field) != getattr(there, field):
            yield field, _text(getattr(here, field)), _text(getattr(there, field))
    if None not in (here.average, there.average) and here.average != there.average:
        yield "average", _text(here.average), _text(there.average)


def _differing_chunks(here: MessageProbe, there: MessageProbe) -> Iterator[tuple[str, str, str]]:
    edges = sorted({0, *(one.stop for one in (*here.chunks, *there.chunks))})
    for name in ("tree", "accumulator"):
        elements, first = 0, None
        for start, stop in pairwise(edges):
            pair = (_at(here, start, name), _at(there, start, name))
            if pair[0] != pair[1]:
                elements += stop - start
                first = first or (start, *pair)
        if first:
            where = f"at element {first[0]} (of {elements} that differ)"
            field = "order" if name == "tree" else name
            yield field, f"{_shown(first[1])} {where}", _shown(first[2])


def _at(probe: MessageProbe, element: int, name: str) -> Any:
    return next(getattr(one, name) for one in probe.chunks if element < one.stop)


def _shown(value: Tree | str | None) -> str:
    return value if isinstance(value, str) else format_order(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _switch_differences(report: ProbeReport, other: ProbeReport) -> list[Record]:
    """Compare where the reduction switches, for the degrees and dtypes swept over equal sizes."""
    found = []
    for tp_size, dtype in dict.fromkeys((one.tp_size, one.dtype) for one in report.messages):
        swept, switches = [], []
        for each in (report, other):
            mine = [one for one in each.messages if (one.tp_size, one.dtype) == (tp_size, dtype)]
            swept.append({one.count for one in mine})
            switches.append(
                [
                    f"after {one.last}: {one.change}"
                    for one in each.switch_points
                    if (one.tp_size, one.dtype) == (tp_size, dtype)
                ]
            )
        if swept[0] == swept[1] and switches[0] != switches[1]:
            texts = ["; ".join(one) or "none" for one in switches]
            sweep = {"tp_size": tp_size, "dtype": dtype, "count": None, "field": "switch_points"}
            found.append({**sweep, "actual": texts[0], "expected": texts[1]})
    return found


def _surroundings(report: ProbeReport, other: ProbeReport) -> Iterator[tuple[str, list[Any]]]:
    """Yield what differs around the reductions: name -> [here, there]."""
    here, there = _flat(report), _flat(other)
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            yield name, [here.get(name), there.get(name)]


def _flat(report: ProbeReport) -> Record:
    facts = {"collective": report.collective, **report.environment}
    variables = facts.pop("variables", None)
    return {**facts, **(variables if isinstance(variables, dict) else {})}


def _require_common(here: Sequence[_Key], there: Sequence[_Key]) -> None:
    if not set(here) & set(there):
        raise TPCheckError(
            f"--against: no message is in both: here {_spread(here)}; there {_spread(there)}"
        )


def _spread(messages: Sequence[_Key]) -> str:
    if not messages:
        return "nothing"
    columns = zip(*messages, strict=True)
    degrees, dtypes, counts = (",".join(map(str, dict.fromkeys(one))) for one in columns)
    return f"tp {degrees}, {dtypes}, {counts} elements"
