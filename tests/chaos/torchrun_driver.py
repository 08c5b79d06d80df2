"""What a command does under torchrun: rank 0 speaks, the others serve; run by test_torchrun."""

import json
import os
import sys
import time

import torch

from tpcheck.groups.jobs import Job
from tpcheck.groups.torchrun import serve_forever, torchrun_pool, torchrun_world

torch.set_num_threads(1)


def main() -> None:
    info = torchrun_world()
    if info.rank > 0:
        serve_forever(info)
        return

    def job(function, payload=None, size=2, timeout_s=60.0):
        return Job(f"chaos_jobs:{function}", payload, size, timeout_s)

    with torchrun_pool(info) as pool:
        results = pool.run(
            [
                job("healthy", torch.arange(3)),
                job("mismatch", {"rank": 1}),
                job("healthy"),
                job("leave", {"rank": 1}),
                job("healthy"),
                job("sleep_before_collective", {"rank": 1}, timeout_s=2),
                job("healthy", size=1),
                job("whoami"),
                job("raise_on", {"rank": 0}),
                job("healthy"),
            ]
        )
    texts = [result.failure.message if result.failure else "ok" for result in results]
    sums = results[0].replies[1]["sum"].tolist()
    stack = results[5].failure.stacks[1]
    json.dump({"texts": texts, "label": pool.label, "sums": sums, "stack": stack}, sys.stdout)
    sys.stdout.flush()
    if "--hang" in sys.argv:
        os.write(2, b"hanging\n")
        time.sleep(600)


if __name__ == "__main__":
    main()
