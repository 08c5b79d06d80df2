"""The result of `tpcheck plan` for a terminal: a verdict, a table, and what would help.

Requirement: a person sees in one line which degrees run where, and on one row per engine and degree
why not; nothing is wider than a terminal, so long reasons are cut there and told in full where one
engine was asked for. Numbers that are not known are blank. A function of the JSON.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

Record = Mapping[str, Any]

WIDTH = 110
OUTCOME_WORDS = {
    "ok": "ok",
    "pad": "pads",
    "replicate": "copies KV heads",
    "allgather_kv": "gathers KV",
    "uneven": "uneven",
    "uneven_empty_rank": "empty ranks",
    "fallback": "falls back",
    "late_error": "loads, fails",
    "silent_wrong": "SILENTLY WRONG",
    "error": "refused",
}
"""Outcome → what stands in the table."""

_FAILURES = {
    "error": "refused by",
    "late_error": "fails at the first forward on",
    "silent_wrong": "SILENTLY WRONG on",
}
_NOTES_SHOWN, _PROBLEMS_SHOWN = 6, 20
_GAP, _CAUSE = 2, 60


def render_plan(records: Sequence[Record]) -> str:
    """Return the verdict on the first line, the table, and what would make degrees legal."""
    engines = list(dict.fromkeys(record["engine"] for record in records))
    alone = len(engines) == 1
    lines = [_head(records, engines), "", *_table(records, alone=alone)]
    lines += _details(records) if alone else [*_fixes(records), *_memory(records)]
    lines += _checkpoint(records)
    lines += _notes(records, engines)
    return "\n".join(line.rstrip() for line in lines)


# -- the verdict


def _head(records: Sequence[Record], engines: Sequence[str]) -> str:
    degrees = list(dict.fromkeys(record["tp_size"] for record in records))
    said: dict[str, list[int]] = {}
    for degree in degrees:
        here = [record for record in records if record["tp_size"] == degree]
        said.setdefault(_clause(here, engines, brief=len(degrees) > 1), []).append(degree)
    clauses = [f"tp {', '.join(map(str, sizes))}: {clause}" for clause, sizes in said.items()]
    found = _problems(records)
    clauses += [f"checkpoint: {_count(len(found), 'problem')}"] if found else []
    return "; ".join(clauses)


def _clause(here: Sequence[Record], engines: Sequence[str], *, brief: bool) -> str:
    failed = [record for record in here if not record["legal"]]
    if len(engines) == 1:
        if not failed:
            return f"runs on {engines[0]}"
        return f"{_FAILURES[failed[0]['outcome']]} {engines[0]} ({_cause(failed[0])})"
    runs = len(here) - len(failed)
    said = [f"runs on {runs or 'none'} of {len(here)} engines"]
    for outcome, words in _FAILURES.items():
        group = [record for record in failed if record["outcome"] == outcome]
        if group and (outcome == "silent_wrong" or not brief):
            said.append(f"{words} {_named(group)}")
    return ("," if brief else ";").join([said[0], *(f" {one}" for one in said[1:])])


def _named(group: Sequence[Record]) -> str:
    """Say `vllm, sglang (num_key_value_heads=10)`: at most three engines, and the first's cause."""
    names = ", ".join(record["engine"] for record in group[:3])
    more = f" and {len(group) - 3} more" if len(group) > 3 else ""
    return f"{names}{more} ({_cause(group[0])})"


def _cause(record: Record) -> str:
    """Return the field that is at fault, else the beginning of the reason."""
    for name, value in re.findall(r"\b([a-z_]\w*)=(\d+)", record["reason"]):
        if name not in ("tp_size", "tp"):
            return f"{name}={value}"
    return _short(record["reason"].partition(";")[0], _CAUSE)


# -- the table


def _table(records: Sequence[Record], *, alone: bool) -> list[str]:
    """Return a row per engine and degree; memory stands there where one engine leaves room."""
    columns = [
        ("engine", [] if alone else [record["engine"] for record in records]),
        ("tp", [str(record["tp_size"]) for record in records]),
        ("outcome", [OUTCOME_WORDS[record["outcome"]] for record in records]),
        ("weights\nper rank", [_bytes(record, "weight_bytes") for record in records if alone]),
        ("KV cache\nper rank", [_bytes(record, "kv_cache_bytes") for record in records if alone]),
        ("padding", [_padding(record) for record in records]),
        ("legal\nnear", [_near(record) for record in records]),
    ]
    kept = [(head, cells) for head, cells in columns if any(cells)]
    used = sum(_width(head, cells) + _GAP for head, cells in kept)
    kept.append(("why", [_short(record["reason"], WIDTH - used) for record in records]))
    rows = list(zip(*(cells for _, cells in kept), strict=True))
    table = tabulate(rows, headers=[head for head, _ in kept], disable_numparse=True)
    return table.splitlines()


def _width(head: str, cells: Sequence[str]) -> int:
    # tabulate gives a header two columns more than its text
    return max(*(len(line) + 2 for line in head.split("\n")), *map(len, cells))


def _bytes(record: Record, name: str) -> str:
    memory = record["memory"]
    count = memory[name] if memory else None
    if count is None:
        return ""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _padding(record: Record) -> str:
    memory = record["memory"]
    share = memory["padding"] if memory else None
    if not share:
        return ""
    return f"{100 * share:.1f} %" if share >= 0.001 else "< 0.1 %"


