"""What every engine does with a model at a degree, from its config alone. Torch-free.

Requirement: a person learns in milliseconds, before a model is downloaded and GPUs are booked,
which degrees run, what is padded or replicated, and why the others do not. A nested config is
planned part by part and its worst part decides. What an engine does is in tpcheck/engines, from
rules with their source; nothing is looked up by model name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpcheck.engines.base import REFUSED, SEVERITY
from tpcheck.engines.facts import Facts
from tpcheck.engines.parts import read_parts
from tpcheck.engines.survey import ENGINES, UP_TO, Decision, decide, survey
from tpcheck.errors import PlanError, TPCheckError
from tpcheck.spec import ModelSpec

ENGINE_NAMES = tuple(ENGINES)
"""The engines that `plan` knows; "reference" is tpcheck's own decoder."""


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
        below = [size for size in self.legal_tp_sizes if size < self.tp_size][-1:]
        above = [size for size in self.legal_tp_sizes if size > self.tp_size][:1]
        return (*below, *above)


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
    return [_result(name, parts, degree) for name in names for degree in degrees]


def _engine_names(engine: str | Sequence[str] | None) -> tuple[str, ...]:
    if engine is None:
        return ENGINE_NAMES
    names = (engine,) if isinstance(engine, str) else tuple(engine)
    for name in names:
        if name not in ENGINES:
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
    if isinstance(config, ModelSpec):
        fields = config.to_fields()
        return {name: value for name, value in fields.items() if value != 0}
    return _read(Path(config))


def _read(path: Path) -> Mapping[str, Any]:
    # a scheduler hands over fields and should not wait for what only files need
    from tpcheck.files import read_json
    from tpcheck.hf_config import read_config

    if path.is_dir():
        return read_config(path)
    try:
        fields = read_json(path)
    except TPCheckError as error:
        raise PlanError(str(error)) from error
    if not isinstance(fields, dict):
        raise PlanError(f"{path}: a {type(fields).__name__}, but should be an object of fields")
    return fields


def _result(engine: str, parts: tuple[tuple[str, Facts], ...], tp_size: int) -> PlanResult:
    decisions = [(name, facts, decide(engine, facts, tp_size)) for name, facts in parts]
    worst_name, facts, worst = max(decisions, key=lambda one: SEVERITY[one[2].finding.outcome])
    finding, rule = worst.finding, worst.rule
    surveys = [survey(engine, one) for _, one in parts]
    legal = frozenset.intersection(*(one.legal for one in surveys))
    where = f"{worst_name}: " if worst_name and finding.outcome != "ok" else ""
    reason = finding.reason if finding.outcome != "ok" else _summary(facts, tp_size)
    version = ENGINES[engine].version
    return PlanResult(
        engine=engine,
        tp_size=tp_size,
        outcome=finding.outcome,
        reason=where + " ".join(reason.split()),
        sizes=_merged_sizes(decisions),
        legal_tp_sizes=tuple(sorted(legal)),
        source=f"{engine} {version}: {rule.source}" if rule else f"{engine} {version}",
        rule_id=rule.rule_id if rule else None,
        error_text=finding.error_text,
        fix=_fix(finding.fix, legal, tp_size) if finding.outcome in REFUSED else None,
        part=worst_name,
        notes=tuple(note for one in surveys for note in one.notes),
    )


def _fix(fix: str | None, legal: frozenset[int], tp_size: int) -> str | None:
    """Say what would make a degree legal, and which ones next to it already are."""
    near = [max((size for size in legal if size < tp_size), default=0)]
    near.append(min((size for size in legal if size > tp_size), default=0))
    degrees = " or ".join(str(size) for size in near if size)
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
