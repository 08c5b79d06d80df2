"""Quantized weights are cut as one thing with their scales: every rank has the whole's numbers.

What the plan accepts is the same function, and what it refuses is another one when codes and scales
are cut by their sizes all the same.
"""

from dataclasses import replace
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tpcheck
from properties.layers import split_decoder
from tests.groups import single_group
from tpcheck.pytest_plugin import tp_degrees
from tpcheck.quantization import Quantization
from tpcheck.reference.decoder import Decoder, build_decoder
from tpcheck.reference.layout import cut, logical_tensors
from tpcheck.reference.quant import dequantize
from tpcheck.reference.weights import GeneratedWeights, RankWeights
from tpcheck.shard_plan import STRICT, SplitPolicy, legal_tp_sizes, make_shard_plan
from tpcheck.shard_plan.policy import SCALE_WAYS
from tpcheck.shard_plan.quant import IN, OUT, components, quantized, stored_as
from tpcheck.sharding import tiling_problems
from tpcheck.spec import ModelSpec
from tpcheck.strategies import model_specs, quant_blocks, quantizations

POISONS = st.sampled_from((float("nan"), 1e30, float("inf")))


@st.composite
def quantized_splits(draw, **pins):
    """A quantized spec, a degree, and a policy that splits it there, straddling scales or not."""
    tp_size = draw(tp_degrees())
    spec = draw(model_specs(tp_size, num_hidden_layers=1, quantization=None, **pins))
    spec = replace(spec, quantization=draw(quantizations()))
    ways = draw(st.sampled_from(("even", "pad", "uneven")))
    kv = draw(st.sampled_from(("shard_or_replicate", "unaligned", "mha")))
    policy = SplitPolicy(ways, kv, ways, scales=draw(st.sampled_from(SCALE_WAYS)))
    padded = {"heads": "pad", "intermediate": "pad"}
    for change in ({}, {"kv": "unaligned"}, {"scales": "finer"}, padded):
        policy = replace(policy, **change)
        if tp_size in legal_tp_sizes(spec, tp_size, policy):
            return spec, tp_size, policy
    raise AssertionError("with pads, unaligned KV heads and copied scales every degree plans")


@settings(max_examples=30)
@given(split=quantized_splits(), poison=POISONS)
def test_a_quantized_model_is_the_same_function_however_its_scales_are_split(
    tp_check, split, poison
):
    spec, tp_size, policy = split
    report = tp_check(split_decoder(spec, policy, poison=poison), tp_sizes=(tp_size,))
    assert report.verdicts[0].checks["structural"].outcome == "PASS"
    assert report.verdicts[0].checks["tiling"].outcome == "PASS"


EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 9}


@settings(max_examples=10)
@given(split=quantized_splits(mlp="gated", **EXPERTS), poison=POISONS)
def test_so_are_quantized_experts(tp_check, split, poison):
    spec, tp_size, policy = split
    tp_check(split_decoder(spec, policy, poison=poison), tp_sizes=(tp_size,))


@settings(max_examples=10)
@given(tp_size=tp_degrees(), data=st.data())
def test_a_quantized_layer_is_as_right_as_the_unquantized_one_beside_it(tp_check, tp_size, data):
    spec = data.draw(model_specs(tp_size, legal=True, num_hidden_layers=1, quantization=None))
    stored = replace(spec, quantization=data.draw(quantizations(spec, tp_size, legal=True)))
    for one in (spec, stored):
        tp_check(split_decoder(one, STRICT), tp_sizes=(tp_size,))


@st.composite
def parts(draw):
    """A split of weights that are quantized before they are cut: online ones need real ranks."""
    spec, tp_size, policy = draw(quantized_splits())
    return replace(spec, quantization=replace(spec.quantization, online=False)), tp_size, policy


def loaded(spec, tp_size, policy, source):
    """What each rank loads: its weights, and the stored tensors it holds."""
    plan = make_shard_plan(spec, tp_size, policy)
    for rank in range(tp_size):
        tp = SimpleNamespace(rank=rank, size=tp_size, dtype=torch.float32, device="cpu")
        yield plan, rank, RankWeights(spec, plan, tp, source)


@settings(max_examples=40)
@given(split=parts())
def test_every_rank_dequantizes_the_bits_that_the_whole_has_there(split):
    spec, tp_size, policy = split
    source = GeneratedWeights(single_group(), spec.quantization)
    names = [name for name, one in logical_tensors(spec).items() if quantized(spec, name, one)]
    ((_, _, alone),) = loaded(spec, 1, STRICT, source)
    whole = {name: alone.load(name) for name in names}
    shards = []
    for plan, rank, weights in loaded(spec, tp_size, policy, source):
        for name in names:
            part = cut(spec, plan, rank, logical_tensors(spec)[name])
            held = [index for run in part.runs for index in range(*run.whole)]
            local = weights.load(name).narrow(part.dim, 0, part.real)
            assert torch.equal(local, whole[name].index_select(part.dim, torch.tensor(held).long()))
        shards.append(weights.shards)
    for name, (stored, _) in alone.shards.items():
        locals_, placements = zip(*(held[name] for held in shards), strict=True)
        assert not tiling_problems(stored.shape, placements, locals_, stored), name


# What is refused.


