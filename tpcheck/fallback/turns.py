"""One order for all ranks, whatever the threads of a server do.

Requirement: two requests that are scored at once on two threads call collectives of one process
group; if rank 0 takes them in one order and rank 1 in the other, the ranks exchange tensors of
different requests or hang. So rank 0 decides whose turn it is, and tells the others; a thread there
waits until its own request is called.

Every rank has to ask for the same requests, in any order and on any threads. Requests with one key
are taken for each other, so keys should differ where requests do.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tpcheck.errors import BackendError
from tpcheck.fallback.gathering import Collectives


class Turns:
    """Lets one thread at a time use the ranks, in the same order on every rank."""

    def __init__(
        self, tp: Collectives, timeout_s: float, device: torch.device | str = "cpu"
    ) -> None:
        self._tp, self._timeout_s, self._device = tp, timeout_s, device
        self._free = threading.Condition()
        self._busy = False
        self._called: int | None = None

    @contextmanager
    def turn(self, key: str) -> Iterator[None]:
        """Wait for this request's turn, and hold it while open.

        Raises:
            BackendError: rank 0 called a request that nobody here asks for, or holds its turn too
                long; names the request.
        """
        number = _number(key)
        self._take(number, key)
        try:
            yield
        finally:
            with self._free:
                self._busy, self._called = False, None
                self._free.notify_all()

    def _take(self, number: int, key: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        with self._free:
            while self._busy or not self._is_called(number):
                left = deadline - time.monotonic()
                if left <= 0 or not self._free.wait(left):
                    raise BackendError(self._late(key))
            self._busy = True

    def _is_called(self, number: int) -> bool:
        """Whether it is this request's turn; hears what rank 0 calls where nothing is called."""
        if self._tp.size == 1:
            return True
        if self._called is None:
            mine = torch.tensor([number if self._tp.rank == 0 else 0], device=self._device)
            self._called = int(self._tp.broadcast(mine, 0))
            if self._called != number:
                self._free.notify_all()
        return self._called == number

    def _late(self, key: str) -> str:
        if self._busy:
            return (
                f"rank {self._tp.rank}: request {key} waited {self._timeout_s:g} s for another's"
                " turn to end; give more with turn_timeout_s="
            )
        return (
            f"rank {self._tp.rank}: request {key} waited {self._timeout_s:g} s while rank 0 was at"
            " another that nobody here asks for; every rank should score the same requests"
        )


def key_of(kind: str, arguments: tuple[object, ...]) -> str:
    """Return a key for a request that was given none: a hash of its tensors' bytes."""
    digest = hashlib.blake2b(kind.encode(), digest_size=8)
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            flat = argument.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
            digest.update(f"{tuple(argument.shape)}{argument.dtype}".encode())
            digest.update(flat.numpy().tobytes())
        else:
            digest.update(repr(argument).encode())
    return digest.hexdigest()


def _number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
