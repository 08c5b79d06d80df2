"""A digest is that of the bytes that are there: every file that makes the function counts.

Evidence: one change per kind of file and of damage, a cache that lies, files that change meanwhile.
"""

import hashlib
import json
import mmap
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tpcheck import model_digest
from tpcheck.errors import TPCheckError
from tpcheck.model_digest import ModelDigest, digest_directory, digest_model

INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files of a test are new: without this none would be kept."""
    monkeypatch.setattr(model_digest, "_SETTLED_NS", -(10**10))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"vocab_size": 8}')
    for n in (1, 2):
        (directory / f"model-{n}.safetensors").write_bytes(os.urandom(64))
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def cache_of(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tpcheck" / "digests.json"


def flip(path: Path) -> None:
    """Change one byte; size and mtime stay."""
    found = path.stat()
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert path.stat().st_mtime_ns == found.st_mtime_ns


def test_every_file_that_counts_is_named_with_its_own_digest(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    digest = digest_directory(model)
    names = ["config.json", "model-1.safetensors", "model-2.safetensors", INDEX]
    assert [file.name for file in digest.files] == names
    for file in digest.files:
        data = (model / file.name).read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_equal_directories_have_equal_digests(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).symlink_to(file)  # as the Hugging Face cache lays them out
    assert digest_directory(model) == digest_directory(other) == digest_directory(model)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("config.json", "config"),
        ("quantize_config.json", "config"),
        ("quant_config.json", "config"),
        ("hf_quant_config.json", "config"),
        ("adapter_config.json", "config"),
        ("modeling_mine.py", "config"),
        ("model-2.safetensors", "weights"),
        ("adapter_model.safetensors", "weights"),
        (INDEX, "weights"),
        ("generation_config.json", ""),
        ("tokenizer.json", ""),
        ("pytorch_model.bin", ""),
    ],
)
def test_what_changes_the_function_changes_its_digest_and_no_other(
    name: str, part: str, model: Path
) -> None:
    before = digest_directory(model)
    path = model / name
    path.write_bytes((path.read_bytes() if path.exists() else b"{}") + b" ")
    after = digest_directory(model)
    assert (before.config_sha256 != after.config_sha256) == (part == "config")
    assert (before.weights_sha256 != after.weights_sha256) == (part == "weights")


def test_shards_that_trade_places_are_another_model(model: Path) -> None:
    before = digest_directory(model)
    one, two = model / "model-1.safetensors", model / "model-2.safetensors"
    one.rename(model / "x")
    two.rename(one)
    (model / "x").rename(two)
    assert digest_directory(model).weights_sha256 != before.weights_sha256


def test_a_shard_of_another_name_is_another_model(model: Path) -> None:
    (model / INDEX).unlink()
    before = digest_directory(model)
    (model / "model-2.safetensors").rename(model / "model-3.safetensors")
    assert digest_directory(model).weights_sha256 != before.weights_sha256


def test_a_kept_digest_is_used_and_paranoid_reads_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest_directory(model)
    read: list[str] = []
    actual = model_digest._read
    monkeypatch.setattr(model_digest, "_read", lambda p: (read.append(p.name), actual(p))[1])
    assert digest_directory(model) == before
    assert read == ["config.json", INDEX]  # small ones are read every time
    assert digest_directory(model, paranoid=True) == before
    assert sorted(read[2:]) == ["config.json", "model-1.safetensors", "model-2.safetensors", INDEX]


def test_a_byte_flipped_behind_size_and_mtime_shows_in_the_ctime(model: Path) -> None:
    before = digest_directory(model)
    flip(model / "model-1.safetensors")
    assert digest_directory(model).weights_sha256 != before.weights_sha256


def test_a_byte_flipped_through_a_mapping_shows_in_the_ctime(model: Path) -> None:
    path = model / "model-1.safetensors"
    if _file_system(path) == "tmpfs":
        pytest.skip("nothing is ever written back there: SECURITY.md says to use paranoid")
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[6] ^= 1  # its page is now the mapper's to write, and the times stay from here on
        time.sleep(0.05)  # past the tick of a coarse clock
        before = digest_directory(model)
        mapped[7] ^= 1
        assert digest_directory(model).weights_sha256 != before.weights_sha256


def _file_system(path: Path) -> str:
    device = path.stat().st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == f"{os.major(device)}:{os.minor(device)}":
            return fields[fields.index("-") + 1]
    return "unknown"


@pytest.mark.parametrize(
    ("base", "own"), [("meta/llama", False), ("{elsewhere}", False), ("{here}", True), (None, True)]
)
def test_an_adapter_whose_weights_lie_elsewhere_has_no_digest(
    base: str | None, own: bool, model: Path, tmp_path: Path
) -> None:
    base = base and base.format(elsewhere=tmp_path, here=model)
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    if own:
        assert "adapter_config.json" in {file.name for file in digest_directory(model).files}
        return
    with pytest.raises(TPCheckError, match="not those of this directory; merge the adapter"):
        digest_directory(model)


def test_an_adapter_that_names_two_bases_has_no_digest(model: Path) -> None:
    twice = f'{{"base_model_name_or_path": "{model}", "base_model_name_or_path": "elsewhere"}}'
    (model / "adapter_config.json").write_text(twice)
    with pytest.raises(TPCheckError, match="stands twice"):
        digest_directory(model)


def test_a_cache_that_lies_is_believed_unless_paranoid(model: Path, tmp_path: Path) -> None:
    """What SECURITY.md says of whoever can write the cache."""
    before = digest_directory(model)
    cache = cache_of(tmp_path)
    value = json.loads(cache.read_text())
    flip(model / "model-1.safetensors")
    found = (model / "model-1.safetensors").stat()
    for row in value["files"]:
        if row[0].endswith("model-1.safetensors"):
            row[3] = found.st_ctime_ns
    cache.write_text(json.dumps(value))
    assert digest_directory(model) == before
    assert digest_directory(model, paranoid=True) != before
    # and what paranoid read takes the lie's place
    assert digest_directory(model) != before


def test_what_changed_a_moment_ago_is_not_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_digest, "_SETTLED_NS", 10**12)
    digest_directory(model)
    assert not cache_of(tmp_path).exists()


def test_the_cache_is_private_and_keeps_one_digest_a_path(model: Path, tmp_path: Path) -> None:
    for _ in range(3):
        flip(model / "model-1.safetensors")
        digest_directory(model)
    cache = cache_of(tmp_path)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    assert len(json.loads(cache.read_text())["files"]) == 2
    assert [file.name for file in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\x00",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"schema": "tpcheck.digests/2", "files": []}',
        b'{"schema": "tpcheck.digests/1"}',
        b'{"schema": "tpcheck.digests/1", "files": 7}',
        b'{"schema": "tpcheck.digests/1", "files": [7, []]}',
        b'{"schema": "tpcheck.digests/1", "files": [["a", 1, 2, 3, 4, 5, "no digest"]]}',
        b'{"schema": "tpcheck.digests/1", "files": [["a", 1, 2, 3, 4, true, "'
        + b"0" * 64
        + b'"]]}',
        b'{"schema": "tpcheck.digests/1", "files": [[[], 1, 2, 3, 4, 5, "' + b"0" * 64 + b'"]]}',
    ],
)
def test_a_broken_cache_costs_time_only(damage: bytes, model: Path, tmp_path: Path) -> None:
    expected = digest_directory(model, cache=tmp_path / "other.json")
    cache = cache_of(tmp_path)
    cache.parent.mkdir(parents=True)
    cache.write_bytes(damage)
    cache.chmod(0o600)
    assert digest_directory(model) == expected
    assert len(json.loads(cache.read_text())["files"]) == 2


@pytest.mark.parametrize("how", ["writable by others", "a link", "a folder", "unwritable place"])
def test_a_cache_that_is_not_ours_alone_is_not_used(how: str, model: Path, tmp_path: Path) -> None:
    digest_directory(model)
    cache = cache_of(tmp_path)
    lie = json.loads(cache.read_text())
    for row in lie["files"]:
        row[-1] = "0" * 64
    cache.write_text(json.dumps(lie))
    assert digest_directory(model).files[1].sha256 == "0" * 64
    where = cache
    if how == "writable by others":
        cache.chmod(0o666)
    elif how == "a link":
        where = tmp_path / "link.json"
        where.symlink_to(cache)
    elif how == "a folder":
        where = tmp_path
    else:
        where = Path("/proc/none/digests.json")
    assert digest_directory(model, cache=where).files[1].sha256 != "0" * 64


def test_it_works_without_a_home(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # counts as not set
    monkeypatch.setenv("HOME", "also/relative")
    assert model_digest.default_cache() is None
    assert digest_directory(model).files


def test_a_file_that_changes_while_it_is_read_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actual = hashlib.file_digest

    def meddle(file: Any, name: str) -> Any:
        digest = actual(file, name)
        with (model / "model-1.safetensors").open("ab") as other:
            other.write(b"x")
        return digest

    monkeypatch.setattr(hashlib, "file_digest", meddle)
    with pytest.raises(TPCheckError, match=r"model-1\.safetensors: changed while it was read"):
        digest_directory(model)


def test_a_link_turned_elsewhere_while_it_is_read_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = model / "model-1.safetensors"
    for name in ("blob", "other"):
        (tmp_path / name).write_bytes(name.encode())
    link.unlink()
    link.symlink_to(tmp_path / "blob")
    actual = hashlib.file_digest

    def meddle(file: Any, name: str) -> Any:
        digest = actual(file, name)
        if digest.hexdigest() == hashlib.sha256(b"blob").hexdigest():
            link.unlink()
            link.symlink_to(tmp_path / "other")  # the file that was read does not notice
        return digest

    monkeypatch.setattr(hashlib, "file_digest", meddle)
    with pytest.raises(TPCheckError, match="changed while it was read"):
        digest_directory(model)


def test_a_directory_that_trades_places_while_it_is_read_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files keep their inode and times: only the name stands for others now."""
    other = tmp_path / "other"
    shutil.copytree(model, other)
    actual = hashlib.file_digest

    def meddle(file: Any, name: str) -> Any:
        digest = actual(file, name)
        if other.exists():
            model.rename(tmp_path / "aside")
            other.rename(model)
        return digest

    monkeypatch.setattr(hashlib, "file_digest", meddle)
    with pytest.raises(TPCheckError, match="changed while it was read"):
        digest_directory(model)


