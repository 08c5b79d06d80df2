"""Subjects that once got a wrong verdict, and uses that once ended in a traceback.

Each test is the smallest form of one finding. Simulated ranks, because none of them depends on what
carries the bytes.
"""

from __future__ import annotations

import functools
import re
import threading

import pytest
import torch
import torch.nn.functional as F

import tpcheck
from tpcheck.faults import FAULTS
from tpcheck.faults.planting import planted_decoder
from tpcheck.inputs import make_inputs, token_ids
from tpcheck.records import Verdict
from tpcheck.reference.decoder import build_decoder
from tpcheck.spec import Case, ModelSpec, RopeScaling
from tpcheck.subjects import make_ref, resolve

VOCAB, HIDDEN, FFN = 96, 32, 64
subject = tpcheck.subject(vocab_size=VOCAB, seq_len=11)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def verdicts(build, tp_sizes=(2, 4), dtypes=("bfloat16",), **options) -> list[Verdict]:
    report = tpcheck.run(build, tp_sizes, dtypes=dtypes, backend="sim", confirm=False, **options)
    assert len(report.verdicts) > 0
    return list(report.verdicts)


def outcomes(build, *args, **options) -> set[str]:
    return {verdict.outcome for verdict in verdicts(build, *args, **options)}


class Weights:
    def __init__(self, tp):
        self.tp = tp
        self.embed = tp.weight("embed", VOCAB, HIDDEN, std=1.0)
        self.up = tp.weight("up", FFN, HIDDEN).chunk(tp.size)[tp.rank]
        self.down = tp.weight("down", HIDDEN, FFN).chunk(tp.size, 1)[tp.rank]
        self.full_head = tp.weight("head", VOCAB, HIDDEN)
        self.head = self.full_head.chunk(tp.size)[tp.rank]

    def partial(self, x):
        return F.silu(x @ self.up.T) @ self.down.T

    def hidden(self, ids):
        x = self.embed[ids]
        return x + self.tp.all_reduce(self.partial(x))


def norm(x):
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


# Clean code that was an ERROR, a crash or DRIFT.


def test_a_maximum_over_a_sharded_vocabulary_is_not_pinned_to_the_whole_ones():
    def build(tp):
        w = Weights(tp)

        def forward(ids):
            logits = (w.hidden(ids) @ w.head.T).float()
            top = tp.all_reduce(logits.max(-1, keepdim=True).values, op="max")
            total = tp.all_reduce((logits - top).exp().sum(-1, keepdim=True))
            return tp.all_gather(logits - top - total.log(), -1)

        return forward

    assert outcomes(subject(build), dtypes=("bfloat16", "float32")) == {"PASS"}


def tokens(tp, off_by=0):
    w = Weights(tp)

    def forward(ids):
        value, index = (w.hidden(ids) @ w.head.T).max(-1)
        index = index + tp.rank * w.head.shape[0]
        values, indices = (tp.all_gather(x.unsqueeze(-1), -1) for x in (value, index))
        chosen = indices.gather(-1, values.argmax(-1, keepdim=True)).squeeze(-1)
        chosen[-1, -1] = (chosen[-1, -1] + off_by * (tp.size > 1)) % VOCAB
        return chosen

    return forward


def test_integer_outputs_are_judged_by_structure_and_never_by_drift():
    for verdict in verdicts(subject(lambda tp: tokens(tp))):
        assert verdict.outcome == "PASS"
        assert verdict.checks["drift"].outcome == "SKIPPED"
        assert "int64" in verdict.checks["drift"].reason
    assert outcomes(subject(lambda tp: tokens(tp, off_by=1))) == {"WRONG"}


