"""ScoringFallback: score at TP=N, look at TP=1 now and then, and score there when it drifts.

Requirement: opt-in, and harmless to what is served. Generation goes on in the model as it is; only
scores (log-probabilities of given tokens, as rewards, perplexity and importance ratios need them)
move to a level that the policy names. Every rank makes the same decisions, threads may call it at
once, and what it did is counted.

[One Order] Scores, and generation that goes through `generate` or `turn`, take turns that rank 0
calls on every rank (turns.py). Generation that does not must use a process group of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from tpcheck.errors import SubjectError, TPCheckError
from tpcheck.fallback.counting import Counters, Event
from tpcheck.fallback.declared_shards import Alone
from tpcheck.fallback.gathering import Collectives, Cost, Meter
from tpcheck.fallback.levels import LEVELS, parallel_model
from tpcheck.fallback.models import Forward
from tpcheck.fallback.policy import Judgement, ScoringPolicy, judged
from tpcheck.fallback.turns import Turns, key_of
from tpcheck.numerics.drift import RATIO_FLOOR
from tpcheck.numerics.tolerance import Tolerance
from tpcheck.records import Report

DEPLOYED = "tp"
"""The level of a score that came from the model as it is deployed."""


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probabilities of given tokens, [B, T-1] float32, each given the tokens before it.

    level: `tp`, or what scored instead. judgement: where this request was compared with TP=1; its
    numbers are TP=N's, the log-probabilities TP=1's if those drifted. cost: of all of it.
    """

    logprobs: torch.Tensor
    level: str
    judgement: Judgement | None
    cost: Cost


