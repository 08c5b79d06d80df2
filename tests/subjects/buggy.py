"""Buggy twins: one bug each, of a kind that was really shipped, and what tpcheck has to say.

EXPECTED maps a subject to (outcome, check that fails, smallest degree that shows it). Every one of
them is right at TP=1. A comment says why that check, where it is not plain.
"""

import torch
import torch.nn.functional as F

import tpcheck

VOCAB, HIDDEN, FFN, LENGTH = 96, 32, 64, 13

EXPECTED = {
    "missing_all_reduce": ("WRONG", "structural", 2),
    "bias_on_every_rank": ("WRONG", "structural", 2),
    "average_for_sum": ("WRONG", "structural", 2),
    "fused_gate_up_split_whole": ("WRONG", "structural", 2),
    "ranks_in_reverse_order": ("WRONG", "structural", 2),
    "kv_head_off_by_one": ("WRONG", "structural", 2),
    "heads_cut_in_two": ("WRONG", "structural", 4),
    "first_of_the_batch": ("WRONG", "structural", 2),
    "last_column_dropped": ("WRONG", "structural", 2),
    "padded_vocab_in_softmax": ("WRONG", "structural", 2),
    "remainder_tokens_dropped": ("WRONG", "structural", 2),
    "remainder_of_all_tokens_dropped": ("WRONG", "structural", 2),
    "one_token_taken_for_a_share": ("WRONG", "structural", 2),
    "first_row_of_a_padded_shard_masked": ("WRONG", "structural", 2),
    "other_norm_eps": ("WRONG", "structural", 2),
    "stale_buffer": ("WRONG", "repeatability", 2),
    "dropout_left_on": ("WRONG", "rank_agreement", 2),
    "logits_differ_per_rank": ("WRONG", "rank_agreement", 2),
    "decode_position_off_by_one": ("WRONG", "decode", 2),
    "extra_collective_on_one_rank": ("ERROR", "schedule", 2),
    "one_rank_raises": ("ERROR", "schedule", 2),
    "four_bit_all_reduce": ("DRIFT", "drift", 2),
    "overflow_in_the_sum": ("DRIFT", "drift", 2),  # with --dtype float16 only
}


class Weights:
    """A one-block model's weights: `gate`, `up` and `down` are this rank's slices."""

    def __init__(self, tp):
        if FFN % tp.size:
            raise tpcheck.IllegalDegreeError(f"intermediate_size={FFN}, tp_size={tp.size}")
        self.embed = tp.weight("embed_tokens.weight", VOCAB, HIDDEN, std=1.0)
        self.gate = tp.weight("gate_proj.weight", FFN, HIDDEN).chunk(tp.size)[tp.rank]
        self.up = tp.weight("up_proj.weight", FFN, HIDDEN).chunk(tp.size)[tp.rank]
        self.down = tp.weight("down_proj.weight", HIDDEN, FFN).chunk(tp.size, 1)[tp.rank]
        self.down_bias = tp.weight("down_proj.bias", HIDDEN)
        self.head = tp.weight("lm_head.weight", VOCAB, HIDDEN)

    def partial(self, x):
        """This rank's term of the MLP's output, without the bias."""
        return (F.silu(x @ self.gate.T) * (x @ self.up.T)) @ self.down.T

    def model(self, mlp):
        """A forward around `mlp(x) -> y`."""

        def forward(input_ids):
            x = self.embed[input_ids]
            return (x + mlp(x)) @ self.head.T

        return forward


subject = tpcheck.subject(vocab_size=VOCAB, seq_len=LENGTH)


# WRONG by structural. Ranks disagree as well, so rank_agreement fails with it.
@subject
def missing_all_reduce(tp):
    w = Weights(tp)
    return w.model(w.partial)


# WRONG by structural: the sum holds tp_size biases. Invisible with zero biases.
@subject
def bias_on_every_rank(tp):
    w = Weights(tp)
    return w.model(lambda x: tp.all_reduce(w.partial(x) + w.down_bias))


