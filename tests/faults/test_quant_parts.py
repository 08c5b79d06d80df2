"""Opening a rank's quantized weight and changing nothing leaves it bit for bit as it was loaded.

A fault that differs from the loaded weight before it changes anything would be caught for nothing.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.groups import single_group
from tpcheck.adapters.reference import BUILTINS
from tpcheck.faults import FAULTS
from tpcheck.faults.quant_parts import (
    DOWN,
    EXPERTS,
    GATE,
    KEY,
    MLP,
    QUERY,
    opened,
    parameter,
    quantize_again,
    quantized,
    reread,
)
from tpcheck.quantization import Quantization
from tpcheck.reference.decoder import build_decoder

FORMATS = (
    Quantization("fp8", 8, 8),
    Quantization("fp8", 0, 0),
    Quantization("fp8", 8, 8, fused=True),
    Quantization("int8"),
    Quantization("gptq", 8, desc_act=True),
    Quantization("awq", 8, symmetric=False),
    Quantization("pack-quantized", 8, symmetric=False, desc_act=True),
    Quantization("mxfp4", 8),
    Quantization("nvfp4", 8),
)


def decoder_of(how: Quantization, rank: int, **fields):
    spec = replace(BUILTINS["llama-tiny"][1], **quantized(how, **fields))
    tp = single_group(rank=rank, size=4)
    return build_decoder(spec, tp), tp


@pytest.mark.parametrize("how", FORMATS, ids=lambda how: how.describe())
@pytest.mark.parametrize("rank", [0, 3])
def test_a_weight_opened_and_not_changed_is_the_weight_that_was_loaded(how, rank):
    decoder, tp = decoder_of(how, rank)
    for name in (QUERY, KEY, GATE, DOWN):
        before = parameter(decoder, name).data.clone()
        shards = dict(decoder.shards())
        with reread(decoder, tp, name):
            pass
        assert torch.equal(parameter(decoder, name), before)
        for key, (held, placement) in decoder.shards().items():
            assert torch.equal(held.view(torch.uint8), shards[key][0].view(torch.uint8)), key
            assert placement == shards[key][1]


def test_a_changed_part_is_what_the_rank_holds_and_computes_with():
    decoder, tp = decoder_of(Quantization("fp8", 8, 8), rank=1)
    before = parameter(decoder, DOWN).data.clone()
    with reread(decoder, tp, DOWN) as one:
        one.parts["weight_scale_inv"] = 2 * one.parts["weight_scale_inv"]
    assert torch.equal(parameter(decoder, DOWN), 2 * before)
    stored = opened(decoder, tp, DOWN).parts["weight_scale_inv"]
    held = decoder.shards()[DOWN.replace(".weight", ".weight_scale_inv")][0]
    assert torch.equal(held, 2 * stored)


def test_what_ranks_hold_makes_up_the_whole():
    decoder, tp = decoder_of(Quantization("fp8", 8, 8), rank=0)
    one = opened(decoder, tp, DOWN)
    parts = [one.of(rank, "weight_scale_inv") for rank in range(4)]
    assert torch.equal(torch.cat(parts, 1), one.whole("weight_scale_inv"))
    features = [feature for rank in range(4) for feature in one.features(rank)]
    assert features == list(range(192))


def test_an_experts_down_projection_is_found_by_its_name():
    decoder, tp = decoder_of(Quantization("int8"), 2, **EXPERTS)
    name = f"{MLP}.experts.3.down_proj.weight"
    assert parameter(decoder, name) is decoder.layers[0].mlp.experts[3].down_Df
    with reread(decoder, tp, name) as one:
        assert len(one.features(2)) == 48


def test_quantizing_again_with_a_scale_of_its_own_rows_changes_nothing():
    decoder, tp = decoder_of(Quantization("int8"), rank=2)
    before = parameter(decoder, GATE).data.clone()
    quantize_again(decoder, tp, GATE, lambda own: own)  # no other rank has these rows
    assert torch.equal(parameter(decoder, GATE), before)
    quantize_again(decoder, tp, GATE, lambda own: 2 * own)
    assert not torch.equal(parameter(decoder, GATE), before)


def test_quantization_has_faults_enough_of_each_kind():
    modules = [fault.plant.__module__ for fault in FAULTS.values()]
    modules += [fault.accepts.__module__ for fault in FAULTS.values() if fault.accepts]
    counts = {
        kind: sum(module == f"tpcheck.faults.quant_{kind}" for module in modules)
        for kind in ("scales", "values", "codes", "padding", "activations", "plans", "straddling")
    }
    assert all(counts.values()), counts
    assert sum(counts.values()) >= 40
