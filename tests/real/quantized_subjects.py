"""Quantized layers the way people write them: casts to fp8 and int8 in the forward, scales as they
come. Not made of the reference decoder."""

import torch
from torch.nn import functional

import tpcheck

VOCAB, WIDTH, FEATURES = 64, 32, 64
ENDS = {"fp8": 448, "int8": 127}


def subject(kind, *, wire="", bug=""):
    """Two MLPs with quantized weights and inputs.

    Args:
        kind: "fp8" or "int8".
        wire: "" reduces in the compute dtype, "float32" in hard float32, "fp8" sends e4m3.
        bug: "own_weight_scale" or "own_input_scale": a rank's maximum in place of all ranks'.
    """

    def build(tp):
        embedding, head = tp.weight("embedding", VOCAB, WIDTH), tp.weight("head", VOCAB, WIDTH)
        up, down = tp.weight("up", FEATURES, WIDTH), tp.weight("down", WIDTH, FEATURES)
        if bug == "own_weight_scale":
            up_fD = as_stored(kind, up.chunk(tp.size)[tp.rank])
            down_Df = as_stored(kind, down.chunk(tp.size, 1)[tp.rank])
        else:
            up_fD = as_stored(kind, up).chunk(tp.size)[tp.rank]
            down_Df = as_stored(kind, down).chunk(tp.size, 1)[tp.rank]

        def forward(ids):
            x = embedding[ids]
            for _ in range(2):
                wide = x.float()
                normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
                inner = functional.silu(
                    functional.linear(on_codes(kind, normed.to(x.dtype)), up_fD)
                )
                largest = inner.abs().amax(-1, keepdim=True)
                if bug != "own_input_scale":
                    largest = tp.all_reduce(largest, op="max")
                x = x + reduced(tp, functional.linear(on_codes(kind, inner, largest), down_Df))
            return functional.linear(x, head)

        return forward

    def reduced(tp, partial):
        if wire == "float32":
            return tp.all_reduce(partial.float()).to(partial.dtype)
        if wire == "fp8" and tp.size > 1:
            partial = on_codes("fp8", partial)
        return tp.all_reduce(partial)

    return tpcheck.subject(vocab_size=VOCAB, seq_len=8)(build)


def as_stored(kind, weight):
    return on_codes(kind, weight, weight.abs().amax())


def on_codes(kind, x, largest=None):
    largest = x.abs().amax(-1, keepdim=True) if largest is None else largest
    scale = largest.float() / ENDS[kind]
    scaled = x.float() / scale
    codes = scaled.to(torch.float8_e4m3fn) if kind == "fp8" else scaled.round().to(torch.int8)
    return codes.to(x.dtype) * scale.to(x.dtype)
