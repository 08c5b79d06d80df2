"""The exceptions of tpcheck: eight classes, one root.

Requirement: a user's mistake ends in one clear sentence and exit code 2, never in a traceback.
Every message names the value, what it should be and the way out; values that a caller may want to
act on are attributes too. All of them survive a pickle, because they cross process borders.
"""

from collections.abc import Sequence
from typing import Any


class TPCheckError(Exception):
    """Root of every error that tpcheck raises on purpose."""


class SubjectError(TPCheckError):
    """The subject cannot be found, shipped, built or called the way it was declared."""


class PlanError(TPCheckError):
    """A model's configuration is malformed, so no plan can be made from it."""


class IllegalDegreeError(TPCheckError):
    """The subject or its plan refuses this TP degree.

    Subjects raise it with a plain message. A plan adds the degrees that would be legal.
    """

    def __init__(self, message: str, *, legal_tp_sizes: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.legal_tp_sizes = tuple(legal_tp_sizes)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_illegal_degree, (self.args[0], self.legal_tp_sizes))


class ScheduleError(TPCheckError):
    """Ranks do not call the same collectives in the same order with the same shapes."""


class BackendError(TPCheckError):
    """This backend, machine or environment cannot do what was asked."""


class GateRefused(TPCheckError):
    """A deployment that the policy does not allow.

    `refusals` are all the reasons, each with its `reason` and `settle`, the command that would
    settle it; the message lists them too.
    """

    def __init__(self, message: str, *, refusals: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.refusals = tuple(refusals)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_gate_refused, (self.args[0], self.refusals))


class CheckFailed(TPCheckError):
    """A subject whose verdict is not PASS; the message is the whole text report."""


def _rebuild_gate_refused(message: str, refusals: tuple[Any, ...]) -> GateRefused:
    return GateRefused(message, refusals=refusals)


def _rebuild_illegal_degree(message: str, legal: tuple[int, ...]) -> IllegalDegreeError:
    return IllegalDegreeError(message, legal_tp_sizes=legal)