def test_tokens_routed_by_the_rank_that_holds_them_are_pinned_piece_by_piece():
    def build(tp):
        w = Weights(tp)
        router = tp.weight("router", 4, HIDDEN)

        def forward(ids):
            x = w.embed[ids]
            length = x.shape[1]
            x = F.pad(x, (0, 0, 0, -length % tp.size)).chunk(tp.size, 1)[tp.rank]
            for _ in range(4):
                h = norm(x)
                p, chosen = (h @ router.T).float().softmax(-1).topk(1, -1)
                h, p, chosen = (tp.all_gather(t, 1) for t in (h, p, chosen))
                x = x + tp.reduce_scatter(w.partial(h * (1 + chosen)) * p.to(h.dtype), 1)
            return tp.all_gather(x, 1)[:, :length] @ w.full_head.T

        return forward

    assert outcomes(subject(build), (2, 4), ("float16",), cases=2) == {"PASS"}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_code_that_rounds_coarser_than_the_deployed_dtype_at_tp1_too_is_no_drift(dtype):
    def build(tp):
        w = Weights(tp)
        up, down, head = (m.bfloat16() for m in (w.up, w.down, w.full_head))

        def forward(ids):
            x = w.embed[ids].bfloat16()
            x = x + tp.all_reduce(F.silu(norm(x) @ up.T) @ down.T)
            return x @ head.T

        return forward

    assert outcomes(subject(build), (2,), (dtype,)) == {"PASS"}


def test_a_coarser_wire_at_tp_n_alone_is_still_drift():
    def build(tp):
        w = Weights(tp)

        def forward(ids):
            x = w.embed[ids]
            y = w.partial(x)
            if tp.size > 1:
                y = tp.all_reduce(y.bfloat16()).to(x.dtype)
            return (x + y) @ w.full_head.T

        return forward

    assert outcomes(subject(build), (2,), ("float32",)) == {"DRIFT"}


# Bugs that passed.


def test_small_logits_are_not_hidden_by_a_massive_one():
    def build(tp):
        w = Weights(tp)
        scale = torch.ones(VOCAB, dtype=tp.dtype)
        scale[5] = 2.0**20

        def forward(ids):
            logits = norm(w.hidden(ids)) @ w.full_head.T * scale
            if tp.size > 1:
                logits[..., :5] *= 1.001
            return logits

        return forward

    found = verdicts(subject(build))
    assert {verdict.outcome for verdict in found} == {"WRONG"}
    assert "in units of each channel" in found[0].checks["structural"].reason


def test_the_imaginary_half_of_an_output_is_compared():
    def build(tp):
        w = Weights(tp)

        def forward(ids):
            y = (w.hidden(ids) @ w.full_head.T).double()
            return torch.complex(y, y * tp.size)

        return forward

    assert outcomes(subject(build), (2,)) == {"WRONG"}


@pytest.mark.parametrize("seed", range(3))
def test_a_masked_row_at_the_edge_of_a_vocabulary_shard_is_met(seed):
    def build(tp):
        w = Weights(tp)
        embed = w.embed.chunk(tp.size)[tp.rank]
        rows = embed.shape[0]

        def forward(ids):
            local = ids - tp.rank * rows
            mine = (local >= 0) & (local < (rows - 1 if tp.size > 1 else rows))
            x = tp.all_reduce(embed[local.clamp(0, rows - 1)] * mine.unsqueeze(-1))
            return x @ w.full_head.T

        return forward

    assert outcomes(subject(build), (2,), seed=seed) == {"WRONG"}


def test_what_a_longer_call_left_behind_shows_in_a_shorter_one():
    def build(tp):
        w = Weights(tp)
        positions = tp.weight("positions", 11, HIDDEN)
        cache = {}

        def forward(ids):
            length = ids.shape[1]
            if tp.size > 1 and len(cache.get("p", ())) >= length:
                p = cache["p"][-length:]
            else:
                p = cache["p"] = positions[:length]
            return (w.hidden(ids) + p) @ w.full_head.T

        return forward

    assert outcomes(subject(build)) == {"WRONG"}


