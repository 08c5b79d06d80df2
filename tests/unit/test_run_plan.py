"""A run's options: every bad value is named before a rank exists, and a repro can be pasted."""

import shlex

import pytest

from tpcheck.errors import PlanError, SubjectError, TPCheckError
from tpcheck.investigation import Settings
from tpcheck.run_plan import make_run_plan, positive, repro_line, repro_options
from tpcheck.spec import Case, ModelSpec
from tpcheck.subjects import Subject, SubjectOptions, SubjectRef

REF = SubjectRef("name", "models", "build", "models:build")
SPEC = ModelSpec(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=6,
)
DEFAULTS = {
    "backend": "sim",
    "ranks_per_gpu": None,
    "dtypes": ("bfloat16",),
    "cases": 1,
    "max_failures": None,
    "case": None,
    "batch": None,
    "seq_len": None,
    "seed": 0,
    "settings": Settings(tp_sizes=()),
    "options": (),
}


def plan(tp_sizes=(2,), *, ref=REF, spec=None, **given):
    options = SubjectOptions(vocab_size=64, seq_len=16, spec=spec)
    subject = Subject("models:build", lambda tp: None, options)
    return make_run_plan(ref, subject, tp_sizes, **(DEFAULTS | given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"dtypes": ("float64",)},
            "dtype='float64', but should be one of bfloat16, float16, float32",
        ),
        ({"dtypes": "bfloat16"}, "dtypes='bfloat16', but should be several"),
        ({"dtypes": ()}, "dtypes=(), but should be several"),
        ({"cases": 0}, "cases=0, but should be a whole number of at least 1"),
        (
            {"settings": Settings(tp_sizes=(), reduction="wide"), "backend": "gloo"},
            "reduction='wide' is emulated, so it needs backend sim, not gloo",
        ),
        ({"batch": 0}, "batch=0, but should be a whole number of at least 1"),
        ({"seq_len": -1}, "seq_len=-1, but should be a whole number of at least 1"),
        ({"seed": -1}, "seed=-1, but should be a whole number of at least 0"),
        ({"seed": True}, "seed=True, but should be a whole number of at least 0"),
        ({"max_failures": 0}, "max_failures=0, but should be a whole number of at least 1"),
        (
            {"seq_len": 17},
            "seq_len=17, but should be at most 16, the longest models:build takes",
        ),
        ({"tp_sizes": ()}, "tp is empty, but should name at least one degree"),
        ({"tp_sizes": (2, 0)}, "tp=0, but should be a whole number of at least 1"),
        ({"tp_sizes": (2.0,)}, "tp=2.0, but should be a whole number of at least 1"),
        ({"tp_sizes": 4}, "tp=4, but should be several degrees: (2, 4, 8)"),
        ({"cases": 10**12}, "cases=1000000000000, but should be at most 1000000"),
        ({"seed": 2**63 - 1, "cases": 2}, "seeds of 2 cases should not pass 9223372036854775807"),
        ({"seed": 2**200}, "but seeds of 1 cases should not pass 9223372036854775807"),
        ({"batch": 10**15}, "batch=1000000000000000, seq_len=16: the float64 logits alone take"),
        ({"case": f"s0-b{10**15}-t4"}, "seq_len=4: the float64 logits alone take 1.907e+09 GiB"),
        ({"case": f"s{2**63}-b2-t4"}, "a seed should be at most 9223372036854775807"),
        ({"case": "s0-b0-t4"}, "batch and length at least 1"),
        ({"case": "s0-b2-t0"}, "batch and length at least 1"),
        ({"case": "s1"}, "s1"),
        ({"case": "s0-b2-t17"}, "17"),
    ],
)
def test_a_bad_option_is_named_with_what_it_should_be(given, message):
    with pytest.raises(TPCheckError) as error:
        plan(**given)
    assert message in str(error.value)


def test_defaults_are_the_contracts():
    made = plan(None)
    assert made.tp_sizes == (2, 4, 8)
    assert not made.asked
    assert made.cases == (Case(seed=0, batch=2, seq_len=16),)
    assert made.settings.tp_sizes == (2, 4, 8)


