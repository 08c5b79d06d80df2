"""What a forward does below its own source: casts, choices, consumed weights, traced modules."""

import pytest
import torch
from torch import nn

from tests.groups import single_group
from tpcheck.errors import SubjectError
from tpcheck.groups.base import Recorder
from tpcheck.observation.consumption import Consumption, offer_weights
from tpcheck.observation.dispatch import Choice, Watch, half_ulp_noise
from tpcheck.observation.modules import (
    ModuleTracer,
    TracePoint,
    fqn_hooks,
    replay_modules,
    traced_modules,
)
from tpcheck.placement import Replicate, Shard

torch.set_num_threads(1)


def watch(**options):
    return Watch(Recorder(), **options)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def casts(w):
    return [(cast.source, cast.target, cast.count) for cast in w.casts]


# Casts and noise.


def test_a_narrowing_cast_is_seen_and_counted():
    x = torch.randn(4, dtype=torch.float64)
    with watch() as w:
        y = x.float()
        (x * 2).to(torch.float32)
        (y.double() + x).sum()
    assert casts(w) == [("float64", "float32", 2)]


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x.softmax(-1).sum(),
        lambda x: x.to(torch.float64),
        lambda x: x.argsort(),
        lambda x: x > 0,
        lambda x: x.float().double() if x.dtype == torch.float32 else x,
    ],
)
def test_what_does_not_narrow_is_no_cast(forward):
    with watch() as w:
        forward(torch.randn(2, 4, dtype=torch.float64))
    assert w.casts == ()


def test_copying_into_a_narrower_tensor_and_softmax_with_a_dtype_are_casts():
    x = torch.randn(2, 4, dtype=torch.float64)
    with watch() as w:
        torch.empty(2, 4).copy_(x)
        x.softmax(-1, dtype=torch.float32)
    assert sum(count for _, _, count in casts(w)) == 2


def test_casts_are_filed_under_the_module_that_runs():
    recorder = Recorder()
    with Watch(recorder) as w:
        recorder.fqn = "layers.0.norm"
        torch.ones(2, dtype=torch.float64).float()
        recorder.fqn = ""
        torch.ones(2, dtype=torch.float64).float()
    assert [cast.fqn for cast in w.casts] == ["layers.0.norm", ""]


def test_what_a_collective_does_inside_is_its_own_affair():
    recorder = Recorder()
    recorder.inside = True
    with Watch(recorder) as w:
        torch.ones(2, dtype=torch.float64).float()
    assert w.casts == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_noise_moves_a_value_by_at_most_half_an_ulp_before_it_rounds_back(dtype):
    x = torch.randn(4000, generator=generator()).to(dtype)
    moved = half_ulp_noise(x, generator(1))
    assert moved.dtype == dtype
    step = (moved.double() - x.double()).abs() / x.double().abs()
    assert float(step.max()) <= torch.finfo(dtype).eps * 1.01
    assert 0.1 < float((moved != x).double().mean()) < 0.9
    assert torch.equal(moved, half_ulp_noise(x, generator(1)))


def test_noise_leaves_infinities_nans_and_zeros():
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    moved = half_ulp_noise(x, generator())
    assert torch.equal(moved.nan_to_num(7.0), x.nan_to_num(7.0))


def test_perturbing_moves_narrow_results_and_nothing_else():
    x = torch.randn(1000, dtype=torch.float64, generator=generator())
    with watch(perturb=generator(1)):
        narrow, wide = x.float(), x * 3
        copied = torch.empty(1000).copy_(x)
    assert torch.equal(wide, x * 3)
    for moved in (narrow, copied):
        assert not torch.equal(moved, x.float())
        torch.testing.assert_close(moved, x.float(), rtol=2e-7, atol=0)


# Choices.

