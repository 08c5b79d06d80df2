"""torch.compile'd code: judged without its compiler, in every run, and the report says so."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import tpcheck
from tpcheck.observation.eagerly import Eagerly


class Refused(Exception):
    """The compiler was called."""


def refuse(graph, example_inputs):
    raise Refused


@torch.compile(backend=refuse)
def activation(x):
    return torch.nn.functional.silu(x.float()).to(x.dtype)


@tpcheck.subject(vocab_size=64, seq_len=8)
def compiled_in_part(tp):
    embed = tp.weight("embed.weight", 64, 32)
    up = tp.weight("mlp.up.weight", 128, 32).chunk(tp.size, 0)[tp.rank]
    down = tp.weight("mlp.down.weight", 32, 128).chunk(tp.size, 1)[tp.rank]

    def forward(input_ids):
        x = embed[input_ids]
        return (x + tp.all_reduce(activation(x @ up.T) @ down.T)) @ embed.T

    return forward


@tpcheck.subject(vocab_size=64, seq_len=8)
def compiled_whole(tp):
    model = torch.nn.Sequential(torch.nn.Embedding(64, 32), torch.nn.Linear(32, 64))
    model[0].weight.data = tp.weight("embed.weight", 64, 32)
    model[1].weight.data = tp.weight("head.weight", 64, 32)
    model[1].bias.data = tp.weight("head.bias", 64)
    return torch.compile(model, backend=refuse)


@tpcheck.subject(vocab_size=64, seq_len=8)
def biased_on_every_rank(tp):
    forward = compiled_in_part(tp)
    bias = tp.weight("bias", 64)
    return lambda input_ids: activation(tp.all_reduce(forward(input_ids) / tp.size + bias))


def path_of(subject):
    report = tpcheck.run(subject, (2, 4), backend="sim")
    assert report.outcome == "PASS", report
    return report.path


def test_compiled_functions_run_eagerly_and_the_path_says_so():
    path = path_of(compiled_in_part)
    assert path.differences == (
        "backend sim, not nccl",
        "compiled code ran eagerly, not torch.compile",
    )


def test_so_does_a_compiled_model():
    assert "compiled code ran eagerly, not torch.compile" in path_of(compiled_whole).differences


def test_a_bug_around_compiled_functions_is_found_and_traced():
    report = tpcheck.run(biased_on_every_rank, (2,), backend="sim")
    assert report.outcome == "WRONG"


def test_a_path_without_compiled_code_has_no_such_difference():
    @tpcheck.subject(vocab_size=8, seq_len=4)
    def plain(tp):
        embed = tp.weight("embed.weight", 8, 8)
        return lambda input_ids: embed[input_ids]

    assert path_of(plain).differences == ("backend sim, not nccl",)


def test_the_compiler_is_back_when_the_last_rank_has_left():
    first, second = Eagerly(), Eagerly()
    first.__enter__()
    second.__enter__()
    first.__exit__()
    activation(torch.ones(2))
    second.__exit__()
    assert (first.compiled, second.compiled) == (False, True)
    with pytest.raises(BackendCompilerFailed, match="Refused"):
        activation(torch.ones(3))


INSIDE = """
import sys, torch, tpcheck

@tpcheck.subject(vocab_size=64, seq_len=8)
def build(tp):
    embed = tp.weight("embed.weight", 64, 32)
    def refuse(graph, example_inputs):
        raise RuntimeError("compiled")
    def forward(input_ids):
        return torch.compile(torch.sin, backend=refuse)(embed[input_ids])
    return forward

assert "torch._dynamo.eval_frame" not in sys.modules
compile_ = torch.compile
report = tpcheck.run(build, (2,), backend="sim")
assert report.outcome == "PASS", report
assert "compiled code ran eagerly, not torch.compile" in report.path.differences
assert torch.compile is compile_
"""


def test_so_does_what_the_first_forward_compiles_before_the_compiler_is_loaded():
    done = subprocess.run([sys.executable, "-c", INSIDE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