@pytest.mark.parametrize("sweep", [True, False])
@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_what_an_earlier_call_left_in_a_buffer_that_takes_turns_shows(buffers, sweep):
    def build(tp):
        w, held, calls = Weights(tp), {}, []

        def forward(ids):
            calls.append(ids)
            slot, x = len(calls) % buffers, w.hidden(ids)
            stale, held[slot] = held.get(slot), x
            if tp.size > 1 and stale is not None and stale.numel() >= x.numel():
                x = stale.flatten()[: x.numel()].view(x.shape)  # read before it was written
            return x @ w.full_head.T

        return forward

    options = {"vocab_size": VOCAB, "seq_len": 11, "sweep": sweep}
    assert outcomes(tpcheck.subject(**options)(build)) == {"WRONG"}


class Exposes:
    def __init__(self, tp, shards):
        self.w = Weights(tp)
        self.shards = shards

    def __call__(self, ids):
        return self.w.hidden(ids) @ self.w.full_head.T


def test_a_tensor_that_no_rank_holds_any_more_is_a_finding():
    def build(tp):
        held = {"z": (tp.weight("z", 8, 3), tpcheck.Replicate())}
        return Exposes(tp, lambda: held if tp.size == 1 else {})

    found = verdicts(subject(build), (2,))
    assert found[0].outcome == "WRONG"
    assert "z: exposed at TP=1, but by no rank" in found[0].checks["tiling"].reason


def test_padding_of_the_unsplit_tensor_is_no_hole():
    def build(tp):
        z = tp.weight("z", 8, 3).chunk(tp.size)[tp.rank]
        rows = z.shape[0]
        placed = tpcheck.Slices([((slice(rows),), (slice(tp.rank * rows, (tp.rank + 1) * rows),))])
        padded = F.pad(z, (0, 0, 0, 3), value=float("nan"))
        return Exposes(tp, lambda: {"z": (padded, placed)})

    assert outcomes(subject(build), (2,)) == {"PASS"}


def test_whole_dims_in_slices_need_no_numbers():
    def build(tp):
        placed = tpcheck.Slices([((slice(None), slice(None)), (slice(None), slice(None)))])
        return Exposes(tp, lambda: {f"only at {tp.size}": (tp.weight("z", 8, 3), placed)})

    assert outcomes(subject(build), (2,)) == {"WRONG"}  # TP=1's name is gone


def test_a_partial_of_zeros_names_its_rank():
    class Row(torch.nn.Module):
        def __init__(self, tp):
            super().__init__()
            self.tp, self.w = tp, Weights(tp)

        def forward(self, x):
            return self.tp.all_reduce(self.w.partial(x) * (self.tp.rank != 1))

    class Model(torch.nn.Module):
        def __init__(self, tp):
            super().__init__()
            self.row = Row(tp)

        def forward(self, ids):
            return self.row(self.row.w.embed[ids]) @ self.row.w.full_head.T

    found = verdicts(subject(lambda tp: Model(tp)), (4,))[0].first_divergence
    assert found is not None
    assert (found.fqn, found.rank) == ("row", 1)
    assert "all zeros" in found.detail


# Misuse that ended in a traceback, or in nothing at all.


@subject
def clean(tp):
    w = Weights(tp)
    return lambda ids: w.hidden(ids) @ w.full_head.T


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tp_sizes": 2}, "tp=2"),
        ({"tp_sizes": "2,4"}, "tp='2,4'"),
        ({"dtypes": ()}, "dtypes=()"),
        ({"dtypes": "bfloat16"}, "dtypes='bfloat16'"),
        ({"cases": 1.5}, "cases=1.5"),
        ({"seed": "a"}, "seed='a'"),
        ({"max_failures": 0}, "max_failures=0"),
        ({"until": "nowhere"}, "until='nowhere'"),
    ],
)
def test_an_unusable_option_is_named(options, named):
    with pytest.raises(tpcheck.TPCheckError, match=re.escape(named)) as raised:
        tpcheck.run(clean, **({"tp_sizes": (2,), "backend": "sim"} | options))
    assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize(
    "entry", [lambda z: (z, "Shard(0)"), lambda z: ([1, 2], tpcheck.Replicate())]
)
def test_a_shard_that_is_none_is_named(entry):
    def build(tp):
        return Exposes(tp, lambda: {"z": entry(tp.weight("z", 8, 3))})

    with pytest.raises(tpcheck.SubjectError, match=r"shards\(\)\['z'\]"):
        verdicts(subject(build), (2,))


