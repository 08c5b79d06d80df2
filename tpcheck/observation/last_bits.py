"""A forward whose every operation rounds anew: what float64 itself leaves undecided.

Requirement: a sum in another order is off by last bits, and an ill-conditioned model (partials that
cancel a millionfold, forty layers of a chaotic map) makes something visible of them. That is no
bug, and no constant knows it: it is measured on TP=1, where there are no ranks to have one.

Of sums, operands are moved: a product of thousands of terms that cancel rounds by its terms. What
goes element by element has its result moved, once for all who read it: x - x stays nothing, and an
entry that is its own threshold stays at it. What is whole is no rounding (a position, a count, a
mask) and is not moved, or a floor, a comparison, a one-hot would take it a step away.
Source: random rounding, Parker 1997, Monte Carlo arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tpcheck.groups.base import Recorder
from tpcheck.observation.codes import plain_name, rounds
from tpcheck.observation.dispatch import DISTRIBUTED, is_exact, is_view
from tpcheck.observation.dispatch_mode import PlainMode
from tpcheck.observation.lifting import written

_EXACT = frozenset(
    f"aten::{name}"
    for name in (
        "topk sort max min kthvalue median mode cummax cummin take masked_select roll flip tril"
        " triu copy _to_copy fill zero masked_fill index_put scatter slice_scatter select_scatter"
        " sgn heaviside remainder fmod floor_divide frac"
    ).split()
)
"""Besides `is_exact`: what gives or places values as they are, and what steps."""

_LARGEST_WHOLE = 2**31
"""Of positions and counts; all that is larger than float64's 53 bits is whole."""


class LastBits(PlainMode):
    """Move by an ulp, up, down or not at all, what the ops that compute in `wide` round.

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
        exact = is_exact(func) or rounds(func) or plain_name(func) in _EXACT
        if self._recorder.inside or func.namespace in DISTRIBUTED or exact or is_view(func):
            return func(*args, **kwargs)
        if torch.Tag.pointwise in func.tags:
            result = func(*args, **kwargs)
            moved = self._moved(result)
            in_place = any(written(func)) and isinstance(result, torch.Tensor)
            return result.copy_(moved) if in_place else moved
        places, names = written(func)
        return func(
            *(x if i in places else self._moved(x) for i, x in enumerate(args)),
            **{key: x if key in names else self._moved(x) for key, x in kwargs.items()},
        )

    def _moved(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._moved(one) for one in value)
        if not isinstance(value, torch.Tensor):
            return value
        floating = value.is_floating_point() or value.is_complex()
        if not floating or torch.finfo(value.dtype).eps != self._step:
            return value
        ulps = torch.randint(-1, 2, value.shape, generator=self._generator).to(value.device)
        moved = value * (1 + self._step * ulps.to(value.dtype))
        parts = torch.view_as_real(value) if value.is_complex() else value
        whole = (parts == parts.round()) & (parts.abs() < _LARGEST_WHOLE)
        stays = (whole.all(-1) if value.is_complex() else whole) | ~moved.isfinite()
        return torch.where(stays, value, moved)