SCORES = torch.tensor([[0.1, 0.5, 0.4, 0.2], [0.3, 0.2, 0.9, 0.8]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("choose", "margin"),
    [
        (lambda x: x.topk(2, -1), (0.4 - 0.2) / 0.5),
        (lambda x: x.topk(2, -1, sorted=False), (0.4 - 0.2) / 0.5),
        (lambda x: x.topk(1, -1, largest=False), (0.3 - 0.2) / 0.9),
        (lambda x: x.argmax(-1), (0.9 - 0.8) / 0.9),
        (lambda x: x.argmax(-1, keepdim=True), (0.9 - 0.8) / 0.9),
        (lambda x: x.max(-1), (0.9 - 0.8) / 0.9),
        (lambda x: x.max(0), (0.9 - 0.4) / 0.9),
    ],
)
def test_a_choice_is_recorded_with_the_narrowest_margin_of_its_rows(choose, margin):
    def indices():
        result = choose(SCORES)
        return result if isinstance(result, torch.Tensor) else result.indices

    expected = indices()
    with watch() as w:
        assert torch.equal(indices(), expected)
    (choice,) = w.choices
    assert torch.equal(choice.indices, expected)
    assert float(choice.margins.min()) == pytest.approx(margin)


def test_taking_everything_leaves_no_margin_to_be_narrow():
    with watch() as w:
        SCORES.topk(4, -1)
    assert w.choices[0].margins.tolist() == [float("inf")] * 2


def test_what_is_masked_out_is_no_candidate():
    masked = SCORES.masked_fill(SCORES > 0.7, -torch.inf)
    with watch() as w:
        masked.topk(2, -1), (-masked).topk(2, -1, largest=False)
    for choice in w.choices:
        assert choice.margins.tolist() == pytest.approx([(0.4 - 0.2) / 0.5, float("inf")])


def test_candidates_that_are_all_masked_out_tie():
    with watch() as w:
        SCORES.masked_fill(SCORES > 0, -torch.inf).topk(2, -1)
    assert w.choices[0].margins.tolist() == [0, 0]


def test_a_flip_has_the_margin_of_its_own_row():
    near_tie, wide = [0.5, 0.5, 0.1, 0.0], [0.9, 0.5, 0.1, 0.0]
    with watch() as w:
        torch.tensor([near_tie, wide]).topk(1, -1)
        torch.tensor([near_tie, wide[::-1]]).topk(1, -1)
    reference, flipped = w.choices
    assert flipped.flips(reference) == (1, pytest.approx(0.4 / 0.9))
    assert reference.flips(reference) == (0, 0.0)


def test_integers_and_whole_tensors_are_no_routing():
    with watch() as w:
        torch.arange(4).topk(2)
        SCORES.argmax()
    assert w.choices == []


PINNED = torch.tensor([[3, 0], [1, 0]])


def test_a_pinned_choice_returns_the_references_indices_with_its_own_values():
    with watch(pinned=[Choice(PINNED, torch.ones(2), 4)]) as w:
        values, indices = SCORES.topk(2, -1)
    assert torch.equal(indices, PINNED)
    assert torch.equal(values, SCORES.gather(-1, PINNED))
    assert w.unpinned == 0
    # what the forward would have chosen itself is what is recorded
    assert w.choices[0].indices.tolist() == [[1, 2], [2, 3]]


def test_argmax_and_max_are_pinned_too():
    row = torch.tensor([2, 0])
    with watch(pinned=[Choice(row, torch.ones(2), 4), Choice(row, torch.ones(2), 4)]):
        assert torch.equal(SCORES.argmax(-1), row)
        values, indices = SCORES.max(-1)
    assert torch.equal(indices, row)
    assert torch.equal(values, SCORES.gather(-1, row[:, None])[:, 0])


def test_choices_that_do_not_fit_the_reference_are_free_and_counted():
    with watch(pinned=[Choice(PINNED, torch.ones(2), 8)]) as w:  # among eight, not four
        assert SCORES.topk(2, -1).indices.tolist() == [[1, 2], [2, 3]]
        SCORES.topk(1, -1)  # the reference has no second choice
    assert w.unpinned == 2


# Consumption.

SHAPES = {"a": (3, 4), "b": (4,), "c": (2, 2)}


def consumed(load):
    group = single_group()
    consumption = Consumption(group.weights)
    offer_weights(group.weights, SHAPES)
    with consumption.watching():
        held = load(group)
    counts = consumption.counts()
    del held
    return counts


def test_copied_and_kept_weights_are_consumed():
    def load(group):
        kept = {}
        target = torch.empty(3, 4, dtype=torch.float64)
        for name, tensor in group.named_weights():
            if name == "a":
                target.copy_(tensor)
            else:
                kept[name] = tensor
        return kept, target

    assert consumed(load) == {"a": 1, "b": 1, "c": 1}


def test_a_weight_that_nobody_reads_is_not():
    def load(group):
        for name, tensor in group.named_weights():
            if name != "b":
                tensor.chunk(2)[0].clone()

    assert consumed(load) == {"a": 1, "b": 0, "c": 1}


def test_a_slice_that_is_kept_counts_as_its_tensor():
    assert consumed(lambda g: {n: t[:1] for n, t in g.named_weights()}) == {"a": 1, "b": 1, "c": 1}


def _as_safetensors(weights, path):
    from safetensors.torch import save_file

    save_file(dict(weights), path)


@pytest.mark.parametrize(
    "write",
    [
        _as_safetensors,
        lambda weights, path: torch.save(dict(weights), path),
        lambda weights, path: [tensor.tolist() for _, tensor in weights],
    ],
)
def test_weights_that_went_to_a_file_are_consumed(tmp_path, write):
    counts = consumed(lambda g: write(g.named_weights(), tmp_path / "model"))
    assert counts == {"a": 1, "b": 1, "c": 1}


def test_loading_twice_counts_twice():
    counts = consumed(lambda g: [dict(g.named_weights()), dict(g.named_weights())])
    assert counts == {"a": 2, "b": 2, "c": 2}


def test_a_loader_that_stops_early_has_not_consumed_the_rest():
    counts = consumed(lambda g: next(iter(g.named_weights())))
    assert counts == {"a": 1, "b": 0, "c": 0}


def test_named_weights_have_the_values_of_weight():
    group = single_group(seed=3)
    offer_weights(group.weights, SHAPES)
    for name, tensor in group.named_weights():
        assert torch.equal(tensor, single_group(seed=3).weight(name, *SHAPES[name]))


def test_a_directory_of_safetensors_is_rounded_to_the_stored_dtype(tmp_path):
    from safetensors.torch import save_file

    full = torch.randn(3, 4, generator=generator())
    save_file({"w": full, "ids": torch.arange(3)}, tmp_path / "model.safetensors")
    group = single_group()
    offer_weights(group.weights, str(tmp_path))
    found = dict(group.named_weights())
    assert torch.equal(found["w"], full.bfloat16().double())
    assert torch.equal(found["ids"], torch.arange(3))


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (7, "weights=int, but should be a safetensors directory or a dict name -> shape"),
        ("/nowhere", "weights='/nowhere': there is no *.safetensors file in it"),
    ],
)
def test_weights_that_cannot_be_offered_are_named(declared, message):
    with pytest.raises(SubjectError) as error:
        offer_weights(single_group().weights, declared)
    assert str(error.value) == message


