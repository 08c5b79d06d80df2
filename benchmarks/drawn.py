"""Cases drawn by the public strategies, one after another, for benchmarks that count outcomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def judged_points(
    seed: int, count: int, build: Callable[[Any, Any], Any], keep: Callable[[Any, Any], None]
) -> None:
    """Run `count` cases drawn from one seed on simulated ranks.

    Args:
        build: (tp, point) -> forward.
        keep: takes the point and its only verdict.
    """
    import hypothesis
    import torch

    import tpcheck
    from tpcheck.strategies import points

    torch.set_num_threads(1)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(points(max_layers=2, max_seq_len=9))
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
