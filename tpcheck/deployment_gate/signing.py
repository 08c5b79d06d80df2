"""Ed25519 keys and signatures for receipts, through `cryptography`. Torch-free.

Requirement: a receipt that nobody can forge, and a private key that nobody sees. A key file is made
for its owner alone and never overwritten; one that others can use is not used. Nothing of a private
key stands in a message, nor in the frames of an error: what the library raises on reading one is
dropped.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpcheck.deployment_gate.receipts import Receipt, Signature, canonical_bytes
from tpcheck.errors import TPCheckError
from tpcheck.files import create_file, read_bounded

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

MAX_BYTES = 1 << 16


def new_key(path: str | os.PathLike[str]) -> str:
    """Make a key pair: `path` for its owner alone, `path`.pub for everybody who verifies.

    Returns:
        The fingerprint of the public key, as signatures carry it.

    Raises:
        TPCheckError: one of the files is there already or cannot be written, or `cryptography` is
            not installed.
    """
    library = _library()
    private, public = Path(path), Path(f"{os.fspath(path)}.pub")
    for file in (private, public):
        if os.path.lexists(file):
            raise TPCheckError(f"{file}: is there already and is not overwritten; name another")
    key = library.Ed25519PrivateKey.generate()
    encoding, public_format = library.Encoding.PEM, library.PublicFormat.SubjectPublicKeyInfo
    create_file(
        key.private_bytes(encoding, library.PrivateFormat.PKCS8, library.NoEncryption()),
        private,
        mode=0o600,
    )
    try:
        create_file(key.public_key().public_bytes(encoding, public_format), public)
    except BaseException:
        private.unlink(missing_ok=True)  # half a pair is of no use, and stands in the next's way
        raise
    return fingerprint(key.public_key())


def assert_usable(key_path: str | os.PathLike[str]) -> None:
    """Raise now what `sign` would raise later.

    Raises:
        TPCheckError: the file cannot be read, can be used by others, or holds no Ed25519 key.
    """
    _private_key(key_path)


def sign(receipt: Receipt, key_path: str | os.PathLike[str]) -> Receipt:
    """Return the receipt with a signature by the private key in a file.

    Raises:
        TPCheckError: the file cannot be read, can be used by others, or holds no Ed25519 key.
    """
    key = _private_key(key_path)
    value = key.sign(canonical_bytes(receipt)).hex()
    return replace(receipt, signature=Signature(fingerprint(key.public_key()), value))


def assert_signed(receipt: Receipt, public_key_path: str | os.PathLike[str]) -> None:
    """Raise unless the receipt was signed by the key whose public half is in a file.

    Raises:
        TPCheckError: it is unsigned, signed by another key, or altered since; or there is no such
            public key, or `cryptography` is not installed.
    """
    key = read_public_key(public_key_path)
    signature = receipt.signature
    if signature is None:
        raise TPCheckError(
            "the receipt is unsigned, so anybody may have written it; sign it with"
            " `tpcheck gate REPORT.json --policy FILE --receipt PATH --sign KEY`"
        )
    expected = fingerprint(key)
    if signature.key != expected:
        raise TPCheckError(
            f"the receipt is signed by the key {signature.key[:16]}..., but should be by"
            f" {expected[:16]}..., the one in {public_key_path}"
        )
    try:
        key.verify(bytes.fromhex(signature.value), canonical_bytes(receipt))
    except _library().InvalidSignature:
        raise TPCheckError(
            "the signature is not that of this content: the receipt was altered after it was"
            " signed, or the signature is forged"
        ) from None


def read_public_key(path: str | os.PathLike[str]) -> Ed25519PublicKey:
    """Return the public key in a file.

    Raises:
        TPCheckError: it cannot be read, or holds something else; names the path.
    """
    library = _library()
    data = read_bounded(path, MAX_BYTES)
    if b"PRIVATE KEY" in data:
        raise TPCheckError(f"{path}: is a private key, but should be the public one, in its .pub")
    try:
        key: Any = library.load_pem_public_key(data)
    except Exception:  # the library names several, by what is wrong with the file
        key = None
    if not isinstance(key, library.Ed25519PublicKey):
        raise TPCheckError(f"{path}: is no Ed25519 public key in PEM; `--new-key` makes a pair")
    found: Ed25519PublicKey = key
    return found


def fingerprint(key: Ed25519PublicKey) -> str:
    """Return the SHA-256 of the raw public key, in hexadecimal."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def _private_key(path: str | os.PathLike[str]) -> Ed25519PrivateKey:
    library = _library()
    found = _parsed_private(library, path)
    if isinstance(found, str):
        raise TPCheckError(f"{path}: {found}")
    return found


def _parsed_private(library: Any, path: str | os.PathLike[str]) -> Ed25519PrivateKey | str:
    """Return the key, or what is wrong: an error raised from here would carry what was read."""
    data = read_bounded(path, MAX_BYTES, private=True)
    if b"PUBLIC KEY" in data:
        return "is a public key, but signing needs the private one"
    if b"ENCRYPTED" in data:
        return "has a password, but tpcheck reads keys that have none"
    try:
        key: Any = library.load_pem_private_key(data, None)
    except Exception:  # its text and frames may hold what was read
        key = None
    if isinstance(key, library.Ed25519PrivateKey):
        found: Ed25519PrivateKey = key
        return found
    return "is no Ed25519 private key in PEM; `--new-key` makes one"


def _library() -> Any:
    """Return what is used of `cryptography`.

    Raises:
        TPCheckError: it is not installed; says how to install it.
    """
    try:
        from tpcheck.deployment_gate import cryptography_names
    except ImportError as error:
        raise TPCheckError(
            "signing and verifying need the package cryptography: pip install 'tpcheck[gate]'"
        ) from error
    return cryptography_names
