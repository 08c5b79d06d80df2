"""require(receipt, ...): a server starts only if this very deployment was proven. Torch-free.

Requirement: called before a server loads anything, it fails closed. Every way in which what is here
differs from what was proven is one sentence of its own; what cannot be read, here or in the
receipt, refuses as well, and so does any error of our own. Nothing of a receipt is believed before
its signature holds: until then that is the only reason given.

[Order] The file, its signature; then, all at once: time, outcome, the model's bytes, degree, dtype,
engine, GPUs, NCCL, settings, torch, driver.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NoReturn

from tpcheck import machine
from tpcheck.deployment_gate.policy import DTYPES, NEVER_ALLOWED
from tpcheck.deployment_gate.receipts import Receipt, read_receipt, shown_time
from tpcheck.deployment_gate.requirement import Refusal, listed, one_line
from tpcheck.deployment_gate.signing import assert_signed
from tpcheck.deployment_gate.surroundings import CLOCK_SKEW
from tpcheck.errors import GateRefused, TPCheckError
from tpcheck.model_digest import ModelDigest, digest_directory

_PACKAGES = {"tpcheck reference": "tpcheck"}
"""Engine -> the package whose version is its own, where the names differ."""

_HARMLESS = (
    *("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE"),
    *("NCCL_DEBUG_TIMESTAMP_FORMAT", "NCCL_DEBUG_TIMESTAMP_LEVELS"),
)
"""These say what NCCL logs; every other setting may change what it computes, or over which path."""

_OF_A_HOST = {"NCCL_SOCKET_IFNAME": "eth,ens", "NCCL_IB_HCA": "mlx5"}
"""These name devices, which may be called otherwise on another host. They choose the path all the
same, and through it NCCL's algorithm, so they are compared; but NCCL takes lists of prefixes, which
can be equal everywhere: NCCL's user guide, Environment Variables."""

