"""make_receipt(report, policy, decision) -> Receipt: only what was proven, and until when.

Requirement: a receipt promises no more than the report shows and the policy asked for. It names
the asked degrees and dtypes, of the tested sizes those that ran there, and of the environment all
of it; a report that does not say what it ran on is no ground for one.

[Expiry] Evidence does not get younger by being written down again: with `max_age_days` a receipt
expires that long after its report was made. A policy without that limit gets DEFAULT_DAYS from now.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from tpcheck.deployment_gate.decision import Decision
from tpcheck.deployment_gate.policy import Policy, policy_digest
from tpcheck.deployment_gate.receipts import Receipt
from tpcheck.errors import TPCheckError
from tpcheck.records import Report, worst

DEFAULT_DAYS = 30.0

Json = dict[str, Any]

_CLASSES = {"sim": "simulated", "gloo": "cpu", "nccl-loopback": "gpu-loopback", "nccl": "gpus"}


def make_receipt(
    report: Report, policy: Policy, decision: Decision, *, report_sha256: str
) -> Receipt:
    """Return the receipt of a deployment that was allowed.

    Args:
        report: what was decided on.
        policy: what it was held against.
        decision: what came of it.
        report_sha256: of the report's file.

    Raises:
        TPCheckError: it was not allowed, or the report does not say what a receipt has to;
            names what is missing and the way out.
    """
    if not decision.allowed or decision.policy != policy_digest(policy):
        raise TPCheckError("receipt: there is none for a deployment that was not allowed")
    missing = next(_missing(report, policy), None)
    if missing is not None:
        raise TPCheckError(f"receipt: {missing}")
    asked = [v for v in report.verdicts if v.tp_size in policy.tp and v.dtype in policy.dtypes]
    return Receipt(
        subject=_clean(report.subject),
        outcome=worst([verdict.outcome for verdict in asked]),
        allowed=policy.allow,
        model=_model(report),
        tp=policy.tp,
        dtypes=policy.dtypes,
        backend=report.path.backend,
        reduction=_reduction(report),
        engine=_engine(report),
        nccl=_nccl(report),
        topology=_topology(report),
        tested=tuple(_tested(report, policy)),
        environment=_clean(dict(report.environment)),
        tpcheck=_clean(report.tpcheck),
        policy_sha256=decision.policy,
        report_sha256=report_sha256,
        created=_whole_seconds(decision.decided),
        expires=_expires(report, policy, decision),
    )


def _missing(report: Report, policy: Policy) -> Iterator[str]:
    """Yield what a receipt has to say and the report does not, most likely first."""
    if report.model is None:
        said = [note for note in report.notes if note.startswith("the model has no digest")]
        why = said[0] if said else f"{report.subject} has no model directory, so no digest"
        yield f"{why}; run hf:DIR or ref:DIR, whose weights can be named"
    again = "make the report anew with this tpcheck"
    for name in ("engine", "reduction", "tested"):
        if getattr(report, name) is None:
            yield f"the report does not say {name}; {again}"
    settings = report.environment.get("nccl_settings")
    if not isinstance(settings, dict) or not all(isinstance(v, str) for v in settings.values()):
        yield f"the report's environment does not say nccl_settings; {again}"
    nodes = report.environment.get("nodes")
    if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
        yield f"the report's environment does not say on how many nodes it ran; {again}"
    if report.path.backend not in _CLASSES:
        yield f"backend {report.path.backend} has no topology that could be held against a machine"
    if report.path.backend.startswith("nccl"):
        for name, value in (("GPU", _gpu(report)), ("NCCL version", _nccl_version(report))):
            if value is None:
                yield f"the report's environment does not say the {name}; {again}"
    ran = {(row["tp_size"], row["dtype"]) for row in report.tested or ()}
    for tp_size in policy.tp:
        for dtype in policy.dtypes:
            if (tp_size, dtype) not in ran:
                yield f"the report does not say which lengths ran at tp={tp_size} {dtype}; {again}"


def _model(report: Report) -> Json:
    assert report.model is not None
    return {
        "config_sha256": report.model["config_sha256"],
        "weights_sha256": report.model["weights_sha256"],
        "files": _clean(report.model.get("files") or {}),
    }


def _engine(report: Report) -> Json:
    assert report.engine is not None
    name, arguments = report.engine["name"], report.engine["arguments"]
    return {
        "name": _clean(name),
        "version": _clean(report.engine.get("version")),
        "arguments": _clean(arguments),
    }


def _nccl(report: Report) -> Json:
    settings = report.environment["nccl_settings"]
    return {"version": _nccl_version(report), "settings": _clean(settings)}


def _tested(report: Report, policy: Policy) -> Iterator[Json]:
    for row in report.tested or ():
        if row["tp_size"] in policy.tp and row["dtype"] in policy.dtypes:
            yield {name: row[name] for name in ("tp_size", "dtype", "batch", "lengths")}


def _reduction(report: Report) -> Json:
    """Return how sums were made, or what a drift report read of it from the outputs."""
    assert report.reduction is not None
    found = (report.drift or {}).get("findings")
    found = found if isinstance(found, list) else []
    texts = [
        one["text"]
        for one in found
        if isinstance(one, dict)
        and one.get("about") == "reduction"
        and isinstance(one.get("text"), str)
    ]
    basis = "identified" if texts and report.path.backend != "sim" else report.reduction["basis"]
    return {
        "kind": _clean(report.reduction["kind"]),
        "basis": _clean(basis),
        "identified": _clean(list(dict.fromkeys(texts))),
    }


def _topology(report: Report) -> Json:
    on_gpus = report.path.backend.startswith("nccl")
    count = report.environment.get("gpu_count")
    return {
        "class": _CLASSES[report.path.backend],
        "gpu": _gpu(report) if on_gpus else None,
        "gpu_count": count if on_gpus and isinstance(count, int) else None,
        "nodes": report.environment["nodes"],
    }


def _gpu(report: Report) -> str | None:
    """Return the model of the GPUs as a server's start reads it; None where there are several."""
    models = report.environment.get("gpu_models")
    if isinstance(models, list) and models:
        return models[0] if len(models) == 1 and isinstance(models[0], str) else None
    gpu = report.environment.get("gpu")
    return gpu if isinstance(gpu, str) else None


def _nccl_version(report: Report) -> str | None:
    if not report.path.backend.startswith("nccl"):
        return None
    found = report.environment.get("nccl_library") or report.environment.get("nccl")
    return found if isinstance(found, str) else None


def _expires(report: Report, policy: Policy, decision: Decision) -> datetime:
    """Return the moment of [Expiry]."""
    if policy.max_age_days is None:
        return _whole_seconds(decision.decided) + timedelta(days=DEFAULT_DAYS)
    made = datetime.fromisoformat(report.created)  # the gate allowed it, so it was read before
    try:
        expires = _whole_seconds(made) + timedelta(days=policy.max_age_days)
    except OverflowError as error:
        raise TPCheckError(
            f"receipt: max_age_days={policy.max_age_days:g} is beyond any calendar"
        ) from error
    if _whole_seconds(expires) <= _whole_seconds(decision.decided):
        raise TPCheckError(
            f"receipt: it would expire at {expires:%Y-%m-%dT%H:%M:%SZ}, the moment it is made;"
            " make the report anew"
        )
    return _whole_seconds(expires)


def _whole_seconds(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(microsecond=0)


def _clean(value: Any) -> Any:
    """Return a copy that UTF-8 can hold: variables of an environment may be any bytes."""
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return value