def test_nothing_declared_nothing_offered():
    with pytest.raises(SubjectError, match="the subject declares no weights"):
        next(single_group().named_weights())


# Traced modules.


class Reduce(nn.Module):
    def __init__(self, group):
        super().__init__()
        self.group = group

    def forward(self, x):
        return self.group.all_reduce(x * 2)


class Block(nn.Module):
    def __init__(self, group):
        super().__init__()
        self.up = nn.Linear(4, 4, dtype=torch.float64)
        self.reduce = Reduce(group)

    def forward(self, x):
        return self.reduce(self.up(x)) + self.up(x)


def traced(until="", group=None):
    group = group or single_group()
    model = nn.ModuleDict({"block": Block(group), "head": nn.Identity()})
    model.forward = lambda x: model["head"](model["block"](x))
    with ModuleTracer(traced_modules(model), group, until=until) as tracer:
        model(torch.ones(2, 4, dtype=torch.float64))
    return tracer.records


def test_modules_are_recorded_in_the_order_in_which_they_return():
    records = traced()
    order = sorted(records, key=lambda fqn: records[fqn].finished)
    assert order == ["block.up", "block.reduce", "block.up#2", "block", "head"]
    assert torch.equal(records["head"].input, records["block"].output)


def test_sums_belong_to_the_innermost_module():
    records = traced()
    ((call, operand, result),) = records["block.reduce"].partials
    assert call.op == "all_reduce"
    assert call.fqn == "block.reduce"
    assert torch.equal(operand, records["block.reduce"].input * 2)
    assert torch.equal(result, records["block.reduce"].output)
    assert records["block"].partials == []