def _near(record: Record) -> str:
    if record["legal"]:
        return ""
    return ", ".join(map(str, record["nearest_legal_tp_sizes"])) or "none"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3].rstrip()}..."


# -- below the table


def _details(records: Sequence[Record]) -> list[str]:
    """Tell in full what one engine says about each degree, equal reasons once."""
    lines: list[str] = []
    for record in records:
        if record["outcome"] == "ok":
            continue
        lines += ["", *_wrapped(f"tp {record['tp_size']}: {record['reason']}", "  ")]
        if record["fix"]:
            lines += _wrapped(f"  fix     {record['fix']}", " " * 10)
        if record["error_text"] and _flat(record["error_text"]) not in record["reason"]:
            lines += _wrapped(f"  says    {_flat(record['error_text'])}", " " * 10)
        lines += _wrapped(f"  source  {record['source']}", " " * 10)
    return lines


def _fixes(records: Sequence[Record]) -> list[str]:
    """Say once what would make a degree legal, and on which engines."""
    helped: dict[tuple[int, str], list[str]] = {}
    for record in records:
        ways = (record["fix"] or "").split("; or ")
        fix = "; or ".join(way for way in ways if not way.startswith("use tp_size="))
        if fix:
            helped.setdefault((record["tp_size"], fix), []).append(record["engine"])
    lines = ["", "what would make it run:"] if helped else []
    for (degree, fix), engines in helped.items():
        lines += _wrapped(f"  tp {degree}: {fix} ({', '.join(engines)})", " " * 8)
    return lines


def _memory(records: Sequence[Record]) -> list[str]:
    """Say once what ranks hold at a degree, and on which engines; most hold the same."""
    held: dict[tuple[int, str], list[str]] = {}
    for record in records:
        weights, cache = (_bytes(record, name) for name in ("weight_bytes", "kv_cache_bytes"))
        if weights:
            said = f"weights {weights}" + (f", KV cache {cache}" if cache else "")
            held.setdefault((record["tp_size"], said), []).append(record["engine"])
    lines = ["", "the fullest rank holds:"] if held else []
    for (degree, said), engines in sorted(held.items(), key=lambda one: one[0][0]):
        lines += _wrapped(f"  tp {degree}: {said} ({', '.join(engines)})", " " * 8)
    return lines


def _checkpoint(records: Sequence[Record]) -> list[str]:
    held = next((record["checkpoint"] for record in records if record["checkpoint"]), None)
    if held is None:
        return []
    read = f"{_count(held['tensors'], 'tensor')} in {_count(held['files'], 'file')}"
    problems = _problems(records)
    outcome = "as config.json says" if held["compared"] else "not compared with config.json"
    outcome = _count(len(problems), "problem") if problems else outcome
    lines = ["", f"checkpoint: {read}: {outcome}"]
    for problem in problems[:_PROBLEMS_SHOWN]:
        lines += _wrapped(f"  {problem}", " " * 6)
    if len(problems) > _PROBLEMS_SHOWN:
        lines.append(f"  and {len(problems) - _PROBLEMS_SHOWN} more: see --json")
    proven = [one["tp_size"] for one in _per_degree(records) if one["tiled"]]
    if proven:
        degrees = ", ".join(map(str, proven))
        lines.append(f"  every sub-block is held exactly once, or by every copy, at tp {degrees}")
    notes = dict.fromkeys(note for one in _per_degree(records) for note in one["notes"])
    for note in notes:
        lines += _wrapped(f"  note: {note}", " " * 8)
    return lines


def _per_degree(records: Sequence[Record]) -> list[Record]:
    found = {record["tp_size"]: record["checkpoint"] for record in records if record["checkpoint"]}
    return list(found.values())


def _problems(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(one for held in _per_degree(records) for one in held["problems"]))


def _notes(records: Sequence[Record], engines: Sequence[str]) -> list[str]:
    """Say which rules could not be applied, and which numbers are not known."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for note in record["notes"]:
            found.setdefault(_general(note), {})[record["engine"]] = None
        missing = record["memory"]["missing"] if record["memory"] else ()
        if missing:
            found.setdefault(f"memory is not known without {', '.join(missing)}", {})
    lines = [
        f"note: {note}" + (f" ({_some(list(names), engines)})" if names else "")
        for note, names in found.items()
    ]
    shown = [part for line in lines[:_NOTES_SHOWN] for part in _wrapped(line, " " * 6)]
    more = [f"and {len(lines) - _NOTES_SHOWN} more notes: see --json"]
    return ["", *shown, *(more if len(lines) > _NOTES_SHOWN else [])] if lines else []


def _general(note: str) -> str:
    """Turn `vllm.vocab not applied: vocab_size not given` into what engines have in common."""
    rule, found, missing = note.partition(" not applied: ")
    return f"rules left out: {missing}" if found and rule else note


def _some(names: Sequence[str], engines: Sequence[str]) -> str:
    return "all engines" if len(names) == len(engines) > 1 else ", ".join(names)


def _wrapped(text: str, indent: str) -> Iterable[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _flat(text: str) -> str:
    return " ".join(text.split())


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
