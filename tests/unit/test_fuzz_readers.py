"""Every reader of a file that nobody vouches for, against files that were altered.

Evidence: the table of readers (tests/fuzzing/readers.py) with Hypothesis behind every edit; what a
campaign of benchmarks/fuzz.py once found, each as one input; and readers made worse on purpose,
which the laws have to notice. Every test here runs under the hook of tests/fuzzing/audit.py (by
tests/unit/conftest.py), whose own evidence is test_fuzz_audit.py.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing import harness, mutators
from tests.fuzzing.harness import BAD, altered, judged
from tests.fuzzing.reader import Reader
from tests.fuzzing.readers import make_readers
from tests.models import MODELS
from tpcheck.cli import main
from tpcheck.errors import PlanError
from tpcheck.hf.config import spec_from_config

NAMES = (
    *("report", "policy", "receipt", "receipt, signed again by its owner"),
    *("public key", "private key", "digest cache", "digested index"),
    *("golden manifest", "golden data", "golden manifest with its checksums made anew"),
    *("golden data with its digest made anew", "safetensors header", "safetensors index"),
    *("capture", "shard map", "tolerances", "order file", "checkpoint"),
    *("manifest of a streamed run", "activations of a streamed run"),
    *(f"config.json, {name}" for name in ("llama", "gpt_oss", "gpt2", "moe", "gptq", "vision")),
    "probe report",
)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Reader]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        made = {reader.name: reader for reader in make_readers(tmp_path_factory.mktemp("files"))}
        yield made


@pytest.fixture
def reader(readers: dict[str, Reader], request: pytest.FixtureRequest) -> Reader:
    return readers[request.param]


def test_the_table_of_readers_is_whole(readers: dict[str, Reader]) -> None:
    assert tuple(readers) == NAMES


@pytest.mark.parametrize("reader", NAMES, indirect=True)
def test_what_the_writer_wrote_is_accepted(reader: Reader) -> None:
    result = judged(reader, reader.original)
    assert (result.outcome, result.text) == (reader.unaltered, "")


@pytest.mark.parametrize("reader", NAMES, indirect=True)
def test_no_altered_file_breaks_a_reader_or_its_law(reader: Reader) -> None:
    @settings(max_examples=60, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(reader.edits)), st.randoms(use_true_random=False))
    def holds(edit: str, rng: random.Random) -> None:
        result = judged(reader, altered(reader, edit, rng))
        assert result.outcome not in BAD, result.text

    holds()


# -- what once broke a reader, as one input each

DEEP = b"[" * 600 + b"]" * 600
DOTS = b"a." * 20_000 + b"a = 1\n"


def header(entry: dict[str, Any], data: bytes = b"") -> bytes:
    """Return a safetensors file of one tensor."""
    return mutators.packed(mutators.json_text({"x": entry}).encode(), data)


def value(reader: Reader, key: str, text: str) -> bytes:
    """Return a reader's JSON file with the value at a top-level key, in raw text."""
    fields = mutators.json.loads(reader.original) | {key: "@raw:" + text}
    return mutators.json_text(fields).encode()


