"""What the fallback's tests run on every rank, simulated or real; jobs go by dotted name."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tests.subjects import dtensor
from tpcheck.adapters.reference import BUILTINS
from tpcheck.errors import TPCheckError
from tpcheck.fallback.gathering import Meter
from tpcheck.fallback.levels import LEVELS, parallel_model
from tpcheck.fallback.scoring import ScoringFallback
from tpcheck.faults import FAULTS
from tpcheck.faults.planting import planted_decoder
from tpcheck.outputs import digest
from tpcheck.placement import Shard
from tpcheck.subjects import make_ref, resolve


@dataclass(frozen=True, slots=True)
class Work:
    """A model (a builtin's name, `dtensor` or a model directory), its dtype, and what to do to it.

    options: of ScoringFallback. fault: planted in a builtin. fields: replaced in its spec.
    """

    model: str = "llama-tiny"
    dtype: torch.dtype = torch.bfloat16
    levels: tuple[str, ...] = ()
    max_bytes: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    requests: int = 1
    threads: int = 1


def build(world: Any, work: Work) -> tuple[Any, Any]:
    """Return this rank's group and model."""
    tp = world.group(seed=3, dtype=work.dtype, weight_dtype=work.dtype)
    if work.model == "dtensor":
        return tp, dtensor.local_logits(tp)
    if work.model in BUILTINS:
        spec = replace(BUILTINS[work.model][1], **work.fields)
        return tp, planted_decoder(spec, FAULTS.get(work.fault), tp)
    return tp, resolve(make_ref(f"hf:{work.model}")).build(tp)


def ids(seed: int = 5, length: int = 9) -> torch.Tensor:
    """Return two rows of token ids below 96, the same every time."""
    return torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(seed))


def deployed_job(world: Any, work: Work) -> torch.Tensor:
    """Return the logits of the model as deployed, at TP=1 a model that was never split."""
    with torch.no_grad():
        logits: torch.Tensor = build(world, work)[1](ids())
    return logits


def level_job(world: Any, work: Work) -> dict[str, Any]:
    """Return the logits of the model as deployed ("tp") and of each level, with its cost."""
    with torch.no_grad():
        _, model = build(world, work)
        wrapped = parallel_model(model)
        found: dict[str, Any] = {"tp": (wrapped.run(ids()), None)}
        for name in work.levels:
            meter = Meter(work.max_bytes)
            forward = LEVELS[name].make(wrapped, meter)
            meter.start()
            found[name] = (forward(ids()), meter.cost())
            meter.start()
            found["held after"] = meter.cost().peak_bytes
            twin = [one for one in getattr(forward, "args", ()) if isinstance(one, torch.nn.Module)]
            found["absent after"] = all(p.is_meta for one in twin for p in one.parameters())
        found["tp again"] = (wrapped.run(ids()), None)
    return found


def refusal_job(world: Any, work: Work) -> str:
    """Return what the fallback says when it is made for a model it cannot be made for."""
    tp, model = build(world, work)
    try:
        ScoringFallback(model, tp, **work.options)
    except TPCheckError as error:
        return f"{type(error).__name__}: {error}"
    return "made"


def score_job(world: Any, work: Work) -> dict[str, Any]:
    """Score requests 0 to n-1 one after the other; return what came of each, and the counters."""
    tp, model = build(world, work)
    events: list[Any] = []
    fallback = ScoringFallback(model, tp, on_event=events.append, **work.options)
    scores = [fallback.score(ids(seed)) for seed in range(work.requests)]
    generated = fallback.generate(ids())
    with torch.no_grad():
        deployed = parallel_model(model).run(ids())
    return {
        "levels": [score.level for score in scores],
        "values": [score.judgement and score.judgement.value for score in scores],
        "logprobs": [score.logprobs for score in scores],
        "counters": fallback.counters(),
        "events": events,
        "generated": digest(generated) == digest(deployed),
    }


def threads_job(world: Any, work: Work) -> dict[str, Any]:
    """Score from several threads at once, generation in between; on each rank at another pace."""
    tp, model = build(world, work)
    fallback = ScoringFallback(model, tp, **work.options)
    jobs = list(range(work.requests))
    pace = random.Random(world.rank)
    scores: dict[int, torch.Tensor] = {}
    errors: list[BaseException] = []

    def serve(thread: int) -> None:
        try:
            torch.set_num_threads(1)
            for number in jobs[thread :: work.threads]:
                time.sleep(pace.random() / 50)
                scores[number] = fallback.score(ids(number)).logprobs
                with torch.no_grad():
                    fallback.generate(ids(number), request_id=f"generate {number}")
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=serve, args=(n,)) for n in range(work.threads)]
    for worker in workers if world.rank % 2 else reversed(workers):
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    alone = ScoringFallback(model, tp, **work.options)
    expected = {number: alone.score(ids(number)).logprobs for number in jobs}
    return {
        "equal": all(torch.equal(scores[n], expected[n]) for n in jobs),
        "counters": fallback.counters(),
        "sequential": alone.counters(),
    }


class Handwritten:
    """Weights with placements and a forward, nothing else: what the owner's `alone` is for."""

    def __init__(self, tp: Any) -> None:
        self.tp = tp
        whole = {name: tp.weight(name, *shape) for name, shape in SHAPES.items()}
        self.embed, self.head = whole["embed"], whole["head"]
        self.up = whole["up"].chunk(tp.size, 0)[tp.rank].contiguous()
        self.down = whole["down"].chunk(tp.size, 1)[tp.rank].contiguous()

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed[input_ids]
        x = x + self.tp.all_reduce((x @ self.up.T).relu() @ self.down.T)
        logits: torch.Tensor = x @ self.head.T
        return logits

    def shards(self) -> dict[str, Any]:
        from tpcheck.placement import Replicate

        return {
            "embed": (self.embed, Replicate()),
            "head": (self.head, Replicate()),
            "up": (self.up, Shard(0)),
            "down": (self.down, Shard(1)),
        }


SHAPES = {"embed": (96, 16), "head": (96, 16), "up": (24, 16), "down": (16, 24)}


def alone(weights: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the handwritten model at TP=1, its weights looked up as they are needed."""

    def forward(input_ids: torch.Tensor) -> torch.Tensor:
        x = weights["embed"][input_ids]
        x = x + (x @ weights["up"].T).relu() @ weights["down"].T
        logits: torch.Tensor = x @ weights["head"].T
        return logits

    return forward


def handwritten_job(world: Any, work: Work) -> tuple[torch.Tensor, dict[str, float], str]:
    """Score a callable with shards(): log-probabilities, counters, and what it cannot do."""
    tp = world.group(seed=3, dtype=work.dtype, weight_dtype=work.dtype)
    model = Handwritten(tp)
    fallback = ScoringFallback(model, tp, alone=alone, **work.options)
    score = fallback.score(ids())
    said = ""
    refused: list[dict[str, Any]] = [{}, {"alone": alone, "level": "rowwise"}]
    for options in refused:
        try:
            ScoringFallback(model, tp, **options)
        except TPCheckError as error:
            said += f"{error}\n"
    return score.logprobs, fallback.counters(), said
