"""A program that uses a pool and is then killed or interrupted; run by test_nothing_is_left."""

import json
import sys

import torch

from tpcheck.groups.jobs import Job
from tpcheck.groups.pool import RankPool

torch.set_num_threads(1)


def main() -> None:
    mode = sys.argv[1]
    pool = RankPool(2)
    result = pool.run([Job("chaos_jobs:healthy", None, 2)])[0]
    assert result.failure is None, result.failure
    facts = {"pids": pool.fleet.pids, "scratch": str(pool.fleet.scratch.path)}
    if mode == "child":
        (reply, _) = pool.run([Job("chaos_jobs:start_a_child", None, 2)])[0].replies
        facts["pids"].append(reply)
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
    if mode == "exit":
        return
    pool.run([Job("chaos_jobs:sleep_before_collective", {"rank": 1}, 2, timeout_s=600)])


if __name__ == "__main__":
    main()