def test_default_degrees_are_those_the_plan_allows():
    assert plan(None, spec=SPEC).tp_sizes == (2,)


def test_no_default_degree_that_works_says_what_to_do():
    import dataclasses

    odd = dataclasses.replace(SPEC, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(TPCheckError, match="none of the default degrees 2, 4, 8 can be run"):
        plan(None, spec=odd)


def test_degrees_that_were_asked_for_stand_even_when_the_plan_refuses_them():
    made = plan((4, 2, 4), spec=SPEC)
    assert made.tp_sizes == (4, 2)
    assert made.asked


def test_cases_count_up_from_the_seed():
    assert [case.id for case in plan(cases=3, seed=7).cases] == [
        "s7-b2-t16",
        "s8-b2-t16",
        "s9-b2-t16",
    ]


def test_batch_and_length_are_the_users():
    assert plan(batch=3, seq_len=5).cases[0].id == "s0-b3-t5"


def test_one_case_by_its_id():
    assert plan(case="s3-b1-t4", cases=5).cases == (Case(seed=3, batch=1, seq_len=4),)


def test_dtypes_named_twice_run_once():
    assert plan(dtypes=("float16", "bfloat16", "float16")).dtypes == ("float16", "bfloat16")


def test_a_repro_names_everything_that_decides_the_case():
    options = repro_options("gloo", None, None, 0.01, None, None)
    line = repro_line(plan(options=options), Case(7, 2, 16), 4, "float16")
    assert line == (
        "tpcheck run models:build --tp 4 --dtype float16 --seed 7 --case s7-b2-t16"
        " --backend gloo --atol 0.01"
    )


def test_a_repro_can_be_pasted_whatever_the_path():
    ref = SubjectRef("file", "/a b/it's.py", "build", "/a b/it's.py:build")
    line = repro_line(plan(ref=ref), Case(7, 2, 16), 4, "float16")
    assert shlex.split(line)[2] == "/a b/it's.py:build"


def test_a_repro_of_another_reduction_is_python_because_the_command_line_has_none():
    settings = Settings(tp_sizes=(), reduction="int8_wire")
    options = repro_options("sim", None, None, None, None, None)
    line = repro_line(plan(settings=settings, options=options), Case(7, 2, 16), 4, "float16")
    assert line == (
        "tpcheck.run('models:build', (4,), dtypes=('float16',), case='s7-b2-t16', backend='sim',"
        " reduction='int8_wire')"
    )


def test_a_closures_repro_is_python_with_the_same_options():
    ref = SubjectRef("pickled", b"", label="tests.x:test.<locals>.build")
    options = repro_options("sim", None, None, 0.01, None, None)
    line = repro_line(plan(ref=ref, options=options), Case(7, 2, 16), 4, "float16")
    assert line == (
        "tpcheck.run(build, (4,), dtypes=('float16',), case='s7-b2-t16', backend='sim', atol=0.01)"
    )
    compile(line, "repro", "eval")


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (("auto", None, None, None, None, None), ()),
        (("sim", 2, 16, None, None, None), ("--backend", "sim")),
        (("auto", None, None, 0.0, 1e-3, None), ("--atol", "0.0", "--rtol", "0.001")),
        (("auto", None, None, None, None, "seed-1e-2"), ("--preset", "seed-1e-2")),
    ],
)
def test_only_options_that_differ_are_repeated(given, options):
    assert repro_options(*given) == options


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_a_timeout_is_positive(value):
    with pytest.raises(TPCheckError, match=r"timeout=.*, but should be more than 0 seconds"):
        positive("timeout", value)


@pytest.mark.parametrize("name", ["s7-b2-t16", "s0-b1-t1"])
def test_a_case_id_reads_back(name):
    assert Case.parse(name).id == name


def test_errors_keep_their_kinds():
    assert issubclass(PlanError, TPCheckError)
    assert issubclass(SubjectError, TPCheckError)
