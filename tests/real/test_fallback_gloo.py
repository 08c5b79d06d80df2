"""The fallback on real Gloo ranks: TP=1's bits from TP=N's weights; one order for all threads."""

import pytest
import torch

from tests.fallback_jobs import Work
from tests.models import make_model
from tpcheck.fallback.levels import LEVELS
from tpcheck.groups.jobs import Job
from tpcheck.groups.pool import PRELOAD, RankPool

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12}


@pytest.fixture(scope="module")
def pool():
    with RankPool(8, preload=(*PRELOAD, "transformers.modeling_utils")) as ranks:
        yield ranks


def replies(pool, function, work, sizes):
    jobs = [Job(f"tests.fallback_jobs:{function}", work, size) for size in sizes]
    results = pool.run(jobs)
    assert [result.failure for result in results] == [None] * len(sizes)
    return [result.replies for result in results]


def bits_agree(ranks, name, expected):
    return all(torch.equal(reply[name][0], expected) for reply in ranks)


@pytest.mark.parametrize("model", ["llama-tiny", "dtensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_has_the_bits_of_tp_1(pool, model, dtype):
    work = Work(model, dtype, levels=("full",))
    (alone,), *split = replies(pool, "level_job", work, (1, 2, 4, 8))
    expected = alone["tp"][0]
    for ranks in split:
        assert bits_agree(ranks, "full", expected)
        assert not bits_agree(ranks, "tp", expected), "TP=N does not round, so this shows nothing"
        assert ranks[0]["full"][1].bytes_gathered > 0


@pytest.mark.parametrize("model", ["llama-tiny", "dtensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_fixed_tree_has_the_same_bits_at_every_degree(pool, model, dtype):
    work = Work(model, dtype, levels=("fixed_tree",))
    (alone,), *split = replies(pool, "level_job", work, (1, 2, 4, 8))
    for ranks in split:
        assert bits_agree(ranks, "fixed_tree", alone["fixed_tree"][0])
        assert not bits_agree(ranks, "tp", alone["tp"][0]), "TP=N rounds as TP=1 does"


def test_a_transformers_model_with_its_tp_plan_scores_at_tp_1(pool, tmp_path):
    pytest.importorskip("transformers")
    directory = str(make_model(tmp_path / "llama", "llama_biases", **HEADS))
    levels = ("head", "rowwise", "full", "fp32_wire")
    work = Work(directory, torch.bfloat16, levels=levels)
    ((alone,),) = replies(pool, "deployed_job", work, (1,))
    (two,) = replies(pool, "level_job", work, (2,))
    expected = alone
    assert bits_agree(two, "full", expected)
    assert not bits_agree(two, "tp", expected)
    exact = expected.double()
    for name in levels:
        assert (two[0][name][0].double() - exact).norm() < 0.05 * exact.norm()
    refused = replies(pool, "refusal_job", Work(directory, options={"level": "fixed_tree"}), (2,))
    assert "transformers' plan put a forward of its own there" in refused[0][0]


def test_a_module_of_dtensors_streams_within_the_bound(pool):
    work = Work("dtensor", torch.bfloat16, levels=("full",))
    ((alone,),) = replies(pool, "level_job", work, (1,))
    largest = 96 * 32 * 2  # the embedding, and the head
    bounded = Work("dtensor", torch.bfloat16, levels=("full",), max_bytes=largest)
    (ranks,) = replies(pool, "level_job", bounded, (2,))
    assert bits_agree(ranks, "full", alone["tp"][0])
    assert all(reply["full"][1].peak_bytes == largest for reply in ranks)
    assert all(reply["held after"] == 0 for reply in ranks)
    assert all(reply["absent after"] for reply in ranks)
    options = {"max_bytes": largest - 1}
    ((said, _),) = replies(pool, "refusal_job", Work("dtensor", options=options), (2,))
    assert said == (
        "SubjectError: embed_tokens: max_bytes=6143, but should be at least 6144, its whole"
        " weights: nothing smaller can be streamed"
    )


def test_experts_of_transformers_score_at_tp_1_or_not_at_all(pool, tmp_path):
    pytest.importorskip("transformers")
    experts = {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 64}
    directory = str(make_model(tmp_path / "mixtral", "llama", **experts, **HEADS))
    ((alone,),) = replies(pool, "deployed_job", Work(directory), (1,))
    (two,) = replies(pool, "level_job", Work(directory, levels=("full",)), (2,))
    assert bits_agree(two, "full", alone)
    assert not bits_agree(two, "tp", alone)
    refused = Work(directory, options={"level": "rowwise"})
    ((said, _),) = replies(pool, "refusal_job", refused, (2,))
    assert "is no Linear, so its products cannot be replaced; take level full" in said


@pytest.mark.parametrize("model", ["llama-tiny", "dtensor"])
def test_threads_that_score_at_once_get_what_one_thread_gets(pool, model):
    options = {"share": 0.5, "seed": 1, "level": "full"}
    work = Work(model, torch.float16, options=options, requests=12, threads=3)
    (ranks,) = replies(pool, "threads_job", work, (2,))
    for reply in ranks:
        assert reply["equal"]
        counters, sequential = reply["counters"], reply["sequential"]
        assert (counters["scored"], counters["generated"]) == (12, 12)
        for name in ("compared", "bytes_gathered", "peak_bytes", "drifted", "fallbacks"):
            assert counters[name] == sequential[name], name
        assert counters["compared"] > 0
    assert ranks[0]["counters"]["bytes_gathered"] == ranks[1]["counters"]["bytes_gathered"]


def test_a_bfloat16_wire_under_float16_falls_back_and_a_clean_one_does_not(pool):
    options = {"share": 1.0, "level": "rowwise"}
    work = Work(dtype=torch.float16, options=options, requests=3)
    (clean,) = replies(pool, "score_job", work, (4,))
    assert all(reply["levels"] == ["tp"] * 3 for reply in clean)
    planted = Work(dtype=torch.float16, options=options, requests=3, fault="bfloat16_wire")
    (ranks,) = replies(pool, "score_job", planted, (4,))
    for reply in ranks:
        assert reply["levels"] == ["full", "rowwise", "rowwise"]
        assert reply["values"][0] > 3 > reply["values"][1]
        assert reply["generated"], "generation has to go on at TP=N"


def test_every_level_is_tried(pool):
    levels = tuple(LEVELS)
    (ranks,) = replies(pool, "level_job", Work(levels=levels), (2,))
    for name in levels:
        first = ranks[0][name][0]
        assert all(torch.equal(reply[name][0], first) for reply in ranks), name
    assert torch.equal(ranks[0]["tp"][0], ranks[0]["tp again"][0])
