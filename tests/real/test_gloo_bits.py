"""The ring of numerics/reduction.py is Gloo's all-reduce, bit for bit.

Real Gloo processes over loopback reduce the same operands that the emulation gets. Every dtype at
every world, from one element to above 1 MiB per segment (where Gloo's chunks get a new geometry);
max, min and avg with NaN, infinities, signed zeros and overflow planted; integers; reduce_scatter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("gloo_bits_worker.py")
FEWEST_CASES = 150


@pytest.mark.parametrize("world", [2, 3, 4, 6, 8])
def test_ring_equals_real_gloo_bit_for_bit(world: int, tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0].splitlines() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * world, str(outputs)
    findings = [line for output in outputs for line in output if line.startswith("DIFFERS")]
    assert not findings, "\n".join(findings)
    assert int(outputs[0][-1].removeprefix("done ")) >= FEWEST_CASES
