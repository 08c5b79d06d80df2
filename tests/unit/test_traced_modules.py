"""Modules are found in whatever a subject returns: a module, a method, a function around them."""

import functools

import torch
from torch import nn

from tpcheck.observation.modules import evaluating, traced_modules


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)

    def forward(self, x, positions=None):
        return self.head(self.body(x))

    def logits(self, x):
        return self.forward(x)


class Runner:
    """Holds a model and is none, as engines do."""

    def __init__(self, model):
        self.model, self.positions = model, torch.arange(3)

    def __call__(self, x):
        return self.model(x, self.positions)

    def run(self, x):
        return self(x)


NAMES = ["body", "body.0", "head"]


def test_a_function_around_one_module_is_traced_as_that_module():
    model, positions = Model(), torch.arange(3)
    assert list(traced_modules(model)) == NAMES
    assert list(traced_modules(lambda x: model(x, positions))) == NAMES
    assert list(traced_modules(model.logits)) == NAMES
    head = model.head
    assert list(traced_modules(lambda x: head(model.body(x)))) == NAMES


def test_what_runs_a_model_is_traced_as_that_model():
    model = Model()
    runner = Runner(model)
    for forward in (
        functools.partial(model, positions=torch.arange(3)),
        functools.partial(functools.partial(model.logits)),
        functools.partial(runner.run),
        runner,
        runner.run,
    ):
        assert list(traced_modules(forward)) == NAMES
        model.train()
        assert evaluating(forward) is forward
        assert not any(module.training for module in model.modules())


def test_modules_are_in_eval_mode_however_a_function_holds_them():
    model = Model()
    runner, layers, by_name = Runner(model), [1, (model,)], {"a": {"b": model}}
    later = functools.partial(lambda x, run: run(x), run=runner.run)
    loop: list = [by_name]
    loop.append(loop)
    for forward in (
        lambda x: runner.run(x),
        lambda x: layers[1][0](x),
        lambda x: by_name["a"]["b"](x),
        lambda x: later(x),
        lambda x: loop[0]["a"]["b"](x),
    ):
        model.train()
        evaluating(forward)
        assert not any(module.training for module in model.modules())
    assert evaluating(len) is len


def test_modules_side_by_side_have_the_names_that_the_function_has_for_them():
    body, head = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    assert list(traced_modules(lambda x: head(body(x)))) == ["body", "body.0", "head"]


def test_a_function_that_holds_no_module_has_none_and_a_declaration_goes_first():
    model = Model()
    later = None

    def forward(x):
        return model(x) if later is None else later(x)

    forward.trace_points = {"out": model.head}
    assert list(traced_modules(forward)) == ["out"]
    assert traced_modules(lambda x: x) == traced_modules(len) == {}


def test_a_name_that_is_not_bound_yet_is_no_module():
    def forward(x):
        return unbound(x)

    assert traced_modules(forward) == {}
    unbound = nn.Linear(2, 2)