FOUND: dict[str, tuple[str, Callable[[Reader], bytes]]] = {
    "keys of so many parts that a TOML reader takes hours": ("policy", lambda _: DOTS),
    "the same in a shard map": ("shard map", lambda _: DOTS),
    "the same in a tolerance file": ("tolerances", lambda _: b"[[tolerance]]\nmatch." + DOTS),
    "a table that is too deep to be walked": (
        "policy",
        lambda r: r.original.rstrip(b"}\n") + b", x = " + b"{a=" * 300 + b"1" + b"}" * 301,
    ),
    "a degree of 20,000 bits": ("policy", lambda _: b"[policy]\ntp = [0x" + b"f" * 5000 + b"]\n"),
    "so many degrees that each is compared with all": (
        "policy",
        lambda _: b"[policy]\ntp = [%s]\n" % ",".join(map(str, range(1, 20_000))).encode(),
    ),
    "a tolerance beyond every float": (
        "tolerances",
        lambda _: b"[[tolerance]]\nmatch = '.*'\natol = 1" + b"0" * 400,
    ),
    "nesting that can be read and not be written": (
        "report",
        lambda r: value(r, "environment", '{"a": ' + DEEP.decode() + "}"),
    ),
    "a whole number beyond every float": (
        "report",
        lambda r: value(r, "sensitivity", '{"caught": 1' + "0" * 400 + "}"),
    ),
    "UTF-16": ("golden manifest", lambda r: r.original.decode().encode("utf-16")),
    "a byte order mark": ("golden manifest", lambda r: b"\xef\xbb\xbf" + r.original),
    "a header in UTF-16, which its own library refuses": (
        "safetensors header",
        lambda _: mutators.packed("{}".encode("utf-16"), b""),
    ),
    "a shape whose product takes for ever": (
        "safetensors header",
        lambda _: header({"dtype": "F32", "shape": [10**4000] * 200, "data_offsets": [0, 0]}),
    ),
    "metadata that are no texts, which its own library refuses": (
        "safetensors header",
        lambda _: mutators.packed(b'{"__metadata__": 0}', b""),
    ),
    "a dtype that torch does not have": (
        "checkpoint",
        lambda _: header({"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}, b"abc"),
    ),
    "a file of a name that no disk can hold": (
        "safetensors index",
        lambda r: r.original.replace(b"model-0", b"x" * 5_000),
    ),
    "a zero byte in a file's name": (
        "manifest of a streamed run",
        lambda r: r.original.replace(b"after-layer-", b"after-layer-\\u0000"),
    ),
    "a header whose own library repeats it in its refusal": (
        "checkpoint",
        lambda _: header({"dtype": "F32", "shape": "x" * 100_000, "data_offsets": [0, 0]}),
    ),
    "a dtype on the wire that is a number": (
        "probe report",
        lambda r: r.original.replace(b'"wire": "bfloat16"', b'"wire": 3'),
    ),
    "layers that are counted by a text": (
        "config.json, gpt_oss",
        lambda r: value(r, "num_hidden_layers", '"3"'),
    ),
    "more layers than memory could list": (
        "config.json, gpt_oss",
        lambda r: value(r, "num_hidden_layers", "1" + "0" * 12),
    ),
    "a width that is an object": ("config.json, gpt2", lambda r: value(r, "n_embd", "{}")),
    "a refusal longer than any terminal": (
        "config.json, gpt2",
        lambda r: value(r, "n_layer", "[" + "0," * 50_000 + "0]"),
    ),
    "codes of more bits than a word": (
        "config.json, gptq",
        lambda r: r.original.replace(b'"bits": 4', b'"bits": 33'),
    ),
    "a probe of more ranks than memory could count": (
        "probe report",
        lambda r: r.original.replace(b'"tp_size": 3', b'"tp_size": 1000000000000'),
    ),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_once_broke_a_reader_is_refused(readers: dict[str, Reader], what: str) -> None:
    name, made = FOUND[what]
    result = judged(readers[name], made(readers[name]))
    assert result.outcome == "refused", result.text


def test_a_rope_factor_that_is_a_text_is_refused() -> None:
    fields = MODELS["llama_yarn_mscale"]
    rope = fields["rope_parameters"] | {"factor": "4"}
    with pytest.raises(PlanError, match=r"factor='4', but should be a number"):
        spec_from_config(fields | {"rope_parameters": rope})


@pytest.mark.parametrize("odd", ["b.safetensors", "model.safetensors.index.json"])
def test_a_pipe_in_the_place_of_a_file_hangs_nobody(
    readers: dict[str, Reader], tmp_path: Path, odd: str
) -> None:
    from tpcheck.captures.reading import read_capture
    from tpcheck.errors import TPCheckError
    from tpcheck.header_check.headers import read_headers

    (tmp_path / "a.safetensors").write_bytes(readers["safetensors header"].original)
    os.mkfifo(tmp_path / odd)
    assert [one.where for one in read_capture(tmp_path).problems] == [str(tmp_path / odd)]
    if odd == "b.safetensors":
        with pytest.raises(TPCheckError, match="is no regular file"):
            read_headers(tmp_path)


COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "report": ("FILE", ("gate", "FILE", "--policy", "policy.toml")),
    "policy": ("FILE", ("gate", "report.json", "--policy", "FILE")),
    "receipt": (
        "FILE",
        ("gate", "--verify", "FILE", "--public-key", "k.pub", "--model", ".", "--tp", "2"),
    ),
    "config.json, gpt_oss": ("config.json", ("plan", ".", "--tp", "2,3")),
    "probe report": ("FILE", ("probe", "--against", "FILE", "--backend", "sim", "--tp", "3")),
    "golden manifest": ("golden/a.json", ("golden", "list", "golden")),
    "capture": ("FILE.safetensors", ("diff", "true.safetensors", "FILE.safetensors")),
    "shard map": (
        "FILE",
        ("diff", "true.safetensors", "true.safetensors", "--shard-map", "FILE"),
    ),
}
"""Reader -> where its file lies, and a command that reads it."""


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_ends_with_a_code_and_one_line(
    readers: dict[str, Reader],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    file, command = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "golden").mkdir()
    for other, path in (("report", "report.json"), ("policy", "policy.toml")):
        (tmp_path / path).write_bytes(readers[other].original)
    (tmp_path / "k.pub").write_bytes(readers["public key"].original)
    (tmp_path / "true.safetensors").write_bytes(readers["capture"].original)
    monkeypatch.setattr(sys, "argv", ["tpcheck", *command, "--quiet"])
    reader = readers[name]
    edits = [edit for edit in reader.edits if edit not in mutators.BYTE_EDITS] or ["truncate"]
    for number in range(16):
        rng = random.Random(f"{name} {number}")
        data = altered(reader, edits[number % len(edits)], rng)
        if name == "probe report":  # what it is held against is read before anything is probed
            data = data.replace(b'"tp_size": 3', b'"tp_size": 5')
        (tmp_path / file).write_bytes(data)
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr().err
        assert end.value.code in (0, 1, 2, 3)
        assert "Traceback" not in said
        assert "bug in tpcheck" not in said
        assert end.value.code != 2 or said.startswith("error: ")


# -- a law that cannot be broken is none: readers made worse


def worst_of(reader: Reader, edits: tuple[str, ...], inputs: int = 400) -> str:
    """Return the first bad outcome of so many altered files."""
    for number in range(inputs):
        edit = edits[number % len(edits)]
        result = judged(reader, altered(reader, edit, random.Random(f"{edit} {number}")))
        if result.outcome in BAD:
            return result.outcome
    return ""


def test_a_receipt_that_is_read_in_other_words_is_noticed(
    readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpcheck.deployment_gate import receipts
    from tpcheck.json_reader import parse_json

    monkeypatch.setattr(
        receipts, "parse_receipt", lambda data: receipts._from_json(parse_json(data))
    )
    assert worst_of(readers["receipt"], ("other words",)) == "law"


def test_golden_data_that_is_not_held_against_its_digest_is_noticed(
    readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpcheck.golden import store

    monkeypatch.setattr(
        store, "read_data", lambda folder, golden: (folder / golden.data.file).read_bytes()
    )
    assert worst_of(readers["golden data"], ("flip a bit",)) == "law"


def test_a_manifest_without_its_checksum_is_noticed(
    readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpcheck.golden import records, store
    from tpcheck.json_reader import JsonReader

    monkeypatch.setattr(store, "from_json", lambda v: records._golden(JsonReader(v, "golden")))
    assert worst_of(readers["golden manifest"], ("edit a value",)) == "law"


def test_a_streamed_run_that_believes_any_digest_is_noticed(
    readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpcheck.reference import stream_scratch

    held = mutators.json.loads(readers["manifest of a streamed run"].original)["sha256"]
    monkeypatch.setattr(stream_scratch, "_digest", lambda *_: held)
    assert worst_of(readers["activations of a streamed run"], ("flip a bit",)) == "law"


def lying(reader: Reader, check: str, **changes: Any) -> bytes:
    """Return a report in which one verdict says something else of one check."""
    fields = mutators.json.loads(reader.original)
    verdict = fields["verdicts"][3]
    if check == "outcome":
        verdict["outcome"] = fields["outcome"] = "DRIFT"
    else:
        verdict["checks"][check] |= changes
    return mutators.json_text(fields).encode()


ASKED: dict[str, Callable[[Reader], bytes]] = {
    "_outcome_problem": lambda r: lying(r, "outcome"),
    "_check_problem": lambda r: lying(r, "repeatability", outcome="SKIPPED", reason="no time"),
    "_number_problem": lambda r: lying(r, "drift", ratio=5.0, limit=9.0),
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_gate_that_does_not_ask_is_noticed(
    readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    from tpcheck.deployment_gate import cells, decision

    data = ASKED[asked](readers["report"])
    assert judged(readers["report"], data).outcome == "accepted"  # a report, and no proof
    monkeypatch.setattr(cells, asked, lambda *_: lambda verdict: None)
    monkeypatch.setattr(decision, "contradictions", lambda report: [])
    assert judged(readers["report"], data).outcome == "law"


def test_a_policy_that_passes_over_a_key_is_noticed(
    readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpcheck.deployment_gate import policy

    monkeypatch.setattr(policy, "_limit", lambda name, value, above=False: None)
    assert worst_of(readers["policy"], ("edit a value",)) in BAD


def test_a_capture_that_is_compared_with_itself_is_noticed(
    readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpcheck.captures.tensors import StoredTensor

    true = StoredTensor.read

    def read(self: StoredTensor, start: int, stop: int) -> torch.Tensor:
        expected = Path(str(self.path).replace("actual", "expected"))
        return true(replace(self, path=expected), start, stop)

    monkeypatch.setattr(StoredTensor, "read", read)
    assert worst_of(readers["capture"], ("edit the data",)) == "law"


def spins(_: bytes) -> str:
    while True:
        pass


def recurses(data: bytes) -> str:
    return recurses(data)


BAD_READERS: dict[str, Callable[[bytes], str]] = {
    "hang": spins,
    "memory": lambda data: str(len(bytearray(harness.MAX_BYTES + 2**20))) and "accepted",
    "crash": recurses,
    "message": lambda data: refuses("x" * (harness.MAX_MESSAGE + 1)),
}


def refuses(text: str) -> str:
    from tpcheck.errors import TPCheckError

    raise TPCheckError(text)


@pytest.mark.parametrize("outcome", BAD_READERS)
def test_the_harness_sees_a_reader_that_ends_badly(
    monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    monkeypatch.setattr(harness, "MAX_CPU_S", 0.2)
    reader = Reader("bad", "text", b"x", BAD_READERS[outcome])
    assert judged(reader, b"x").outcome == outcome
