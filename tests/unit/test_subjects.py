"""Subjects by name, by file, as closures; what is missing or cannot travel is named."""

import functools
import os
import sys
import threading

import pytest
import torch
from hypothesis import strategies as st

import tpcheck
from tpcheck.errors import IllegalDegreeError, PlanError, SubjectError
from tpcheck.spec import ModelSpec
from tpcheck.subjects import (
    DEFAULT_SEQ_LEN,
    SubjectRef,
    assert_takes_the_group,
    make_ref,
    resolve,
    subject,
    with_spec,
)

torch.set_num_threads(1)
SPEC = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 8,
}
SOURCE = """
import tpcheck
from helper_of_{stem} import VOCAB

@tpcheck.subject(vocab_size=VOCAB, seq_len=4)
def build(tp):
    return lambda ids: ids

class models:
    @staticmethod
    @tpcheck.subject(vocab_size=5)
    def small(tp):
        return lambda ids: ids

plain = 7
def undecorated(tp):
    return lambda ids: ids
"""


@pytest.fixture
def file(tmp_path, request, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    stem = f"subject_{abs(hash(request.node.name)) % 10**8}"
    (tmp_path / f"helper_of_{stem}.py").write_text("VOCAB = 77")
    path = tmp_path / f"{stem}.py"
    path.write_text(SOURCE.format(stem=stem))
    return path


@subject(vocab_size=11, seq_len=3)
def importable(tp):
    return lambda ids: ids


def error_of(function, *args, **kwargs):
    with pytest.raises(SubjectError) as error:
        function(*args, **kwargs)
    return str(error.value)


# Options.


def test_options_are_kept_and_defaults_are_those_of_the_contract():
    build = subject(vocab_size=9)(lambda tp: None)
    options = build.__tpcheck_subject__
    assert (options.vocab_size, options.seq_len) == (9, DEFAULT_SEQ_LEN)
    assert (options.float64, options.sweep, options.logits) == (True, True, "all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "subject: give vocab_size= (more than 0) or inputs=, so that tpcheck can feed it"),
        (
            {"seq_len": 4},
            "subject: give vocab_size= (more than 0) or inputs=, so that tpcheck can feed it",
        ),
        ({"vocab_size": -1}, "subject: vocab_size=-1, but should be a whole number >= 0"),
        ({"vocab_size": True}, "subject: vocab_size=True, but should be a whole number >= 0"),
        ({"vocab_size": 2.0}, "subject: vocab_size=2.0, but should be a whole number >= 0"),
        (
            {"vocab_size": 8, "seq_len": "4"},
            "subject: seq_len='4', but should be a whole number >= 0",
        ),
        (
            {"vocab_size": 8, "logits": "rank1"},
            'subject: logits=\'rank1\', but should be "all" or "rank0"',
        ),
        ({"inputs": 7}, "subject: inputs=7, but should be fn(generator, ...)"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    assert error_of(subject, **options) == message


def test_brackets_that_were_left_out_are_named():
    with pytest.raises(SubjectError, match=r"without brackets, but should be @tpcheck.subject\("):

        @subject
        def build(tp): ...


def test_only_a_callable_can_be_decorated():
    assert error_of(subject(vocab_size=8), 7) == ("subject: 7 is not callable; decorate build(tp)")


def test_a_spec_gives_vocabulary_and_length():
    options = subject(spec=SPEC)(lambda tp: None).__tpcheck_subject__
    assert isinstance(options.spec, ModelSpec)
    assert (options.vocab_size, options.seq_len) == (64, 8)


def test_a_malformed_spec_is_a_plan_error():
    with pytest.raises(PlanError, match="unknown fields n_head"):
        subject(spec={"n_head": 4})


def test_things_without_attributes_can_be_decorated_too():
    class Frozen:
        __slots__ = ()

        def __call__(self, tp):
            return "built"

    build = subject(vocab_size=8)(Frozen())
    assert build.__tpcheck_subject__.vocab_size == 8
    assert build(None) == "built"


# Names.


def test_a_module_and_attribute():
    ref = make_ref("tests.subjects.rank0_bias:build")
    assert (ref.kind, ref.value, ref.attr) == ("name", "tests.subjects.rank0_bias", "build")
    found = resolve(ref)
    assert found.name == "tests.subjects.rank0_bias:build"
    assert found.options.vocab_size == 96


def test_a_file_is_loaded_with_its_folder_on_the_path(file):
    found = resolve(make_ref(f"{file}:build"))
    assert found.options.vocab_size == 77
    assert resolve(make_ref(f"{file}:build")).build is found.build


def test_a_relative_file(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    ref = make_ref(f"{file.name}:build")
    assert ref.value == str(file)
    assert ref.label == f"{file.name}:build"


def test_a_dotted_attribute(file):
    assert resolve(make_ref(f"{file}:models.small")).options.vocab_size == 5


@pytest.mark.parametrize("name", ["build", "", ":", "x:", ":x", "tests.subjects"])
def test_a_name_without_a_form_says_which_forms_there_are(name):
    assert error_of(make_ref, name) == (
        f"subject={name!r}, but should be package.module:attr, path/file.py:attr,"
        " builtin:NAME, hf:DIR or ref:DIR"
    )


@pytest.mark.parametrize("kind", ["builtin", "hf", "ref"])
def test_a_kind_without_a_name(kind):
    assert error_of(make_ref, f"{kind}:") == f"subject='{kind}:', but should say what after {kind}:"


def test_directories_are_made_absolute():
    assert make_ref("ref:models/x").value == os.path.abspath("models/x")
    assert make_ref("hf:~/x").value == os.path.expanduser("~/x")


def test_builtins_and_their_faults():
    assert resolve(make_ref("builtin:llama-tiny")).options.vocab_size == 131
    assert resolve(make_ref("builtin:llama-tiny+norm_eps")).name == "builtin:llama-tiny+norm_eps"
    assert "llama-tiny" in error_of(resolve, make_ref("builtin:nope"))
    assert "there is no fault 'nope'" in error_of(resolve, make_ref("builtin:llama-tiny+nope"))


def test_something_else_is_no_subject():
    assert error_of(make_ref, 7) == "subject=7, but should be a name or a callable build(tp)"


def test_what_is_missing_is_named(file):
    assert error_of(make_ref, "no/such.py:build") == (
        "subject='no/such.py:build': there is no file no/such.py"
    )
    assert error_of(resolve, make_ref("no_such_module:build")) == (
        "no_such_module:build: there is no module 'no_such_module' on the path"
        " (run where it can be imported, or give path/file.py:attr)"
    )
    assert error_of(resolve, make_ref(f"{file}:nope")) == (
        f"{file}:nope: {file.name} has no attribute 'nope'; its subjects: build"
    )
    assert (
        error_of(resolve, make_ref(f"{file}:plain")) == f"{file}:plain: plain is int, not callable"
    )
    assert "not a subject, but should be decorated" in error_of(
        resolve, make_ref(f"{file}:undecorated")
    )


@pytest.mark.parametrize(
    ("line", "phrase"),
    [
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def", "SyntaxError"),
    ],
)
def test_a_file_that_fails_to_load_says_how_and_is_tried_again(tmp_path, line, phrase, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "broken.py"
    path.write_text(line)
    message = error_of(resolve, make_ref(f"{path}:build"))
    assert message.startswith(f"subject file {path} failed to load: {phrase}")
    fixed = "import tpcheck\n@tpcheck.subject(vocab_size=3)\ndef build(tp): ...\n"
    path.write_text(fixed + "# of another length, so that no cached bytecode is taken\n")
    assert resolve(make_ref(f"{path}:build")).options.vocab_size == 3


def test_a_module_that_fails_to_import_says_what_it_was(tmp_path, monkeypatch):
    (tmp_path / "fails_on_import.py").write_text("import no_such_thing")
    monkeypatch.syspath_prepend(tmp_path)
    message = error_of(resolve, make_ref("fails_on_import:build"))
    assert message == (
        "fails_on_import:build: importing fails_on_import failed: No module named 'no_such_thing'"
        " (fails_on_import.py, line 1)"
    )


@pytest.mark.parametrize(
    ("options", "build", "message"),
    [
        ({"vocab_size": 8}, lambda: None, "takes (), but should take one argument, the TPGroup"),
        (
            {"vocab_size": 8},
            lambda tp, spec: None,
            "takes (tp, spec), but should take one argument, the TPGroup; a spec comes second"
            " where specs= is declared",
        ),
        (
            {"vocab_size": 8},
            lambda *, tp: None,
            "takes (*, tp), but should take one argument, the TPGroup",
        ),
        (
            {"specs": st.just(SPEC)},
            lambda tp: None,
            "takes (tp), but should take two arguments, the TPGroup and a spec of specs=",
        ),
    ],
)
def test_a_build_that_takes_something_else_is_told_what_it_is_called_with(options, build, message):
    ref = make_ref(subject(**options)(build))
    assert error_of(assert_takes_the_group, resolve(ref)) == f"{ref.label}: {message}"


def test_more_parameters_are_fine_where_they_have_defaults():
    class Model:
        @subject(vocab_size=8)
        def build(self, tp, *, width: int = 4):
            return len

    for build in (lambda tp, n=2: len, lambda *args, **kwargs: len, Model().build):
        found = resolve(make_ref(subject(vocab_size=8)(build)))
        assert_takes_the_group(found)
        assert found.build(None) is len


# Callables.


def test_an_importable_function_travels_by_name():
    ref = make_ref(importable)
    assert (ref.kind, ref.attr) == ("name", "importable")
    assert resolve(ref).build is importable


def test_a_function_of_a_subject_file_travels_by_file(file):
    ref = make_ref(resolve(make_ref(f"{file}:build")).build)
    assert (ref.kind, ref.value, ref.attr) == ("file", str(file), "build")


def test_a_ref_is_a_ref():
    ref = SubjectRef("name", "tests.subjects.moe", "expert_tp", "x")
    assert make_ref(ref) is ref


def closure(factor):
    @subject(vocab_size=10, seq_len=4)
    def build(tp):
        return lambda ids: ids * factor

    return build


def test_a_closure_travels_by_value_with_its_options():
    ref = make_ref(closure(3))
    assert ref.kind == "pickled"
    found = resolve(ref)
    assert found.options.vocab_size == 10
    assert found.build(None)(torch.tensor(2)).item() == 6


def test_a_lambda_and_a_partial_travel_by_value():
    for build in (lambda tp: len, functools.partial(lambda tp, n: len, n=2)):
        ref = make_ref(subject(vocab_size=10)(build))
        assert ref.kind == "pickled"
        assert resolve(ref).build(None) is len


def test_what_cannot_travel_is_one_error_that_names_the_captured_object():
    lock = threading.Lock()

    @subject(vocab_size=10)
    def build(tp):
        return lambda ids: lock and ids

    message = error_of(make_ref, build)
    assert "cannot be sent to the ranks, because it captures 'lock', a _thread.lock" in message
    assert message.endswith("make it inside build(tp) instead")


def test_a_closure_runs_on_ranks_and_its_repro_is_python():
    @subject(vocab_size=16, seq_len=4)
    def doubles(tp):
        w = tp.weight("w", 16, 8)
        return lambda ids: tp.all_reduce(w[ids] / tp.size if tp.size < 4 else w[ids])

    report = tpcheck.run(doubles, (2, 4), backend="sim")
    clean, wrong = report.verdicts if len(report.verdicts) == 2 else (None, None)
    assert (clean.outcome, wrong.outcome) == ("PASS", "WRONG")
    assert wrong.repro.startswith(
        "tpcheck.run(doubles, (4,), dtypes=('bfloat16',), case='s0-b2-t4'"
    )


# Specs.


def test_a_drawn_spec_gives_the_subject_its_sizes():
    build = subject(specs=st.just(SPEC))(lambda tp, spec: None)
    drawn = with_spec(resolve(make_ref(build)), ModelSpec.from_fields(SPEC))
    assert (drawn.options.vocab_size, drawn.options.seq_len) == (64, 8)


@subject(
    specs=st.sampled_from([3, 6]).map(
        lambda n: SPEC | {"num_attention_heads": n, "hidden_size": 8 * n}
    )
)
def refuses(tp, spec):
    if spec.num_attention_heads % tp.size:
        raise IllegalDegreeError(f"num_attention_heads={spec.num_attention_heads}")
    w = tp.weight("w", spec.vocab_size, 8)
    return lambda ids: tp.all_reduce(w[ids] / tp.size)


@subject(specs=st.just(SPEC | {"num_attention_heads": 3, "hidden_size": 24}))
def accepts(tp, spec):
    w = tp.weight("w", spec.vocab_size, 8)
    return lambda ids: w[ids]


def test_a_drawn_illegal_degree_passes_when_refused_and_is_wrong_when_accepted():
    report = tpcheck.run(refuses, (2,), backend="sim", cases=4)
    assert report.outcome == "PASS"
    (verdict,) = tpcheck.run(accepts, (2,), backend="sim", confirm=False).verdicts
    assert verdict.outcome == "WRONG"
    assert verdict.checks["plan"].outcome == "FAIL"