def test_nothing_after_until_is_recorded():
    assert set(traced(until="block.reduce")) == {"block", "block.up", "block.reduce"}


def test_an_unknown_until_names_modules_there_are():
    with pytest.raises(SubjectError, match=r"until='nope' is not a traced module; .* block"):
        traced(until="nope")


def test_hooks_and_interceptor_are_gone_afterwards():
    group = single_group()
    module = Reduce(group)
    with ModuleTracer(traced_modules(_with_points({"r": module})), group) as tracer:
        module(torch.ones(1))
    module(torch.ones(1))
    assert set(tracer.records) == {"r"}
    assert group.interceptor is None
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_a_module_that_raises_leaves_no_module_open():
    group = single_group()
    module = nn.Linear(4, 4)
    with ModuleTracer(traced_modules(_with_points({"up": module})), group) as tracer:
        with pytest.raises(RuntimeError):
            module(torch.ones(3))
        module(torch.ones(4))
    assert set(tracer.records) == {"up", "up#2"}
    assert group.recorder.fqn == ""


def test_tuples_and_keyword_arguments_are_recorded_by_their_first_tensor():
    class Pair(nn.Module):
        def forward(self, *, scale, x):
            return None, x * scale

    group = single_group()
    module = Pair()
    with ModuleTracer(traced_modules(_with_points({"p": module})), group) as tracer:
        module(scale=2, x=torch.ones(3))
    assert tracer.records["p"].input.tolist() == [1, 1, 1]
    assert tracer.records["p"].output.tolist() == [2, 2, 2]


def _with_points(points):
    def forward(x):
        return x

    forward.trace_points = points
    return forward


def test_a_plain_function_has_no_points_and_declared_ones_win_over_names():
    assert traced_modules(lambda x: x) == {}
    module = nn.Linear(2, 2)
    points = traced_modules(_with_points({"o_proj": (module, Shard(-1), Replicate())}))
    assert points["o_proj"].module is module
    assert points["o_proj"].in_placement == Shard(-1)
    assert points["o_proj"].out_placement == Replicate()


@pytest.mark.parametrize(
    "points",
    [
        7,
        {"a": "module"},
        {"a": (nn.Identity(), Shard(0))},
        {"a": (nn.Identity(), "shard", None)},
    ],
)
def test_malformed_points_are_named(points):
    with pytest.raises(SubjectError, match=r"forward\.trace_points"):
        traced_modules(_with_points(points))


def test_a_replay_runs_a_module_on_the_references_own_input():
    group = single_group()
    declared = (nn.Linear(4, 4, dtype=torch.float64), Replicate(), Replicate())
    points = traced_modules(_with_points({"up": declared, "free": nn.Identity()}))
    with ModuleTracer(points, group) as tracer:
        declared[0](torch.zeros(2, 4, dtype=torch.float64))
    reference = torch.ones(2, 4, dtype=torch.float64)
    with torch.no_grad():
        replayed = replay_modules(
            points, {"up": reference, "free": reference, "gone": reference}, group, tracer
        )
        assert set(replayed) == {"up"}
        assert torch.equal(replayed["up"].output, declared[0](reference))
    assert tracer.records["up"].input.count_nonzero() == 0


def test_a_module_whose_own_hook_raises_is_not_left_before_it_is_entered():
    def refuse(_module, _args):
        raise ValueError("too long")

    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_pre_hook(refuse)
    group = single_group()
    with (
        pytest.raises(ValueError, match="too long"),  # and no warning that a hook of ours raised
        ModuleTracer(traced_modules(model) | {"whole": TracePoint(model)}, group),
        fqn_hooks(model, group),
    ):
        model(torch.ones(1, 4))
