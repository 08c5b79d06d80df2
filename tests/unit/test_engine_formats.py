"""Which stored forms an engine reads: what it does not read is never "ok" on it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine_rules import planned
from tpcheck.planning import ENGINE_NAMES

LLAMA: dict[str, Any] = {
    **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def stored(quant: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**LLAMA, **fields, "quantization_config": quant}


READERS = {
    "gptq": {"vllm", "sglang", "tgi", "transformers", "deepspeed"},
    "awq": {"vllm", "sglang", "tgi", "transformers", "deepspeed"},
    "exl2": {"exllamav2", "transformers", "deepspeed"},
    "bitsandbytes": {"tgi", "transformers", "deepspeed", "pytorch-dtensor", "exllamav3"},
    "gguf": {"sglang", "transformers", "deepspeed", "pytorch-dtensor"},
    "nvfp4": {"vllm", "sglang", "tensorrt-llm", "deepspeed", "pytorch-dtensor", "exllamav3"},
}
"""Method → the engines that do not refuse it at two ranks, tpcheck's own decoder aside."""


@pytest.mark.parametrize("method", READERS)
def test_an_engine_that_does_not_read_a_form_refuses_every_degree(method: str) -> None:
    quant = {"quant_method": method, "bits": 4, "group_size": 128}
    for engine in set(ENGINE_NAMES) - {"reference"}:
        result = planned(stored(quant), engine, 2)
        assert result.is_legal == (engine in READERS[method]), (engine, result.reason)
        if not result.is_legal:
            assert result.source
            assert result.fix


@pytest.mark.parametrize(
    ("engine", "text"),
    [
        ("vllm", "Unknown quantization method: exl3. Must be one of [...]"),
        ("sglang", "Unknown quantization method: exl3. Must be one of [...]"),
        ("pytorch-dtensor", "ColwiseParallel currently only support nn.Linear and nn.Embedding!"),
        ("megatron", None),
        ("neuronx-distributed", None),
        ("tensorrt-llm", None),
        ("tgi", None),
    ],
)
def test_the_engines_own_words_where_it_has_any(engine: str, text: str | None) -> None:
    result = planned(stored({"quant_method": "exl3"}), engine, 2)
    assert (result.outcome, result.error_text) == ("error", text)
    assert "exl3" in result.reason or text is not None


def test_dtensors_words_are_torchs_own() -> None:
    import torch
    from torch.distributed.tensor.parallel import ColwiseParallel

    with pytest.raises(NotImplementedError) as error:
        ColwiseParallel()._apply(torch.nn.ReLU(), None)  # type: ignore[arg-type]
    result = planned(stored(GPTQ), "pytorch-dtensor", 2)
    assert result.error_text == str(error.value)
    assert planned(stored(GPTQ), "pytorch-dtensor", 1).is_legal


def test_exllamav2_loads_gptq_and_splits_exl2_alone() -> None:
    alone, split = (planned(stored(GPTQ), "exllamav2", size) for size in (1, 2))
    assert alone.outcome == "ok"
    assert split.error_text == "Can only split fully loaded EXL2 tensor."
    assert split.legal_tp_sizes == (1,)
    assert planned(stored({"quant_method": "exl2"}), "exllamav2", 2).outcome == "ok"


def test_deepspeed_leaves_layers_that_are_no_linears_whole() -> None:
    odd = stored(GPTQ, num_key_value_heads=32, num_attention_heads=32)
    result = planned(odd, "deepspeed", 3)
    assert result.outcome == "replicate"
    assert result.sizes == {"whole": True}
    assert planned(LLAMA, "deepspeed", 3).outcome == "uneven"


def test_a_form_of_which_nothing_is_known_is_planned_with_a_note() -> None:
    for engine in ("transformers", "sglang", "deepspeed"):
        result = planned(stored({"quant_method": "brand_new"}), engine, 2)
        assert result.outcome == "ok"
        note = "quant_method='brand_new': not known how it is split, planned as unquantized"
        assert note in result.notes, engine
    assert not [one for one in planned(stored(GPTQ), "vllm", 2).notes if "quant" in one]


def test_tensorrt_llm_takes_blocks_of_128_alone() -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    result = planned(stored(fp8), "tensorrt-llm", 2)
    assert result.error_text == "FP8_BLOCK_SCALES only supports block_size=(128,128)"
    wider = {**fp8, "weight_block_size": [128, 128]}
    assert planned(stored(wider), "tensorrt-llm", 2).is_legal


@pytest.mark.parametrize(
    ("word", "method"),
    [
        ("gptq-int4", "gptq"),
        ("awq_w4", "awq"),
        ("w8a8_int8", "w8a8_int8"),
        ("experts_int8", "experts_int8"),
        ("auto-round", "auto_round"),
        ("compressed-tensors", "compressed-tensors"),
    ],
)
def test_a_methods_name_is_read_whole(word: str, method: str) -> None:
    from tpcheck.engines.quant_reading import read_quant

    quant = read_quant({"quantization_config": {"quant_method": word}}, "config")
    assert quant is not None
    assert quant.method == method


def test_bitsandbytes_says_its_bits_and_what_it_leaves_out() -> None:
    from tpcheck.engines.quant_reading import read_quant

    fields = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["lm_head"]}
    four = read_quant({"quantization_config": fields}, "config")
    eight = read_quant({"quantization_config": {**fields, "load_in_8bit": True}}, "config")
    assert four is not None
    assert eight is not None
    assert (four.bits, eight.bits, four.ignored) == (4, 8, ("lm_head",))
