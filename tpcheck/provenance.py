"""What exactly a run speaks of: the model's bytes, what carried it, the sizes that were tried.

Requirement: a receipt may promise no more than was run. So the weights named are those that lay
there from before the first rank until after the last; the engine is the one that computed; and of
batch times tokens only the points that ran are listed, degree by degree, because every degree runs
lengths of its own, and one row of some of them (inputs: [One Row]).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tpcheck.environment import tpcheck_version
from tpcheck.errors import TPCheckError
from tpcheck.inputs import lengths_at, row_lengths
from tpcheck.machine import package_version
from tpcheck.model_digest import DigestedModel, digest_model
from tpcheck.records import Verdict
from tpcheck.spec import Case
from tpcheck.subjects import Subject, SubjectRef

Json = dict[str, Any]

_NEVER_RAN = ("ILLEGAL", "ERROR")
_NO_SINGLE_ROWS = "inputs: TP=1 raises for one row"
"""How a verdict says that its subject is made for more rows than one (case_runs.py)."""


@dataclass(frozen=True, slots=True)
class WatchedModel:
    """The model directory of a subject; nothing for one that has none.

    `reason` says why there is a directory without a digest: a run does not need one.
    """

    digested: DigestedModel | None = None
    reason: str = ""

    def facts(self) -> Json | None:
        """Return the report's `model`, once everything has run.

        Raises:
            TPCheckError: the directory changed meanwhile, so that nobody knows what ran.
        """
        if self.digested is None:
            return None
        self.digested.assert_unchanged()
        digest = self.digested.digest
        return {
            "directory": str(self.digested.directory),
            "config_sha256": digest.config_sha256,
            "weights_sha256": digest.weights_sha256,
            "files": digest.named(),
        }


def watch_model(ref: SubjectRef) -> WatchedModel:
    """Digest the directory of an `hf:DIR` or `ref:DIR` subject, before it runs."""
    if ref.kind not in ("hf", "ref"):
        return WatchedModel()
    try:
        return WatchedModel(digest_model(str(ref.value)))
    except TPCheckError as error:
        return WatchedModel(reason=str(error))


def engine_facts(ref: SubjectRef, arguments: Json) -> Json:
    """Return the report's `engine`: who computed the logits, and as what it was told to run."""
    if ref.kind == "hf":
        name, version = "transformers", package_version("transformers")
    elif ref.kind in ("ref", "builtin"):
        name, version = "tpcheck reference", tpcheck_version()
    else:
        name, version = "subject", None
    return {"name": name, "version": version, "arguments": arguments}


def range_tested(subject: Subject, verdicts: Sequence[Verdict]) -> list[Json]:
    """Return the report's `tested`: per degree, dtype and batch the lengths that ran.

    A subject whose own inputs take no length has no `lengths`, and `lengths_reason`.
    """
    found: dict[tuple[int, str, int], set[int]] = {}
    for verdict in verdicts:
        refused_as_planned = set(verdict.checks) == {"plan"}
        if verdict.outcome in _NEVER_RAN or refused_as_planned:
            continue
        case = Case.parse(verdict.case_id)
        row = found.setdefault((verdict.tp_size, verdict.dtype, case.batch), set())
        row |= set(lengths_at(subject, case, verdict.tp_size))
        if single := _single_rows(subject, case, verdict):
            found.setdefault((verdict.tp_size, verdict.dtype, 1), set()).update(single)
    return [
        {"tp_size": tp_size, "dtype": dtype, "batch": batch, "lengths": sorted(lengths)}
        | ({} if lengths else {"lengths_reason": "the subject makes its own inputs"})
        for (tp_size, dtype, batch), lengths in sorted(found.items())
    ]


def _single_rows(subject: Subject, case: Case, verdict: Verdict) -> list[int]:
    """Return the lengths that ran as one row besides the case's own; of token ids alone.

    Whether a subject's own inputs could be made of one row is not known here, so it is not said.
    """
    left_out = any(reason.startswith(_NO_SINGLE_ROWS) for reason in verdict.reasons)
    if left_out or subject.options.inputs is not None or not subject.options.sweep:
        return []
    return row_lengths(case, (verdict.tp_size,))