@pytest.mark.parametrize("how", ["written", "touched", "added", "removed", "put back"])
def test_a_directory_that_changed_in_use_is_refused(how: str, model: Path) -> None:
    digested = digest_model(model)
    digested.assert_unchanged()
    path = model / "model-2.safetensors"
    if how == "written":
        flip(path)
    elif how == "touched":
        path.touch()
    elif how == "added":
        (model / "model-3.safetensors").write_bytes(b"")
    elif how == "removed":
        path.unlink()
    else:  # the old bytes again: the run in between may have read others
        path.rename(model / "aside")
        path.write_bytes(b"")
        path.unlink()
        (model / "aside").rename(path)
    with pytest.raises(TPCheckError, match=r"model-[23]\.safetensors changed while it was in use"):
        digested.assert_unchanged()


def broken(model: Path, how: str) -> str:
    """Break a directory in one way; return what the message should say."""
    shard = model / "model-1.safetensors"
    if how == "no directory":
        for file in model.iterdir():
            file.unlink()
        model.rmdir()
        return "is no directory, but should be a model's"
    if how == "pickled weights":
        for file in model.glob("*.safetensors*"):
            file.unlink()
        (model / "pytorch_model.bin").write_bytes(b"x")
        return "pytorch_model.bin is not read: convert it to safetensors"
    if how == "empty":
        for file in model.iterdir():
            file.unlink()
        return r"holds no \*.safetensors"
    if how == "no config":
        (model / "config.json").unlink()
        return "config.json is missing"
    if how == "renamed shard":
        shard.rename(model / "model-x.safetensors")
        return "index.json: names 'model-1.safetensors', which is not in the directory"
    if how == "shard elsewhere":
        (model / INDEX).write_text('{"weight_map": {"a": "../model-1.safetensors"}}')
        return "names '../model-1.safetensors', which is not in the directory"
    if how == "broken index":
        (model / INDEX).write_text('{"weight_map": 7}')
        return "weight_map should say the file of each tensor"
    shard.unlink()
    if how == "a pipe":
        os.mkfifo(shard)
        return "is no regular file"
    if how == "a dangling link":
        shard.symlink_to(model / "nowhere")
        return "cannot be read: No such file"
    assert how == "a folder"
    shard.mkdir()
    return "is no regular file"


