"""The parts of `tpcheck gate` about receipts: make a key, issue and sign, verify. Torch-free.

Requirement: one call does one thing; options that belong to another are an error, so that nobody
believes a signature was checked which was not. A receipt is made and signed before the decision is
shown, and written after it: an error leaves no half of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpcheck.cli_commands.options import DType
from tpcheck.cli_commands.output import Outputs, is_stdout, print_error, print_result
from tpcheck.errors import GateRefused, TPCheckError
from tpcheck.files import assert_writable, read_bounded
from tpcheck.records import EXIT_CODES, PASS, Report

if TYPE_CHECKING:
    from tpcheck.deployment_gate.decision import Decision
    from tpcheck.deployment_gate.policy import Policy
    from tpcheck.deployment_gate.receipts import Receipt

ReceiptPath = Annotated[
    Path | None,
    typer.Option("--receipt", metavar="PATH", help="Write what was proven, if it is allowed."),
]
SignKey = Annotated[
    Path | None, typer.Option("--sign", metavar="KEY", help="Sign the receipt with this key.")
]
NewKey = Annotated[
    Path | None,
    typer.Option("--new-key", metavar="PATH", help="Make a key pair, PATH and PATH.pub; no more."),
]
Verify = Annotated[
    Path | None,
    typer.Option("--verify", metavar="RECEIPT", help="May a server start, by this receipt?"),
]
PublicKey = Annotated[
    Path | None,
    typer.Option("--public-key", metavar="K", help="With --verify: of whoever signed it."),
]
ModelDir = Annotated[
    Path | None,
    typer.Option("--model", metavar="DIR", help="With --verify: what the server will load."),
]
Degree = Annotated[
    int | None, typer.Option("--tp", min=1, help="With --verify: the degree it will run at.")
]
Deployed = Annotated[
    DType | None, typer.Option("--dtype", help="With --verify: the dtype it will run in.")
]
Paranoid = Annotated[
    bool, typer.Option("--paranoid", help="With --verify: read every byte of the weights again.")
]

MAX_REPORT_BYTES = 1 << 30

Given = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Start:
    """A server that is about to start, as the options say it."""

    receipt: Path | None
    public_key: Path | None
    model: Path | None
    tp_size: int | None
    dtype: DType | None
    paranoid: bool

    @property
    def given(self) -> dict[str, Any]:
        """Every option, as it is typed, and its value."""
        return {
            "--verify": self.receipt,
            "--public-key": self.public_key,
            "--model": self.model,
            "--tp": self.tp_size,
            "--dtype": self.dtype,
            "--paranoid": self.paranoid,
        }


def assert_one_thing(given: Given) -> None:
    """Refuse options that do not make one of three calls: decide, --new-key or --verify.

    Args:
        given: every option, as it is typed, and its value.

    Raises:
        TPCheckError: options of two of them, or one that lacks another.
    """
    used = [name for name, value in given.items() if value]
    belongs = {
        "--new-key": {"--new-key", "--quiet"},
        "--verify": {*_NEEDED, "--verify", "--dtype", "--paranoid", "--json", "--quiet"},
    }
    for mode, options in belongs.items():
        if given[mode]:
            foreign = [name for name in used if name not in options]
            if foreign:
                raise TPCheckError(f"{mode}: does not go with {foreign[0]}; call them one by one")
            missing = [name for name in _NEEDED if mode == "--verify" and not given[name]]
            if missing:
                raise TPCheckError(f"--verify: needs {missing[0]} {_NEEDED[missing[0]]} as well")
            return
    alone = [name for name in used if name in (*_NEEDED, "--dtype", "--paranoid")]
    if alone:
        raise TPCheckError(f"{alone[0]}: is about --verify RECEIPT, which is missing")
    if given["--sign"] and not given["--receipt"]:
        raise TPCheckError("--sign: signs a receipt, but --receipt PATH is missing")


_NEEDED = {"--public-key": "K", "--model": "DIR", "--tp": "N"}


def assert_apart(outputs: Given, inputs: Given) -> None:
    """Refuse to write two things into one file, or where the evidence, policy or key lies.

    Raises:
        TPCheckError: names both.
    """
    places = {os.path.realpath(path): name for name, path in inputs.items() if path is not None}
    for name, path in outputs.items():
        if path is None or str(path) == "-":
            continue
        other = places.setdefault(os.path.realpath(path), name)
        if other != name:
            raise TPCheckError(f"{name}={path}, but should differ from {other}")


def make_key(path: Path, *, quiet: bool) -> None:
    """Make a key pair and say where it is and what it is called."""
    from tpcheck.deployment_gate.signing import new_key

    fingerprint = new_key(path)
    if not quiet:
        print_result(
            f"{path}: the private key; keep it where only the gate runs\n"
            f"{path}.pub: the public key, {fingerprint}; give it to every server"
        )


def read_evidence(path: Path) -> tuple[Report, str]:
    """Return a report and the SHA-256 of the very bytes it was read from.

    Raises:
        TPCheckError: as `read_report`; or it is no regular file.
    """
    from tpcheck.report import parse_report

    data = read_bounded(path, MAX_REPORT_BYTES)
    return parse_report(data, path), hashlib.sha256(data).hexdigest()


def prepare(receipt: Path, key: Path | None) -> None:
    """Find out before the decision that the receipt can be written and signed.

    Raises:
        TPCheckError: names the file and what is wrong with it.
    """
    assert_writable(receipt)
    if is_stdout(receipt) or (os.path.exists(receipt) and not os.path.isfile(receipt)):
        raise TPCheckError(f"--receipt={receipt}: is no regular file, but should be one")
    if key is not None:
        from tpcheck.deployment_gate.signing import assert_usable

        assert_usable(key)


def issue(
    report: Report, policy: Policy, decision: Decision, report_sha256: str, key: Path | None
) -> Receipt | None:
    """Return the receipt of an allowed deployment, signed if there is a key.

    Raises:
        TPCheckError: the report does not say what a receipt has to.
    """
    if not decision.allowed:
        return None
    from tpcheck.deployment_gate.issuing import make_receipt
    from tpcheck.deployment_gate.signing import sign

    receipt = make_receipt(report, policy, decision, report_sha256=report_sha256)
    return receipt if key is None else sign(receipt, key)


def store(receipt: Receipt | None, path: Path, *, quiet: bool) -> None:
    """Write the receipt and say where it is, or that there is none."""
    from tpcheck.deployment_gate.receipts import shown_time, write_receipt

    if receipt is None:
        if os.path.exists(path):
            print_error(f"note: refused, so no receipt was written; {path} is an earlier one")
        return
    write_receipt(receipt, path)
    if receipt.signature is None:
        print_error(f"note: {path} is unsigned, so no server starts by it; use --sign KEY")
    elif not quiet:
        key, until = receipt.signature.key[:16], shown_time(receipt.expires)
        print_error(f"note: {path} is signed by the key {key}..., and good until {until}")


def verify_and_show(start: Start, outputs: Outputs, *, quiet: bool) -> int:
    """Say whether a server may start, and return the exit code."""
    from tpcheck.deployment_gate.receipts import shown_time
    from tpcheck.deployment_gate.requiring import require

    receipt, model, tp_size = start.receipt, start.model, start.tp_size
    assert receipt is not None  # assert_one_thing saw to all four
    assert model is not None
    assert tp_size is not None
    assert start.public_key is not None
    found: dict[str, Any] = {"schema": "tpcheck.verification/1", "outcome": "ALLOWED"}
    found |= {"receipt": str(receipt), "model": str(model), "tp_size": tp_size, "refusals": []}
    try:
        held = require(
            receipt,
            model_dir=model,
            tp_size=tp_size,
            public_key=start.public_key,
            dtype=None if start.dtype is None else start.dtype.value,
            paranoid=start.paranoid,
        )
        tested = [row for row in held.tested if row["tp_size"] == tp_size]
        until = shown_time(held.expires)
        text = f"ALLOWED: {model} at tp_size={tp_size}, by {receipt}, until {until}"
        for row in tested:
            lengths = ", ".join(map(str, row["lengths"])) or "of its own"
            text += f"\n  tested: {row['dtype']}, batch {row['batch']}, lengths {lengths}"
    except GateRefused as refused:
        text = str(refused)
        found["outcome"] = "REFUSED"
        found["refusals"] = [
            {"reason": one.reason, "settle": one.settle} for one in refused.refusals
        ]
    outputs.publish(found, text, quiet=quiet)
    return EXIT_CODES[PASS if found["outcome"] == "ALLOWED" else "WRONG"]
