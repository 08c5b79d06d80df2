"""A forward whose every operation rounds anew: what float64 itself leaves undecided.

Requirement: a sum in another order is off by last bits, and an ill-conditioned model (partials that
cancel a millionfold, forty layers of a chaotic map) makes something visible of them. That is no
bug, and no constant knows it: it is measured on TP=1, where there are no ranks to have one.

Operands are moved, not results: a product of thousands of terms that cancel rounds by its terms.
What steps (a comparison, a cast to integers, a floor) is given what it would have been given.
Source: random rounding, Parker 1997, Monte Carlo arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tpcheck.groups.base import Recorder
from tpcheck.observation.codes import plain_name, rounds
from tpcheck.observation.dispatch import is_exact, is_view
from tpcheck.observation.dispatch_mode import PlainMode
from tpcheck.observation.lifting import written

_STEPS = frozenset(
    f"aten::{name}" for name in "sign sgn heaviside remainder fmod floor_divide frac".split()
)
"""Besides rounding to whole numbers: a last bit takes them to another value."""


class LastBits(PlainMode):
    """Move every operand of what computes in `wide` by an ulp, up, down or not at all.

    Args:
        recorder: says when a TPGroup's own code runs, which is left alone.
        wide: whose ulp.
        seed: of the moves.
    """

    def __init__(self, recorder: Recorder, wide: torch.dtype, seed: int) -> None:
        super().__init__()
        self._recorder = recorder
        self._step = torch.finfo(wide).eps
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        steps = rounds(func) or plain_name(func) in _STEPS
        if self._recorder.inside or steps or is_view(func) or is_exact(func):
            return func(*args, **kwargs)
        places, names = written(func)
        result = func(
            *(x if i in places else self._moved(x) for i, x in enumerate(args)),
            **{key: x if key in names else self._moved(x) for key, x in kwargs.items()},
        )
        decides = any(
            not (x.is_floating_point() or x.is_complex())
            for x in (result if isinstance(result, (list, tuple)) else (result,))
            if isinstance(x, torch.Tensor)
        )
        return func(*args, **kwargs) if decides and not places and not names else result

    def _moved(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._moved(one) for one in value)
        if not isinstance(value, torch.Tensor):
            return value
        rounds_so = value.is_floating_point() or value.is_complex()
        if not rounds_so or torch.finfo(value.dtype).eps != self._step:
            return value
        ulps = torch.randint(-1, 2, value.shape, generator=self._generator).to(value.device)
        moved = value * (1 + self._step * ulps.to(value.dtype))
        return torch.where(moved.isfinite(), moved, value)  # a mask of the largest number stays
