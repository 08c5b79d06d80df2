"""A forward under Lift: below float64 nothing rounds, what is shared or written stays as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tpcheck.groups.base import Recorder
from tpcheck.observation.dispatch import Watch
from tpcheck.observation.lifting import Lift, Unliftable

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
X = torch.randn(4, 16, generator=generator, dtype=torch.float64)
W = torch.randn(16, 8, generator=generator, dtype=torch.float64)
NARROW_W = W.bfloat16()


def lifted(forward, *, codes=()):
    with Lift(Recorder(), torch.float64, codes=codes):
        return forward()


def into_a_new_buffer() -> torch.Tensor:
    buffer = torch.zeros(4, 8, dtype=torch.float16)
    buffer[:, :3] = (X @ W)[:, :3]
    torch.narrow(buffer, 1, 3, 5).copy_((X @ W)[:, 3:])
    return buffer


@pytest.mark.parametrize(
    "forward",
    [
        lambda: X.bfloat16() @ W.bfloat16(),
        lambda: X.half().mm(W.half()).bfloat16(),
        lambda: F.linear(X.to(torch.bfloat16), W.T.bfloat16()),
        lambda: torch.cat([X.bfloat16(), X.bfloat16()]).chunk(2)[1] @ W.bfloat16(),
        lambda: torch.einsum("bi,io->bo", X.bfloat16(), W.bfloat16()),
        into_a_new_buffer,
    ],
)
def test_what_is_computed_below_float32_is_computed_in_float64(forward):
    got = lifted(forward)
    assert got.dtype == torch.float64
    assert torch.allclose(got, X @ W, rtol=1e-13, atol=1e-13)
    assert not torch.allclose(forward().double(), X @ W, rtol=1e-5, atol=1e-5)


def sent_in_integers() -> torch.Tensor:
    scale = X.abs().amax(-1, keepdim=True) / 127
    codes = (X / scale).round().clamp(-127, 127).to(torch.int8)
    return (torch.stack([codes, codes]).to(torch.int32)[1].to(X.dtype) * scale) @ W


def sent_as_bytes() -> torch.Tensor:
    scale = X.abs().amax(-1, keepdim=True) / 448
    codes = (X / scale).to(torch.float8_e4m3fn).view(torch.uint8)
    return (torch.cat([codes, codes])[4:].view(torch.float8_e4m3fn).to(X.dtype) * scale) @ W


@pytest.mark.parametrize(("forward", "codes"), [(sent_in_integers, {0, 1}), (sent_as_bytes, {0})])
def test_what_is_quantized_to_be_sent_is_what_it_was(forward, codes):
    got = lifted(forward, codes=codes)
    assert torch.allclose(got, X @ W, rtol=1e-13, atol=1e-13)
    assert not torch.allclose(forward(), X @ W, rtol=1e-5, atol=1e-5)


def test_the_quantizers_that_are_lifted_are_those_of_their_places():
    def both():
        kept = torch.zeros_like(X, dtype=torch.float8_e4m3fn).copy_(X)  # two places
        return kept.double() + (X * 3).round(), (X * 5).round()

    first, second = lifted(both, codes={3})
    assert torch.equal(first, both()[0])
    assert torch.equal(second, X * 5)


def test_a_quantizer_stays_where_casts_alone_are_lifted():
    assert torch.equal(lifted(sent_in_integers), sent_in_integers())
    fp8 = lifted(lambda: X.to(torch.float8_e4m3fn).bfloat16())
    assert torch.equal(fp8, X.to(torch.float8_e4m3fn).double())


def test_codes_that_are_written_to_a_buffer_are_refused():
    buffer = torch.zeros(4, 16, dtype=torch.int8)
    with pytest.raises(Unliftable, match="writes codes to a buffer"):
        lifted(lambda: buffer.copy_((X * 3).round()), codes={0, 1})


def test_weights_that_are_narrow_already_are_what_they_are():
    got = lifted(lambda: X.bfloat16() @ NARROW_W)
    assert torch.allclose(got, X @ NARROW_W.double(), rtol=1e-13, atol=1e-13)


def test_attention_in_a_narrow_dtype_is_that_of_float64():
    q, k, v = (X.reshape(1, 2, 8, 4) * scale for scale in (1.0, 0.5, 2.0))

    def attention():
        return F.scaled_dot_product_attention(q.half(), k.half(), v.half(), is_causal=True)

    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(lifted(attention), exact, rtol=1e-13, atol=1e-13)


def test_float32_is_lifted_as_any_narrower_dtype():
    got = lifted(lambda: torch.softmax(X.bfloat16(), -1, dtype=torch.float32))
    assert torch.allclose(got, X.softmax(-1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "write",
    [
        lambda cache, x: cache.copy_(x),
        lambda cache, x: cache.__setitem__((slice(None), slice(2, 4)), x[:, 2:4]),
        lambda cache, x: cache.index_copy_(0, torch.arange(4), x.to(cache.dtype)),
        lambda cache, x: cache.__setitem__(torch.tensor([0, 2]), x[:2].to(cache.dtype)),
        lambda cache, x: torch.mul(x.to(cache.dtype), 2, out=cache),
        lambda cache, x: cache.add_(x.to(cache.dtype)),
    ],
)
def test_what_was_made_narrow_before_is_written_in_place_as_ever(write):
    here, there = (torch.ones(4, 16, dtype=torch.bfloat16) for _ in range(2))
    write(there, X)
    watch = Watch(Recorder())
    with watch, Lift(Recorder(), torch.float64):
        write(here, X)
    assert here.dtype == torch.bfloat16
    assert torch.equal(here, there)
    assert [(cast.source, cast.target) for cast in watch.casts] == [("float64", "bfloat16")]


@pytest.mark.parametrize(
    "forward",
    [
        lambda: X.bfloat16().view(torch.int16),
        lambda: torch.ops.tpcheck_test.twice(X.bfloat16()),
    ],
)
def test_what_may_read_the_bits_of_an_operand_is_refused(forward):
    with torch.library._scoped_library("tpcheck_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CPU")
        with pytest.raises(Unliftable, match="cannot be computed in"):
            lifted(forward)


def test_what_a_collective_does_inside_is_its_own_affair():
    recorder = Recorder()
    with Lift(recorder, torch.float64):
        recorder.enter("all_reduce", (16,), "bfloat16", "sum")
        assert X.bfloat16().dtype == torch.bfloat16
        recorder.exit()
        assert X.bfloat16().dtype == torch.float64
