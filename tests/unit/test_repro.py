"""repro_script: what it gives out fits a page, needs torch alone, and shows the failure."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tpcheck
from tests.subjects import buggy
from tpcheck.adapters.reference import _build_generated
from tpcheck.faults import FAULTS
from tpcheck.groups.weights import MemoryStore, WeightSource
from tpcheck.observation.program import Constant, Ref, Step
from tpcheck.repro import MAX_LINES, Repro, make_repro, repro_script
from tpcheck.repro.alignment import Flow, aligned, pruned, simplified
from tpcheck.repro.harness import recorded_script
from tpcheck.repro.scripts import shows_failure
from tpcheck.repro.values import Values
from tpcheck.repro.wording import WIDTH, Statement, laid_out
from tpcheck.shard_plan import STRICT
from tpcheck.spec import ModelSpec

OUT_OF_REACH = {
    "decode_position": "decoding it takes more than a page",
    "expert_bias_times_tp": "two experts take more than a page",
    "packed_experts_contiguous": "two experts take more than a page",
    "global_head_count": "its heads of 48 take more than a page",
    "heads_sliced_by_size": "its heads of 48 take more than a page",
    "summed_by_arrival": "the last bits of two calls differ; every call agrees with TP=1",
    "large_messages_overflow": "it needs 24 tokens",
    "window_ignored": "it needs more tokens than its window",
    "kv_copies_declared_shards": "the forward is right",
    "wrong_shard_dim": "the forward is right",
    "one_rank_raises": "nothing that torch does raises",
    "first_row_of_a_padded_shard_masked": "it shows at one of 5003 ids",
} | dict.fromkeys(
    [name for name, one in FAULTS.items() if one.policy != STRICT or "quantization" in one.needs]
    + ["float8_wire", "int4_wire", "small_blocks_shrink"],
    "codes and scales take more than a page",
)
"""Failures of which no script of a page can be made, and why."""

SHOWN = [name for name in FAULTS if name not in OUT_OF_REACH][::5]
"""A sample: one script takes about half a second."""


def small_spec(name: str, tp_size: int) -> ModelSpec:
    """Return what a fault is shrunk to: one layer, hidden 8."""
    fields: dict[str, Any] = {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 2 * tp_size,
        "num_attention_heads": 2 * tp_size,
        "num_key_value_heads": tp_size,
        "head_dim": 4,
        "max_position_embeddings": 8,
    }
    needs = dict(FAULTS[name].needs)
    if "num_attention_heads" not in needs and "num_key_value_heads" in needs:
        needs["num_key_value_heads"] = min(needs["num_key_value_heads"], 2 * tp_size)
    if "num_experts" in needs:
        needs |= {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 2 * tp_size}
    if needs.get("shared_expert_intermediate_size"):
        needs["shared_expert_intermediate_size"] = 2 * tp_size
    return ModelSpec(**(fields | needs | {"num_hidden_layers": 1}))


def of_fault(name: str) -> Repro:
    """Return the script of the first small case that shows a fault."""
    sizes = [(FAULTS[name].min_tp, *case) for case in ((1, 2), (2, 2), (1, 3), (2, 5))]
    for tp_size, batch, seq_len in (*sizes, (4, 1, 5)):
        spec = small_spec(name, tp_size)
        subject = tpcheck.subject(spec=spec)(partial(_build_generated, spec, FAULTS[name]))
        found = make_repro(subject, tp_size=tp_size, batch=batch, seq_len=seq_len)
        if "agrees" not in found.reason:
            break
    return found


def of_buggy(name: str) -> Repro:
    tp_size = buggy.EXPECTED[name][2]
    dtype = "float16" if name == "overflow_in_the_sum" else "bfloat16"
    subject = f"tests.subjects.buggy:{name}"
    for batch, seq_len in ((2, 3), (1, 3), (1, 1)):
        found = make_repro(subject, tp_size=tp_size, batch=batch, seq_len=seq_len, dtype=dtype)
        if "agrees" not in found.reason:
            break
    return found


def run_files(directory: Path, scripts: dict[str, str]) -> dict[str, Any]:
    """Run every script as a file in one bare Python; name -> exit code."""
    for name, script in scripts.items():
        (directory / f"{name}.py").write_text(script)
    driver = (
        "import json, runpy, sys\n"
        "codes = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        runpy.run_path(name + '.py', run_name='__main__')\n"
        "    except SystemExit as end:\n        codes[name] = 1 if end.code else 0\n"
        "    except Exception as error:\n        codes[name] = type(error).__name__\n"
        "assert 'tpcheck' not in sys.modules\n"
        "print(json.dumps(codes))\n"
    )
    command = [sys.executable, "-I", "-c", driver, *scripts]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=240, check=True
    )
    codes: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return codes


def assert_shown(directory: Path, make: Callable[[str], Repro], names: list[str]) -> None:
    assert names
    scripts = {}
    for name in names:
        found = make(name)
        assert found.script, f"{name}: {found.reason}"
        lines = found.script.splitlines()
        assert len(lines) <= MAX_LINES, name
        assert max(map(len, lines)) <= WIDTH, name
        assert "tpcheck" not in found.script, name
        scripts[name] = found.script
    codes = run_files(directory, scripts)
    raising = ("RuntimeError", "IndexError")
    assert {name: code for name, code in codes.items() if code != 1 and code not in raising} == {}


def test_scripts_of_planted_faults_show_them_with_torch_alone(tmp_path: Path) -> None:
    assert_shown(tmp_path, of_fault, SHOWN)


def test_scripts_of_handwritten_bugs_show_them_with_torch_alone(tmp_path: Path) -> None:
    names = [name for name in buggy.EXPECTED if name not in OUT_OF_REACH]
    assert_shown(tmp_path, of_buggy, names)


@pytest.mark.parametrize("name", ["decode_position", "wrong_shard_dim"])
def test_no_script_without_a_reason(name: str) -> None:
    found = of_fault(name)
    assert not found.script
    assert found.reason


def test_a_rank_that_raises_in_its_own_code_has_no_script() -> None:
    found = of_buggy("one_rank_raises")
    assert found == Repro(
        "", "rank 1 raises RuntimeError: no kernel image is available for execution on the device"
    )


def test_logits_of_rank_0_alone_have_no_script() -> None:
    found = make_repro("tests/subjects/rank0_logits.py:build", tp_size=2, seq_len=2)
    assert found.reason.startswith("only rank 0 returns logits")


def test_every_exception_is_a_known_failure() -> None:
    assert set(OUT_OF_REACH) <= set(FAULTS) | set(buggy.EXPECTED)


def test_what_is_right_has_no_script() -> None:
    assert repro_script("builtin:llama-tiny", tp_size=2, seq_len=2) == ""
    assert "agrees" in make_repro("builtin:llama-tiny", tp_size=2, seq_len=2).reason


def test_the_bug_can_be_read() -> None:
    script = of_fault("missing_all_reduce").script
    assert '(yield "sum", ' in script
    assert "if n == 1 else" in script
    assert "layers.0.mlp.down_proj" in script.splitlines()[0]


def test_fqn_chooses_the_module() -> None:
    found = make_repro(
        "builtin:llama-tiny+missing_all_reduce", tp_size=2, seq_len=1, fqn="layers.0.mlp"
    )
    assert ", layers.0.mlp: " in found.script.splitlines()[0]


def test_a_spec_reaches_a_subject_that_takes_one() -> None:
    @tpcheck.subject(specs=st.nothing(), vocab_size=8)
    def build(tp: Any, spec: ModelSpec) -> Any:
        w = tp.weight("w", 8, spec.hidden_size)
        return lambda ids: w[ids] @ w.T * tp.size

    spec = ModelSpec(8, 4, 4, 1, 2)
    script = repro_script(build, tp_size=2, spec=spec)
    assert 'w("w", 8, 4)' in script


def test_weights_have_the_values_tpcheck_gives_them() -> None:
    defined, _ = recorded_script(
        title="", inputs=[], body=['    yield "end", w("a.weight", 4, 3) + w("b", 3)'], tp_size=2,
        seed=7, weight_dtype="bfloat16", dtype="float64", exact=True, copies=False, compared=True,
        shapes=False,
    )  # fmt: skip
    space: dict[str, Any] = {}
    exec("\n".join(defined), space)
    source = WeightSource(
        seed=7, dtype=torch.float64, weight_dtype=torch.bfloat16, store=MemoryStore()
    )
    for name, shape in (("a.weight", (4, 3)), ("b", (3,))):
        assert torch.equal(space["w"](name, *shape), source.weight(name, shape))


def test_a_script_that_fails_by_itself_shows_nothing() -> None:
    assert not shows_failure("import nothing_of_that_name")
    assert not shows_failure("raise SystemExit(0)")
    assert shows_failure("raise SystemExit(1)")
    assert shows_failure("raise IndexError", "IndexError")
    assert not shows_failure("import torch\none = torch.tensor(float('nan'))\nraise SystemExit(1)")


# The parts.
def flow(*steps: Step, size: int = 2) -> Flow:
    return Flow(steps, Ref(len(steps) - 1), size)


def test_what_writes_into_a_live_storage_is_kept() -> None:
    made = Step("torch.zeros", ((2,),), holds=(1,))
    view = Step(".view", (Ref(0), 2), holds=(1,))
    write = Step(".__setitem__", (Ref(1), 0, 1.0), writes=(1,), holds=())
    other = Step("torch.ones", ((2,),), holds=(2,))
    (kept,) = pruned([Flow((made, view, write, other), Ref(0), 1)])
    assert kept.steps == (made, view, write)


def test_copies_go_unless_something_is_written_there() -> None:
    made, copy = (
        Step("input", ("A", 0), holds=(1,)),
        Step(".clone", (Ref(0),), same=True, holds=(2,)),
    )
    assert simplified(flow(made, copy)).root == Ref(0)
    write = Step(".add_", (Ref(1), 1), writes=(2,), holds=(2,))
    assert simplified(Flow((made, copy, write), Ref(1), 2)).root == Ref(1)


def test_a_collective_that_one_rank_needs_stays_on_every_rank() -> None:
    x, reduced = Step("input", ("A", 0)), Step("all_reduce", (Ref(0), "sum"))
    ends = [Flow((x, reduced), Ref(1), 2), Flow((x, reduced), Ref(0), 2)]
    assert [len(one.steps) for one in pruned(ends)] == [2, 2]


def test_programs_are_aligned_on_what_they_share() -> None:
    x, add = Step("input", ("A", 0)), Step(".add", (Ref(0), 1))
    slots, roots = aligned([flow(x, size=1), flow(x, add)])
    assert [set(slot.steps) for slot in slots] == [{0, 1}, {1}]
    assert roots == {0: Ref(0), 1: Ref(1)}


PLACES = [(1, 0), (4, 0), (4, 1), (4, 2), (4, 3)]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3, 3, 3, 3, 3], "3"),
        ([1, 4, 4, 4, 4], "n"),
        ([0, 0, 1, 2, 3], "r"),
        ([8, 2, 2, 2, 2], "8 // n"),
        ([0, 0, 2, 4, 6], "2 * r"),
        ([0, 1, 2, 3, 0], "(r + 1) % n"),
        ([7, 0, 0, 0, 5], "7 if n == 1 else 0 if r != 3 else 5"),
    ],
)
def test_numbers_that_differ_become_formulas(numbers: list[int], text: str) -> None:
    values = Values(PLACES, lambda slot: (f"x{slot}", 9))
    assert values.text(dict(enumerate(numbers)))[0] == text


@given(st.lists(st.integers(-20, 20), min_size=5, max_size=5))
def test_a_formula_gives_every_program_its_number(numbers: list[int]) -> None:
    values = Values(PLACES, lambda slot: (f"x{slot}", 9))
    text = values.text(dict(enumerate(numbers)))[0]
    assert [eval(text, {"n": n, "r": r}) for n, r in PLACES] == numbers


@given(st.sets(st.integers(0, 4), min_size=1), st.sets(st.integers(0, 4)))
def test_a_condition_holds_for_the_chosen_programs_only(chosen: set[int], more: set[int]) -> None:
    text = Values(PLACES, lambda slot: ("", 9)).condition(chosen, chosen | more)
    held = {p for p in chosen | more if eval(text, {"n": PLACES[p][0], "r": PLACES[p][1]})}
    assert held == chosen


def test_tensors_are_written_by_value() -> None:
    values = Values(PLACES, lambda slot: ("", 9))
    value = Constant((1, 2), "torch.float64", (0.5, float("inf")))
    text = values.text({0: value})[0]
    made = eval(text, {"torch": torch})
    assert torch.equal(made, torch.tensor([[0.5, float("inf")]], dtype=torch.float64))


def test_statements_share_lines_only_when_packed_and_never_a_condition() -> None:
    statements = [Statement("a = 1"), Statement("b = 2"), Statement("c = 3", "r == 0")]
    assert laid_out(statements, packed=True) == ["    a = 1; b = 2", "    if r == 0: c = 3"]
    assert laid_out(statements, packed=False)[:2] == ["    a = 1", "    b = 2"]
