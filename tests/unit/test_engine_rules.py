"""The recorded rules as a whole: each is restated somewhere, or says nothing about a degree."""

from __future__ import annotations

import pytest

from tests.engine_rules import TEXTS, planned
from tests.unit.test_library_rules import DTENSOR, EXLLAMA, TRANSFORMERS
from tests.unit.test_serving_rules import TENSORRT_LLM, TGI
from tests.unit.test_sglang_rules import SGLANG
from tests.unit.test_training_rules import DEEPSPEED, MEGATRON, NEURONX
from tests.unit.test_vllm_group_rules import VLLM_GROUPS
from tests.unit.test_vllm_rules import VLLM

ALL = [
    *(*VLLM, *VLLM_GROUPS, *SGLANG, *TGI, *TENSORRT_LLM, *EXLLAMA, *TRANSFORMERS, *DTENSOR),
    *(*MEGATRON, *DEEPSPEED, *NEURONX),
]
SUMS = {"vllm.allreduce", "megatron.allreduce", "nxd.reduce_dtype"}
"""Rules that say how sums are made and in which dtype, at any degree."""
SIZES = {"exllamav2.split", "exllamav3.split", "trtllm.deepseek_mlp_tp"}
"""Rules that no outcome shows, only what each rank gets: tested by name below."""


def test_every_rule_that_was_recorded_is_restated() -> None:
    restated_here = {rule for one in ALL for rule in one.rules}
    recorded = {rule["rule_id"] for rule in TEXTS}
    assert len(recorded) == 127
    assert restated_here | SUMS | SIZES == recorded


@pytest.mark.parametrize("engine", ["exllamav2", "exllamav3"])
@pytest.mark.parametrize("tp_size", [2, 3, 4, 7])
def test_exllama_shares_out_whole_units_by_memory(engine: str, tp_size: int) -> None:
    memory = [float(2 + rank) for rank in range(tp_size)]
    config = {
        **{"num_key_value_heads": 5, "num_attention_heads": 5, "head_dim": 128},
        **{"intermediate_size": 128 * 41, "hidden_size": 4096, "vocab_size": 32000},
        "gpu_mem_gb": memory,
    }
    sizes = planned(config, engine, tp_size).sizes
    if engine == "exllamav2":
        heads, widths = sizes["split"]["kv_heads"], sizes["split"]["intermediate"]
    else:
        spans = [(rank["attn"], rank["mlp"]) for rank in sizes["plan"]]
        heads = [attention[1] - attention[0] for attention, _ in spans]
        widths = [mlp[1] - mlp[0] for _, mlp in spans]
    assert sum(heads) == 5
    assert sum(widths) == 128 * 41
    assert all(width % 128 == 0 for width in widths)
    for mine, room in zip(widths, memory, strict=True):
        assert abs(mine / (128 * 41) - room / sum(memory)) < 0.05


@pytest.mark.parametrize("blocks", [1, 3, 8, 12, 144])
@pytest.mark.parametrize("tp_size", [1, 2, 3, 8, 16])
def test_deepseeks_dense_mlp_runs_at_the_degree_its_blocks_allow(blocks: int, tp_size: int) -> None:
    config = {"model_type": "deepseek_v3", "intermediate_size": 128 * blocks}
    sizes = planned(config, "tensorrt-llm", tp_size).sizes
    common = max(one for one in range(1, tp_size + 1) if tp_size % one == 0 and blocks % one == 0)
    assert (sizes["mlp_tp"], sizes["copies"]) == (common, tp_size // common)