class ScoringFallback:
    """Wraps this rank's tensor-parallel model for scoring.

    Args:
        model: a reference decoder, an nn.Module with DTensor parameters (torch's
            parallelize_module, transformers with its tp plan), or a callable with `shards()`.
        tp: the TPGroup of a callable; the others know their ranks.
        level: what scores after drift was seen: head, rowwise, full, fp32_wire or fixed_tree. A
            level that is seen to drift as well makes way for full.
        share: of requests that are compared with TP=1, drawn from `seed` and the request's number.
        max_drift_ratio: how many times TP=1's own error is drift; the gate's policy has it too.
        tolerance: instead: how far logits may be from TP=1's; a policy's or a user's.
        max_bytes: most bytes of whole weights held at once, a gather's own buffer not counted; by
            default those of one part of the model, as large as it is.
        head: FQN of a module's output layer.
        alone: what a callable with `shards()` is at TP=1, as a function of whole weights.
        on_event: called with an Event after each score, outside of every lock, for metrics.
        turn_timeout_s: how long a request may wait for its turn.

    Raises:
        SubjectError: nothing says what the ranks hold, an unknown level, or one that this model
            cannot have.
        TPCheckError: an option is out of range; names it and its value.
    """

    def __init__(
        self,
        model: Any,
        tp: Collectives | None = None,
        *,
        level: str = "full",
        share: float = 0.01,
        seed: int = 0,
        max_drift_ratio: float = RATIO_FLOOR,
        tolerance: Tolerance | None = None,
        max_bytes: int | None = None,
        head: str = "lm_head",
        alone: Alone | None = None,
        on_event: Callable[[Event], None] | None = None,
        turn_timeout_s: float = 60.0,
    ) -> None:
        self.policy = ScoringPolicy(level, share, seed, max_drift_ratio, tolerance)
        if not turn_timeout_s > 0:
            raise TPCheckError(f"turn_timeout_s={turn_timeout_s}, but should be more than 0")
        self._meter = Meter(max_bytes)
        self._model = parallel_model(model, tp, head=head, alone=alone)
        self._forwards: dict[str, Forward] = {DEPLOYED: self._model.run}
        self._forwards["full"] = LEVELS["full"].make(self._model, self._meter)
        if tolerance is None:
            self._oracle = self._model.alone(self._meter, torch.float64)
        if level not in self._forwards:
            self._forwards[level] = LEVELS[level].make(self._model, self._meter)
        self._turns = Turns(self._model.tp, turn_timeout_s, self._model.device)
        self._on_event = on_event
        self._level = DEPLOYED
        self._told = False
        self._counters = Counters()

    @property
    def level(self) -> str:
        """What scores now: `tp`, or the level that scoring fell back to."""
        return self._level

    def counters(self) -> dict[str, float]:
        """Return what was counted so far; see Counters for the names."""
        return self._counters.snapshot()

    def score(self, input_ids: torch.Tensor, *, request_id: str | None = None) -> Score:
        """Return the log-probabilities of tokens 1 to T-1 of each row; every rank calls it.

        Args:
            input_ids: int64 [B, T], T at least 2, the same on every rank.
            request_id: a name for the request, the same on every rank; by default its ids.

        Raises:
            SubjectError: the ids have another shape.
            BackendError: the ranks do not score the same requests.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] < 2 or input_ids.is_floating_point():
            shape, dtype = list(input_ids.shape), input_ids.dtype
            raise SubjectError(
                f"score: input_ids={shape} {dtype}, but should be whole numbers [batch, tokens],"
                " two tokens or more"
            )
        key = request_id or key_of("score", (input_ids,))
        with self._turns.turn(key), torch.no_grad():
            score, event = self._scored(input_ids, key)
        self._tell(event)
        return score

    def generate(self, *arguments: Any, request_id: str | None = None, **options: Any) -> Any:
        """Return what the deployed model gives, in turn with the scores; it never falls back."""
        with self._turns.turn(request_id or key_of("generate", (*arguments, options))):
            self._counters.add(generated=1)
            return self._model.run(*arguments, **options)

    def turn(self, request_id: str) -> AbstractContextManager[None]:
        """Return a context in which the caller may use the ranks: for `prefill` and `step`."""
        return self._turns.turn(request_id)

    def heed(self, report: Report) -> bool:
        """Compare the next request with TP=1 if a report says that this degree and dtype drift.

        Returns:
            Whether it says so. Every rank should be given the same report.
        """
        dtype = str(self._model.dtype).removeprefix("torch.")
        drifts = any(
            verdict.tp_size == self._model.tp.size
            and verdict.dtype == dtype
            and verdict.outcome in ("DRIFT", "WRONG")
            for verdict in report.verdicts
        )
        self._told = self._told or drifts
        return drifts

    def reset(self) -> None:
        """Score at TP=N again: after a new deployment, on every rank."""
        self._level, self._told = DEPLOYED, False

    def _scored(self, ids: torch.Tensor, key: str) -> tuple[Score, Event]:
        number = int(self._counters.add(scored=1)["scored"])
        level = self._level
        cost, logits = self._timed(level, ids)
        judgement = None
        if self._told or self.policy.samples(number):
            self._told = False
            more, expected, judgement = self._compared(logits, ids)
            cost = cost.plus(more)
            if judgement.drifts:
                self._level = self.policy.level if level == DEPLOYED else "full"
                level, logits = "full", expected
        fell = judgement is not None and judgement.drifts
        self._counters.add(
            compared=int(judgement is not None),
            drifted=int(fell),
            fallbacks=int(level != DEPLOYED),
            bytes_gathered=cost.bytes_gathered,
            seconds=cost.seconds,
            peak_bytes=cost.peak_bytes,
        )
        score = Score(_logprobs(logits, ids), level, judgement, cost)
        return score, Event(key, number, level, self._level, judgement, cost)

    def _timed(self, level: str, ids: torch.Tensor) -> tuple[Cost, torch.Tensor]:
        self._meter.start()
        logits = self._forwards[level](ids)
        if logits.device.type == "cuda":
            torch.cuda.synchronize(logits.device)
        return self._meter.cost(), logits

    def _compared(
        self, logits: torch.Tensor, ids: torch.Tensor
    ) -> tuple[Cost, torch.Tensor, Judgement]:
        """Run TP=1, and judge on rank 0 for all: ranks that decide apart would part for good."""
        cost, expected = self._timed("full", ids)
        oracle = None
        if self.policy.tolerance is None:
            self._meter.start()
            oracle = self._oracle(ids)
            cost = cost.plus(self._meter.cost())
        own = judged(self.policy, logits, expected, oracle)
        tp = self._model.tp
        if tp.size == 1:
            return cost, expected, own
        numbers = torch.tensor([float(own.drifts), own.value, own.limit], dtype=torch.float64)
        drifts, value, limit = tp.broadcast(numbers.to(logits.device), 0).tolist()
        return cost, expected, Judgement(bool(drifts), value, limit, own.source)

    def _tell(self, event: Event) -> None:
        """Call the owner's callback; what it raises costs a count and a warning, not the score."""
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception as error:
            self._counters.add(callback_errors=1)
            warnings.warn(
                f"ScoringFallback: on_event raised {type(error).__name__}: {error}", stacklevel=3
            )


def _logprobs(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each next token, in float32 or wider, as float32."""
    wide = logits_BTV[:, :-1].to(torch.promote_types(logits_BTV.dtype, torch.float32))
    every = torch.log_softmax(wide, -1)
    next_ids = ids_BT[:, 1:, None].to(every.device)
    return every.gather(-1, next_ids).squeeze(-1).to(torch.float32)
