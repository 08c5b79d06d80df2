"""Hypothesis strategies, and how a run draws from one without a test function round it.

Requirement: a subject that takes specs (`specs=`) is given specs drawn by Hypothesis, the same ones
for the same seed on every machine.
"""

from __future__ import annotations

from typing import Any

from tpcheck.errors import SubjectError
from tpcheck.spec import ModelSpec

_SKIPPED_DRAWS = 8
"""Hypothesis tries the simplest example first; a case is the one drawn after these."""


def draw_spec(strategy: Any, seed: int) -> ModelSpec:
    """Return the spec that `seed` draws from a Hypothesis strategy of specs or dicts of fields.

    Raises:
        SubjectError: the strategy draws something else.
        PlanError: the drawn fields make no spec.
    """
    import hypothesis

    drawn: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=_SKIPPED_DRAWS,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(spec: Any) -> None:
        drawn.append(spec)

    try:
        collect()
    except hypothesis.errors.HypothesisException as error:
        raise SubjectError(f"specs={strategy!r} cannot be drawn from: {error}") from error
    spec = drawn[-1]
    if isinstance(spec, dict):
        return ModelSpec.from_fields(spec)
    if not isinstance(spec, ModelSpec):
        raise SubjectError(f"specs drew {type(spec).__name__}, but should draw ModelSpec or a dict")
    return spec
