"""Cases of a subject that takes specs: what a user's own strategy draws, and all else of a case.

Requirement: a strategy of specs may draw ModelSpecs or dicts of their fields; anything else is
named. Batch, length and seed are drawn beside the spec, or pinned.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tpcheck.errors import SubjectError
from tpcheck.spec import Case, ModelSpec

LARGEST_SEED = 999
"""Seeds stand in case ids and commands, and more than a thousand weights are not needed."""


def generated_cases(
    specs: Any, *, longest: int, batch: int | None = None, seq_len: int | None = None
) -> st.SearchStrategy[Case]:
    """Return a strategy of cases whose specs are drawn from `specs`.

    Args:
        longest: the longest input, where the spec allows it.
        batch: rows of every input; drawn from 1 to 3 when not given.
        seq_len: tokens of the longest input; drawn when not given.

    Raises:
        SubjectError: `specs` is no strategy; when drawn from, that it draws something else than
            specs or fields.
    """
    if not isinstance(specs, st.SearchStrategy):
        raise SubjectError(f"specs={specs!r}, but should be a Hypothesis strategy of specs")
    rows = st.just(batch) if batch else st.integers(1, 3)
    tokens = st.just(seq_len) if seq_len else st.integers(1, longest)
    return st.builds(_case, specs, rows, tokens, st.integers(0, LARGEST_SEED))


def as_spec(drawn: Any) -> ModelSpec:
    """Return what a strategy of specs drew as a spec: a ModelSpec, or a dict of its fields.

    Raises:
        SubjectError: it is something else.
        PlanError: the fields make no spec.
    """
    if isinstance(drawn, dict):
        return ModelSpec.from_fields(drawn)
    if not isinstance(drawn, ModelSpec):
        raise SubjectError(
            f"specs drew {type(drawn).__name__}, but should draw ModelSpec or a dict"
        )
    return drawn


def _case(drawn: Any, batch: int, seq_len: int, seed: int) -> Case:
    spec = as_spec(drawn)
    return Case(seed, batch, min(seq_len, spec.max_position_embeddings), spec)
