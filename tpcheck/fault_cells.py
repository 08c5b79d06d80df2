"""One planted fault at one degree in one dtype: which checks see it, and how soon.

Requirement: a fault is planted where it can show. Its spec is one that the degree allows (or, for
a fault of the plan, refuses), small enough for milliseconds a forward; its subject takes that spec
as a generated one, so that the verdicts are those of any generated case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tpcheck.adapters.reference import BUILTINS
from tpcheck.errors import SubjectError
from tpcheck.faults import FAULTS, Fault
from tpcheck.faults.planting import planted_decoder
from tpcheck.groups.jobs import Ranks
from tpcheck.investigation import Settings
from tpcheck.judging import CaseJudge, Seen
from tpcheck.records import FAIL
from tpcheck.run_plan import DEFAULT_BATCH, RunPlan, make_run_plan
from tpcheck.shard_plan import STRICT, SplitPolicy, legal_tp_sizes
from tpcheck.spec import Case, ModelSpec
from tpcheck.subjects import make_ref, resolve, subject

if TYPE_CHECKING:
    from tpcheck.groups.base import TPGroup

SEQ_LEN = 16

_LLAMA = replace(BUILTINS["llama-tiny"][1], num_hidden_layers=1)
_BASES = (
    _LLAMA,
    replace(_LLAMA, hidden_size=48, num_attention_heads=6, num_key_value_heads=3, head_dim=8),
    replace(_LLAMA, num_attention_heads=60, num_key_value_heads=30, intermediate_size=120),
)
"""For degrees 2, 4 and 8; for 3 and 6; for 5, 10 and 15."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault at one degree in one dtype.

    cases: how many it took until the check that names the fault failed; None where none did.
    seen_by: the checks that failed in the first case, or in the one where that check did.
    drift: whether the drift check failed in the first case.
    """

    tp_size: int
    dtype: str
    cases: int | None
    seen_by: frozenset[str]
    drift: bool


class FaultBench:
    """One fault, ready to be planted at any degree; what TP=1 says is kept between degrees."""

    def __init__(
        self, fault: Fault, ranks: Ranks, tp_sizes: Sequence[int], *, seed: int, casts: bool = False
    ) -> None:
        self._fault = fault
        self._ranks = ranks
        self._plan = _run_plan(fault, tp_sizes, ranks.label, seed, casts)
        self._judges: dict[tuple[Case, str], CaseJudge] = {}

    def cell(self, tp_size: int, dtype: str, max_cases: int) -> Cell:
        """Run cases until the check that names the fault fails, at most `max_cases`."""
        first = seen = self._failed(tp_size, dtype, 0)
        count = 1
        while self._fault.caught_by not in seen and count < max_cases:
            seen = self._failed(tp_size, dtype, count)
            count += 1
        caught = self._fault.caught_by in seen
        return Cell(
            tp_size,
            dtype,
            count if caught else None,
            seen if caught else first,
            "drift" in first,
        )

    def _failed(self, tp_size: int, dtype: str, offset: int) -> frozenset[str]:
        """Return the checks that fail on one case."""
        spec = spec_for(self._fault, tp_size)
        case = Case(self._plan.seed + offset, DEFAULT_BATCH, SEQ_LEN, spec)
        if (case, dtype) not in self._judges:
            judge = CaseJudge(self._plan, self._ranks, case, dtype, Seen(), self._plan.settings)
            self._judges[case, dtype] = judge
        checks = self._judges[case, dtype].verdict(tp_size).checks
        return frozenset(name for name, check in checks.items() if check.outcome == FAIL)


def find_fault(name: str) -> Fault:
    """Return a fault by its name.

    Raises:
        SubjectError: there is none; names those that there are.
    """
    if name not in FAULTS:
        raise SubjectError(f"fault={name!r}, but should be one of {', '.join(FAULTS)}")
    return FAULTS[name]


def spec_for(fault: Fault, tp_size: int) -> ModelSpec:
    """Return the spec to plant a fault in at one degree.

    Raises:
        SubjectError: no spec at hand is legal there with what the fault needs; or, for a fault of
            the plan, illegal there and legal as what the ranks then run with.
    """
    for base in _BASES:
        spec = replace(base, **fault.needs)
        if fault.caught_by != "plan" and _is_legal(spec, tp_size):
            return spec
        if fault.caught_by == "plan" and not _is_legal(spec, tp_size):
            accepted = fault.accepts(spec, tp_size) if fault.accepts else spec
            if _is_legal(accepted, tp_size, fault.policy):
                return spec
    raise SubjectError(
        f"fault {fault.name}: tp={tp_size}, but should be a degree at which it can be planted,"
        " such as 2, 3, 4 or 8"
    )


def _is_legal(spec: ModelSpec, tp_size: int, policy: SplitPolicy = STRICT) -> bool:
    return tp_size in legal_tp_sizes(spec, up_to=tp_size, policy=policy)


def build_planted(name: str, casts: bool, tp: TPGroup, spec: ModelSpec) -> Any:
    """Return the reference decoder with a fault in it at TP > 1, and casts if asked for."""
    decoder = planted_decoder(spec, FAULTS[name], tp)
    if casts:
        _cast_norms(decoder)
    return decoder


def _cast_norms(decoder: Any) -> None:
    """Take the norms in float32 whatever the model runs in, as most model code does."""

    def cast(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].float(),)

    for layer in decoder.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_pre_hook(cast)
            norm.register_forward_hook(lambda _, args, y: y.to(decoder.norm.weight.dtype))


def _run_plan(
    fault: Fault, tp_sizes: Sequence[int], backend: str, seed: int, casts: bool
) -> RunPlan:
    # what is generated here is one spec per degree: there is no strategy to draw from
    build = subject(specs=spec_for, seq_len=SEQ_LEN)(partial(build_planted, fault.name, casts))
    ref = make_ref(build)
    return make_run_plan(
        ref,
        resolve(ref),
        tp_sizes,
        backend=backend,
        ranks_per_gpu=None,
        dtypes=("bfloat16",),
        cases=1,
        max_failures=None,
        case=None,
        batch=None,
        seq_len=None,
        seed=seed,
        settings=Settings(tp_sizes=(), confirm=False, locate=False),
        options=(),
    )
