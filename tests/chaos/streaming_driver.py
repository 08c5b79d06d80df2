"""Kills runs of a streamed reference by SIGKILL at every moment that there is, then resumes them.

    python streaming_driver.py DIRECTORY SCRATCH RANDOM

A moment is before or after anything that a run does for good: it enters or leaves a layer, writes
activations, flushes a file, puts one in another's place, removes one, multiplies a step of the
head. Run N is killed at its N-th moment, until one gets through; then RANDOM more are killed from
outside after some milliseconds. Each is a forked child, and so is each that goes on after one. One
line of JSON each: where it was killed, which layer the next took up, the digest of what it gave.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tpcheck.reference import stream_scratch, streaming
from tpcheck.reference.checkpoint import load_decoder
from tpcheck.reference.decoder import DecoderLayer
from tpcheck.reference.stream_scratch import tensor_digest
from tpcheck.reference.transient import _Head

torch.set_num_threads(1)
TRUE = {
    (DecoderLayer, "forward"): DecoderLayer.forward,
    (stream_scratch, "save_file"): stream_scratch.save_file,
    (os, "fsync"): os.fsync,
    (Path, "replace"): Path.replace,
    (Path, "unlink"): Path.unlink,
    (_Head, "step"): _Head.step,
}


def main() -> None:
    directory, scratch, more = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    inputs = [
        torch.randint(0, 101, shape, generator=torch.Generator().manual_seed(2))
        for shape in ((2, 9), (1, 3))
    ]
    tp = streaming.group_of_one(torch.float64, streaming.stored_dtype(directory))
    with torch.no_grad():
        decoder = load_decoder(directory, tp)
        say({"expected": [tensor_digest(decoder(input_ids)) for input_ids in inputs]})

    def run() -> dict[str, Any]:
        first: list[int] = []
        logits = streaming.stream_many(
            directory,
            inputs,
            dtype="float64",
            scratch=scratch,
            progress=lambda done, total, text: first.append(done),
        )
        return {"first": first[0], "digests": [tensor_digest(one) for one in logits]}

    moment, ended = 0, False
    while not ended:
        moment += 1
        ended = not killed_at(moment, run)
        say({"moment": moment, "killed": not ended, **(forked(run) if not ended else {})})
    draws = random.Random(11)
    for _ in range(more):
        was_killed = killed_after(draws.uniform(0, 0.06), run)
        say({"moment": 0, "killed": was_killed, **forked(run)})
    say({"left": scratch.exists()})


def say(fields: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def killed_at(moment: int, run: Callable[[], Any]) -> bool:
    """Run in a child that kills itself at a moment; return whether that came."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def pass_moment() -> None:
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        for (owner, name), true in TRUE.items():
            setattr(owner, name, around(true, pass_moment))
        finish(run)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def around(true: Callable[..., Any], pass_moment: Callable[[], None]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        pass_moment()
        found = true(*args, **kwargs)
        pass_moment()
        return found

    return wrapped


def killed_after(seconds: float, run: Callable[[], Any]) -> bool:
    """Run in a child and kill it from here after some time; return whether it was still there."""
    pid = os.fork()
    if pid == 0:
        finish(run)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def finish(run: Callable[[], Any]) -> None:
    try:
        run()
    except BaseException as error:
        sys.stderr.write(f"{error!r}\n")
        os._exit(3)
    os._exit(0)


def forked(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a run gives in a child of its own, which knows nothing of those before it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)

        def told() -> None:
            with os.fdopen(writer, "w") as pipe:
                pipe.write(json.dumps(run()))

        finish(told)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"the run that goes on ended with {code}"
    found: dict[str, Any] = json.loads(text)
    return found


if __name__ == "__main__":
    main()
