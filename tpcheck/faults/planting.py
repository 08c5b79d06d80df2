"""What a fault is, and the small tools that plant one in one rank's decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tpcheck.errors import SubjectError
from tpcheck.shard_plan import STRICT, SplitPolicy

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup
    from tpcheck.spec import ModelSpec

Decoder = Any
"""The reference decoder; faults reach into its modules further than types can follow."""

Plant = Callable[[Decoder, "TPGroup"], None]

Accepts = Callable[["ModelSpec", int], "ModelSpec"]

MANY_HEADS = {"num_attention_heads": 48, "num_key_value_heads": 24, "head_dim": 4}
"""Several query heads per KV head and several KV heads per rank up to TP=8: with one of either the
order of heads, and a statistic over them, cannot go wrong."""

WIDE_HEADS = {"head_dim": 48}
"""A head that divides into even pieces at degrees 2, 3, 4, 6 and 8."""

ONE_KV_HEAD = {"num_key_value_heads": 1}
"""Every rank holds a copy of it, at every degree."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One bug.

    thread: the public report it re-makes. caught_by: the check that has to fail. needs: spec fields
    it takes to show. min_tp: the smallest degree at which it does anything. drift: whether drift
    alone sees it at every degree, in all dtypes or in those named; where it need not, `reason` says
    why. dtypes: the deployed dtypes in which it shows, all when empty. accepts: for a plan that
    accepts what it should refuse, the spec that is run in place of the illegal one. policy: or how
    the illegal one is split.
    """

    name: str
    thread: str
    description: str
    caught_by: str
    plant: Plant
    needs: Mapping[str, Any] = field(default_factory=dict)
    min_tp: int = 2
    drift: bool | tuple[str, ...] = True
    reason: str = ""
    dtypes: tuple[str, ...] = ()
    accepts: Accepts | None = None
    policy: SplitPolicy = STRICT

    def drift_sees(self, dtype: str) -> bool:
        """Say whether drift alone has to see it in a deployed dtype."""
        return self.drift if isinstance(self.drift, bool) else dtype in self.drift


FAULTS: dict[str, Fault] = {}


def fault(
    thread: str, description: str, caught_by: str = "structural", **options: Any
) -> Callable[[Plant], Plant]:
    """Register the decorated function as what plants a fault of its name."""

    def register(plant: Plant) -> Plant:
        _register(Fault(plant.__name__, thread, description, caught_by, plant, **options))
        return plant

    return register


def plan_fault(
    thread: str, description: str, *, needs: Mapping[str, Any]
) -> Callable[[Accepts], Accepts]:
    """Register the decorated function as a plan that takes the spec `needs` makes for legal.

    It returns the spec that ranks then run with.
    """

    def register(accepts: Accepts) -> Accepts:
        _register(
            Fault(
                accepts.__name__,
                thread,
                description,
                "plan",
                lambda decoder, tp: None,
                needs=needs,
                drift=False,
                reason="a degree that should have been refused is not compared",
                accepts=accepts,
            )
        )
        return accepts

    return register


def _register(new: Fault) -> None:
    if new.name in FAULTS:
        raise SubjectError(f"fault {new.name!r} is defined twice")
    FAULTS[new.name] = new


def planted_decoder(spec: ModelSpec, fault: Fault | None, tp: TPGroup) -> Decoder:
    """Return one rank's reference decoder, at TP > 1 with a fault planted in it.

    Raises:
        IllegalDegreeError: the plan refuses tp.size and the fault does not accept it.
    """
    from tpcheck.reference.decoder import build_decoder

    if fault is None or tp.size == 1:
        return build_decoder(spec, tp)
    accepted = fault.accepts(spec, tp.size) if fault.accepts else spec
    decoder = build_decoder(accepted, tp, policy=fault.policy)
    fault.plant(decoder, tp)
    return decoder


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


def gather_with(module: Any, all_gather: Callable[..., torch.Tensor]) -> None:
    """Give one module another all-gather."""
    module.tp = Seam(module.tp, all_gather=all_gather)


def change_output(module: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change what one module returns."""
    module.register_forward_hook(lambda _, __, output: change(output))


def in_order(terms: torch.Tensor) -> torch.Tensor:
    """Add up the rows of `terms` one after the other."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def set_weight(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Replace one rank's weight."""
    parameter.data = value.clone()


def full_weight(tp: TPGroup, decoder: Decoder, name: str) -> torch.Tensor:
    """The whole generated weight behind a logical name."""
    from tpcheck.reference.layout import logical_tensors

    return tp.weight(name, *logical_tensors(decoder.spec)[name].shape)