def test_other_things_than_specs_are_named():
    with pytest.raises(tpcheck.SubjectError, match="spec=3"):
        tpcheck.subject(spec=3)
    with pytest.raises(tpcheck.SubjectError, match="specs=3"):
        verdicts(tpcheck.subject(vocab_size=8, specs=3)(lambda tp, spec: None), (2,))


def test_what_a_partial_binds_is_named():
    def build(lock, tp):
        return clean(tp)

    partial = subject(functools.partial(build, threading.Lock()))
    with pytest.raises(tpcheck.SubjectError, match=r"partial\(.*'argument 0', a _thread.lock"):
        make_ref(partial)


def test_a_bool_is_no_size():
    with pytest.raises(tpcheck.SubjectError, match="shape=\\(True,\\)"):
        verdicts(subject(lambda tp: tp.weight("z", True)), (2,))


# What inputs have to be, for all of the above.


@pytest.mark.parametrize(
    ("vocab", "batch", "length"), [(1, 2, 1), (2, 2, 5), (99, 2, 13), (7, 3, 1)]
)
def test_token_ids_differ_wherever_they_can(vocab, batch, length):
    ids = token_ids(torch.Generator().manual_seed(0), vocab, batch, length)
    assert ids.shape == (batch, length)
    assert 0 <= int(ids.min()) <= int(ids.max()) < vocab
    if vocab >= batch * length:
        assert len(set(ids.flatten().tolist())) == batch * length
    if vocab >= batch:
        assert len(set(ids[:, 0].tolist())) == batch


def test_inputs_do_not_depend_on_the_degrees_asked_for_and_run_long_to_short():
    case, loaded = Case(0, 2, 11), resolve(make_ref(clean))
    alone, both = make_inputs(loaded, case, (4,)), make_inputs(loaded, case, (2, 4, 8))
    assert all(torch.equal(alone[key][0], both[key][0]) for key in alone)
    assert list(alone) == ["t5", "t4", "t3", "t1", "row5", "row1", "A", "B"]


FEW_ERRORS = ModelSpec(
    vocab_size=9,
    hidden_size=4,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=12,
    head_dim=4,
    norm_type="layer",
    position="learned",
    max_position_embeddings=64,
    attention_bias=True,
)
"""Four channels behind a LayerNorm: the logits' errors are few, and A and B alone gave 3.002."""


def test_an_alarm_that_rests_on_few_errors_is_measured_again():
    @tpcheck.subject(spec=FEW_ERRORS, seq_len=3)
    def build(tp):
        return build_decoder(FEW_ERRORS, tp)

    (verdict,) = verdicts(build, (4,))
    drift = verdict.checks["drift"]
    assert verdict.outcome == "PASS"
    assert 2 < drift.facts["ratio"] < drift.facts["limit"]


def test_what_drifts_still_drifts_on_more_inputs():
    @tpcheck.subject(spec=FEW_ERRORS, seq_len=3)
    def build(tp):
        decoder = build_decoder(FEW_ERRORS, tp)
        if tp.size > 1:
            coarse = lambda y: y if y.dtype == torch.float64 else (y * 8).round() / 8  # noqa: E731
            decoder.layers[0].register_forward_hook(lambda _, __, y: coarse(y))
        return decoder

    (verdict,) = verdicts(build, (4,))
    assert verdict.outcome == "DRIFT"
    assert verdict.checks["structural"].outcome == "PASS"


def test_choices_that_a_fault_flips_are_no_rounding():
    (verdict,) = verdicts("builtin:llama-tiny+router_of_one_rank", (4,))
    drift = verdict.checks["drift"]
    assert drift.outcome == "FAIL"
    assert drift.facts["limit"] < 10


