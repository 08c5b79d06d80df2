"""Packed codes, against the packers of the formats themselves.

compressed-tensors and transformers run here. AutoGPTQ, AutoAWQ, GPTQModel and torchao are no
dependencies: what their packers made of CODES and ZEROS stands below as data.
"""

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tpcheck.numerics.grids import decode, encode, round_to
from tpcheck.reference.packing import (
    AWQ_ORDER,
    CODE_BITS,
    GPTQ_V1_ZERO_OFFSET,
    pack,
    pack_nibbles,
    unpack,
    unpack_nibbles,
)

_K, _N, _G = torch.arange(32)[:, None], torch.arange(32), torch.arange(2)[:, None]
CODES = (7 * _K + 3 * _N + _K * _N // 5) % 16
"""[K, N]: no two of its rows, columns or words are alike by symmetry."""
ZEROS = 1 + (4 * _G + 7 * _N + _N // 4) % 15
"""[G, N]: at least 1, since v1 cannot store 0."""

# Given to the packers as a linear layer of scale 1 and the weight CODES - ZEROS, groups of 16.
# AutoGPTQ 0.7.1 (qlinear_cuda_old.QuantLinear.pack), GPTQModel 7.7.0 (pack_original); both make
# the same qweight, of which these are the first 6 columns.
GPTQ_QWEIGHT = [
    [440163952, 1585414563, -1833712426, -419956727, 708524860, 2139062143],
    [-1833642248, -150394052, 1567518849, -1279998507, 421075498, 2139062143],
    [440163952, -2119977770, 135932732, 1887539618, -134739960, 2139062143],
    [-1833642248, 725376639, -1262102793, 1297968767, -689510665, 2139062143],
]
GPTQ_V1_QZEROS = [
    [1567518320, 994856029, 422193723, -418904039],
    [-1834769484, 1887535506, 1567518320, 994856029],
]
GPTQ_V2_QZEROS = [
    [1853849473, 1281187182, 708524876, -132572886],
    [-1548438331, -2121100637, 1853849473, 1281187182],
]
# AutoAWQ 0.2.9 (WQLinear_GEMM.from_linear), the same from GPTQModel 7.7.0 (pack_awq); of qweight
# the first 8 rows.
AWQ_QWEIGHT = [
    [1603480672, -686054168, 1603480672, -686054168],
    [-687168553, 1889746288, 171824906, -1546162013],
    [1602300750, 440194569, -974683468, 1888701807],
    [-403135547, -1278906223, 1888636254, 1299126571],
    [1870605116, 1566447914, 994899976, 439084775],
    [-134761549, -134761549, -134761549, -134761549],
    [2137930282, -1869657013, -1567527331, -1011642498],
    [-135941487, 974710228, 1833638151, -1870701510],
]
AWQ_QZEROS = [
    [1735978993, 1163316702, 590654396, -250443366],
    [-1413729211, -1986391517, 1735978993, 1163316702],
]
# torchao 0.18.0 (mx_formats.kernels: f32_to_f4_unpacked, then pack_uint4).
FP4_VALUES = [
    [0.2, 0.25, 0.26, -0.75, 1.25, -1.3, 1.75, -2.5],
    [2.51, 3.5, -4.4, 5.0, -5.1, 7.0, -0.0, 0.75],
]
FP4_BYTES = [[0, 161, 178, 196], [101, 110, 127, 40]]


def words(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def draw(*shape: int, bits: int, dtype: torch.dtype = torch.int32) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, shape, generator=generator).to(dtype)


def test_gptq_packs_weights_along_the_input():
    assert torch.equal(pack(CODES, 4, 0)[:, :6], words(GPTQ_QWEIGHT))
    assert torch.equal(unpack(words(GPTQ_QWEIGHT), 4, 0, 32), CODES[:, :6].int())


def test_gptq_packs_zeros_along_the_output_and_v1_stores_one_less():
    assert torch.equal(pack(ZEROS, 4, 1), words(GPTQ_V2_QZEROS))
    assert torch.equal(pack(ZEROS - GPTQ_V1_ZERO_OFFSET, 4, 1), words(GPTQ_V1_QZEROS))
    stored = unpack(words(GPTQ_V1_QZEROS), 4, 1, 32)
    assert torch.equal(stored + GPTQ_V1_ZERO_OFFSET, ZEROS.int())


def test_awq_packs_along_the_output_in_its_order():
    assert torch.equal(pack(CODES, 4, 1, AWQ_ORDER)[:8], words(AWQ_QWEIGHT))
    assert torch.equal(pack(ZEROS, 4, 1, AWQ_ORDER), words(AWQ_QZEROS))
    assert torch.equal(unpack(words(AWQ_QWEIGHT), 4, 1, 32, AWQ_ORDER), CODES[:8].int())
    assert torch.equal(unpack(words(AWQ_QZEROS), 4, -1, 32, AWQ_ORDER), ZEROS.int())


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (8, 32), (13, 45), (64, 3)])
def test_words_are_those_of_compressed_tensors(shape, dim, bits):
    codes = draw(*shape, bits=bits)
    signed = (codes - 2 ** (bits - 1)).to(torch.int8)
    packed = pack_to_int32(signed, bits, packed_dim=dim)
    assert torch.equal(pack(codes, bits, dim), packed)
    assert torch.equal(unpack(packed, bits, dim, shape[dim]), codes)
    back = unpack_from_int32(pack(codes, bits, dim), bits, torch.Size(shape), packed_dim=dim)
    assert torch.equal(back, signed)


