"""One rule of an engine, restated: sizes to draw from, a config, and what its text says of it.

The text is that of tests/data/engine_rules.json. What follows from it is computed here once more,
from the sizes alone, so that a rule is held to its text at sizes that no recorded case has.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tpcheck.planning import PlanResult, plan

TEXTS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "engine_rules.json").read_text(encoding="utf-8")
)
DRAWS = 60

Answer = tuple[str, str | None]
"""An outcome, and the engine's own text; None does not look at the text."""


class Restated(NamedTuple):
    """`rules` are the ids whose text this restates; `sizes` name → what to draw from."""

    rules: tuple[str, ...]
    engine: str
    sizes: dict[str, Iterable[Any]]
    config: Callable[..., dict[str, Any]]
    answer: Callable[..., Answer]
    constant: bool = False


def restated(
    rules: str,
    engine: str,
    config: Callable[..., dict[str, Any]],
    answer: Callable[..., Answer],
    *,
    constant: bool = False,
    **sizes: Iterable[Any],
) -> Restated:
    """Return one entry; `tp` is drawn from 1 to 16 unless `sizes` say otherwise."""
    drawn = {"tp": range(1, 17), **sizes}
    return Restated(tuple(rules.split()), engine, drawn, config, answer, constant)


def planned(config: dict[str, Any], engine: str, tp_size: int) -> PlanResult:
    (result,) = plan(config, engine, (tp_size,))
    return result


def hold_to_its_text(one: Restated) -> None:
    """Draw sizes and compare; both a refusal and its absence have to occur, unless `constant`."""
    numbers = random.Random(" ".join(one.rules))
    pools = {name: list(pool) for name, pool in one.sizes.items()}
    seen = set()
    for _ in range(DRAWS):
        sizes = {name: numbers.choice(pool) for name, pool in pools.items()}
        config = one.config(**sizes)
        result = planned(config, one.engine, sizes["tp"])
        outcome, text = one.answer(**sizes)
        assert result.outcome == outcome, (sizes, result.reason)
        assert text is None or result.error_text == text, (sizes, result.error_text)
        seen.add((outcome, text is None))
    assert one.constant == (len(seen) == 1), seen


def refused(condition: object, text: str = "", otherwise: str = "ok") -> Answer:
    """Return an error with this text where the condition holds, else that the degree runs."""
    return ("error", text) if condition else (otherwise, None)
