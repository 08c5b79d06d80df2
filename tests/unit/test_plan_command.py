"""tpcheck plan: what it prints, what it writes, how it exits, and that it needs no torch."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.configs import PHI_4
from tpcheck.errors import PlanError, TPCheckError
from tpcheck.plan_command import config_records, exit_code, plan_records, read_model
from tpcheck.plan_memory import Request
from tpcheck.planning import ENGINE_NAMES, plan
from tpcheck.render.plan import WIDTH, render_plan

DATA = Path(__file__).parents[1] / "data" / "model_configs.json"
KEYS = {
    *("model", "engine", "tp_size", "outcome", "legal", "reason", "fix", "error_text", "rule_id"),
    *("part", "sizes", "legal_tp_sizes", "nearest_legal_tp_sizes", "source", "notes"),
    *("memory", "checkpoint"),
}
CACHE = Request(32768, 256)
MEMORY_KEYS = {
    *("weight_bytes", "kv_cache_bytes", "padding", "missing", "seq_len", "batch", "kv_dtype"),
}


@pytest.fixture
def phi4(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(PHI_4))
    return tmp_path


def tpcheck(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tpcheck", "plan", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        input=stdin,
    )


# -- how it exits


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 0),
        (["--engine", "vllm"], 1),
        (["--engine", "vllm", "--tp", "2"], 0),
        (["--engine", "vllm,transformers", "--tp", "4"], 1),
        (["--engine", "transformers", "--tp", "2,4"], 0),
    ],
    ids=["any engine", "vllm at 4", "vllm at 2", "not on both", "transformers"],
)
def test_exit_1_when_an_asked_degree_cannot_run(
    phi4: Path, arguments: list[str], code: int
) -> None:
    done = tpcheck(str(phi4), *arguments)
    assert (done.returncode, done.stderr) == (code, "")


def test_without_an_engine_one_that_runs_is_enough() -> None:
    def record(engine: str, *, legal: bool) -> dict[str, Any]:
        return {"engine": engine, "tp_size": 4, "legal": legal, "checkpoint": None}

    mixed = [record("vllm", legal=False), record("tgi", legal=True)]
    none = [record("vllm", legal=False), record("tgi", legal=False)]
    assert (exit_code(mixed, asked=False), exit_code(none, asked=False)) == (0, 1)
    assert exit_code(mixed, asked=True) == 1
    sick = [{**record("tgi", legal=True), "checkpoint": {"problems": ["x"]}}]
    assert exit_code(sick, asked=False) == 1


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["nowhere.json"], "", "error: nowhere.json: cannot be read: No such file"),
        (["-"], "{", "error: stdin: is not JSON: "),
        (["-"], "[1]", "error: stdin: a list, but should be an object of fields"),
        (["-"], '{"hidden_size": 1, "hidden_size": 2}', "error: stdin: is not JSON: the key "),
        (["-"], '{"hidden_size": NaN}', "error: stdin: is not JSON: NaN is not allowed"),
        (
            ["-"],
            '{"hidden_size": "big"}',
            "error: config: hidden_size='big', but should be a whole",
        ),
        (
            ["-", "--engine", "vlm"],
            '{"n_head": 8}',
            "error: engine='vlm', but should be one of reference, ",
        ),
        (["-"], "{}", "error: stdin: num_attention_heads=None, but should be the number of heads"),
        (
            ["-"],
            '{"hidden_size": 64, "vision_config": {"num_heads": 4}}',
            "error: stdin: num_attention_heads=None, but should be the number of heads",
        ),
        (
            ["-"],
            '{"n_head": 8, "num_attention_heads": 16}',
            "error: config: num_attention_heads=16, but n_head=8: they say the same thing",
        ),
        (
            ["-"],
            '{"num_attention_heads": 8, "num_key_value_heads": 3}',
            "error: config: num_attention_heads=8, but should be a multiple of num_key_value_heads",
        ),
        (["-", "--engine", ","], "{}", "error: --engine=',', but should be names like vllm,sglang"),
        (["-", "--tp", "0"], "{}", "error: --tp='0', but should be whole numbers"),
        (["-", "--batch", "2"], "{}", "error: --batch: is about the KV cache, but --seq-len is"),
        (["-", "--kv-dtype", "float8"], "{}", "error: --kv-dtype: is about the KV cache, but"),
        (["-", "--weights"], "{}", "error: --weights: MODEL='-', but should be a directory of"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(arguments: list[str], stdin: str, message: str) -> None:
    done = tpcheck(*arguments, stdin=stdin)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


def test_a_directory_without_a_config_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    done = tpcheck(str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}: config.json is not there; it holds README.md\n"


# -- where the config comes from


def test_a_directory_a_file_and_stdin_say_the_same(phi4: Path) -> None:
    from_directory = tpcheck(str(phi4), "--tp", "4")
    from_file = tpcheck(str(phi4 / "config.json"), "--tp", "4")
    from_stdin = tpcheck("-", "--tp", "4", stdin=json.dumps(PHI_4))
    assert from_directory.stdout == from_file.stdout == from_stdin.stdout
    assert from_directory.returncode == from_file.returncode == from_stdin.returncode == 0


def test_read_model_reads_what_is_there(phi4: Path) -> None:
    assert read_model(str(phi4)) == PHI_4
    with pytest.raises(TPCheckError, match="cannot be read"):
        read_model(str(phi4 / "missing"))


@pytest.mark.parametrize("extra", [[], ["--weights"]], ids=["config", "weights"])
def test_no_torch_and_no_transformers(phi4: Path, extra: list[str]) -> None:
    (phi4 / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    code = (
        "import sys\n"
        f"sys.argv = ['tpcheck', 'plan', {str(phi4)!r}, '--seq-len', '8', *{extra!r}]\n"
        "from tpcheck.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code)\n"
        "loaded = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ("1" if extra else "0")


# -- the JSON


def test_json_is_one_record_per_engine_and_degree_with_stable_keys(
    phi4: Path, tmp_path: Path
) -> None:
    written = tmp_path / "plan.json"
    done = tpcheck(str(phi4), "--tp", "2,4", "--seq-len", "64", "--json", str(written))
    records = json.loads(written.read_text())
    assert done.stdout.startswith("tp 2: ")
    assert [(one["engine"], one["tp_size"]) for one in records] == [
        (engine, degree) for engine in ENGINE_NAMES for degree in (2, 4)
    ]
    for one in records:
        assert set(one) == KEYS
        assert one["checkpoint"] is None
        assert (one["memory"] is None) == (not one["legal"])
        assert one["memory"] is None or set(one["memory"]) == MEMORY_KEYS


def test_json_on_stdout_is_json_alone(phi4: Path) -> None:
    done = tpcheck(str(phi4), "--json", "-", "--engine", "vllm")
    assert [one["outcome"] for one in json.loads(done.stdout)] == ["ok", "error", "error"]
    assert done.returncode == 1


def test_records_say_what_plan_says(phi4: Path) -> None:
    records = plan_records(str(phi4), None, (2, 4))
    for one, result in zip(records, plan(PHI_4, None, (2, 4)), strict=True):
        assert (one["engine"], one["outcome"], one["reason"], one["fix"]) == (
            *(result.engine, result.outcome, result.reason, result.fix),
        )
        assert tuple(one["nearest_legal_tp_sizes"]) == result.nearest_legal_tp_sizes


# -- the text


def test_the_default_degrees_are_the_contracts(phi4: Path) -> None:
    assert {one["tp_size"] for one in plan_records(str(phi4))} == {2, 4, 8}


def test_phi_4_is_refused_by_vllm_and_runs_on_transformers(phi4: Path) -> None:
    records = plan_records(str(phi4), ("vllm", "transformers"), (4,))
    text = render_plan(records)
    assert text.startswith("tp 4: runs on 1 of 2 engines; refused by vllm (num_key_value_heads=10)")
    assert "repeat KV heads to num_key_value_heads=20 (vllm)" in text


def test_quiet_prints_the_verdict_only(phi4: Path) -> None:
    done = tpcheck(str(phi4), "--quiet", "--tp", "4", "--engine", "vllm")
    assert done.stdout == "tp 4: refused by vllm (num_key_value_heads=10)\n"


def test_silently_wrong_is_said_in_the_first_line_and_the_table() -> None:
    quant = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    config = {
        **{"model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064},
        **{"torch_dtype": "float16", "quantization_config": quant, "num_hidden_layers": 80},
    }
    records = config_records(config, None, (2,), CACHE)
    wrong = [one["engine"] for one in records if one["outcome"] == "silent_wrong"]
    assert "vllm" in wrong
    text = render_plan(records)
    assert "SILENTLY WRONG on" in text.splitlines()[0]
    assert text.count("SILENTLY WRONG") == 1 + len(wrong)
    assert "pad intermediate_size to 29696" in text


@pytest.mark.parametrize("engines", [None, ("vllm",)], ids=["all engines", "one engine"])
def test_nothing_is_wider_than_the_terminal(engines: tuple[str, ...] | None) -> None:
    for entry in json.loads(DATA.read_text())[::7]:
        config = entry["config"]
        config = config if "n_layer" in config else {"num_hidden_layers": 40, **config}
        text = render_plan(config_records(config, engines, (2, 3, 4, 8, 16), CACHE))
        head, *rest = text.splitlines()
        assert "\n" not in head
        assert max(map(len, rest)) <= WIDTH, entry["name"]
        assert text == "\n".join(line.rstrip() for line in text.splitlines())


def test_an_unknown_architecture_is_planned_and_says_so() -> None:
    config = {"model_type": "brand_new", "num_attention_heads": 6, "hidden_size": 288}
    text = render_plan(config_records(config, None, (4,), CACHE))
    assert "note: model_type='brand_new' is not known: planned from the fields" in text
    assert "note: memory is not known without vocab_size, num_hidden_layers" in text


def test_a_vision_tower_refuses_as_much_as_a_decoder() -> None:
    decoder = {
        **{"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
    }
    tower = {"hidden_size": 3200, "intermediate_size": 12800, "num_attention_heads": 25}
    config = {"model_type": "internvl_chat", "llm_config": decoder, "vision_config": tower}
    text = render_plan(config_records(config, ("vllm",), (4,), CACHE))
    assert text.startswith("tp 4: refused by vllm (")
    assert "vision_config: 25 is not divisible by 4" in text


ODD = st.sampled_from([None, 0, -1, True, "x", "auto", 3.5, 10**12, [], [0], [1, 2], {}, {"a": 1}])
FIELDS = st.sampled_from(
    [
        *(*PHI_4, "layer_types", "mlp_only_layers", "decoder_sparse_step", "moe_layer_freq"),
        *("first_k_dense_replace", "n_routed_experts", "n_positions", "kv_lora_rank", "depth"),
        *("qk_rope_head_dim", "tie_word_embeddings", "text_config", "vision_config"),
        *("quantization_config", "v_head_dim", "num_local_experts", "moe_intermediate_size"),
    ]
)


@given(st.dictionaries(FIELDS, ODD, max_size=3), st.sampled_from(["vllm", "neuronx-distributed"]))
def test_odd_fields_are_planned_or_refused_in_a_sentence(
    changes: dict[str, Any], engine: str
) -> None:
    try:
        records = config_records({**PHI_4, **changes}, (engine,), (2, 5), CACHE)
    except TPCheckError:
        return
    assert max(map(len, render_plan(records).splitlines()[1:])) <= WIDTH
    json.dumps(records, allow_nan=False)


def test_a_number_of_layers_that_is_no_models_is_refused() -> None:
    config = {**PHI_4, "num_hidden_layers": 10**12}
    with pytest.raises(PlanError, match="num_hidden_layers=1000000000000, but should be at most"):
        config_records(config, ("vllm",), (2,), CACHE)


# -- a checkpoint


def _entries(config: dict[str, Any]) -> dict[str, list[int]]:
    """Return the shapes of a Phi-3 checkpoint of one layer."""
    hidden, width, vocab = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    layer = "model.layers.0"
    return {
        "model.embed_tokens.weight": [vocab, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [vocab, hidden],
        f"{layer}.input_layernorm.weight": [hidden],
        f"{layer}.post_attention_layernorm.weight": [hidden],
        f"{layer}.self_attn.qkv_proj.weight": [(heads + 2 * kv) * (hidden // heads), hidden],
        f"{layer}.self_attn.o_proj.weight": [hidden, hidden],
        f"{layer}.mlp.gate_up_proj.weight": [2 * width, hidden],
        f"{layer}.mlp.down_proj.weight": [hidden, width],
    }


def _write_checkpoint(directory: Path, config: dict[str, Any], shapes: dict[str, Any]) -> None:
    """Write headers and holes: nothing but headers is to be read."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path = directory / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + at)
    (directory / "config.json").write_text(json.dumps(config))


