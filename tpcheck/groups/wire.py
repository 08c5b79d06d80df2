"""Messages between the parent and its ranks: pickles with raw tensor bytes beside them.

Requirement: results travel beside the group under test, over a private socket, without the copies
and file descriptors of torch's own tensor pickling. A frame is one pickle (protocol 5) followed by
its out-of-band buffers, each on a 64 byte boundary so that tensors can be viewed in place.

Both ends are processes of one user and one session; nothing from a file or a server is read here.
"""

from __future__ import annotations

import io
import pickle
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

_ALIGNMENT = 64
_LENGTH = struct.Struct("<Q")
_COUNT = struct.Struct("<I")
_MOST_PIECES = 64
"""Pieces handed to the kernel at once. A frame in one call wakes the other side once, not six times
for a small job's order; with more ranks than cores every wake-up takes a core from a rank."""

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Order:
    """What a rank is to do: one job, on the world named by `layout`.

    `rendezvous` is ("file", path) or ("tcp", host, port, prefix). `payload` is a packed value.
    `environment`: what the parent changed in its own since the ranks', None for what it removed.
    """

    job: int
    function: str
    payload: Any
    rank: int
    size: int
    layout: str
    rendezvous: tuple[Any, ...]
    path: tuple[str, ...]
    directory: str
    environment: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class Reply:
    """How a job ended on one rank.

    kind: `returned`, `raised` or `environment` (the group could not be set up). `value` is the
    packed result, `exception` its pickle (empty if it has none), `groups` the process groups left.
    """

    job: int
    kind: str
    value: Any = b""
    exception_type: str = ""
    message: str = ""
    exception: bytes = b""
    traceback: str = ""
    groups: int = 1


def pack(value: object) -> bytearray:
    """Return `value` as bytes that `unpack` turns back, tensors on the CPU."""
    parts = _parts(value)
    packed = bytearray(sum(len(part) for part in parts))
    offset = 0
    for part in parts:
        packed[offset : offset + len(part)] = part
        offset += len(part)
    return packed


def unpack(packed: bytearray | memoryview) -> Any:
    """Return the value of `pack`. Its tensors share memory with `packed`."""
    view = memoryview(packed)
    (count,) = _COUNT.unpack_from(view, 0)
    sizes = struct.unpack_from(f"<{count}Q", view, _COUNT.size)
    offset = _aligned(_COUNT.size + 8 * count)
    parts = []
    for size in sizes:
        parts.append(view[offset : offset + size])
        offset = _aligned(offset + size)
    return pickle.loads(parts[0], buffers=parts[1:])


def send(sock: socket.socket, value: object) -> None:
    """Write one frame, waiting until the other side took it."""
    outgoing = deque(memoryview(part) for part in frame(value))
    while outgoing:
        _send_some(sock, outgoing)


def receive(sock: socket.socket) -> Any:
    """Wait for one frame and return its value.

    Raises:
        EOFError: the other side is gone.
    """
    head = read_exactly(sock, _LENGTH.size)
    return unpack(read_exactly(sock, _LENGTH.unpack(head)[0]))


def frame(value: object) -> list[Buffer]:
    """Return the pieces of one frame, in order; large buffers are not copied."""
    parts = _parts(value)
    return [_LENGTH.pack(sum(len(part) for part in parts)), *parts]