def test_rounding_floating_inputs_is_no_cast_of_the_subject():
    def inputs(generator, batch, seq_len):
        return torch.randn((batch, seq_len, 8), generator=generator)

    @tpcheck.subject(inputs=inputs, seq_len=3)
    def build(tp):
        w = tp.weight("w", 8, 8)
        return lambda x: tp.all_reduce(x @ w.T / tp.size)

    for verdict in verdicts(build):
        structural = verdict.checks["structural"]
        assert structural.outcome == "PASS"
        assert (structural.facts["dtype"], structural.facts["limit"]) == ("float64", 1e-12)


ONE_TOKENS_ERRORS = ModelSpec(
    vocab_size=34,
    hidden_size=4,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=54,
    num_key_value_heads=2,
    head_dim=8,
    norm_type="layer",
    rope_theta=500000.0,
    rope_scaling=RopeScaling("linear", 2.0),
    max_position_embeddings=64,
    attention_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    qk_norm="per_head",
    sliding_window=1,
)
"""A LayerNorm of four channels blows up one token's error: 4.32 whatever inputs stood beside it."""


def test_an_alarm_that_one_token_carries_is_measured_with_other_weights():
    @tpcheck.subject(spec=ONE_TOKENS_ERRORS, seq_len=4)
    def build(tp):
        return build_decoder(ONE_TOKENS_ERRORS, tp)

    (verdict,) = verdicts(build, (6,), dtypes=("float32",), batch=1, seed=1)
    assert verdict.outcome == "PASS"
    assert verdict.checks["drift"].facts["ratio"] < 2.5


TWO_LAYERS_OF_EXPERTS = ModelSpec(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=8,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    shared_expert_intermediate_size=48,
    max_position_embeddings=16,
)


@pytest.mark.parametrize("name", ["", "shared_expert_reduced_twice", "shared_expert_not_reduced"])
def test_choices_that_a_fault_flips_do_not_raise_the_limit_it_is_held_to(name):
    @tpcheck.subject(spec=TWO_LAYERS_OF_EXPERTS, seq_len=16)
    def build(tp):
        decoder = planted_decoder(TWO_LAYERS_OF_EXPERTS, FAULTS[name] if name else None, tp)
        for layer in decoder.layers:  # hard float32 casts, as real norms have
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.register_forward_hook(lambda _, __, y: y.float().to(y.dtype))
        return decoder

    (verdict,) = verdicts(build, (2,))
    structural = verdict.checks["structural"]
    assert structural.facts["limit"] < 1e-4
    assert structural.outcome == ("FAIL" if name else "PASS")


@pytest.mark.parametrize("wrong", [False, True])
def test_outputs_of_eight_bits_are_compared_by_value(wrong):
    @subject
    def build(tp):
        weights = Weights(tp)

        def forward(ids):
            y = tp.all_reduce(weights.partial(weights.embed[ids]))
            return (y * (2 if wrong and tp.size > 1 else 1)).to(torch.float8_e4m3fn)

        return forward

    assert outcomes(build) == {"WRONG" if wrong else "PASS"}


def all_in_float32(tp, narrow=False):
    """An engine that computes in float32 whatever the dtype: its float64 run rounds as well."""
    weights = Weights(tp)

    def forward(ids):
        x = weights.embed[ids].float()
        y = F.silu(x @ weights.up.float().T) @ weights.down.float().T
        y = y.bfloat16() if narrow and tp.size > 1 else y
        return ((x + tp.all_reduce(y)) @ weights.full_head.float().T).to(tp.dtype)

    return forward


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_what_tp_1_rounds_in_its_float64_run_too_is_its_own_error(seed, narrow):
    build = subject(functools.partial(all_in_float32, narrow=narrow))
    found = outcomes(build, (2, 8), dtypes=("float32",), seed=seed)
    assert found == {"DRIFT" if narrow else "PASS"}


def test_no_drift_is_held_to_another_models_error():
    @subject
    def build(tp):
        generator = torch.Generator().manual_seed(1)
        table = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=tp.dtype)
        return lambda ids: table[ids]

    for verdict in verdicts(build, (2,)):
        assert verdict.outcome == "PASS"
        drift = verdict.checks["drift"]
        assert drift.outcome == "SKIPPED"
        assert "in bfloat16 it is not the model that it is in float64" in drift.reason


