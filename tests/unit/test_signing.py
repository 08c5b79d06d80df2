"""Nobody but the holder of the key can sign, and nobody sees the key.

Evidence: keys of other kinds and modes, forged and foreign signatures, a search for the secret in
whatever is printed, raised or written.
"""

import os
import pickle
import stat
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed448, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tests.receipting import make_model, make_receipt_of, make_report
from tpcheck.deployment_gate import signing
from tpcheck.deployment_gate.receipts import Receipt, Signature, canonical_bytes
from tpcheck.deployment_gate.signing import assert_signed, assert_usable, new_key, sign
from tpcheck.errors import TPCheckError
from tpcheck.files import create_file


@pytest.fixture(scope="module")
def receipt(tmp_path_factory: pytest.TempPathFactory) -> Receipt:
    model = make_model(tmp_path_factory.mktemp("signing") / "model")
    return make_receipt_of(make_report(model))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    new_key(tmp_path / "key")
    return tmp_path / "key"


def public(key: Path) -> Path:
    return key.with_name(f"{key.name}.pub")


def test_a_new_pair_is_private_and_works(key: Path, receipt: Receipt) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(public(key).stat().st_mode) == 0o644 & ~current_umask()
    assert_signed(sign(receipt, key), public(key))
    assert sorted(file.name for file in key.parent.iterdir()) == ["key", "key.pub"]


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_key_is_private_from_its_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No moment in which another could open it: the mode is given to open itself, exclusively."""
    seen: list[tuple[str, int, int]] = []
    actual = os.open

    def watch(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        seen.append((str(path), flags, mode))
        return actual(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", watch)
    mask = os.umask(0)
    try:
        new_key(tmp_path / "key")
    finally:
        os.umask(mask)
    made = [(flags, mode) for name, flags, mode in seen if ".key." in name and ".pub" not in name]
    assert made
    for flags, mode in made:
        assert flags & os.O_EXCL
        assert mode == 0o600
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["key", "key.pub"])
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_key_overwrites_nothing_and_leaves_no_half(name: str, kind: str, tmp_path: Path) -> None:
    if kind == "file":
        (tmp_path / name).write_text("mine")
    else:
        (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(TPCheckError, match=f"{name}: is there already and is not overwritten"):
        new_key(tmp_path / "key")
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_file_that_appears_at_the_last_moment_is_kept(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("mine")
    with pytest.raises(TPCheckError, match="is there already and is not overwritten"):
        create_file(b"x", tmp_path / "key", mode=0o600)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("key", "mine")]


def test_a_public_half_that_cannot_be_written_leaves_no_private_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actual = signing.create_file

    def fail(data: bytes, path: Path, **more: Any) -> None:
        if path.suffix == ".pub":
            raise TPCheckError("the disk is full")
        actual(data, path, **more)

    monkeypatch.setattr(signing, "create_file", fail)
    with pytest.raises(TPCheckError, match="the disk is full"):
        new_key(tmp_path / "key")
    assert list(tmp_path.iterdir()) == []


def test_no_key_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TPCheckError, match="cannot be written: No such file"):
        new_key(tmp_path / "none" / "key")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o604, 0o601])
def test_a_private_key_that_others_can_use_is_not_used(
    mode: int, key: Path, receipt: Receipt
) -> None:
    key.chmod(mode)
    with pytest.raises(TPCheckError, match=f"has mode 0{mode:o}, .* chmod 600"):
        sign(receipt, key)
    key.chmod(0o400)
    assert_usable(key)


def test_an_unsigned_receipt_is_refused(key: Path, receipt: Receipt) -> None:
    with pytest.raises(TPCheckError, match="unsigned, so anybody may have written it"):
        assert_signed(receipt, public(key))


def test_a_signature_by_another_key_is_refused(key: Path, receipt: Receipt) -> None:
    other = key.with_name("other")
    new_key(other)
    with pytest.raises(TPCheckError, match="is signed by the key"):
        assert_signed(sign(receipt, other), public(key))


def test_a_signature_that_claims_the_right_key_is_refused(key: Path, receipt: Receipt) -> None:
    other = key.with_name("other")
    new_key(other)
    ours, theirs = sign(receipt, key).signature, sign(receipt, other).signature
    assert ours is not None
    assert theirs is not None
    forged = replace(receipt, signature=Signature(ours.key, theirs.value))
    with pytest.raises(TPCheckError, match="altered after it was signed, or the signature is for"):
        assert_signed(forged, public(key))


def test_a_signature_of_another_receipt_is_refused(key: Path, receipt: Receipt) -> None:
    signed = sign(receipt, key)
    with pytest.raises(TPCheckError, match="altered after it was signed"):
        assert_signed(replace(signed, tp=(2, 4, 8)), public(key))


@pytest.mark.parametrize("how", ["order", "zero"])
def test_a_signature_has_one_form(how: str, key: Path, receipt: Receipt) -> None:
    """S and S + L verify alike in a careless implementation."""
    signed = sign(receipt, key)
    assert signed.signature is not None
    raw = bytes.fromhex(signed.signature.value)
    order = 2**252 + 27742317777372353535851937790883648493
    s = int.from_bytes(raw[32:], "little") + order
    other = raw[:32] + s.to_bytes(32, "little") if how == "order" else bytes(64)
    forged = replace(signed, signature=Signature(signed.signature.key, other.hex()))
    with pytest.raises(TPCheckError, match="forged"):
        assert_signed(forged, public(key))


def test_any_other_tool_can_check_it(key: Path, receipt: Receipt) -> None:
    """The signature is plain Ed25519 over the canonical bytes."""
    signed = sign(receipt, key)
    assert signed.signature is not None
    loaded = serialization.load_pem_public_key(public(key).read_bytes())
    assert isinstance(loaded, Ed25519PublicKey)
    loaded.verify(bytes.fromhex(signed.signature.value), canonical_bytes(receipt))


def other_keys() -> dict[str, bytes]:
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    plain = serialization.NoEncryption()
    locked = serialization.BestAvailableEncryption(b"s3cret")
    openssh = serialization.PrivateFormat.OpenSSH
    mine = Ed25519PrivateKey.generate()
    return {
        "rsa": rsa.generate_private_key(65537, 2048).private_bytes(pem, pkcs8, plain),
        "ed448": ed448.Ed448PrivateKey.generate().private_bytes(pem, pkcs8, plain),
        "password": mine.private_bytes(pem, pkcs8, locked),
        "openssh": mine.private_bytes(pem, openssh, plain),
        "cut": mine.private_bytes(pem, pkcs8, plain)[:60],
        "nothing": b"",
        "text": b"s3cret",
    }


@pytest.mark.parametrize("kind", ["rsa", "ed448", "password", "openssh", "cut", "nothing", "text"])
def test_another_kind_of_key_is_one_error(kind: str, tmp_path: Path, receipt: Receipt) -> None:
    path = tmp_path / "key"
    path.write_bytes(other_keys()[kind])
    path.chmod(0o600)
    message = "has a password" if kind == "password" else "is no Ed25519 private key in PEM"
    with pytest.raises(TPCheckError, match=message) as caught:
        sign(receipt, path)
    assert caught.value.__cause__ is None
    assert "s3cret" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_halves_that_are_swapped_are_named(key: Path, receipt: Receipt) -> None:
    public(key).chmod(0o600)
    with pytest.raises(TPCheckError, match="is a public key, but signing needs the private one"):
        sign(receipt, public(key))
    with pytest.raises(TPCheckError, match=r"is a private key, but should be the public one"):
        assert_signed(sign(receipt, key), key)


@pytest.mark.parametrize("content", [b"", b"x", b"-----BEGIN PUBLIC KEY-----\n", None])
def test_a_public_key_that_is_none_is_one_error(
    content: bytes | None, key: Path, receipt: Receipt
) -> None:
    path = key.with_name("other.pub")
    if content is not None:
        path.write_bytes(content)
    message = "cannot be read" if content is None else "is no Ed25519 public key in PEM"
    with pytest.raises(TPCheckError, match=message):
        assert_signed(sign(receipt, key), path)


def test_a_key_file_that_never_ends_is_not_read(receipt: Receipt, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        with pytest.raises(TPCheckError):
            sign(receipt, path)
        with pytest.raises(TPCheckError):
            signing.read_public_key(path)


def secrets_of(key: Path) -> list[str]:
    """Return the secret in every form in which it might slip out."""
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    assert isinstance(loaded, Ed25519PrivateKey)
    raw = loaded.private_bytes_raw()
    body = key.read_text().splitlines()[1]
    return [body, raw.hex(), repr(raw)[2:-1], repr(list(raw))]


def frames_of(error: BaseException) -> str:
    """Return everything that a tool which prints locals would show of an error."""
    assert error.__traceback__ is not None
    below = error.__traceback__.tb_next  # the first frame is the test's, which knows the secret
    shown = traceback.TracebackException(type(error), error, below, capture_locals=True)
    assert len(shown.stack) >= 2
    return "".join(shown.format())


def test_no_secret_in_any_error_or_its_frames(key: Path, receipt: Receipt) -> None:
    secrets = secrets_of(key)
    broken = key.with_name("broken")
    for content in (key.read_bytes()[:-30], key.read_bytes().replace(b"BEGIN", b"BEGUN")):
        broken.write_bytes(content)
        broken.chmod(0o600)
        with pytest.raises(TPCheckError) as caught:
            sign(receipt, broken)
        shown = frames_of(caught.value) + repr(pickle.dumps(caught.value))
        assert str(broken) in shown
        assert not any(secret in shown for secret in secrets)
    key.chmod(0o644)
    with pytest.raises(TPCheckError) as caught:
        sign(receipt, key)
    assert not any(secret in frames_of(caught.value) for secret in secrets)
    with pytest.raises(TPCheckError) as caught:
        assert_signed(receipt, key)  # unsigned, and the wrong half
    assert not any(secret in str(caught.value) for secret in secrets)


def test_without_the_package_it_says_how_to_install_it(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['cryptography'] = None\n"
        "from tpcheck.deployment_gate import receipts, requiring\n"
        "from tpcheck.deployment_gate.signing import new_key\n"
        f"new_key({str(tmp_path / 'key')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(
        "TPCheckError: signing and verifying need the package cryptography:"
        " pip install 'tpcheck[gate]'"
    )
    assert list(tmp_path.iterdir()) == []
