"""tpcheck: is a model split over N devices still the same function?

Requirement: `import tpcheck` is cheap and loads no torch, so that reports and gates run anywhere
and `tpcheck --help` answers at once. Every public name is found on first use. No module directly
under this package may carry the name of a public function: importing that module would replace
the function, and its second call would fail.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpcheck.captures.comparing import diff
    from tpcheck.deployment_gate.gating import gate
    from tpcheck.deployment_gate.requiring import require
    from tpcheck.drift_profiles.command import drift
    from tpcheck.errors import (
        BackendError,
        CheckFailed,
        GateRefused,
        IllegalDegreeError,
        PlanError,
        ScheduleError,
        SubjectError,
        TPCheckError,
    )
    from tpcheck.fallback.scoring import ScoringFallback
    from tpcheck.groups.base import TPGroup
    from tpcheck.placement import Partial, Placement, Replicate, Shard, Slices
    from tpcheck.planning import PlanResult, plan
    from tpcheck.records import Check, FirstDivergence, Report, Verdict
    from tpcheck.spec import Case, ModelSpec
    from tpcheck.subjects import subject
    from tpcheck.workflow import run

    __version__: str

_HOMES = {
    "BackendError": "errors",
    "Case": "spec",
    "Check": "records",
    "CheckFailed": "errors",
    "FirstDivergence": "records",
    "GateRefused": "errors",
    "IllegalDegreeError": "errors",
    "ModelSpec": "spec",
    "Partial": "placement",
    "Placement": "placement",
    "PlanError": "errors",
    "PlanResult": "planning",
    "Replicate": "placement",
    "Report": "records",
    "ScheduleError": "errors",
    "ScoringFallback": "fallback.scoring",
    "Shard": "placement",
    "Slices": "placement",
    "SubjectError": "errors",
    "TPCheckError": "errors",
    "TPGroup": "groups.base",
    "Verdict": "records",
    "diff": "captures.comparing",
    "drift": "drift_profiles.command",
    "gate": "deployment_gate.gating",
    "plan": "planning",
    "require": "deployment_gate.requiring",
    "run": "workflow",
    "subject": "subjects",
}

__all__ = [
    "BackendError",
    "Case",
    "Check",
    "CheckFailed",
    "FirstDivergence",
    "GateRefused",
    "IllegalDegreeError",
    "ModelSpec",
    "Partial",
    "Placement",
    "PlanError",
    "PlanResult",
    "Replicate",
    "Report",
    "ScheduleError",
    "ScoringFallback",
    "Shard",
    "Slices",
    "SubjectError",
    "TPCheckError",
    "TPGroup",
    "Verdict",
    "__version__",
    "diff",
    "drift",
    "gate",
    "plan",
    "require",
    "run",
    "subject",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = importlib.import_module("tpcheck.environment").tpcheck_version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"tpcheck.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'tpcheck' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
