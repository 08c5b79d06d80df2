"""`hf:DIR`: transformers' own tensor-parallel plan on real Gloo ranks, against its own TP=1.

float64 runs of most models agree exactly: transformers' float32 norms round away what the other
order of summation changes. That they were really split is seen in the facts and in bfloat16.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from tests.models import make_model
from tpcheck.adapters.transformers import build_hf, hf_config, load_directory
from tpcheck.errors import IllegalDegreeError, PlanError, SubjectError
from tpcheck.execution import Task
from tpcheck.groups.jobs import Job
from tpcheck.groups.pool import PRELOAD, RankPool
from tpcheck.subjects import make_ref

pytest.importorskip("transformers")

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12}
MOE = {"num_experts_per_tok": 2, **HEADS}
MODELS = {
    "llama": ("llama_biases", HEADS),
    "qwen2_tied": ("qwen2_tied", HEADS),
    "qwen3": ("qwen3", {**HEADS, "head_dim": 16}),
    "mistral": ("mistral_window", HEADS),
    "mixtral": ("llama", {"model_type": "mixtral", "num_local_experts": 4, **MOE}),
    "qwen3_moe": (
        "llama",
        {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 24, **MOE},
    ),
    "gpt_neox": ("llama", {"model_type": "gpt_neox", **HEADS}),
    "hrm_text": ("llama", {"model_type": "hrm_text", **HEADS, "num_attention_heads": 4}),
}
SPLIT_RIGHTLY = [name for name in MODELS if name != "hrm_text"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")

    def get(name):
        base, fields = MODELS.get(name, (name, {}))
        return str(make_model(root / name, base, **fields))

    return get


@pytest.fixture(scope="module")
def pool():
    with RankPool(4, preload=(*PRELOAD, "transformers.modeling_utils")) as ranks:
        yield ranks


def run(pool, directory, dtype, sizes):
    ids = torch.randint(0, 101, (2, 13), generator=torch.Generator().manual_seed(1))
    task = Task(
        subject=make_ref(f"hf:{directory}"),
        seed=0,
        dtype=dtype,
        weight_dtype="bfloat16",
        inputs={"A": (ids,)},
        order=("A", "A"),
    )
    return pool.run([Job("tpcheck.execution:execute", task, size) for size in sizes])


def traces(pool, directory, dtype, sizes):
    results = run(pool, directory, dtype, sizes)
    assert [result.failure for result in results] == [None] * len(sizes)
    return [result.replies for result in results]


def relative(actual, expected):
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    return error.item()


@pytest.mark.parametrize("name", SPLIT_RIGHTLY)
def test_a_split_model_is_the_same_function_in_float64(pool, models, name):
    (alone,), two, four = traces(pool, models(name), "float64", (1, 2, 4))
    expected = alone.outputs["A"]
    assert expected.shape == (2, 13, 101)
    assert expected.dtype == torch.float64
    assert "note" not in alone.facts
    for ranks in (two, four):
        assert relative(ranks[0].outputs["A"], expected) < 1e-7
        assert len({trace.digests["A"] for trace in ranks}) == 1
        assert ranks[0].facts["tp_plan"] > alone.facts["tp_plan"] == 0
        assert "note" not in ranks[0].facts


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_a_split_model_rounds_differently_in_bfloat16(pool, models, name):
    (alone,), two = traces(pool, models(name), "bfloat16", (1, 2))
    assert two[0].outputs["A"].dtype == torch.bfloat16
    assert 0 < relative(two[0].outputs["A"], alone.outputs["A"]) < 0.05


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_float64_runs_of_experts_say_that_they_loop(pool, models, name):
    (wide,) = traces(pool, models(name), "float64", (1,))[0]
    (deployed,) = traces(pool, models(name), "bfloat16", (1,))[0]
    assert wide.facts["experts"] == "eager"
    assert deployed.facts["experts"] != "eager"


def test_weights_are_rounded_to_what_is_stored(pool, models):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models("qwen3"), dtype=torch.bfloat16).double()
    ids = torch.randint(0, 101, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.eval()(ids).logits
    (alone,) = traces(pool, models("qwen3"), "float64", (1,))[0]
    assert relative(alone.outputs["A"], expected) < 1e-12


def test_facts_name_what_carried_the_run(pool, models):
    import transformers

    facts = traces(pool, models("llama"), "bfloat16", (2,))[0][0].facts
    assert facts["transformers"] == transformers.__version__
    assert facts["attention"] == "sdpa"
    assert facts["tp_plan"] == 2 * 7 + 2


@pytest.mark.parametrize(
    ("size", "message", "legal"),
    [
        (3, "layers.*.self_attn: num_key_value_heads=2, but should be divisible by tp_size=3", 2),
        (4, "layers.*.self_attn: num_attention_heads=6, but should be divisible by tp_size=4", 2),
    ],
)
def test_heads_that_do_not_divide_are_refused_before_the_load(pool, models, size, message, legal):
    directory = models("llama_tied")  # 6 heads, 2 KV heads
    failure = run(pool, directory, "float64", (size,))[0].failure
    assert isinstance(failure.exception, IllegalDegreeError)
    assert message in str(failure.exception)
    assert failure.exception.legal_tp_sizes == (1, legal)
    raw = pool.run([Job("tests.real.hf_jobs:load_unchecked", directory, size)])[0]
    assert all(reply.startswith("failed at the first forward") for reply in raw.replies)


def test_a_model_without_a_plan_is_refused_as_transformers_does(pool, models):
    failure = run(pool, models("gpt2"), "float64", (2,))[0].failure
    assert isinstance(failure.exception, IllegalDegreeError)
    assert "GPT2LMHeadModel: tp_plan=None" in str(failure.exception)
    assert "ref:DIR splits the same weights in tpcheck's own decoder" in str(failure.exception)
    assert failure.exception.legal_tp_sizes == (1,)
    raw = pool.run([Job("tests.real.hf_jobs:load_unchecked", models("gpt2"), 2)])[0]
    assert all("has no `tp_plan`" in reply for reply in raw.replies)
    (alone,) = traces(pool, models("gpt2"), "float64", (1,))[0]
    assert alone.outputs["A"].isfinite().all()


def test_a_checkpoint_with_a_missing_tensor_is_not_filled_with_noise(pool, models, tmp_path):
    from safetensors.torch import load_file, save_file

    directory = models("llama")
    tensors = load_file(f"{directory}/model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(f"{directory}/config.json", tmp_path)
    for size in (1, 2):
        failure = run(pool, tmp_path, "float64", (size,))[0].failure
        assert isinstance(failure.exception, SubjectError)
        assert "model.layers.1.mlp.up_proj.weight" in str(failure.exception)


def altered(directory, to, change):
    """Copy a model to a directory, after `change` has been made to its tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(f"{directory}/model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(f"{directory}/config.json", to)
    return to


def apart(tensors):
    """Take the fused projections of an HRM checkpoint apart."""
    for name in [name for name in tensors if "gqkv_proj" in name or "gate_up_proj" in name]:
        layer, fused, rest = name.replace(".attn.", ".self_attn.").rsplit(".", 2)
        parts = ("gate", "q", "k", "v") if fused == "gqkv_proj" else ("gate", "up")
        for part, rows in zip(parts, tensors.pop(name).chunk(len(parts)), strict=True):
            tensors[f"{layer}.{part}_proj.{rest}"] = rows.clone()


def test_a_bug_in_transformers_own_loader_is_found(pool, models, tmp_path):
    # 5.23.0 cuts a fused projection over the ranks, and then takes each rank's rows apart.
    (alone,), two = traces(pool, models("hrm_text"), "float64", (1, 2))
    assert relative(two[0].outputs["A"], alone.outputs["A"]) > 0.1
    unfused = altered(models("hrm_text"), tmp_path, apart)
    (again,), two = traces(pool, unfused, "float64", (1, 2))
    assert torch.equal(again.outputs["A"], alone.outputs["A"])
    assert relative(two[0].outputs["A"], alone.outputs["A"]) < 1e-6


def test_a_tensor_of_another_shape_is_named_with_both(pool, models, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    cut = altered(models("llama"), tmp_path, lambda tensors: tensors.update({name: torch.ones(3)}))
    for size in (1, 2):
        failure = run(pool, cut, "float64", (size,))[0].failure
        assert isinstance(failure.exception, SubjectError)
        assert f"{name}: shape=[3], but config.json makes it [" in str(failure.exception)


def test_an_index_that_names_a_missing_file_is_one_sentence(pool, models, tmp_path):
    shutil.copytree(models("llama"), tmp_path, dirs_exist_ok=True)
    index = {"weight_map": {"model.norm.weight": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    failure = run(pool, tmp_path, "float64", (1,))[0].failure
    assert isinstance(failure.exception, SubjectError)
    assert "names 'model-2.safetensors', which is not there" in str(failure.exception)


def test_a_config_that_no_model_can_be_made_of_is_one_sentence(pool, models, tmp_path):
    shutil.copytree(models("llama"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    failure = run(pool, tmp_path, "float64", (1,))[0].failure
    assert isinstance(failure.exception, SubjectError)
    assert "of its config.json: ZeroDivisionError" in str(failure.exception) or (
        "cannot read its config.json" in str(failure.exception)
    )


def test_tensors_that_nobody_reads_are_noted(pool, models, tmp_path):
    extra = {"model.layers.0.mlp.up_proj.bias": torch.ones(3)}
    more = altered(models("qwen3"), tmp_path, lambda tensors: tensors.update(extra))
    ((alone,),) = traces(pool, more, "float64", (1,))
    assert "no use for model.layers.0.mlp.up_proj.bias of the checkpoint" in alone.facts["note"]


def test_a_model_that_is_no_language_model_is_one_sentence(pool, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "vocab_size": 8}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    failure = run(pool, tmp_path, "float64", (1,))[0].failure
    assert isinstance(failure.exception, SubjectError)
    assert "model_type='vit' is no causal language model" in str(failure.exception)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(SubjectError, match=r"config\.json is not there; the directory does not"):
        load_directory(str(tmp_path / "nowhere"))
    with pytest.raises(SubjectError, match=r"config\.json is not there; it is empty"):
        load_directory(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(PlanError, match="vocab_size=None, but should be a whole number"):
        load_directory(str(tmp_path))
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 8, "n_positions": 4}}')
    with pytest.raises(SubjectError, match=r"\*\.safetensors is not there; it holds config\.json"):
        build_hf(tmp_path)
    assert hf_config(tmp_path)["max_position_embeddings"] == 4


def test_options_come_from_the_config_and_torch_is_not_loaded(models):
    code = (
        "import sys; from tpcheck.adapters.transformers import load_directory;"
        f"options = load_directory({models('llama')!r}).options;"
        "assert (options.vocab_size, options.seq_len) == (101, 16), options;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