@pytest.mark.parametrize(
    "how",
    "no directory|pickled weights|empty|no config|renamed shard|shard elsewhere|broken index"
    "|a pipe|a dangling link|a folder".split("|"),
)
def test_what_cannot_be_digested_is_one_clear_error(how: str, model: Path, tmp_path: Path) -> None:
    message = broken(model, how)
    with pytest.raises(TPCheckError, match=message):
        digest_directory(model)
    assert not cache_of(tmp_path).exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, "cannot be listed: File name too long"),
        ("loop", "cannot be listed: Too many levels of symbolic links"),
        ("a\0b", "is no directory"),
        ("file", "is no directory"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_clear_error(
    name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    with pytest.raises(TPCheckError, match=message):
        digest_directory(tmp_path / name)


def test_a_directory_that_may_not_be_listed_is_one_clear_error(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Any, **_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    error: Exception | None = None
    with monkeypatch.context() as patched:
        for name in ("stat", "listdir"):  # of a folder in a closed one, not even a stat works
            patched.setattr(os, name, closed)
        try:
            digest_directory(model)
        except Exception as found:  # pytest itself could not tell of one
            error = found
    assert isinstance(error, TPCheckError)
    assert str(error) == f"{model}: cannot be listed: Permission denied"


def test_a_name_without_meaning_as_text_counts_too(model: Path) -> None:
    before = digest_directory(model)
    Path(os.fsdecode(os.fsencode(model) + b"/\xff.safetensors")).write_bytes(b"x")
    after = digest_directory(model)
    assert after.weights_sha256 != before.weights_sha256
    assert digest_directory(model) == after


def test_large_files_are_read_side_by_side_to_the_same_digest(model: Path) -> None:
    data = os.urandom(2**20) * 9
    (model / "model-1.safetensors").write_bytes(data)
    (model / "model-2.safetensors").write_bytes(data[::-1])
    digest = digest_directory(model)
    assert digest.files[1].sha256 == hashlib.sha256(data).hexdigest()
    assert digest.files[2].sha256 == hashlib.sha256(data[::-1]).hexdigest()


def test_it_starts_without_torch_or_a_command_line(model: Path) -> None:
    code = (
        "import sys\nfrom tpcheck.model_digest import digest_directory\n"
        f"print(digest_directory({str(model)!r}).weights_sha256)\n"
        "assert not {'torch', 'typer', 'numpy', 'hypothesis'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    digest: ModelDigest = digest_directory(model)
    assert done.stdout.strip() == digest.weights_sha256
