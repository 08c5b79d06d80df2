"""Torch's thread state, so that greenlets on one thread can each have their own.

Requirement: torch keeps grad and inference mode, autocast, RNG, default dtype and device, and the
stacks of modes per thread or per process. Simulated ranks share the thread: two ranks parked inside
`no_grad` would otherwise swap it. So every run of a rank goes through `Neutral.resume`, which puts
the rank's state in place, lets it run, reads its state back and leaves the thread neutral.

[Absolute Guards] Inference mode has no setter, but torch's C++ guards write absolute values when
they leave. So the grad and inference flags and the dispatch keys (autocast, modes, what an op
excluded) come back whole, in whatever order the ranks leave their own guards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.utils._device as _device
import torch.utils._python_dispatch as _python_dispatch

T = TypeVar("T")

_C: Any = torch._C
_DEVICE_CONTEXT: Any = getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None)
_MODE_FLAGS = (
    "_is_in_torch_dispatch_mode",
    "_is_in_non_infra_torch_dispatch_mode",
    "_is_in_any_mode_without_ignore_compile_internals",
)
"""Module globals of torch.utils._python_dispatch; older torches lack some."""
_mode_flag = vars(_python_dispatch).get
_included_keys, _excluded_keys = (
    _C._dispatch_tls_local_include_set,
    _C._dispatch_tls_local_exclude_set,
)
_count_functions, _count_dispatches = _C._len_torch_function_stack, _C._len_torch_dispatch_stack
_read_rng, _write_rng = torch.default_generator.get_state, torch.default_generator.set_state


class ThreadState(NamedTuple):
    """What a rank finds again when it goes on. A tuple, because one is made at every switch."""

    grad: bool
    inference: bool
    included_keys: Any
    excluded_keys: Any
    function_modes: tuple[Any, ...]
    dispatch_modes: tuple[Any, ...]
    settings: tuple[Any, ...]
    rng: torch.Tensor


class Neutral:
    """The thread between ranks: no modes, no grad, no autocast. Made by `neutral()`."""

    def __init__(self, start: ThreadState) -> None:
        self.start = start
        self._included, self._excluded = _included_keys(), _excluded_keys()
        self._settings = _read_settings()

    def resume(self, state: ThreadState, run: Callable[[], T]) -> tuple[T | None, ThreadState]:
        """Call `run` under a state; return what it returned and the state it left.

        If `run` raises, the thread is neutral again and the exception goes on.
        """
        with _C._InferenceMode(state.inference):
            if state.included_keys == self._included and state.excluded_keys == self._excluded:
                return self._resume(state, run)
            with _C._ForceDispatchKeyGuard(state.included_keys, state.excluded_keys):
                return self._resume(state, run)

    def _resume(self, state: ThreadState, run: Callable[[], T]) -> tuple[T | None, ThreadState]:
        if state.grad == state.inference:  # the guard above has set grad to `not inference`
            _C._set_grad_enabled(state.grad)
        _write_rng(state.rng)
        if state.settings != self._settings:
            _write_settings(state.settings)
        _push_modes(state)
        try:
            result = run()
        finally:
            left = _take()
            if left.settings != self._settings:
                _write_settings(self._settings)
        return result, left


@contextlib.contextmanager
def neutral() -> Iterator[Neutral]:
    """Make the thread neutral for a while; `Neutral.start` is the state it had, put back after."""
    start = _take()
    try:
        with _C._InferenceMode(False):
            _C._set_grad_enabled(False)
            for device in ("cpu", "cuda"):
                torch.set_autocast_enabled(device, False)
            yield Neutral(start)
    finally:
        _write_rng(start.rng)
        if start.settings != _read_settings():
            _write_settings(start.settings)
        _push_modes(start)


def _take() -> ThreadState:
    """Read the state, and pop its modes: some of the getters would ask them."""
    included, excluded = _included_keys(), _excluded_keys()
    functions: tuple[Any, ...] = ()
    dispatches: tuple[Any, ...] = ()
    while _count_functions():
        functions += (_C._pop_torch_function_stack(),)
    while _count_dispatches():
        dispatches += (_C._pop_torch_dispatch_stack(None),)
    return ThreadState(
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        included,
        excluded,
        functions,
        dispatches,
        _read_settings(),
        _read_rng(),
    )


def _push_modes(state: ThreadState) -> None:
    for mode in reversed(state.dispatch_modes):
        _C._push_on_torch_dispatch_stack(mode)
    for mode in reversed(state.function_modes):
        _C._push_on_torch_function_stack(mode)


def _read_settings() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_autocast_dtype("cpu"),
        torch.get_autocast_dtype("cuda"),
        torch.is_autocast_cache_enabled(),
        _device.CURRENT_DEVICE,
        getattr(_DEVICE_CONTEXT, "device_context", None),
        _mode_flag(_MODE_FLAGS[0], False),
        _mode_flag(_MODE_FLAGS[1], False),
        _mode_flag(_MODE_FLAGS[2], False),
    )


def _write_settings(settings: tuple[Any, ...]) -> None:
    dtype, cpu, cuda, cache, device, context, *flags = settings
    torch.set_default_dtype(dtype)
    torch.set_autocast_dtype("cpu", cpu)
    torch.set_autocast_dtype("cuda", cuda)
    torch.set_autocast_cache_enabled(cache)
    _device.CURRENT_DEVICE = device
    if _DEVICE_CONTEXT is not None:
        _DEVICE_CONTEXT.device_context = context
    for name, flag in zip(_MODE_FLAGS, flags, strict=True):
        if hasattr(_python_dispatch, name):
            setattr(_python_dispatch, name, flag)
    mirror = getattr(_python_dispatch, "set_is_in_mode_without_ignore_compile_internals", None)
    if mirror is not None:
        mirror(flags[-1])
