"""What every engine does with a model at a degree, from its config alone. Torch-free.

Requirement: a person learns in milliseconds, before a model is downloaded and GPUs are booked,
which degrees run, what is padded or replicated, and why the others do not. A nested config is
planned part by part and its worst part decides. What an engine does is in tpcheck/engines, from
rules with their source; nothing is looked up by model name.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpcheck.engines.base import REFUSED, SEVERITY
from tpcheck.engines.facts import Facts
from tpcheck.engines.parts import read_parts
from tpcheck.engines.registry import ENGINE_NAMES, engine_named
from tpcheck.engines.survey import UP_TO, Decision, decide, survey
from tpcheck.errors import PlanError, TPCheckError

if TYPE_CHECKING:
    from tpcheck.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class PlanResult:
    """What one engine does with a model at one degree.

    `outcome` is "ok", "pad", "replicate", "allgather_kv", "uneven", "uneven_empty_rank",
    "fallback", "late_error" (loads, fails at the first forward), "silent_wrong" (runs, with wrong
    numbers) or "error" (refused at load). `reason` is one line with the numbers; `error_text` the
    engine's own text to the letter, "" where it is a bare assert, None where there is none.
    `sizes` says what each rank gets, `legal_tp_sizes` which degrees up to 64 can be used, `fix`
    what would make this one legal. `part` is the part of a nested config that decided, `notes`
    says which rules could not be applied.
    """

    engine: str
    tp_size: int
    outcome: str
    reason: str
    sizes: Mapping[str, Any]
    legal_tp_sizes: tuple[int, ...]
    source: str
    rule_id: str | None = None
    error_text: str | None = None
    fix: str | None = None
    part: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def is_legal(self) -> bool:
        """Whether this degree can be used on this engine."""
        return self.outcome not in REFUSED

    @property
    def nearest_legal_tp_sizes(self) -> tuple[int, ...]:
        """The legal degrees next to this one, below and above."""
        return _near(self.legal_tp_sizes, self.tp_size)


def plan(
    config: Mapping[str, Any] | ModelSpec | str | os.PathLike[str],
    engine: str | Sequence[str] | None = None,
    tp_sizes: Sequence[int] | int = (1, 2, 4, 8),
) -> list[PlanResult]:
    """Return what engines do with a model at these degrees, engine by engine.

    Args:
        config: the fields of a config.json, whole or a fragment; a ModelSpec; or a path to a
            config.json or its directory.
        engine: one name or several; None for tpcheck's reference decoder and every engine.
        tp_sizes: degrees, in the order in which results come.

    Raises:
        PlanError: the config is malformed; names the field and its value.
        TPCheckError: an engine that is not known, or a degree that is none.

    Example:
        >>> phi4 = {"num_attention_heads": 40, "num_key_value_heads": 10, "hidden_size": 5120}
        >>> [one.outcome for one in plan(phi4, engine="vllm", tp_sizes=(2, 4))]
        ['ok', 'error']
    """
    names = _engine_names(engine)
    degrees = _degrees(tp_sizes)
    parts = read_parts(_fields(config))
    return [result for name in names for result in _results(name, parts, degrees)]


def _engine_names(engine: str | Sequence[str] | None) -> tuple[str, ...]:
    if engine is None:
        return ENGINE_NAMES
    names = (engine,) if isinstance(engine, str) else tuple(engine)
    for name in names:
        if name not in ENGINE_NAMES:
            known = ", ".join(ENGINE_NAMES)
            raise TPCheckError(f"engine={name!r}, but should be one of {known}")
    return names


def _degrees(tp_sizes: Sequence[int] | int) -> tuple[int, ...]:
    sizes = (tp_sizes,) if isinstance(tp_sizes, int) else tuple(tp_sizes)
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise TPCheckError(f"tp_size={size!r}, but should be a whole number of at least 1")
    return sizes


def _fields(config: Mapping[str, Any] | ModelSpec | str | os.PathLike[str]) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if isinstance(config, (str, os.PathLike)):
        return _read(Path(config))
    if not hasattr(config, "to_fields"):
        kind = type(config).__name__
        raise PlanError(f"config: a {kind}, but should be fields, a ModelSpec or a path")
    return {name: value for name, value in config.to_fields().items() if value != 0}


def _read(path: Path) -> Mapping[str, Any]:
    # a scheduler hands over fields and should not wait for what only files need
    from tpcheck.files import read_json
    from tpcheck.hf.config import read_config

    if path.is_dir():
        return read_config(path)
    try:
        fields = read_json(path)
    except TPCheckError as error:
        raise PlanError(str(error)) from error
    if not isinstance(fields, dict):
        raise PlanError(f"{path}: a {type(fields).__name__}, but should be an object of fields")
    return fields


def _results(
    name: str, parts: tuple[tuple[str, Facts], ...], tp_sizes: Sequence[int]
) -> Iterator[PlanResult]:
    """Yield one engine's results; which rules apply, and what is legal, is found once for all."""
    engine = engine_named(name)
    surveys = [survey(name, facts) for _, facts in parts]
    legal = frozenset.intersection(*(one.legal for one in surveys))
    listed = tuple(sorted(legal))
    notes = tuple(note for one in surveys for note in one.notes)
    for tp_size in tp_sizes:
        decisions = [
            (part, facts, decide(engine, one, facts, tp_size))
            for (part, facts), one in zip(parts, surveys, strict=True)
        ]
        worst_part, facts, worst = max(decisions, key=lambda one: SEVERITY[one[2].finding.outcome])
        finding, rule = worst.finding, worst.rule
        where = f"{worst_part}: " if worst_part and finding.outcome != "ok" else ""
        reason = finding.reason if finding.outcome != "ok" else _summary(facts, tp_size)
        source = f"{name} {engine.version}"
        yield PlanResult(
            engine=name,
            tp_size=tp_size,
            outcome=finding.outcome,
            reason=where + " ".join(reason.split()),
            sizes=_merged_sizes(decisions),
            legal_tp_sizes=listed,
            source=f"{source}: {rule.source}" if rule else source,
            rule_id=rule.rule_id if rule else None,
            error_text=finding.error_text,
            fix=_fix(finding.fix, listed, tp_size) if finding.outcome in REFUSED else None,
            part=worst_part,
            notes=notes,
        )