class BySize:
    """Weights whose codes and scales are cut by their own sizes and counted from the cut.

    That is what an engine does that divides the sizes of stored tensors: of three scales for two
    ranks the first takes two, and the second counts its features from the third. Where a cut goes
    between units, that is right. Weights are dequantized here, so the decoder has none to do.
    """

    def __init__(self, tp, spec):
        self._spec, self._tensors, self._dtype = spec, logical_tensors(spec), tp.dtype
        self._source = uneven_weights(tp, spec.quantization)

    def slice(self, name, shape, dim, start, stop):
        if not quantized(self._spec, name, self._tensors[name]):
            return self._source.slice(name, shape, dim, start, stop)
        quantization = self._spec.quantization
        weight = stored_as(quantization, self._tensors, name)
        stored = components(quantization, weight.shape)

        def serving(suffix, side):
            first, last = (start, stop) if side == dim else (0, shape[side])
            offset = weight.offset if side == OUT else 0
            return torch.tensor(by_size(stored[suffix], side, shape[side], first, last, offset))

        parts = {
            suffix: self._source.stored(weight, suffix, 0, 0, one.shape[0])
            for suffix, one in stored.items()
        }
        if dim == IN:  # one entry for each input feature
            parts |= {key: parts[key][start:stop] for key in parts if key.endswith("g_idx")}
        return dequantize(parts, quantization, serving, self._dtype)


def by_size(component, side, size, start, stop, offset):
    """Which stored index each feature from start to stop reads, of a stored dim cut by its size."""
    for dim, axis in enumerate(component.axes):
        if axis is not None and axis.side == side:
            ranks, rank = size // (stop - start), start // (stop - start)
            units = -(-size // axis.unit)
            first = offset // axis.unit + rank * -(-units // ranks)
            if dim == component.packed:
                return [first * axis.unit + feature for feature in range(stop - start)]
            return [first + feature // axis.unit for feature in range(stop - start)]
    return [0] * (stop - start)


def uneven_weights(tp, quantization):
    """Generated weights of which neighbouring groups and blocks have unlike scales."""

    def weight(name, *shape):
        whole = tp.weight(name, *shape)
        if not name.endswith("_proj.weight"):
            return whole
        for dim, unit in enumerate((quantization.block_rows, quantization.group_size)):
            steps = torch.arange(shape[dim]) // (unit or shape[dim]) % 5
            whole = whole * torch.exp2(steps.to(whole.dtype)).unsqueeze(1 - dim)
        return whole

    return GeneratedWeights(SimpleNamespace(weight=weight), quantization)


def cut_by_size(spec):
    """The decoder of a quantized spec: whole at TP=1, and cut by the sizes of what is stored."""

    @tpcheck.subject(vocab_size=spec.vocab_size, seq_len=3)
    def build(tp):
        if tp.size == 1:
            decoder = build_decoder(spec, tp, weights=uneven_weights(tp, spec.quantization))
        else:
            plain = replace(spec, quantization=None)
            decoder = Decoder(plain, make_shard_plan(plain, tp.size), tp, BySize(tp, spec))
        return lambda ids: decoder(ids)  # no shards to tell by: numbers alone are judged

    return build


# with these, a wrong scale cannot be normed, clamped or masked away
VISIBLE = {
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "qk_norm": "none",
    "sliding_window": 0,
    "swiglu_limit": 0.0,
    "max_position_embeddings": 8,
}


@st.composite
def stored_ahead(draw, legal):
    """A degree, and a spec that fits it but for its quantization, which may or may not."""
    tp_size = draw(tp_degrees())
    spec = draw(model_specs(tp_size, legal=True, quantization=None, **VISIBLE))
    stored = draw(quantizations(spec, tp_size, legal, activations=["none"], kv_caches=["none"]))
    return tp_size, replace(spec, quantization=replace(stored, online=False))


@settings(max_examples=30)
@given(stored_ahead(legal=False))
def test_scales_that_the_plan_refuses_are_wrong_when_cut_by_size(tp_pool, point):
    tp_size, spec = point
    report = tp_pool.run(cut_by_size(spec), tp_sizes=(tp_size,), backend="sim", confirm=False)
    (verdict,) = report.verdicts
    if report.outcome != "ERROR":  # a rank for which no scale is left
        assert verdict.checks["structural"].outcome == "FAIL"


@settings(max_examples=30)
@given(stored_ahead(legal=True))
def test_scales_that_the_plan_accepts_are_right_even_when_cut_by_size(tp_check, point):
    tp_size, spec = point
    tp_check(cut_by_size(spec), tp_sizes=(tp_size,))


def an_mlp_of(block, tp_size):
    """A model whose MLP is as wide as the dim that a block is cut from."""
    rows = block.size if block.kind == "block" else 1
    quantization = Quantization("fp8", block.size, rows, skip=("self_attn",))
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": block.dim}
    heads = {"num_attention_heads": tp_size, "head_dim": 4}
    one = {"num_hidden_layers": 1, "max_position_embeddings": 8}
    return ModelSpec(**sizes, **heads, **one, quantization=quantization)


@settings(max_examples=15)
@given(data=st.data(), tp_size=tp_degrees(), legal=st.booleans())
def test_blocks_are_legal_in_the_plan_and_in_numbers_at_once(tp_pool, data, tp_size, legal):
    block = data.draw(quant_blocks(tp_size, legal, max_dim=512), label="block")
    spec = an_mlp_of(block, tp_size)
    assert (tp_size in legal_tp_sizes(spec, tp_size)) == legal
    builds = {split_decoder(spec, SplitPolicy(intermediate="uneven", scales="replicate")): True}
    if block.dim % tp_size == 0:
        builds[cut_by_size(spec)] = legal
    for build, right in builds.items():
        report = tp_pool.run(build, tp_sizes=(tp_size,), backend="sim", confirm=False)
        assert (report.outcome == "PASS") == right
