"""The pytest plugin: `pytest --tp 8` in any project that installs tpcheck.

Requirement: installed and not asked for, it changes nothing: no torch is loaded, no rank starts, no
line is printed. A bad option, a report that cannot be written and too few GPUs are one error before
the first test. What runs subjects is in plugin/session.py and plugin/check.py, imported when a
fixture is first used; what is shown at the end in plugin/summary.py. The verdicts of a test travel
with its reports, because that is the way on which xdist already carries what every worker has to
say.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from tpcheck.errors import BackendError, TPCheckError
from tpcheck.plugin.options import (
    DEFAULT_DEGREES,
    PluginOptions,
    add_options,
    is_worker,
    only_shows,
    placed,
    read_options,
    under_torchrun,
)
from tpcheck.plugin.summary import RECORDS, Summary

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from tpcheck.plugin.check import TPCheck
    from tpcheck.plugin.session import TPPool

MARKER = "tp(min_size=1): needs a world of at least min_size tensor-parallel ranks (--tp)"


@dataclass(slots=True)
class _State:
    """What one pytest session knows. The heavy half is there once a fixture was used."""

    options: PluginOptions
    pool: TPPool | None = None
    check: TPCheck | None = None
    records: list[str] = field(default_factory=list)


_KEY = pytest.StashKey[_State]()
_active: list[_State] = []
"""The sessions of this process, innermost last: strategies have no way to be handed one."""


def tp_degrees() -> SearchStrategy[int]:
    """Return a strategy of the degrees that `--tp` asks for, found out when it is drawn from.

    Under `pytest --tp 8` it draws from 2 to 8, a third of the time 8; under `--tp 2,4` one of
    these; without `--tp`, and without pytest, 2, 4 or 8. It shrinks to the smallest.

    For tests of a model that people run with `--tp`. `tpcheck.strategies.tp_degrees` knows no
    options: it draws from degrees that the test itself names.

    Example:
        >>> from hypothesis import given
        >>> @given(tp_size=tp_degrees())
        ... def test_my_layer(tp_check, tp_size): ...
    """
    from hypothesis import strategies as st

    def degrees() -> SearchStrategy[int]:
        sizes = _active[-1].options.degrees if _active else DEFAULT_DEGREES
        # the largest is what was asked for by name: it must not be left to luck
        return st.sampled_from((*sizes, *sizes[-1:] * (len(sizes) // 2)))

    return st.deferred(degrees)


# The session.


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options of the contract."""
    add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Under torchrun rank 0 runs the tests; every other process serves it and leaves with 0."""
    options = read_options(config)
    if not options.torchrun or only_shows(config):
        return None
    from tpcheck.groups.opening import serves_torchrun

    try:
        return 0 if serves_torchrun(options.backend, options.ranks_per_gpu) else None
    except TPCheckError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_configure(config: pytest.Config) -> None:
    """Check everything that can be checked before a test runs."""
    config.addinivalue_line("markers", MARKER)
    state = config.stash[_KEY] = _State(read_options(config))
    _active.append(state)
    if state.options.given and not only_shows(config):
        state.options = placed(config, state.options)
    if not (is_worker(config) or only_shows(config)):
        config.pluginmanager.register(Summary(state.options.report), "tpcheck-summary")


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the ranks that fixtures started."""
    state = config.stash.get(_KEY, None)
    if state is None:
        return
    _active.remove(state)
    if state.pool is not None:
        state.pool.close()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Under torchrun meet the processes that serve, whether or not a test will need them."""
    state = session.config.stash[_KEY]
    if state.options.torchrun and not only_shows(session.config):
        _pool(state, session.config).open()


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say what `--tp` stands for here."""
    state = config.stash[_KEY]
    return state.options.header() if state.options.given else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests whose marker asks for a larger world, with the reason."""
    world = config.stash[_KEY].options.world
    for item in items:
        for marker in item.iter_markers("tp"):
            size = _min_size(item, marker)
            if size > world:
                reason = f"needs a world of {size} ranks, but it has {world}: pytest --tp {size}"
                item.add_marker(pytest.mark.skip(reason=reason))
                break


# The fixtures.


@pytest.fixture(scope="session")
def tp_pool(pytestconfig: pytest.Config) -> TPPool:
    """The warm ranks of this session: `.degrees`, `.world`, `.backend`, `.run(build, **options)`.

    `run` takes the options of `tpcheck.run`, those of the command line by default, and returns the
    Report whatever its outcome.
    """
    return _pool(pytestconfig.stash[_KEY], pytestconfig)


@pytest.fixture(scope="session")
def tp_check(pytestconfig: pytest.Config, tp_pool: TPPool) -> TPCheck:
    """A function: `tp_check(build, **options)` raises CheckFailed unless `build` is PASS.

    It takes the options of `tpcheck.run`; the degrees are those of `--tp` unless `tp_sizes=` is
    given. Inside `@given` it searches on simulated ranks, which costs milliseconds; the minimal
    failing example and a share of the passing ones are then run on real ranks.
    """
    state = pytestconfig.stash[_KEY]
    if state.check is None:
        from tpcheck.plugin.check import TPCheck

        state.check = TPCheck(tp_pool, state.records)
    return state.check


# One test.


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let a property print how to repeat its failure before it starts."""
    if "tp_check" in getattr(item, "fixturenames", ()) and "hypothesis" in sys.modules:
        from tpcheck.plugin.session import print_how_to_repeat

        print_how_to_repeat(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Hold what a property found in simulation against real ranks when it is over."""
    __tracebackhide__ = True
    state = item.config.stash[_KEY]
    if state.check is not None:
        state.check.begin()
    try:
        result = yield
    except Exception as error:
        if state.check is not None:
            state.check.finish(error)
        raise
    if state.check is not None:
        state.check.finish(None)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Send what the test was told along with its report."""
    report = yield
    records = item.config.stash[_KEY].records
    if records:
        setattr(report, RECORDS, list(records))
        records.clear()
    return report


# What the hooks share.


def _pool(state: _State, config: pytest.Config) -> TPPool:
    if state.pool is None:
        options = state.options
        if not options.given:
            if under_torchrun():
                raise BackendError(
                    "tp_pool: this is torchrun's world, but without --tp the other processes do"
                    " not serve it: torchrun ... -m pytest --tp N"
                )
            state.options = options = placed(config, options)
        from tpcheck.plugin.session import TPPool

        state.pool = TPPool(options)
    return state.pool


def _min_size(item: pytest.Item, marker: pytest.Mark) -> int:
    size = marker.kwargs.get("min_size", 1)
    unknown = marker.args or set(marker.kwargs) - {"min_size"}
    if unknown or not isinstance(size, int) or size < 1:
        words = [*map(repr, marker.args), *(f"{k}={v!r}" for k, v in marker.kwargs.items())]
        raise pytest.UsageError(
            f"{item.nodeid}: tp({', '.join(words)}), but should be tp(min_size=N), N at least 1"
        )
    return size