def two_rows_only(tp, wrong=False):
    weights = Weights(tp)
    cache = torch.zeros(2, 11, HIDDEN, dtype=tp.dtype)

    def forward(ids):
        x = weights.embed[ids]
        cache[:, : ids.shape[1]].copy_(x.view(2, -1, HIDDEN))
        if wrong and tp.size > 1 and ids.shape[1] == 1:
            raise ValueError("one token")
        return x + tp.all_reduce(weights.partial(cache[:, : ids.shape[1]]))

    return forward


@pytest.mark.parametrize("float64", [True, False])
def test_a_subject_made_for_two_rows_runs_without_one(float64):
    build = tpcheck.subject(vocab_size=VOCAB, seq_len=11, float64=float64)(two_rows_only)
    (verdict,) = verdicts(build, (2,))
    assert verdict.outcome == "PASS", verdict.reasons
    assert "inputs: TP=1 raises for one row; only inputs of 2 rows were run" in verdict.reasons


def test_a_subject_made_for_one_length_runs_with_that():
    @subject
    def build(tp):
        weights = Weights(tp)
        positions = tp.weight("positions", 11, HIDDEN)

        def forward(ids):
            x = weights.embed[ids] + positions
            return (x + tp.all_reduce(weights.partial(x))) @ weights.full_head.T

        return forward

    (verdict,) = verdicts(build, (2,))
    assert verdict.outcome == "PASS", verdict.reasons
    note = "inputs: TP=1 raises for other lengths than 11; only inputs of that were run"
    assert note in verdict.reasons


def test_what_raises_at_one_degree_only_is_an_error():
    build = subject(functools.partial(two_rows_only, wrong=True))
    (verdict,) = verdicts(build, (2,))
    assert verdict.outcome == "ERROR"
    assert "one token" in verdict.reasons[0]


def test_a_users_inputs_may_want_two_rows():
    def inputs(generator, batch, seq_len):
        if batch < 2:
            raise ValueError("batch")
        return torch.randint(VOCAB, (batch, seq_len), generator=generator)

    build = tpcheck.subject(inputs=inputs, vocab_size=VOCAB, seq_len=11)(two_rows_only)
    assert outcomes(build) == {"PASS"}


# Code that takes another way for one token.


@pytest.mark.parametrize(("factor", "outcome"), [(1.0, "PASS"), (1 + 2**-6, "WRONG")])
def test_a_cast_at_one_length_only_is_a_cast(factor, outcome):
    @subject
    def build(tp):
        weights = Weights(tp)

        def forward(ids):
            x = weights.embed[ids]
            if ids.shape[1] == 1:  # as kernels for decoding do
                y = tp.all_reduce(weights.partial(x.bfloat16().to(x.dtype)).float()).to(x.dtype)
                y = y * factor if tp.size > 1 else y
            else:
                y = tp.all_reduce(weights.partial(x))
            return (x + y) @ weights.full_head.T

        return forward

    assert outcomes(build) == {outcome}


# What a build leaves behind.


@functools.cache
def cached_positions() -> torch.nn.Module:
    table = torch.nn.Module()
    angles = torch.outer(torch.arange(16.0), torch.linspace(0.1, 1, HIDDEN))
    table.register_buffer("cos", angles.cos())
    return table


@pytest.mark.parametrize("factor", [1.0, 1.002])
def test_a_module_that_outlives_its_build_is_named_as_that(factor):
    cached_positions.cache_clear()

    @subject
    def build(tp):
        weights = Weights(tp)
        table = cached_positions().to(tp.dtype)  # rounded for every build that follows

        def forward(ids):
            x = weights.embed[ids] * table.cos[: ids.shape[1]].to(tp.dtype)
            y = tp.all_reduce(weights.partial(x.float().to(x.dtype)))
            return (x + y * (factor if tp.size > 1 else 1)) @ weights.full_head.T

        return forward

    for found in verdicts(build):
        assert found.outcome == "WRONG"
        assert any("build(tp) leaves state behind" in reason for reason in found.reasons)
