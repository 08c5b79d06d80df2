"""Digests: equal exactly when the bits are, however many ranks of one process share the work."""

from types import SimpleNamespace

import pytest
import torch

from tpcheck import outputs
from tpcheck.groups.jobs import Job
from tpcheck.groups.simulated import SimulatedRanks, SimulatedWorld
from tpcheck.outputs import Digests, digest, plain_copy, whole

NAN = float("nan")
OUTPUTS = {
    "plain": torch.tensor([0.0, 1.0, 2.0, 3.0]),
    "negative zero": torch.tensor([-0.0, 1.0, 2.0, 3.0]),
    "another number": torch.tensor([0.0, 1.0, 2.0, 4.0]),
    "another shape": torch.tensor([[0.0, 1.0], [2.0, 3.0]]),
    "another dtype": torch.tensor([0.0, 1.0, 2.0, 3.0]).view(torch.int32),
    "NaN": torch.tensor([NAN, 1.0, 2.0, 3.0]),
    "another NaN": torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32),
    "bfloat16": torch.tensor([0.0, 1.0], dtype=torch.bfloat16),
    "float64": torch.tensor([0.0, -0.0], dtype=torch.float64),
    "complex": torch.tensor([1j, NAN], dtype=torch.complex128),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(1.0),
    "empty": torch.zeros(0, 3),
}


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return a list that every tensor is added to when it is hashed."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(outputs, "digest", lambda x: (seen.append(x), digest(x))[1])
    return seen


@pytest.mark.parametrize("first", OUTPUTS)
@pytest.mark.parametrize("second", OUTPUTS)
def test_a_digest_is_the_same_after_any_other_ranks_output(first, second):
    digests = Digests()
    assert digests.of("A", OUTPUTS[first]) == digest(OUTPUTS[first])
    assert digests.of("A", OUTPUTS[second].clone()) == digest(OUTPUTS[second])
    assert (digest(OUTPUTS[first]) == digest(OUTPUTS[second])) == (first == second)


@pytest.mark.parametrize("name", sorted(OUTPUTS.keys() - {"complex"}))
def test_ranks_that_agree_hash_once(name, monkeypatch):
    seen, digests = hashed(monkeypatch), Digests()
    assert len({digests.of("A", OUTPUTS[name].clone()) for _ in range(8)}) == 1
    assert len(seen) == 1
    digests.of("B", OUTPUTS[name].clone())
    assert len(seen) == 2


def run_on_ranks(world: SimulatedWorld, signs: list[float]) -> str:
    """Run as a job: the digest of a zero of this rank's sign."""
    group = world.group(seed=0, dtype=torch.float32, weight_dtype=torch.float32)
    group.barrier()
    return group.digest("A", torch.tensor([signs[world.rank]]))


def test_simulated_ranks_share_what_agrees_and_keep_what_does_not(monkeypatch):
    seen = hashed(monkeypatch)
    job = Job(f"{__name__}:run_on_ranks", [0.0, 0.0, 0.0, -0.0], 4)
    ranks = SimulatedRanks()
    for _ in range(2):  # nothing is kept from one job to the next
        (result,) = ranks.run([job])
        plus, minus = digest(torch.tensor([0.0])), digest(torch.tensor([-0.0]))
        assert result.replies == (plus, plus, plus, minus)
    assert len(seen) == 4


@pytest.mark.parametrize(
    "output",
    [
        OUTPUTS["plain"],
        (OUTPUTS["plain"], None),
        {"logits": OUTPUTS["plain"], "state": 1},
        SimpleNamespace(logits=OUTPUTS["plain"]),
        SimpleNamespace(logits=(OUTPUTS["plain"], 1)),
    ],
)
def test_logits_are_found_in_what_frameworks_return(output):
    assert whole(output) is OUTPUTS["plain"]


class Tagged(torch.Tensor):
    """What a library makes of its own tensors."""


@pytest.mark.parametrize(
    "output",
    [
        torch.eye(3).as_subclass(Tagged),
        torch.eye(3).to_sparse(),
        torch.eye(3).to(torch.float8_e4m3fn),
        torch.nn.Parameter(torch.eye(3)),
    ],
    ids=["subclass", "sparse", "float8", "parameter"],
)
def test_what_a_forward_gives_is_kept_as_a_plain_tensor(output):
    kept = plain_copy(output)
    assert type(kept) is torch.Tensor
    assert not kept.requires_grad
    assert torch.equal(kept, torch.eye(3))