class Channel:
    """The parent's end of one rank's socket: never blocks, in either direction."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._outgoing: deque[memoryview] = deque()
        self._target = bytearray(_LENGTH.size)
        self._filled = 0
        self._in_body = False
        self.closed = False

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def wants_write(self) -> bool:
        return bool(self._outgoing) and not self.closed

    def post(self, value: object) -> None:
        """Queue one frame and send what the socket takes now."""
        self._outgoing.extend(memoryview(part) for part in frame(value))
        self.flush()

    def flush(self) -> None:
        try:
            while self._outgoing:
                _send_some(self._sock, self._outgoing)
        except BlockingIOError:
            pass
        except OSError:
            self._outgoing.clear()  # reading tells that the rank is gone

    def read(self) -> list[Any]:
        """Return every message that is complete by now. Sets `closed` at the end of the stream."""
        messages = []
        while not self.closed:
            try:
                got = self._sock.recv_into(memoryview(self._target)[self._filled :])
            except BlockingIOError:
                break
            except OSError:
                got = 0
            if got == 0:
                self.closed = True
                break
            self._filled += got
            if self._filled == len(self._target):
                message = self._advance()
                if message is not None:
                    messages.append(message)
        return messages

    def detach(self) -> socket.socket:
        """Give the socket up, for another channel over it."""
        return self._sock

    def close(self) -> None:
        self.closed = True
        self._outgoing.clear()
        self._sock.close()

    def _advance(self) -> Any:
        complete, self._filled = self._target, 0
        self._in_body = not self._in_body
        if self._in_body:
            self._target = bytearray(_LENGTH.unpack(complete)[0])
            return None
        self._target = bytearray(_LENGTH.size)
        return unpack(complete)


def _send_some(sock: socket.socket, outgoing: deque[memoryview]) -> None:
    """Send what the socket takes of these pieces, none of them empty, and drop it from them."""
    sent = sock.sendmsg(list(islice(outgoing, _MOST_PIECES)))
    while sent:
        if sent < len(outgoing[0]):
            outgoing[0] = outgoing[0][sent:]
            return
        sent -= len(outgoing.popleft())


class _Pickler(pickle.Pickler):
    """Ships plain tensors as bytes; everything else (subclasses, sparse, meta) as torch does."""

    def reducer_override(self, obj: object) -> Any:
        if type(obj) is not torch.Tensor and type(obj) is not torch.nn.Parameter:
            return NotImplemented
        if obj.layout is not torch.strided or obj.is_meta or obj.is_quantized:
            return NotImplemented
        plain = obj.detach().cpu().resolve_conj().resolve_neg().contiguous()
        # a tensor of one element is contiguous whatever its strides are, and its view keeps them
        flat = plain.as_strided((plain.numel(),), (1,))
        raw: Any = flat.view(torch.uint8).numpy()
        is_parameter = type(obj) is torch.nn.Parameter
        fields = (obj.dtype, tuple(obj.shape), obj.requires_grad, is_parameter)
        return _rebuild_tensor, (pickle.PickleBuffer(raw), *fields)


def _rebuild_tensor(
    raw: Any, dtype: torch.dtype, shape: tuple[int, ...], requires_grad: bool, is_parameter: bool
) -> torch.Tensor:
    if len(raw) == 0:
        tensor = torch.empty(shape, dtype=dtype)
    else:
        tensor = torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(shape)
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)
    return tensor.requires_grad_(requires_grad)


def _parts(value: object) -> list[Buffer]:
    stream = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    # list.append returns None, which pickle reads as "keep it out of the stream".
    keep: Callable[[pickle.PickleBuffer], Any] = buffers.append
    _Pickler(stream, protocol=5, buffer_callback=keep).dump(value)
    bodies: list[Buffer] = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
    head = _COUNT.pack(len(bodies)) + struct.pack(f"<{len(bodies)}Q", *map(len, bodies))
    parts: list[Buffer] = []
    for body in [head, *bodies]:
        parts.append(body)
        parts.append(b"\0" * (_aligned(len(body)) - len(body)))
    return [part for part in parts if len(part)]


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def read_exactly(sock: socket.socket, count: int) -> bytearray:
    """Wait for `count` bytes.

    Raises:
        EOFError: the other side is gone.
    """
    data = bytearray(count)
    view = memoryview(data)
    while len(view):
        got = sock.recv_into(view)
        if got == 0:
            raise EOFError("the other side closed the connection")
        view = view[got:]
    return data