ONE_LAYER = {**PHI_4, "num_hidden_layers": 1}


def test_a_sound_checkpoint_is_exit_0(tmp_path: Path) -> None:
    _write_checkpoint(tmp_path, ONE_LAYER, _entries(ONE_LAYER))
    done = tpcheck(str(tmp_path), "--weights", "--tp", "2", "--engine", "vllm")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(
        "checkpoint: 9 tensors in 1 file: as config.json says\n"
        "  every sub-block is held exactly once, or by every copy, at tp 2\n"
    )


def test_a_problem_is_exit_1_one_line_and_in_the_verdict(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.qkv_proj.weight"
    shapes = {**_entries(ONE_LAYER), name: [7680 - 64, 5120]}  # half a head short
    _write_checkpoint(tmp_path, ONE_LAYER, shapes)
    arguments = [str(tmp_path), "--weights", "--tp", "2", "--engine", "vllm"]
    done = tpcheck(*arguments)
    assert done.returncode == 1
    assert done.stdout.startswith("tp 2: runs on vllm; checkpoint: 1 problem\n")
    assert f"  {name}: shape=[7616, 5120], but should be [7680, 5120]\n" in done.stdout
    [record] = json.loads(tpcheck(*arguments, "--json", "-").stdout)
    assert record["checkpoint"] == {
        "tp_size": 2,
        "files": 1,
        "tensors": 9,
        "compared": True,
        "problems": [f"{name}: shape=[7616, 5120], but should be [7680, 5120]"],
        "tiled": False,
        "notes": [],
    }


def test_a_file_cut_short_is_exit_2_and_named(tmp_path: Path) -> None:
    _write_checkpoint(tmp_path, ONE_LAYER, _entries(ONE_LAYER))
    path = tmp_path / "model.safetensors"
    os.truncate(path, 5)
    done = tpcheck(str(tmp_path), "--weights")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {path}: 5 bytes, but should begin with the 8 bytes of a header's length\n"
    )
