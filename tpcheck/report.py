"""Report <-> JSON, the only thing that is stored, gated and rendered. Torch-free.

Requirement: a report that was written can be trusted by a reader that never saw the run. So the
writer replaces a file in one step or not at all, no NaN or Infinity ever stands in it (null, and a
`<name>_reason` beside it), and the reader refuses, naming the JSON path, whatever it cannot vouch
for: another schema, a wrong type, an outcome that its own verdicts and checks contradict. Nothing
is recomputed: what a verdict says is decided in verdict.py alone. Keys it does not know are left
out, because adding keys is free.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from tpcheck.errors import TPCheckError
from tpcheck.files import json_of, read_json, write_text
from tpcheck.json_reader import JsonReader, brief_name, refuse
from tpcheck.records import (
    CHECK_NAMES,
    FAIL,
    OUTCOMES,
    PASS,
    SCHEMA,
    SKIPPED,
    Check,
    FirstDivergence,
    Path,
    Report,
    Verdict,
)

Json = dict[str, Any]

_RUN = ("model", "engine", "tested", "reduction")
"""What exactly was run: absent where it is not known."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


def to_json(report: Report) -> Json:
    """Return the report as plain JSON values, keys as in the contract, every number finite."""
    top: Json = finite(
        {
            "schema": SCHEMA,
            "outcome": report.outcome,
            "subject": report.subject,
            "tpcheck": report.tpcheck,
            "environment": report.environment,
            "path": {
                "backend": report.path.backend,
                "collectives": report.path.collectives,
                "same_as_deployed": report.path.same_as_deployed,
                "differences": report.path.differences,
            },
            "sensitivity": report.sensitivity,
            "notes": report.notes,
            "verdicts": [_verdict_to_json(verdict) for verdict in report.verdicts],
        }
        | ({} if report.drift is None else {"drift": report.drift})
        | {name: getattr(report, name) for name in _RUN if getattr(report, name) is not None}
        | ({"created": report.created} if report.created else {})
    )
    return top


def from_json(value: Any) -> Report:
    """Return the report that `to_json` made this value from.

    Raises:
        TPCheckError: names the JSON path of the first value that is missing, has another type,
            or contradicts the rest of the report.
    """
    top = JsonReader(value, "report")
    schema = top.get("schema", str)
    if schema != SCHEMA:
        refuse("report.schema", schema, repr(SCHEMA))
    outcome = top.choice("outcome", OUTCOMES)
    report = Report(
        subject=top.get("subject", str),
        verdicts=tuple(_verdict_from_json(item) for item in top.items("verdicts", dict)),
        environment=top.get("environment", dict),
        path=_path_from_json(top.reader("path")),
        tpcheck=top.get("tpcheck", str),
        sensitivity=top.optional("sensitivity", dict),
        drift=top.optional("drift", dict),
        notes=tuple(item.value for item in top.items("notes", str, default=())),
        model=_model_from_json(top),
        engine=_engine_from_json(top),
        tested=_tested_from_json(top),
        reduction=_reduction_from_json(top),
        created=top.optional("created", str) or "",
    )
    if report.outcome != outcome:
        refuse("report.outcome", outcome, f"{report.outcome!r}, the worst of its verdicts")
    seen: dict[tuple[str, int, str], int] = {}
    for i, verdict in enumerate(report.verdicts):
        first = seen.setdefault((verdict.case_id, verdict.tp_size, verdict.dtype), i)
        if first != i:
            key = f"{verdict.case_id}, tp_size={verdict.tp_size}, {verdict.dtype}"
            refuse(f"report.verdicts[{i}]", key, f"there once (it is report.verdicts[{first}])")
    return report


