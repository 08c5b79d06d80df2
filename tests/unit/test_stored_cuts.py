"""The plan of stored tensors: what each rank holds of codes and scales, and joint constraints."""

import torch

from tpcheck.quantization import Quantization
from tpcheck.reference.decoder import build_decoder
from tpcheck.reference.quantizing import quantize
from tpcheck.shard_plan import SplitPolicy, make_shard_plan, stored_cuts
from tpcheck.spec import ModelSpec

FP8 = Quantization("fp8", 128, 128)


def wide_model(**fields):
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 1536}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 64}
    how = {"num_hidden_layers": 1, "quantization": FP8}
    return ModelSpec(**(how | sizes | heads | fields))


def test_heads_are_padded_to_whole_blocks_and_not_only_to_the_degree():
    """sgl-project/sglang#8243: 66 heads divide by 6 and cut blocks of 128; 72 is the least."""
    plan = make_shard_plan(wide_model(), 6, SplitPolicy(heads="pad", intermediate="pad"))
    assert plan.padded.query * 6 == 72


def test_a_scale_is_cut_where_its_codes_are():
    spec = wide_model()
    cuts = stored_cuts(spec, make_shard_plan(spec, 4))
    name = "model.layers.0.mlp.down_proj"
    codes, scales = cuts[f"{name}.weight"], cuts[f"{name}.weight_scale_inv"]
    assert [part.span for part in codes] == [(0, 384), (384, 768), (768, 1152), (1152, 1536)]
    assert [part.span for part in scales] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert {part.dim for part in (*codes, *scales)} == {1}


def test_what_is_planned_is_what_the_decoder_loads():
    spec = wide_model(quantization=Quantization("gptq", 24, desc_act=True))
    policy = SplitPolicy(scales="replicate", heads="uneven", intermediate="uneven")
    cuts = stored_cuts(spec, make_shard_plan(spec, 3, policy))
    for rank in range(3):
        shards = build_decoder(spec, one_rank(rank, 3), policy=policy).shards()
        assert cuts.keys() == shards.keys()
        for name, (tensor, placement) in shards.items():
            part = cuts[name][rank]
            assert (tensor.shape[part.dim], placement) == (part.size, part.placement), name


def one_rank(rank, size):
    class Group:
        dtype, device = torch.float64, torch.device("cpu")

        def weight(self, name, *shape):
            return torch.zeros(shape, dtype=torch.float64)

    group = Group()
    group.rank, group.size = rank, size
    return group


def test_every_stored_tensor_has_the_shape_that_the_plan_says():
    for quantization in (FP8, Quantization("awq", 32, symmetric=False), Quantization("nvfp4", 16)):
        spec = wide_model(quantization=quantization)
        cuts = stored_cuts(spec, make_shard_plan(spec, 1))
        parts = quantize(torch.ones(1536, 256), quantization)
        for suffix, tensor in parts.items():
            part = cuts[f"model.layers.0.mlp.up_proj.{suffix}"][0]
            assert tensor.shape[part.dim] == part.size