_NUMERIC = (
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
"""Variables that change numbers without any line of a server's configuration."""

_AGAIN = "prove it here: `tpcheck run`, then `tpcheck gate REPORT.json --receipt PATH --sign KEY`"
_BUG = "this is a bug in tpcheck, and nothing is known about the deployment"


@dataclass(frozen=True, slots=True)
class Here:
    """What this machine would run the model on; None is what cannot be read."""

    gpus: tuple[str, ...] | None = None
    driver: str | None = None
    nccl: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    version: Callable[[str], str | None] = machine.version_here


@dataclass(frozen=True, slots=True)
class _Asked:
    """The deployment that is about to start."""

    model_dir: str
    tp_size: int
    dtype: str | None
    paranoid: bool
    now: datetime


def require(
    receipt: str | os.PathLike[str],
    *,
    model_dir: str | os.PathLike[str],
    tp_size: int,
    public_key: str | os.PathLike[str],
    dtype: str | None = None,
    paranoid: bool = False,
) -> Receipt:
    """Return only if a signed receipt proves this deployment; call it before a server starts.

    Args:
        receipt: the file that `tpcheck gate --receipt --sign` wrote.
        model_dir: the directory whose weights the server will load.
        tp_size: the degree it will run at.
        public_key: the file that `tpcheck gate --new-key` wrote beside the private key.
        dtype: the dtype it will run in, where that is known: bfloat16, float16 or float32.
        paranoid: read every byte of the weights again, whatever was kept of an earlier reading.

    Returns:
        The receipt; `tested` says which batch sizes and lengths it speaks for.

    Raises:
        GateRefused: anything is not as it was proven, cannot be read, or goes wrong; the message
            lists every reason, `refusals` holds them, each with `reason` and `settle`.
        TPCheckError: `tp_size` or `dtype` is not what it can be.
    """
    return _require(receipt, model_dir, tp_size, public_key, dtype, paranoid)


def _require(
    receipt: str | os.PathLike[str],
    model_dir: str | os.PathLike[str],
    tp_size: int,
    public_key: str | os.PathLike[str],
    dtype: str | None,
    paranoid: bool,
    *,
    here: Here | None = None,
    now: datetime | None = None,
) -> Receipt:
    if not isinstance(tp_size, int) or isinstance(tp_size, bool) or tp_size < 1:
        raise TPCheckError(f"tp_size={tp_size!r}, but should be a whole number of at least 1")
    if dtype is not None and dtype not in DTYPES:
        raise TPCheckError(f"dtype={dtype!r}, but should be one of {', '.join(DTYPES)}")
    where = f"{model_dir} at tp_size={tp_size}, by {receipt}"
    try:
        held = read_receipt(receipt)
        assert_signed(held, public_key)
    except Exception as error:
        _refuse(where, [_of_error(error, "name a signed receipt and the public key of its signer")])
    try:
        asked = _Asked(os.fspath(model_dir), tp_size, dtype, paranoid, now or datetime.now(UTC))
        refusals = list(_refusals(held, asked, here or read_here()))
    except Exception as error:
        _refuse(where, [_of_error(error, _BUG)])
    if refusals:
        _refuse(where, refusals)
    return held


def read_here() -> Here:
    """Read this machine: GPUs, driver, NCCL. No torch, no CUDA context."""
    return Here(
        gpus=machine.visible_gpus(),
        driver=machine.driver_version(),
        nccl=machine.nccl_version(),
        settings=machine.nccl_settings() | _numeric(os.environ),
    )


def _refuse(where: str, found: list[Refusal]) -> NoReturn:
    # a file that nobody vouches for may put anything into a name
    refusals = [Refusal(one_line(one.reason), one_line(one.settle)) for one in found]
    raise GateRefused(listed(f"REFUSED: {one_line(where)}", refusals), refusals=refusals)


def _of_error(error: Exception, settle: str) -> Refusal:
    if isinstance(error, TPCheckError):
        return Refusal(str(error), settle)
    return Refusal(f"it cannot be checked: {type(error).__name__}: {error}", _BUG)


def _refusals(receipt: Receipt, asked: _Asked, here: Here) -> Iterator[Refusal]:
    """Yield everything that is not as it was proven, in [Order]."""
    yield from _time(receipt, asked.now)
    yield from _outcome(receipt)
    yield from _model(receipt, asked)
    yield from _deployment(receipt, asked)
    yield from _engine(receipt, here)
    yield from _gpus(receipt, asked, here)
    yield from _nccl(receipt, here)
    yield from _settings(receipt, here)
    yield from _torch_and_driver(receipt, here)


def _time(receipt: Receipt, now: datetime) -> Iterator[Refusal]:
    if receipt.created > now + CLOCK_SKEW:
        yield Refusal(
            f"it was made at {shown_time(receipt.created)}, which is in the future: it is"
            f" {shown_time(now)} here",
            "set this machine's clock",
        )
    if receipt.expires <= now:
        yield Refusal(
            f"it expired at {shown_time(receipt.expires)}, and it is {shown_time(now)} here", _AGAIN
        )


def _outcome(receipt: Receipt) -> Iterator[Refusal]:
    outcome = receipt.outcome
    if outcome in NEVER_ALLOWED or (outcome != "PASS" and outcome not in receipt.allowed):
        yield Refusal(f"its outcome is {outcome}, which its policy does not let through", _AGAIN)


def _model(receipt: Receipt, asked: _Asked) -> Iterator[Refusal]:
    try:
        digest = digest_directory(asked.model_dir, paranoid=asked.paranoid)
    except TPCheckError as error:
        yield Refusal(f"the model cannot be read: {error}", "name the directory that was proven")
        return
    for kind in ("config", "weights"):
        actual = getattr(digest, f"{kind}_sha256")
        expected = receipt.model[f"{kind}_sha256"]
        if actual != expected:
            yield Refusal(
                f"{kind}: {expected[:16]}... was proven, but {actual[:16]}... is here"
                f"{_files(receipt, digest)}",
                f"put back what was proven, or {_AGAIN}",
            )


def _files(receipt: Receipt, digest: ModelDigest) -> str:
    """Name the files that differ, where the receipt says what they were."""
    proven = dict(receipt.model["files"])
    if not proven:
        return ""
    actual = digest.named()
    words = []
    for name in sorted({*proven, *actual}):
        if name not in actual:
            words.append(f"{name} is missing")
        elif name not in proven:
            words.append(f"{name} is new")
        elif actual[name] != proven[name]:
            words.append(f"{name} differs")
    more = f" and {len(words) - 3} more" if len(words) > 3 else ""
    return f": {', '.join(words[:3])}{more}" if words else ""


def _deployment(receipt: Receipt, asked: _Asked) -> Iterator[Refusal]:
    if asked.tp_size not in receipt.tp:
        proven = ", ".join(map(str, receipt.tp))
        yield Refusal(
            f"tp_size: {proven} was proven, but {asked.tp_size} is asked for",
            f"start at a proven degree, or {_AGAIN}",
        )
    if asked.dtype is not None and asked.dtype not in receipt.dtypes:
        yield Refusal(
            f"dtype: {', '.join(receipt.dtypes)} was proven, but {asked.dtype} is asked for",
            f"start in a proven dtype, or {_AGAIN}",
        )


def _engine(receipt: Receipt, here: Here) -> Iterator[Refusal]:
    name, expected = receipt.engine["name"], receipt.engine["version"]
    if expected is not None:
        actual = here.version(_PACKAGES.get(name, name))
        yield from _same_version(f"engine {name}", expected, actual)


def _same_version(what: str, expected: str, actual: str | None) -> Iterator[Refusal]:
    if actual is None:
        yield Refusal(
            f"{what}: {expected} was proven, but its version cannot be read here",
            "call this in the environment that runs the server, on a machine that has it",
        )
    elif actual != expected:
        yield Refusal(f"{what}: {expected} was proven, but {actual} is here", _AGAIN)


def _gpus(receipt: Receipt, asked: _Asked, here: Here) -> Iterator[Refusal]:
    topology = receipt.topology
    if topology["class"] in ("simulated", "cpu"):
        return  # the policy let evidence count that no GPU is part of
    expected = topology["gpu"]
    if expected is None:
        yield Refusal("GPU: the receipt does not say which one it was proven on", _AGAIN)
        return
    if here.gpus is None:
        yield Refusal(
            f"GPU: {expected} was proven, but which are visible here cannot be read",
            "pip install nvidia-ml-py; name whole GPUs in CUDA_VISIBLE_DEVICES; where they differ,"
            " set CUDA_DEVICE_ORDER=PCI_BUS_ID",
        )
        return
    others = sorted({gpu for gpu in here.gpus if gpu != expected})
    if others:
        yield Refusal(f"GPU: {expected} was proven, but {', '.join(others)} is here", _AGAIN)
    loopback = topology["class"] == "gpu-loopback"
    needed = 1 if loopback else -(-asked.tp_size // topology["nodes"])
    if len(here.gpus) < needed:
        yield Refusal(
            f"GPUs: tp_size={asked.tp_size} needs {needed} here, but {len(here.gpus)} are visible",
            "look at CUDA_VISIBLE_DEVICES, or start on a machine that has them",
        )


def _nccl(receipt: Receipt, here: Here) -> Iterator[Refusal]:
    expected = receipt.nccl["version"]
    if expected is not None:
        yield from _same_version("NCCL", expected, here.nccl)
    elif receipt.topology["class"] in ("gpus", "gpu-loopback"):
        yield Refusal("NCCL: the receipt does not say which version it was proven with", _AGAIN)


def _settings(receipt: Receipt, here: Here) -> Iterator[Refusal]:
    proven = {**receipt.nccl["settings"], **_numeric(receipt.environment.get("variables") or {})}
    actual = here.settings
    for name in sorted({*proven, *actual} - {*_HARMLESS}):
        was, now = proven.get(name), actual.get(name)
        if machine.HIDDEN in (was, now):
            yield Refusal(
                f"{name} sounds like a secret, so its value is hidden and cannot be compared",
                f"unset {name} here, and where it was proven",
            )
        elif now is None:
            yield Refusal(f"{name}: {was} was proven, but it is not set here", _set(name, was))
        elif was is None:
            yield Refusal(
                f"{name}: it was not set when this was proven, but is {now} here", _set(name, was)
            )
        elif was != now:
            yield Refusal(f"{name}: {was} was proven, but {now} is here", _set(name, was))


def _numeric(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: variables[name] for name in _NUMERIC if name in variables}


def _set(name: str, value: str | None) -> str:
    """Return how to set a variable to what was proven."""
    command = f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}"
    if name not in _OF_A_HOST:
        return command
    return (
        f"{command}; where hosts call their devices differently, prove it with one list of prefixes"
        f" for all of them, like {name}={_OF_A_HOST[name]}, and set that here"
    )


def _torch_and_driver(receipt: Receipt, here: Here) -> Iterator[Refusal]:
    for name, actual in (("torch", here.version("torch")), ("driver", here.driver)):
        expected: Any = receipt.environment.get(name)
        if expected is not None:
            yield from _same_version(name, str(expected), actual)
        elif name == "torch":
            yield Refusal("torch: the receipt does not say which one it was proven with", _AGAIN)
