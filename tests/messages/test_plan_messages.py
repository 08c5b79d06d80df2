"""What `tpcheck plan` prints, in full: several engines, one engine, a checkpoint with problems."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

from tests.configs import PHI_4, QWEN_72B_INT4
from tpcheck.plan_command import config_records
from tpcheck.plan_memory import Request
from tpcheck.render.plan import render_plan


def test_several_engines() -> None:
    engines = ("vllm", "transformers", "deepspeed")
    records = config_records(PHI_4, engines, (2, 4), Request(4096, 8))
    assert render_plan(records) == dedent("""\
        tp 2: runs on 3 of 3 engines; tp 4: runs on 2 of 3 engines

        engine        tp    outcome    legal    why
                                       near
        ------------  ----  ---------  -------  ----------------------------------------------------------------------
        vllm          2     ok                  40 heads / 2 = 20, 10 KV heads / 2 = 5, 17920 intermediate / 2 = 89...
        vllm          4     refused    2        num_key_value_heads=10 and tp_size=4 do not divide one another (a b...
        transformers  2     ok                  40 heads / 2 = 20, 10 KV heads / 2 = 5, 17920 intermediate / 2 = 89...
        transformers  4     ok                  40 heads / 4 = 10, 10 KV heads / 4 = 2.5, 17920 intermediate / 4 =...
        deepspeed     2     ok                  40 heads / 2 = 20, 10 KV heads / 2 = 5, 17920 intermediate / 2 = 89...
        deepspeed     4     uneven              self_attn.q_proj: from 1024 to 1536 rows a rank

        what would make it run:
          tp 4: repeat KV heads to num_key_value_heads=20 (vllm)

        the fullest rank holds:
          tp 2: weights 13.7 GiB, KV cache 3.1 GiB (vllm, transformers, deepspeed)
          tp 4: weights 6.9 GiB, KV cache 1.9 GiB (transformers, deepspeed)""")  # noqa: E501


def test_one_engine_that_is_silently_wrong() -> None:
    records = config_records(QWEN_72B_INT4, ("vllm",), (1, 2), Request(32768))
    assert (
        render_plan(records)
        == dedent("""\
        tp 1: runs on vllm; tp 2: SILENTLY WRONG on vllm (mlp.down_proj: 231 groups of 128 over 2 ranks)

        tp    outcome         weights     KV cache    legal    why
                              per rank    per rank    near
        ----  --------------  ----------  ----------  -------  -------------------------------------------------------
        1     ok              38.6 GiB    10.0 GiB             64 heads / 1 = 64, 8 KV heads / 1 = 8, 29568 interme...
        2     SILENTLY WRONG                          1        mlp.down_proj: 231 groups of 128 over 2 ranks; Exlla...

        tp 2: mlp.down_proj: 231 groups of 128 over 2 ranks; Exllama reads the wrong groups
          fix     pad intermediate_size to 29696, or quantize in blocks or groups of 64; or use tp_size=1
          source  vllm 0.33.0: vllm/model_executor/kernels/linear/__init__.py:539,887-955; mixed_precision/*.py""")  # noqa: E501
    )


def test_an_engine_that_speaks_itself() -> None:
    config = {**PHI_4, "num_attention_heads": 36, "num_key_value_heads": 4, "hidden_size": 4608}
    assert render_plan(config_records(config, ("vllm",), (8,), Request())) == dedent("""\
        tp 8: refused by vllm (Total number of attention heads (36) must be divisible by...)

        tp    outcome    legal    why
                         near
        ----  ---------  -------  -----------------------------------------------------------------------------------
        8     refused    4        Total number of attention heads (36) must be divisible by tensor parallel size (8).

        tp 8: Total number of attention heads (36) must be divisible by tensor parallel size (8).
          fix     pad num_attention_heads to 40; or use tp_size=4
          source  vllm 0.33.0: vllm/config/model.py:1558-1565""")  # noqa: E501


def test_a_checkpoint_with_problems() -> None:
    held: dict[str, Any] = {
        "tp_size": 2,
        "files": 4,
        "tensors": 963,
        "compared": True,
        "problems": [
            "model.layers.7.mlp.up_proj.weight: shape=[17919, 5120], but should be [17920, 5120]",
            "lm_head.weight: is missing, but should be [100352, 5120]",
        ],
        "tiled": False,
        "notes": [],
    }
    [record] = config_records(PHI_4, ("vllm",), (2,), Request())
    assert render_plan([{**record, "checkpoint": held}]) == dedent("""\
        tp 2: runs on vllm; checkpoint: 2 problems

        tp    outcome    weights     why
                         per rank
        ----  ---------  ----------  --------------------------------------------------------------------------------
        2     ok         13.7 GiB    40 heads / 2 = 20, 10 KV heads / 2 = 5, 17920 intermediate / 2 = 8960, 100352...

        checkpoint: 963 tensors in 4 files: 2 problems
          model.layers.7.mlp.up_proj.weight: shape=[17919, 5120], but should be [17920, 5120]
          lm_head.weight: is missing, but should be [100352, 5120]""")  # noqa: E501


def test_a_checkpoint_that_is_what_it_should_be() -> None:
    held: dict[str, Any] = {"files": 1, "tensors": 242, "compared": True, "problems": []}
    refused = (
        "layers.*.self_attn: num_key_value_heads=10, but should divide tp_size=4 or be divisible"
        " by it [phi3, tp_size=4]"
    )
    proven = {**held, "tp_size": 2, "tiled": True, "notes": []}
    notes = [f"tp 4: nothing proven: {refused}"]
    unproven = {**held, "tp_size": 4, "tiled": False, "notes": notes}
    records = config_records(PHI_4, ("transformers",), (2, 4), Request())
    held_records = [
        {**record, "checkpoint": one}
        for record, one in zip(records, (proven, unproven), strict=True)
    ]
    assert render_plan(held_records) == dedent("""\
        tp 2, 4: runs on transformers

        tp    outcome    weights     why
                         per rank
        ----  ---------  ----------  ---------------------------------------------------------------------------------
        2     ok         13.7 GiB    40 heads / 2 = 20, 10 KV heads / 2 = 5, 17920 intermediate / 2 = 8960, 100352...
        4     ok         6.9 GiB     40 heads / 4 = 10, 10 KV heads / 4 = 2.5, 17920 intermediate / 4 = 4480, 10035...

        checkpoint: 242 tensors in 1 file: as config.json says
          every sub-block is held exactly once, or by every copy, at tp 2
          note: tp 4: nothing proven: layers.*.self_attn: num_key_value_heads=10, but should divide tp_size=4 or be
                divisible by it [phi3, tp_size=4]""")  # noqa: E501
