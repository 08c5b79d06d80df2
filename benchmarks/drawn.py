"""Cases drawn by the public strategies, one after another, for benchmarks that count outcomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def drawing(seed: int, count: int, cases: Any) -> Callable[[Callable[[Any], None]], Any]:
    """Return a decorator that calls a function with `count` cases drawn from one seed."""
    import hypothesis

    chosen = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    return lambda run: hypothesis.seed(seed)(chosen(hypothesis.given(cases)(run)))


def judged_points(
    seed: int, count: int, build: Callable[[Any, Any], Any], keep: Callable[[Any, Any], None]
) -> None:
    """Run `count` cases drawn from one seed on simulated ranks.

    Args:
        build: (tp, point) -> forward.
        keep: takes the point and its only verdict.
    """
    import torch

    import tpcheck
    from tpcheck.strategies import points

    torch.set_num_threads(1)

    @drawing(seed, count, points(max_layers=2, max_seq_len=9))
    def run(point: Any) -> None:
        @tpcheck.subject(spec=point.spec, seq_len=point.seq_len)
        def subject(tp):  # type: ignore[no-untyped-def]
            return build(tp, point)

        report = tpcheck.run(
            subject,
            (point.tp_size,),
            backend="sim",
            confirm=False,
            dtypes=(point.dtype,),
            batch=point.batch,
            seq_len=point.seq_len,
            seed=point.seed,
        )
        (verdict,) = report.verdicts
        keep(point, verdict)

    run()
