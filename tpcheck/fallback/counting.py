"""What a fallback counts, and what it tells a server's metrics.

Requirement: counts are exact under threads, and a snapshot is of one moment.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from tpcheck.fallback.gathering import Cost
from tpcheck.fallback.policy import Judgement


@dataclass(frozen=True, slots=True)
class Event:
    """One scored request: its key and number, what scored it, and what will score from now on."""

    request: str
    number: int
    level: str
    next_level: str
    judgement: Judgement | None
    cost: Cost


class Counters:
    """Sums over requests: scored, generated, compared, drifted, fallbacks (scored elsewhere than at
    TP=N), callback_errors, bytes_gathered, seconds; and the largest peak_bytes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        names = "scored generated compared drifted fallbacks callback_errors bytes_gathered seconds"
        self._values: dict[str, float] = dict.fromkeys([*names.split(), "peak_bytes"], 0)

    def add(self, **more: float) -> dict[str, float]:
        """Add to several at once, and return what they are then."""
        with self._lock:
            for name, value in more.items():
                old = self._values[name]
                self._values[name] = max(old, value) if name == "peak_bytes" else old + value
            return dict(self._values)

    def snapshot(self) -> dict[str, float]:
        """Return all of them."""
        return self.add()
