"""What `tpcheck plan` finds, as JSON records: plans, memory, and what a checkpoint's headers say.

Requirement: one record per engine and degree with stable keys, so that a scheduler reads the same
as a person; an exit code that means "an asked degree cannot run". No torch: a plan is there in
milliseconds, on machines that have none.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tpcheck.engines.parts import read_parts
from tpcheck.engines.registry import engine_named
from tpcheck.errors import PlanError, TPCheckError
from tpcheck.files import read_json
from tpcheck.hf.config import read_config
from tpcheck.json_reader import parse_json
from tpcheck.plan_memory import Request, rank_memory
from tpcheck.planning import PlanResult, plan

DEFAULT_TP_SIZES = (2, 4, 8)
STDIN = "-"

Record = dict[str, Any]


def plan_records(
    model: str,
    engines: Sequence[str] | None = None,
    tp_sizes: Sequence[int] | None = None,
    request: Request = Request(),  # noqa: B008 - frozen
    *,
    weights: bool = False,
) -> list[Record]:
    """Return one record per engine and degree: a PlanResult's fields, `memory`, `checkpoint`.

    Args:
        model: a config.json, the directory that holds one, or "-" for stdin.
        engines: names, None for all.
        tp_sizes: degrees, None for 2, 4 and 8.
        request: what the KV cache has to hold.
        weights: also hold the headers of the directory's safetensors against the config.

    Raises:
        PlanError: the config is malformed; names the field and its value.
        TPCheckError: nothing to read, an unknown engine, or a file that is no safetensors file.
    """
    config = read_model(model)
    if weights and not Path(model).is_dir():
        raise TPCheckError(f"--weights: MODEL={model!r}, but should be a directory of safetensors")
    _need_heads(config, "stdin" if model == STDIN else model)
    degrees = tuple(tp_sizes or DEFAULT_TP_SIZES)
    held = _checkpoint(model, config, degrees) if weights else dict.fromkeys(degrees)
    records = config_records(config, engines, degrees, request)
    return [{"model": model, **record, "checkpoint": held[record["tp_size"]]} for record in records]


def config_records(
    config: Mapping[str, Any],
    engines: Sequence[str] | None,
    tp_sizes: Sequence[int],
    request: Request,
) -> list[Record]:
    """Return one record per engine and degree, from a config's fields alone.

    Raises:
        PlanError: the config is malformed; names the field and its value.
        TPCheckError: an unknown engine.
    """
    return [
        {**_plan_fields(result), "memory": _memory(config, result, request), "checkpoint": None}
        for result in plan(config, engines, tp_sizes)
    ]


def exit_code(records: Sequence[Record], *, asked: bool) -> int:
    """Return 1 when a degree cannot run, or when a checkpoint has problems; else 0.

    Args:
        asked: engines were asked for, so that each of them has to run every degree; otherwise one
            engine per degree is enough.
    """
    enough = all if asked else any
    degrees = dict.fromkeys(record["tp_size"] for record in records)
    runs = all(
        enough(record["legal"] for record in records if record["tp_size"] == degree)
        for degree in degrees
    )
    sound = not any(record["checkpoint"] and record["checkpoint"]["problems"] for record in records)
    return 0 if runs and sound else 1


def read_model(model: str) -> Mapping[str, Any]:
    """Return the fields of a config.json that is a file, in a directory, or on stdin.

    Raises:
        SubjectError: a directory without config.json; says what it holds.
        PlanError: not a JSON object.
        TPCheckError: the file cannot be read.
    """
    if model == STDIN:
        return _object(_read_stdin(), "stdin")
    path = Path(model)
    if path.is_dir():
        return read_config(path)
    return _object(read_json(path), model)


def _need_heads(config: Mapping[str, Any], where: str) -> None:
    """Raise where no decoder says its heads: every answer would be about something else.

    Raises:
        PlanError: names the field, and what takes a fragment.
    """
    decoders = [facts for _, facts in read_parts(config) if facts.role == "text"]
    # a model of state-space layers alone has a width and no attention
    if not any(facts.num_attention_heads or facts.mamba_intermediate_size for facts in decoders):
        raise PlanError(
            f"{where}: num_attention_heads=None, but should be the number of heads, under this or"
            " another model's name of it (n_head, n_heads, num_heads); tpcheck.plan() takes"
            " fragments of a config"
        )


def _object(fields: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(fields, dict):
        raise PlanError(f"{where}: a {type(fields).__name__}, but should be an object of fields")
    return fields


def _read_stdin() -> Any:
    if sys.stdin is None:
        raise TPCheckError("stdin: is closed, but should be a config.json")
    try:
        return parse_json(sys.stdin.buffer.read())
    except (ValueError, RecursionError) as error:
        raise TPCheckError(f"stdin: is not JSON: {error}") from error


def _plan_fields(result: PlanResult) -> Record:
    return {
        "engine": result.engine,
        "tp_size": result.tp_size,
        "outcome": result.outcome,
        "legal": result.is_legal,
        "reason": result.reason,
        "fix": result.fix,
        "error_text": result.error_text,
        "rule_id": result.rule_id,
        "part": result.part,
        "sizes": dict(result.sizes),
        "legal_tp_sizes": list(result.legal_tp_sizes),
        "nearest_legal_tp_sizes": list(result.nearest_legal_tp_sizes),
        "source": result.source,
        "notes": list(result.notes),
    }


def _memory(config: Mapping[str, Any], result: PlanResult, request: Request) -> Record | None:
    """Return what a rank holds; None at a degree that cannot run, where nobody holds anything."""
    if not result.is_legal:
        return None
    held = rank_memory(
        config,
        result.tp_size,
        request,
        sizes=result.sizes,
        outcome=result.outcome,
        splits_towers=engine_named(result.engine).splits_towers,
    )
    return {**asdict(held), "missing": list(held.missing), **asdict(request)}


def _checkpoint(
    directory: str, config: Mapping[str, Any], degrees: Sequence[int]
) -> dict[int, Record | None]:
    from tpcheck.header_check import header_findings  # only --weights needs it

    found = header_findings(Path(directory), config, degrees)
    return {degree: found.to_json(degree) for degree in degrees}