def _near(legal: Sequence[int], tp_size: int) -> tuple[int, ...]:
    """Return the legal degrees next to this one; `legal` ascends."""
    at = bisect_left(legal, tp_size)
    above = legal[at + 1 : at + 2] if tp_size in legal[at : at + 1] else legal[at : at + 1]
    return (*legal[max(0, at - 1) : at], *above)


def _fix(fix: str | None, legal: Sequence[int], tp_size: int) -> str | None:
    """Say what would make a degree legal, and which ones next to it already are."""
    degrees = " or ".join(map(str, _near(legal, tp_size)))
    ways = (fix, f"use tp_size={degrees}" if degrees else None)
    return "; or ".join(way for way in ways if way) or None


def _merged_sizes(decisions: list[tuple[str, Facts, Decision]]) -> Mapping[str, Any]:
    if len(decisions) == 1:
        return decisions[0][2].sizes
    return {name: decision.sizes for name, _, decision in decisions}


def _summary(facts: Facts, tp_size: int) -> str:
    """Return one line of what each rank gets where every number divides."""
    said = [
        f"{value} {word} / {tp_size} = {value / tp_size:g}"
        for value, word in (
            (facts.num_attention_heads, "heads"),
            (facts.num_key_value_heads, "KV heads"),
            (facts.intermediate_size, "intermediate"),
            (facts.moe_intermediate_size, "expert width"),
            (facts.vocab_size, "vocab"),
            (facts.sharded_dim, "wide"),
        )
        if value is not None
    ]
    return ", ".join(said) or "no rule of this engine says otherwise"


__all__ = ["ENGINE_NAMES", "UP_TO", "PlanResult", "plan"]
