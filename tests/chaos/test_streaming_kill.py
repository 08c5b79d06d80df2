"""A streamed reference that is killed by SIGKILL goes on to the same bits, whenever it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.models import make_model

pytest.importorskip("transformers")

LAYERS, RANDOM = 3, 12


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("killed")
    directory = make_model(folder / "model", "llama_biases", num_hidden_layers=LAYERS)
    driver = Path(__file__).with_name("streaming_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(directory), str(folder / "scratch"), str(RANDOM)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "starting over" not in done.stderr, "a kill never leaves anything that is not believed"
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_at_every_moment_it_goes_on_to_the_bits_of_whole(said: list[dict[str, Any]]) -> None:
    expected, kills = said[0]["expected"], [one for one in said if one.get("killed")]
    for one in kills:
        assert one["digests"] == expected, one
    moments = [one["moment"] for one in said if one.get("moment")]
    assert moments == list(range(1, len(moments) + 1))
    assert [one["killed"] for one in said if one.get("moment")] == [*[True] * (len(moments) - 1), 0]
    assert len(moments) > 12 * LAYERS, (
        "layers, writes, flushes, replacements, removals and the head"
    )


def test_no_whole_layer_is_run_again(said: list[dict[str, Any]]) -> None:
    firsts = [one["first"] for one in said if one.get("moment") and one["killed"]]
    assert set(firsts) == set(range(LAYERS + 1))
    # kept layers only grow with the moment, until the scratch folder is taken away at the end
    end = max(index for index, first in enumerate(firsts) if first == LAYERS)
    assert firsts[: end + 1] == sorted(firsts[: end + 1])
    assert set(firsts[end + 1 :]) <= {0}


def test_killed_at_random_it_goes_on_to_the_bits_of_whole(said: list[dict[str, Any]]) -> None:
    drawn = [one for one in said if one.get("moment") == 0]
    assert len(drawn) == RANDOM
    for one in drawn:
        assert one["digests"] == said[0]["expected"]


def test_nothing_is_left_at_the_end(said: list[dict[str, Any]]) -> None:
    assert said[-1] == {"left": False}