def write_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the report as JSON; the file is there whole or not at all.

    Raises:
        TPCheckError: the file cannot be written; names the path.
    """
    write_text(json.dumps(to_json(report), indent=1, ensure_ascii=False, allow_nan=False), path)


def read_report(path: str | os.PathLike[str]) -> Report:
    """Read a report and check that it is consistent.

    Raises:
        TPCheckError: the file cannot be read, is not JSON, or `from_json` refuses it.
    """
    return _vouched(read_json(path), path)


def parse_report(data: bytes, path: str | os.PathLike[str]) -> Report:
    """Return the report in the bytes of a file, as `read_report` does.

    Raises:
        TPCheckError: as `read_report`; names the path.
    """
    return _vouched(json_of(data, path), path)


def _vouched(value: Any, path: str | os.PathLike[str]) -> Report:
    try:
        return from_json(value)
    except TPCheckError as error:
        raise TPCheckError(f"{path}: is not a tpcheck report: {error}") from error


def _verdict_to_json(verdict: Verdict) -> Json:
    known = [name for name in CHECK_NAMES if name in verdict.checks]
    names = known + [name for name in verdict.checks if name not in known]
    first = verdict.first_divergence
    return {
        "case_id": verdict.case_id,
        "tp_size": verdict.tp_size,
        "dtype": verdict.dtype,
        "outcome": verdict.outcome,
        "checks": {name: _check_to_json(verdict.checks[name]) for name in names},
        "reasons": verdict.reasons,
        "first_divergence": None if first is None else _divergence_to_json(first),
        "repro": verdict.repro,
    } | ({"script": verdict.script} if verdict.script else {})


def _check_to_json(check: Check) -> Json:
    reason = {"reason": check.reason} if check.reason else {}
    return {"outcome": check.outcome, **check.facts, **reason}


def _divergence_to_json(first: FirstDivergence) -> Json:
    value: Json = {"fqn": first.fqn, "rank": first.rank, "index": first.index}
    if first.ulp is not None:
        value["ulp"] = first.ulp
    if first.detail:
        value["detail"] = first.detail
    return value


def finite(value: Any) -> Any:
    """Return a copy in plain JSON types; a float that is not finite is null and says which."""
    if isinstance(value, Mapping):
        copy: Json = {}
        for key, item in value.items():
            copy[str(key)] = finite(item)
            lost = _lost(item)
            if lost:
                copy.setdefault(f"{key}_reason", f"was {lost}, which JSON cannot hold")
        return copy
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    # a subject may attach any fact; a finished run is not lost for it
    return str(value)


def _lost(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, list | tuple):
        return next(filter(None, map(_lost, value)), "")
    return ""


def _verdict_from_json(item: JsonReader) -> Verdict:
    first = item.optional("first_divergence", dict)
    checks = item.reader("checks")
    verdict = Verdict(
        case_id=item.get("case_id", str),
        tp_size=item.get("tp_size", int),
        dtype=item.get("dtype", str),
        outcome=item.choice("outcome", OUTCOMES),
        checks={name: _check_from_json(checks.reader(name)) for name in checks.value},
        reasons=tuple(reason.value for reason in item.items("reasons", str, default=())),
        first_divergence=None
        if first is None
        else _divergence_from_json(item.reader("first_divergence")),
        repro=item.get("repro", str, default=""),
        script=item.get("script", str, default=""),
    )
    failed = [name for name, check in verdict.checks.items() if _decides(name, check)]
    if verdict.outcome == PASS and failed:
        name = brief_name(failed[0])
        refuse(f"{item.path}.outcome", PASS, f"no PASS, because its check {name} failed")
    return verdict


def _decides(name: str, check: Check) -> bool:
    # an allclose at the derived tolerance may fail in a verdict that is PASS: it is only shown
    return check.outcome == FAIL and (name != "allclose" or check.facts.get("decides") is True)


def _check_from_json(item: JsonReader) -> Check:
    outcome = item.choice("outcome", (PASS, FAIL, SKIPPED))
    reason = item.get("reason", str, default="")
    if outcome != PASS and not reason:
        refuse(f"{item.path}.reason", reason, f"a sentence, because the check is {outcome}")
    facts = {key: value for key, value in item.value.items() if key not in ("outcome", "reason")}
    return Check(outcome, reason, facts)


def _divergence_from_json(item: JsonReader) -> FirstDivergence:
    ulp = item.optional("ulp", (int, float))
    return FirstDivergence(
        fqn=item.get("fqn", str),
        rank=item.optional("rank", int),
        index=item.get("index", str, default=""),
        ulp=None if ulp is None else float(ulp),
        detail=item.get("detail", str, default=""),
    )


def _path_from_json(item: JsonReader) -> Path:
    collectives = item.reader("collectives")
    return Path(
        backend=item.get("backend", str),
        collectives={name: collectives.get(name, int) for name in collectives.value},
        same_as_deployed=item.get("same_as_deployed", bool),
        differences=tuple(text.value for text in item.items("differences", str)),
    )


def _model_from_json(top: JsonReader) -> Json | None:
    if top.value.get("model") is None:
        return None
    item = top.reader("model")
    item.get("directory", str)
    files = item.reader("files", dict, {})
    digests = [(item, "config_sha256"), (item, "weights_sha256")]
    for where, name in digests + [(files, name) for name in files.value]:
        found = where.reader(name, str)
        if not _SHA256.fullmatch(found.value):
            refuse(found.path, found.value, "64 digits in lower-case hexadecimal")
    return dict(item.value)


def _engine_from_json(top: JsonReader) -> Json | None:
    if top.value.get("engine") is None:
        return None
    item = top.reader("engine")
    item.get("name", str)
    item.optional("version", str)
    item.get("arguments", dict)
    return dict(item.value)


def _reduction_from_json(top: JsonReader) -> Json | None:
    if top.value.get("reduction") is None:
        return None
    item = top.reader("reduction")
    item.get("kind", str)
    item.get("basis", str)
    return dict(item.value)


def _tested_from_json(top: JsonReader) -> tuple[Json, ...] | None:
    if top.value.get("tested") is None:
        return None
    rows = top.items("tested", dict)
    for row in rows:
        row.get("dtype", str)
        for name in ("tp_size", "batch"):
            if row.get(name, int) < 1:
                refuse(f"{row.path}.{name}", row.value[name], "at least 1")
        for length in row.items("lengths", int):
            if length.value < 1:
                refuse(length.path, length.value, "at least 1")
    return tuple(dict(row.value) for row in rows)