# WRONG by structural.
@subject
def average_for_sum(tp):
    w = Weights(tp)
    return w.model(lambda x: tp.all_reduce(w.partial(x), op="avg"))


# WRONG by structural: a fused [gate; up] weight is cut as one, so rank 0 holds gate rows only.
@subject
def fused_gate_up_split_whole(tp):
    w = Weights(tp)
    full = [tp.weight(f"{name}_proj.weight", FFN, HIDDEN) for name in ("gate", "up")]
    fused = torch.cat(full).chunk(tp.size)[tp.rank]

    def mlp(x):
        gate, up = (x @ fused.T).chunk(2, -1)
        return tp.all_reduce((F.silu(gate) * up) @ w.down.T)

    return w.model(mlp)


# WRONG by structural: up and down are cut in opposite rank orders.
@subject
def ranks_in_reverse_order(tp):
    w = Weights(tp)
    w.down = tp.weight("down_proj.weight", HIDDEN, FFN).chunk(tp.size, 1)[tp.size - 1 - tp.rank]
    return w.model(lambda x: tp.all_reduce(w.partial(x)))


def _attention(tp, heads, head_dim, kv_of_head):
    """Causal attention with 4 KV heads; `kv_of_head(global head) -> KV head`; heads per rank."""
    kv_heads, width = 4, heads * head_dim
    w = Weights(tp)
    q, o = tp.weight("q_proj.weight", width, HIDDEN), tp.weight("o_proj.weight", HIDDEN, width)
    k = tp.weight("k_proj.weight", kv_heads * head_dim, HIDDEN).view(kv_heads, head_dim, HIDDEN)
    v = tp.weight("v_proj.weight", kv_heads * head_dim, HIDDEN).view(kv_heads, head_dim, HIDDEN)
    mine = range(tp.rank * heads // tp.size, (tp.rank + 1) * heads // tp.size)
    chosen = [kv_of_head(head) for head in mine]
    q, o = q.chunk(tp.size)[tp.rank], o.chunk(tp.size, 1)[tp.rank]

    def attention(x):
        query = (x @ q.T).unflatten(-1, (len(mine), head_dim)).transpose(1, 2)
        key = torch.einsum("btd,hed->bhte", x, k[chosen])
        value = torch.einsum("btd,hed->bhte", x, v[chosen])
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return tp.all_reduce(y.transpose(1, 2).flatten(2) @ o.T)

    return w.model(attention)


# WRONG by structural: from rank 1 on, query heads read their neighbour's KV head.
@subject
def kv_head_off_by_one(tp):
    if 8 % tp.size:
        raise tpcheck.IllegalDegreeError(f"num_attention_heads=8, tp_size={tp.size}")
    shift = 1 if tp.rank else 0
    return _attention(tp, 8, 8, lambda head: (head // 2 + shift) % 4)


# WRONG by structural at 4: 6 heads of 8 become 4 heads of 12. Right at 2 and 3.
@subject
def heads_cut_in_two(tp):
    heads, head_dim = 6, 8
    width = heads * head_dim
    if width % tp.size or heads < tp.size:
        raise tpcheck.IllegalDegreeError(f"num_attention_heads={heads}, tp_size={tp.size}")
    w = Weights(tp)
    q, k, v = (
        tp.weight(f"{name}_proj.weight", width, HIDDEN).chunk(tp.size)[tp.rank] for name in "qkv"
    )
    o = tp.weight("o_proj.weight", HIDDEN, width).chunk(tp.size, 1)[tp.rank]

    def attention(x):
        query, key, value = (
            (x @ weight.T).unflatten(-1, (heads // tp.size, -1)).transpose(1, 2)
            for weight in (q, k, v)
        )
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return tp.all_reduce(y.transpose(1, 2).flatten(2) @ o.T)

    return w.model(attention)


# WRONG by structural: a hook returns output[0]; every row of the batch gets the first one's.
@subject
def first_of_the_batch(tp):
    w = Weights(tp)

    def mlp(x):
        y = w.partial(x)
        return tp.all_reduce(y[0]).expand_as(y) if tp.size > 1 else y

    return w.model(mlp)


# WRONG by structural: the last rank's slice is one column short, as after a wrong round-down.
@subject
def last_column_dropped(tp):
    w = Weights(tp)
    if tp.size > 1 and tp.rank == tp.size - 1:
        w.down = torch.cat([w.down[:, :-1], torch.zeros_like(w.down[:, :1])], 1)
    return w.model(lambda x: tp.all_reduce(w.partial(x)))


# WRONG by structural: the pad rows' zero logits take part in the softmax, then are cut off.
@subject
def padded_vocab_in_softmax(tp):
    w = Weights(tp)
    vocab = VOCAB - 1
    pad = -vocab % tp.size
    head = F.pad(w.head[:vocab], (0, 0, 0, pad)).chunk(tp.size)[tp.rank]

    def forward(input_ids):
        x = w.embed[input_ids]
        x = x + tp.all_reduce(w.partial(x))
        logits = tp.all_gather(x @ head.T, -1)
        return logits.log_softmax(-1)[..., :vocab]

    return forward


# WRONG by structural, at lengths that do not divide only: tokens are split without a pad.
@subject
def remainder_tokens_dropped(tp):
    w = Weights(tp)

    def mlp(x):
        each = x.shape[1] // tp.size
        if each == 0:
            return tp.all_reduce(w.partial(x))
        y = tp.all_gather(tp.reduce_scatter(w.partial(x)[:, : each * tp.size], 1), 1)
        return F.pad(y, (0, 0, 0, x.shape[1] - each * tp.size))

    return w.model(mlp)


# WRONG by structural, at an odd number of tokens in all rows together only: rows lie one behind the
# other, as engines have them, and two rows are even.
@subject
def remainder_of_all_tokens_dropped(tp):
    w = Weights(tp)

    def mlp(x):
        tokens = x.flatten(0, 1)
        each = len(tokens) // tp.size
        if each == 0:
            return tp.all_reduce(w.partial(x))
        mine = tp.reduce_scatter(w.partial(tokens)[: each * tp.size], 0)
        y = F.pad(tp.all_gather(mine, 0), (0, 0, 0, len(tokens) - each * tp.size))
        return y.view_as(x)

    return w.model(mlp)


# WRONG by structural, with one token in one row only: fewer tokens than ranks look dealt out.
@subject
def one_token_taken_for_a_share(tp):
    w = Weights(tp)

    def mlp(x):
        y = tp.all_reduce(w.partial(x))
        return y / tp.size if x.shape[:-1].numel() == 1 else y

    return w.model(mlp)


# WRONG by structural, at one token in 5003: the vocabulary is padded to a multiple of 64, so shards
# end elsewhere than at 5003 / tp, and > stands for >=.
@tpcheck.subject(vocab_size=5003, seq_len=16)
def first_row_of_a_padded_shard_masked(tp):
    w = Weights(tp)
    rows = -(-5003 // 64) * 64 // tp.size
    first = tp.rank * rows
    table = F.pad(tp.weight("table.weight", 5003, HIDDEN), (0, 0, 0, rows * tp.size - 5003))
    mine = table[first : first + rows]

    def forward(input_ids):
        local = input_ids - first
        elsewhere = (local < 0) | (local >= rows) | (local == 0) & (first > 0)
        x = mine[local.masked_fill(elsewhere, 0)].masked_fill(elsewhere[..., None], 0)
        x = tp.all_reduce(x)
        return (x + tp.all_reduce(w.partial(x))) @ w.head.T

    return forward


# WRONG by structural: 1e-5 for 1e-6 in the split path only. allclose at 1e-2 passes it.
@subject
def other_norm_eps(tp):
    w = Weights(tp)
    eps = 1e-6 if tp.size == 1 else 1e-5

    def mlp(x):
        return tp.all_reduce(w.partial(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)))

    return w.model(mlp)


# WRONG by repeatability: the reduction accumulates into a buffer that is never cleared. The first
# forward of every shape is right, so structural sees it only in what is run after that (B).
@subject
def stale_buffer(tp):
    w = Weights(tp)
    buffers = {}

    def mlp(x):
        y = tp.all_reduce(w.partial(x))
        if tp.size == 1:
            return y
        kept = buffers.get(tuple(y.shape))
        buffers[tuple(y.shape)] = y if kept is None else y + kept
        return buffers[tuple(y.shape)]

    return w.model(mlp)


# WRONG by rank_agreement (with structural and repeatability): dropout after the sum, drawn from
# a generator that every rank seeds for itself.
@subject
def dropout_left_on(tp):
    w = Weights(tp)
    generator = torch.Generator().manual_seed(tp.rank)

    def mlp(x):
        y = tp.all_reduce(w.partial(x))
        if tp.size == 1:
            return y
        keep = torch.rand(y.shape, generator=generator) > 0.1
        return y * keep / 0.9

    return w.model(mlp)


# WRONG by rank_agreement and nothing else: rank 0, the one that is compared, is right.
@subject
def logits_differ_per_rank(tp):
    w = Weights(tp)
    forward = w.model(lambda x: tp.all_reduce(w.partial(x)))
    return lambda input_ids: forward(input_ids) * (1 + tp.rank / 128)


# WRONG by decode and nothing else: with more than one rank, step looks one position too far.
@subject
def decode_position_off_by_one(tp):
    w = Weights(tp)
    positions = tp.weight("embed_positions.weight", LENGTH + 1, HIDDEN)

    def step(input_ids, start):
        length = input_ids.shape[1]
        late = 1 if tp.size > 1 and start > 0 else 0
        x = w.embed[input_ids] + positions[start + late : start + late + length]
        return (x + tp.all_reduce(w.partial(x))) @ w.head.T, start + length

    def forward(input_ids):
        return step(input_ids, 0)[0]

    forward.prefill = lambda input_ids: step(input_ids, 0)
    forward.step = step
    return forward


# ERROR by schedule: rank 0 reduces once more, for a log line.
@subject
def extra_collective_on_one_rank(tp):
    w = Weights(tp)

    def mlp(x):
        y = tp.all_reduce(w.partial(x))
        if tp.size > 1 and tp.rank == 0:
            tp.all_reduce(y.norm(), op="max")
        return y

    return w.model(mlp)


# ERROR: the last rank raises where the others wait for it.
@subject
def one_rank_raises(tp):
    w = Weights(tp)

    def mlp(x):
        if tp.size > 1 and tp.rank == tp.size - 1:
            raise RuntimeError("no kernel image is available for execution on the device")
        return tp.all_reduce(w.partial(x))

    return w.model(mlp)


# DRIFT by drift: the deployed dtypes are sent as 4-bit numbers; float64 runs are not.
@subject
def four_bit_all_reduce(tp):
    w = Weights(tp)

    def mlp(x):
        y = w.partial(x)
        if tp.size > 1 and y.dtype != torch.float64:
            scale = y.abs().amax(-1, keepdim=True) / 7
            y = (y / scale).round() * scale
        return tp.all_reduce(y)

    return w.model(mlp)


# DRIFT in float16 only: the partials are scaled up for the wire and the sum overflows.
@subject
def overflow_in_the_sum(tp):
    w = Weights(tp)
    scale = 2.0**16 if tp.size > 1 else 1.0
    return w.model(lambda x: tp.all_reduce(w.partial(x) * scale) / scale)