def test_words_of_stacked_experts_are_those_of_compressed_tensors():
    codes = draw(3, 5, 19, bits=4)
    packed = pack_to_int32((codes - 8).to(torch.int8), 4)
    assert torch.equal(pack(codes, 4, 2), packed)
    assert torch.equal(unpack(packed, 4, -1, 19), codes)


def test_bytes_of_fp4_are_those_of_compressed_tensors():
    codes = draw(6, 32, bits=4, dtype=torch.uint8)
    values = decode(codes, "float4_e2m1", torch.bfloat16)
    packed = pack_fp4_to_uint8(values)
    assert torch.equal(pack_nibbles(codes), packed)
    assert torch.equal(pack_nibbles(encode(values, "float4_e2m1")), packed)
    back = unpack_fp4_from_uint8(pack_nibbles(codes), 6, 32)
    assert torch.equal(back.signbit(), values.signbit())
    assert torch.equal(back, values)


def test_bytes_of_fp4_are_those_of_torchao():
    codes = encode(round_to(torch.tensor(FP4_VALUES), "float4_e2m1"), "float4_e2m1")
    assert pack_nibbles(codes).tolist() == FP4_BYTES
    assert torch.equal(unpack_nibbles(torch.tensor(FP4_BYTES, dtype=torch.uint8)), codes)


def test_blocks_of_gpt_oss_mean_what_transformers_reads():
    blocks_ENGB = draw(2, 3, 4, 16, bits=8, dtype=torch.uint8)
    scales_ENG = draw(2, 3, 4, bits=5, dtype=torch.uint8) + 112
    values = decode(unpack_nibbles(blocks_ENGB), "float4_e2m1", torch.float32)
    scaled = values * decode(scales_ENG, "e8m0", torch.float32).unsqueeze(-1)
    expected_EKN = convert_moe_packed_tensors(blocks_ENGB, scales_ENG, dtype=torch.float32)
    assert torch.equal(scaled.flatten(-2).transpose(1, 2), expected_EKN)


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 33, 64])
def test_place_i_of_a_word_holds_the_ordered_code_i_and_the_rest_is_zero(size, dim, bits):
    per_word = 32 // bits
    generator = torch.Generator().manual_seed(size)
    order = tuple(torch.randperm(per_word, generator=generator).tolist())
    codes = draw(size, 3, bits=bits, dtype=torch.uint8).movedim(0, dim).contiguous()
    packed = pack(codes, bits, dim, order)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    for i, row in enumerate(packed.movedim(dim, 0).tolist()):
        for word, column in zip(row, codes.movedim(dim, 0).T.tolist(), strict=True):
            own = [*column[i * per_word : (i + 1) * per_word], *[0] * per_word][:per_word]
            assert [word >> bits * k & (2**bits - 1) for k in range(per_word)] == [
                own[k] for k in order
            ]
    assert torch.equal(unpack(packed, bits, dim, size, order), codes.int())


def test_packing_leaves_its_input_alone():
    codes = draw(5, 6, bits=4)
    before = codes.clone()
    unpack(pack(codes, 4, 0), 4, 0, 5).zero_()
    unpack_nibbles(pack_nibbles(codes)).zero_()
    assert torch.equal(codes, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: pack(x, 3, 0), "bits=3, but should be one of 1, 2, 4, 8"),
        (lambda x: pack(x, 4, 0, (0, 1)), r"order=\(0, 1\), but should hold 0..7 once each"),
        (lambda x: pack(x, 8, 0, AWQ_ORDER), r"but should hold 0..3 once each \[bits=8\]"),
        (lambda x: pack(x + 16, 4, 0), r"code=16, but should be in 0..15 \[bits=4\]"),
        (lambda x: pack(x - 1, 4, 0), "code=-1, but should be in 0..15"),
        (lambda x: pack(x.float(), 4, 0), "codes.dtype=torch.float32, but should be of integers"),
        (lambda x: unpack(x.long(), 4, 0, 8), "words.dtype=torch.int64, but should be torch.int32"),
        (lambda x: unpack(x, 4, 0, 16), r"words.shape\[0\]=1, but should be 2 \[16 codes of 4"),
        (lambda x: unpack(x, 4, 1, 16), r"words.shape\[1\]=3, but should be 2"),
        (lambda x: pack_nibbles(x), r"codes.shape\[-1\]=3, but should be even"),
        (lambda x: pack_nibbles(x + 16), "code=16, but should be in 0..15"),
        (lambda x: unpack_nibbles(x), "dtype=torch.int32, but should be torch.uint8"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 3, dtype=torch.int32))
