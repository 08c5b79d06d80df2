"""What a fault is, and the small tools that plant one in one rank's decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tpcheck.errors import SubjectError

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup

Decoder = Any
"""The reference decoder; faults reach into its modules further than types can follow."""

Plant = Callable[[Decoder, "TPGroup"], None]


@dataclass(frozen=True, slots=True)
class Fault:
    """One bug.

    thread: the public report it re-makes, empty where we know of none. caught_by: the check that
    has to fail. needs: spec fields it takes to show. min_tp: the smallest degree at which it does
    anything. drift: whether drift alone sees it in bfloat16; where it cannot, `reason` says why.
    dtypes: the deployed dtypes in which it shows, all when empty.
    """

    name: str
    thread: str
    description: str
    caught_by: str
    plant: Plant
    needs: Mapping[str, Any] = field(default_factory=dict)
    min_tp: int = 2
    drift: bool = True
    reason: str = ""
    dtypes: tuple[str, ...] = ()


FAULTS: dict[str, Fault] = {}


def fault(
    thread: str, description: str, caught_by: str = "structural", **options: Any
) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        name = plant.__name__
        if name in FAULTS:
            raise SubjectError(f"fault {name!r} is defined twice")
        FAULTS[name] = Fault(name, thread, description, caught_by, plant, **options)
        return plant

    return register


class Seam:
    """A TPGroup with one collective replaced, for one module of one rank."""

    def __init__(self, tp: TPGroup, **replaced: Callable[..., torch.Tensor]) -> None:
        self._tp = tp
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tp, name)


def reduce_with(module: Any, all_reduce: Callable[..., torch.Tensor]) -> None:
    """Give one module another all-reduce."""
    module.tp = Seam(module.tp, all_reduce=all_reduce)


def set_weight(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    parameter.data = value.clone()


def full_weight(tp: TPGroup, decoder: Decoder, name: str) -> torch.Tensor:
    """The whole generated weight behind a logical name."""
    from tpcheck.reference.layout import logical_tensors

    return tp.weight(name, *logical_tensors(decoder.spec)[name].shape)
