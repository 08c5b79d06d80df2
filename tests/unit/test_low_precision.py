"""Wires narrower than the activations: their codecs, what they must cost, where they saturate.

The codecs are held against loops over single numbers, in numpy's float16 and torch's own float8.
What they must cost is injected into a float64 run, and held against what the deployed dtype shows.
"""

import math

import numpy as np
import pytest
import torch

import tpcheck
from tpcheck.fault_matrix import selfcheck
from tpcheck.faults.planting import reduce_with
from tpcheck.groups.jobs import Job
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.investigation import Investigation, Settings
from tpcheck.numerics.low_precision import LOW_PRECISION, carried_as, wire_error
from tpcheck.numerics.reduction import reduce, reduce_sum
from tpcheck.observation.injection import reduction_noise
from tpcheck.reference.decoder import build_decoder
from tpcheck.spec import Case, ModelSpec
from tpcheck.subjects import make_ref, resolve

torch.set_num_threads(1)
LEVELS = {"int8_wire": 128, "int6_wire": 32, "int4_wire": 8}
BLOCKS = (*LEVELS, "fp8_wire")
FLOAT16_MAX = 65504.0
SPEC = ModelSpec(
    vocab_size=131,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rms(x):
    return float(x.double().square().mean().sqrt())


# The codecs, number by number.


def half(x):
    """Round to float16; what overflows saturates, an infinity stays."""
    x = np.float32(x)
    if np.isfinite(x):
        x = np.clip(x, np.float32(-FLOAT16_MAX), np.float32(FLOAT16_MAX))
    return np.float32(np.float16(x))


def int_sent(numbers, levels):
    """Encode and decode one block."""
    numbers = [half(x) for x in numbers]
    high, low = max(numbers), min(numbers)
    scale = half((high if abs(high) > abs(low) else low) * np.float32(-1 / levels))
    with np.errstate(divide="ignore", invalid="ignore"):
        to_code = half(np.float32(1) / half(scale + np.float32(2**-24)))
        wide = [np.fmin(np.fmax(half(x * to_code), -levels), levels - 1) for x in numbers]
    codes = [np.rint(x) for x in wide]
    return [half(np.float32(code) * scale) for code in codes]


def int_wire(tensors, levels):
    flat = [[float(v) for v in x.reshape(-1)] + [0.0] * (-x.numel() % 64) for x in tensors]
    result = [0.0] * len(flat[0])
    for start in range(0, len(flat[0]), 64):
        for odd in (0, 1):
            places = range(start + odd, start + 64, 2)
            total = [np.float32(0)] * 32
            for x in flat:
                sent = int_sent([x[i] for i in places], levels)
                total = [half(a + b) for a, b in zip(total, sent, strict=True)]
            for i, value in zip(places, int_sent(total, levels), strict=True):
                result[i] = float(value)
    return torch.tensor(result[: tensors[0].numel()]).to(tensors[0].dtype).view(tensors[0].shape)


def fp8_sent(block):
    largest = block.abs().max()
    if largest == 0:
        return block
    scale = torch.tensor(448.0) / largest
    return (block * scale).to(torch.float8_e4m3fn).float() / scale


def fp8_two_shots(tensors):
    """Every rank owns one piece and adds it up from itself on."""
    world, count = len(tensors), tensors[0].numel()
    pieces = [x.reshape(-1).float().split(-(-count // world)) for x in tensors]
    result = []
    for owner in range(len(pieces[0])):
        in_turn = [pieces[(owner + k) % world][owner].split(496) for k in range(world)]
        for blocks in zip(*in_turn, strict=True):
            total = torch.zeros_like(blocks[0])
            for block in blocks:
                total = total + fp8_sent(block)
            result.append(fp8_sent(total))
    return torch.cat(result).to(tensors[0].dtype).view(tensors[0].shape)


def fp8_eight_ranks(tensors):
    """Two groups of four add up first; four ranks own 16 blocks in turn."""
    result = []
    split = [x.reshape(-1).float().split(496) for x in tensors]
    for index, blocks in enumerate(zip(*split, strict=True)):
        owner = index // 16 % 4
        halves = []
        for group in (blocks[:4], blocks[4:]):
            total = torch.zeros_like(group[0])
            for k in range(4):
                total = total + fp8_sent(group[(owner + k) % 4])
            halves.append(fp8_sent(total))
        result.append(fp8_sent(halves[0] + halves[1]))
    return torch.cat(result).to(tensors[0].dtype).view(tensors[0].shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("world", [2, 3, 8])
def test_quick_reduce_has_the_bits_of_a_loop_over_numbers(world, kind, dtype):
    for shape, scale in [((3, 47), 1.0), ((64,), 1e-3), ((5,), 1e4), ((2, 64), 1e-5)]:
        tensors = [(normal(rank, *shape) * scale).to(dtype) for rank in range(world)]
        tensors[0].view(-1)[1] = 0
        assert torch.equal(reduce_sum(tensors, kind), int_wire(tensors, LEVELS[kind])), shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_float8_has_the_bits_of_a_loop_over_warps(world, dtype):
    for shape in [(5,), (496,), (7, 1001), (65, 496)]:
        tensors = [normal(rank, *shape).to(dtype) for rank in range(world)]
        expected = fp8_eight_ranks(tensors) if world == 8 else fp8_two_shots(tensors)
        assert torch.equal(reduce_sum(tensors, "fp8_wire"), expected), shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float16_wire_adds_in_rank_order_in_float16(dtype):
    a, b, c = (normal(rank, 99).to(dtype) for rank in range(3))
    expected = ((a.half() + b.half()) + c.half()).to(dtype)
    assert torch.equal(reduce_sum([a, b, c], "fp16_wire"), expected)


@pytest.mark.parametrize("kind", LOW_PRECISION)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float32])
def test_what_a_wire_does_not_take_is_summed_by_the_ring(kind, dtype):
    tensors = [(normal(rank, 200) * 9).to(dtype) for rank in range(4)]
    taken = kind == "fp8_wire" and dtype == torch.float32
    assert carried_as(kind, dtype) == (kind if taken else "ring")
    for op in ("sum", "max"):
        same = torch.equal(reduce(tensors, op, kind), reduce(tensors, op, "ring"))
        assert same is (not taken or op == "max")


@pytest.mark.parametrize("kind", LOW_PRECISION)
def test_one_rank_sends_nothing(kind):
    x = normal(0, 100).bfloat16()
    assert torch.equal(reduce_sum([x], kind), x)
    assert not wire_error([x], kind).any()


# Both ends of the range.


@pytest.mark.parametrize(("kind", "levels"), LEVELS.items())
def test_a_block_shrinks_once_float16_cannot_hold_the_inverse_of_its_scale(kind, levels):
    ends = levels / FLOAT16_MAX
    block = torch.linspace(-1, 1, 64)
    for shrink in (8, 1 / 2, 1 / 4):
        peak = ends * shrink
        got = float(reduce_sum([(block * peak).half()] * 2, kind).double().abs().max())
        first = min(1.0, shrink)  # the second shot finds a sum that is smaller already
        second = min(1.0, 2 * first * shrink)
        step = peak / levels
        # half a step per rank, and half of the sum's, which are at most twice as wide
        assert got == pytest.approx(2 * first * second * peak, abs=2.1 * step)
        if shrink < 1:
            assert got < 0.6 * 2 * peak


def test_a_tiny_block_comes_back_as_zeros():
    tiny = torch.full((64,), 2.0**-20, dtype=torch.bfloat16)
    for kind in LEVELS:
        assert not reduce_sum([tiny, tiny], kind).any(), kind
    assert torch.equal(reduce_sum([tiny, tiny], "fp8_wire"), tiny * 2)


def test_a_float16_wire_overflows_and_the_integer_codecs_saturate():
    big = torch.ones(128, dtype=torch.bfloat16)
    big[5] = 2.0**16
    one = torch.ones_like(big)
    for tensors in ([big, big], [one, big]):  # the cast itself overflows, not only the sum
        assert reduce_sum(tensors, "fp16_wire").isinf().nonzero().flatten().tolist() == [5]
    for kind in LEVELS:
        # float16's largest, in bfloat16; the sum of the two saturates once more
        assert float(reduce_sum([big, big], kind)[5]) == 2.0**16, kind
    assert float(reduce_sum([big, big], "fp8_wire")[5]) == 2.0**17


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinity_poisons_every_other_number_of_its_64_and_float8_hides_it(value):
    tensors = [torch.ones(192, dtype=torch.float16) for _ in range(2)]
    tensors[1][70] = value
    got = reduce_sum(tensors, "int8_wire")
    assert got.isfinite().logical_not().nonzero().flatten().tolist() == [*range(64, 128, 2)]
    assert float(got[70]) == value
    hidden = reduce_sum(tensors, "fp8_wire")
    assert hidden.isfinite().all()
    assert abs(float(hidden[70])) == pytest.approx(448, rel=0.05)


def test_the_ideal_codec_does_not_saturate():
    for kind in BLOCKS:
        terms = [normal(rank, 1024) for rank in range(4)]
        error = wire_error(terms, kind)
        for scale in (2.0**-30, 2.0**30):
            scaled = wire_error([x * scale for x in terms], kind) / scale
            torch.testing.assert_close(scaled, error, rtol=1e-9, atol=1e-12)


# What a wire must cost.


def independent(size):
    return [normal(rank, 64, 512) for rank in range(size)]


def coherent(size):
    return [normal(99, 64, 512) + normal(rank, 64, 512) / 4 for rank in range(size)]


def cancelling(size):
    return [normal(99, 64, 512) * (-1) ** r + normal(r, 64, 512) / 16 for r in range(size)]


OUTLIERS = slice(7, None, 100)


def outlier_channels(size):
    channels = torch.ones(512, dtype=torch.float64)
    channels[OUTLIERS] = 64
    return [normal(rank, 64, 512) * channels for rank in range(size)]


def one_large_rank(size):
    return [normal(rank, 64, 512) * (64 if rank == size // 2 else 1) for rank in range(size)]


def call(world, body):
    return body(world)


def on_ranks(body, size, reduction):
    (result,) = SimulatedRanks(reduction).run([Job(f"{__name__}:call", body, size, 60.0)])
    assert result.failure is None, result.failure
    return result.replies


def injected(terms, dtype, kind):
    def body(world):
        tp = world.group(seed=0, dtype=torch.float64, weight_dtype=torch.bfloat16)
        exact = tp.all_reduce(terms[world.rank])
        tp.interceptor = reduction_noise(dtype, kind, seed=1)
        return tp.all_reduce(terms[world.rank]) - exact

    return on_ranks(body, len(terms), kind)


def measured(terms, dtype, kind):
    narrow = getattr(torch, dtype)
    exact = sum(terms)
    got = reduce_sum([x.to(narrow) for x in terms], kind)
    return got.double() - exact, exact.to(narrow).double() - exact


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("kind", LOW_PRECISION)
@pytest.mark.parametrize(
    "partials", [independent, coherent, cancelling, outlier_channels, one_large_rank]
)
def test_the_injected_error_is_that_of_the_wire(partials, kind, size, dtype):
    terms = partials(size)
    error, at_1 = measured(terms, dtype, kind)
    response = injected(terms, dtype, kind)[0]
    parts = [slice(None)]
    if partials is outlier_channels:
        parts += [OUTLIERS, slice(0, 7)]  # the rest is as well foretold as what outweighs it
    for part in parts:
        predicted = math.hypot(rms(at_1[:, part]), rms(response[:, part]))
        assert predicted == pytest.approx(rms(error[:, part]), rel=0.15)


def test_every_rank_gets_the_same_injected_error():
    first, *others = injected(independent(4), "bfloat16", "int4_wire")
    assert rms(first) > 0.1
    assert all(torch.equal(first, other) for other in others)


def law(terms, kind):
    """q^2/12 for every rounding: the mean over elements, from nothing but block maxima."""
    world, count = len(terms), terms[0].numel()
    if kind == "fp8_wire":
        # between 2^e and 2^(e+1) the step is 2^(e-3): 0.424 x 2^-4 of the value, as for any float
        energy = sum(rms(x) ** 2 for x in terms) + rms(sum(terms)) ** 2
        halves = rms(sum(terms[:4])) ** 2 + rms(sum(terms[4:])) ** 2 if world == 8 else 0
        return (energy + halves) * (0.424 * 2**-4) ** 2
    blocks = [x.reshape(-1, 32, 2).abs().amax(1) for x in [*terms, sum(terms)]]
    assert blocks[0].numel() == count // 32
    return sum(float((x / LEVELS[kind]).square().mean()) for x in blocks) / 12


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("partials", [independent, coherent])
def test_the_wires_error_is_that_of_uniform_roundings_where_values_spread(partials, kind, size):
    terms = partials(size)
    assert rms(wire_error(terms, kind)) == pytest.approx(math.sqrt(law(terms, kind)), rel=0.15)


# What drift makes of it.


@tpcheck.subject(spec=SPEC, seq_len=8)
def clean(tp):
    return build_decoder(SPEC, tp)


def scaled(scale):
    """Return a decoder whose MLP partials are far larger, or smaller, where they are summed."""

    @tpcheck.subject(spec=SPEC, seq_len=8)
    def build(tp):
        decoder = build_decoder(SPEC, tp)
        for layer in decoder.layers:
            reduce_with(layer.mlp.down_proj, lambda y: tp.all_reduce(y * scale) / scale)
        return decoder

    return build


def drift_of(build, size, actual, declared, dtype="bfloat16"):
    """Judge ranks that reduce in one way as if they had declared another."""
    ref = make_ref(build)
    subject = resolve(ref)
    settings = Settings(tp_sizes=(size,), reduction=declared, locate=False)
    ranks = SimulatedRanks(actual)
    found = Investigation(ranks, ref, subject, Case(3, 2, 8), dtype, settings).findings(size)
    assert found.checks["structural"].outcome == "PASS", "a float64 run sends float64"
    return found.checks["drift"]


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("kind", LOW_PRECISION)
def test_a_clean_model_on_the_wire_it_declares_raises_no_alarm(kind, size):
    for dtype in ("bfloat16", "float16"):
        drift = drift_of(clean, size, kind, kind, dtype)
        assert drift.outcome == "PASS", drift.reason
        # whole models: what the law predicts is met from both sides wherever it was needed
        if drift.facts["ratio"] > 3:
            assert drift.facts["ratio"] / drift.facts["expected"] == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize(
    ("declared", "actual"),
    [
        ("ring", "fp8_wire"),
        ("wide", "int4_wire"),
        ("fp16_wire", "int6_wire"),
        ("int8_wire", "int6_wire"),
        ("int8_wire", "fp8_wire"),
        ("int6_wire", "int4_wire"),
        ("fp8_wire", "int4_wire"),
    ],
)
def test_a_coarser_wire_than_the_one_declared_is_drift(declared, actual, size):
    drift = drift_of(clean, size, actual, declared)
    assert drift.outcome == "FAIL"
    assert "x that of TP=1, but should be at most" in drift.reason


@pytest.mark.parametrize("size", [2, 8])
def test_saturation_is_drift_even_on_the_wire_that_was_declared(size):
    high = drift_of(scaled(2.0**21), size, "fp16_wire", "fp16_wire")
    assert high.outcome == "FAIL"
    assert "not finite in bfloat16 but are in float64" in high.reason
    assert "overflow" in high.reason
    small = drift_of(scaled(2.0**-9), size, "int8_wire", "int8_wire")
    assert small.outcome == "FAIL"
    assert small.facts["ratio"] > 2 * small.facts["limit"]
    for scale in (2.0**21, 2.0**-9):
        assert drift_of(scaled(scale), size, "ring", "ring").outcome == "PASS"
        assert drift_of(scaled(scale), size, "fp8_wire", "fp8_wire").outcome == "PASS"


def test_the_faults_on_the_wire_are_caught_by_drift_alone_at_every_degree():
    names = ["float8_wire", "int4_wire", "float16_wire_overflow", "small_blocks_shrink"]
    for result in selfcheck((2, 4, 8), faults=names, casts=False).results:
        assert set(result.caught_by) - {"allclose"} == {"drift"}
        assert (result.missed, result.cases_needed) == ((), 1)


def test_run_takes_the_kind_and_says_so():
    report = tpcheck.run(clean, (4,), backend="sim", reduction="int4_wire")
    (verdict,) = report.verdicts
    assert verdict.outcome == "PASS"
    assert verdict.checks["drift"].facts["ratio"] > 10
    assert "reduction int4_wire, emulated" in report.path.differences
    assert verdict.repro.endswith("backend='sim', reduction='int4_wire')")
