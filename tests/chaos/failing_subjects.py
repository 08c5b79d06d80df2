"""Subjects that end badly, each in its own way, at TP > 1 only unless it says so."""

import os
import signal
import time

import torch

import tpcheck

VOCAB, WIDTH = 32, 16


def decoder(tp, hook=lambda partial: partial):
    """A clean sharded MLP; `hook` sees each partial before it is reduced."""
    embed = tp.weight("embed", VOCAB, WIDTH)
    up = tp.weight("up", 4 * WIDTH, WIDTH).chunk(tp.size, 0)[tp.rank]
    down = tp.weight("down", WIDTH, 4 * WIDTH).chunk(tp.size, 1)[tp.rank]

    def forward(input_ids):
        x = embed[input_ids]
        return tp.all_reduce(hook(torch.relu(x @ up.T) @ down.T)) @ embed.T

    return forward


@tpcheck.subject(vocab_size=VOCAB, seq_len=4)
def clean(tp):
    return decoder(tp)


@tpcheck.subject(vocab_size=VOCAB, seq_len=4)
def sleeps(tp):
    def wait_forever(partial):
        if tp.rank == 1:
            time.sleep(3600)
        return partial

    return decoder(tp, wait_forever)


@tpcheck.subject(vocab_size=VOCAB, seq_len=4)
def raises_in_build(tp):
    if tp.size > 1 and tp.rank == 1:
        raise ValueError("the shard file is missing")
    return decoder(tp)


@tpcheck.subject(vocab_size=VOCAB, seq_len=4)
def leaves(tp):
    def leave(partial):
        if tp.size > 1 and tp.rank == tp.size - 1:
            os._exit(3)
        return partial

    return decoder(tp, leave)


@tpcheck.subject(vocab_size=VOCAB, seq_len=4)
def runs_out_of_memory(tp):
    """Allocates up to a limit that stands in for the machine, then dies as by the OOM killer."""

    def allocate(partial):
        if tp.size > 1 and tp.rank == 0:
            held = []
            try:
                while sum(map(len, held)) < 1 << 29:
                    held.append(bytearray(1 << 26))
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        return partial

    return decoder(tp, allocate)


@tpcheck.subject(vocab_size=VOCAB, seq_len=4)
def nan_when_sharded(tp):
    return decoder(tp, lambda partial: partial * float("nan") if tp.size > 1 else partial)


@tpcheck.subject(vocab_size=VOCAB, seq_len=4)
def nan_always(tp):
    return decoder(tp, lambda partial: partial * float("nan"))


@tpcheck.subject(vocab_size=VOCAB, seq_len=4)
def refuses(tp):
    if tp.size == 2:
        raise tpcheck.IllegalDegreeError("heads=3, but should be divisible by tp_size=2")
    return decoder(tp)


@tpcheck.subject(vocab_size=VOCAB, seq_len=4)
def wrong_by_a_variable(tp):
    wrong = os.environ.get("TPCHECK_TEST_BUG")
    return decoder(tp, lambda partial: partial + tp.rank if wrong else partial)


@tpcheck.subject(vocab_size=VOCAB, seq_len=4)
def shares_the_environment(tp):
    """Its own ranks leave a mark that only those of the same process find."""
    found = os.environ.setdefault("TPCHECK_TEST_MARK", str(tp.rank)) != str(tp.rank)
    return decoder(tp, lambda partial: partial + 1 if found else partial)
