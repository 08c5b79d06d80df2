"""The planner is fast enough to be asked in a loop: CPU time, whatever else runs."""

from __future__ import annotations

import subprocess
import sys

IMPORT = """
import time
start = time.process_time()
import tpcheck.planning
print(time.process_time() - start)
"""
HUNDRED = """
import json, time
from tpcheck.planning import plan
models = json.load(open("tests/data/model_configs.json", encoding="utf-8"))
start = time.process_time()
for model in models:
    assert len(plan(model["config"], tp_sizes=range(1, 17))) == 16 * 12
print(time.process_time() - start)
"""


def best_of(code: str, *, times: int = 5) -> float:
    """Return the least CPU seconds that the code printed, each time in a fresh process."""
    found = []
    for _ in range(times):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        found.append(float(done.stdout))
    return min(found)


def test_importing_the_planner_takes_less_than_50_ms() -> None:
    assert best_of(IMPORT) < 0.05


def test_a_hundred_configs_at_sixteen_degrees_on_every_engine_take_less_than_a_second() -> None:
    assert best_of(HUNDRED) < 1.0


def test_one_engine_loads_no_other() -> None:
    code = (
        "import sys; from tpcheck.planning import plan\n"
        "plan({'num_attention_heads': 8}, 'vllm', (2,))\n"
        "others = [name for name in sys.modules if name.startswith('tpcheck.engines.')]\n"
        "assert 'tpcheck.engines.vllm' in others\n"
        "assert not {'tpcheck.engines.sglang', 'tpcheck.engines.reference'} & set(others)\n"
        "assert 'tpcheck.shard_plan' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
