"""A report says what exactly was run: bytes, engine, sizes; and no more than was run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tpcheck
from tests.models import make_model as make_checkpoint
from tests.receipting import make_model
from tpcheck.inputs import input_order, lengths_at, make_inputs
from tpcheck.model_digest import digest_directory
from tpcheck.provenance import engine_facts, range_tested, watch_model
from tpcheck.records import Check, Verdict
from tpcheck.spec import Case
from tpcheck.subjects import Subject, SubjectOptions, SubjectRef


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_bytes_named_are_those_that_lay_there(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    watched = watch_model(SubjectRef("hf", str(model), label=f"hf:{model}"))
    facts = watched.facts()
    digest = digest_directory(model)
    assert facts == {
        "directory": str(model),
        "config_sha256": digest.config_sha256,
        "weights_sha256": digest.weights_sha256,
        "files": {file.name: file.sha256 for file in digest.files},
    }


def test_a_directory_that_changed_during_the_run_is_an_error(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    watched = watch_model(SubjectRef("ref", str(model)))
    (model / "model-1.safetensors").write_bytes(b"others")
    with pytest.raises(tpcheck.TPCheckError, match=r"model-1\.safetensors changed while it was"):
        watched.facts()


def test_a_directory_without_a_digest_can_be_run_all_the_same(tmp_path: Path) -> None:
    watched = watch_model(SubjectRef("ref", str(tmp_path)))
    assert watched.facts() is None
    assert "holds no *.safetensors" in watched.reason


def test_a_subject_without_a_directory_has_no_bytes_to_name() -> None:
    for ref in (SubjectRef("builtin", "llama-tiny"), SubjectRef("file", "/x.py", "build")):
        watched = watch_model(ref)
        assert (watched.facts(), watched.reason) == (None, "")


def test_the_engine_is_who_computed() -> None:
    from transformers import __version__

    expected = {"name": "transformers", "version": __version__, "arguments": {"a": 1}}
    assert engine_facts(SubjectRef("hf", "/x"), {"a": 1}) == expected
    assert engine_facts(SubjectRef("ref", "/x"), {})["name"] == "tpcheck reference"
    own = {"name": "subject", "version": None, "arguments": {}}
    assert engine_facts(SubjectRef("name", "my.module", "build"), {}) == own


def verdict(case_id: str, tp_size: int, outcome: str = "PASS", dtype: str = "bfloat16") -> Verdict:
    ran = {"plan": Check("PASS"), "structural": Check("PASS")}
    return Verdict(case_id, tp_size, dtype, outcome, ran)


def make_subject(**options: Any) -> Subject:
    return Subject("x", lambda _: None, SubjectOptions(**{"vocab_size": 64, **options}))


@pytest.mark.parametrize("tp_sizes", [(2,), (2, 4, 8), (8, 3)])
@pytest.mark.parametrize("seq_len", [1, 2, 8, 16])
@pytest.mark.parametrize("sweep", [True, False])
def test_lengths_are_those_of_the_inputs_that_run(
    tp_sizes: tuple[int, ...], seq_len: int, sweep: bool
) -> None:
    subject, case = make_subject(seq_len=16, sweep=sweep), Case(0, 2, seq_len)
    inputs = make_inputs(subject, case, tp_sizes)
    for tp_size in tp_sizes:
        ran = {inputs[name][0].shape[1] for name in input_order(inputs, tp_size)}
        assert set(lengths_at(subject, case, tp_size)) == ran


def test_each_row_is_a_degree_a_dtype_and_a_batch() -> None:
    verdicts = [
        verdict("s0-b2-t8", 2),
        verdict("s1-b2-t5", 2),
        verdict("s0-b3-t8", 2),
        verdict("s0-b2-t8", 4, "DRIFT"),
        verdict("s0-b2-t8", 4, "ILLEGAL", "float16"),
        verdict("s0-b2-t8", 8, "ERROR"),
    ]
    found = range_tested(make_subject(seq_len=8), verdicts)
    assert [(row["tp_size"], row["dtype"], row["batch"], row["lengths"]) for row in found] == [
        (2, "bfloat16", 1, [1, 3]),
        (2, "bfloat16", 2, [1, 2, 3, 5, 8]),
        (2, "bfloat16", 3, [1, 2, 3, 8]),
        (4, "bfloat16", 1, [1, 5]),
        (4, "bfloat16", 2, [1, 3, 4, 5, 8]),
    ]


@pytest.mark.parametrize("sweep", [True, False])
@pytest.mark.parametrize("least", [1, 2])
def test_what_is_said_to_be_tested_is_what_ran(tmp_path: Path, sweep: bool, least: int) -> None:
    log = tmp_path / "ran"

    @tpcheck.subject(vocab_size=32, seq_len=4, sweep=sweep)
    def build(tp: tpcheck.TPGroup) -> Any:
        embed = tp.weight("embed", 32, 8)
        down = tp.weight("down", 8, 8).chunk(tp.size, 1)[tp.rank]

        def forward(ids: torch.Tensor) -> torch.Tensor:
            if ids.shape[0] < least:
                raise ValueError("made for more rows")
            with log.open("a") as file:
                file.write(f"{ids.shape[0]} {ids.shape[1]}\n")
            return tp.all_reduce(embed[ids].chunk(tp.size, -1)[tp.rank] @ down.T) @ embed.T

        return forward

    report = tpcheck.run(build, (2,), backend="sim")
    assert report.outcome == "PASS"
    said = {f"{row['batch']} {n}" for row in report.tested or () for n in row["lengths"]}
    assert said == set(log.read_text().splitlines())


def test_a_case_that_was_refused_as_planned_never_ran() -> None:
    refused = replace(verdict("s0-b2-t8", 2), checks={"plan": Check("PASS")})
    assert range_tested(make_subject(seq_len=8), [refused]) == []


def test_inputs_of_the_subjects_own_have_no_length() -> None:
    def own(generator: torch.Generator) -> torch.Tensor:
        return torch.rand(3, generator=generator)

    subject = make_subject(inputs=own)
    [row] = range_tested(subject, [verdict("s0-b2-t8", 2)])
    assert (row["lengths"], row["lengths_reason"]) == ([], "the subject makes its own inputs")


@pytest.fixture(scope="module")
def report() -> tpcheck.Report:
    return tpcheck.run("builtin:llama-tiny", (2,), backend="sim", dtypes=("float16",), seq_len=5)


def test_a_run_says_all_of_it(report: tpcheck.Report) -> None:
    assert report.model is None
    assert report.tested == (
        {"tp_size": 2, "dtype": "float16", "batch": 1, "lengths": [1, 3]},
        {"tp_size": 2, "dtype": "float16", "batch": 2, "lengths": [1, 2, 3, 5]},
    )
    assert report.reduction == {"kind": "ring", "basis": "emulated"}
    assert report.engine is not None
    assert report.engine["name"] == "tpcheck reference"
    assert report.engine["arguments"]["dtypes"] == ["float16"]
    assert report.environment["nodes"] == 1
    assert isinstance(report.environment["nccl_settings"], dict)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "llama")


def test_a_run_of_a_directory_names_its_bytes(directory: Path) -> None:
    report = tpcheck.run(f"ref:{directory}", (2,), backend="sim")
    digest = digest_directory(directory)
    assert report.model is not None
    assert report.model["weights_sha256"] == digest.weights_sha256
    drift = tpcheck.drift(
        f"ref:{directory}", (2,), backend="sim", wires=("float32",), dtypes=("bfloat16",)
    )
    assert drift.model == report.model


@pytest.mark.parametrize("command", [tpcheck.run, tpcheck.drift], ids=["run", "drift"])
def test_a_run_whose_weights_change_meanwhile_is_no_report(command: Any, directory: Path) -> None:
    [shard] = directory.glob("*.safetensors")

    def meddle(*_: Any) -> None:
        data = shard.read_bytes()
        (directory / "new").write_bytes(data)
        (directory / "new").rename(shard)  # the same bytes again: who knows what was between

    with pytest.raises(tpcheck.TPCheckError, match=f"{shard.name} changed while it was in use"):
        command(f"ref:{directory}", (2,), backend="sim", dtypes=("bfloat16",), progress=meddle)
