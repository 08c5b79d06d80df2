"""Golden records and their folder: what is written is read back, and nothing else is believed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from tests.golden_records import WEIGHTS, forged, kept_in, logits, made, put, with_data
from tpcheck.errors import TPCheckError
from tpcheck.golden.listing import listing
from tpcheck.golden.records import Key, from_json, sha256_of, to_json
from tpcheck.golden.sketches import SUMS, chosen_positions, sketch, sketch_weights
from tpcheck.golden.store import locked, prepare, read_data, read_manifest, scan, write
from tpcheck.golden.tensors import unpack


def states(folder: Path) -> dict[str, str]:
    return {entry.file: entry.state for entry in scan(folder)}


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    for full in (False, True):
        golden, data = made(full=full, case_id=f"s{int(full)}-b2-t3")
        kept_in(tmp_path, golden, data)
        found = read_manifest(tmp_path / golden.file)
        assert found == golden
        kept = unpack(read_data(tmp_path, found), found)["A"]
        assert kept.oracle is not None
        assert torch.equal(kept.oracle.sums, sketch(logits()).sums)
        assert (kept.whole_oracle is not None) == full
        if full:
            assert torch.equal(kept.whole_oracle, logits())  # type: ignore[arg-type]
    assert set(states(tmp_path).values()) == {"ok"}
    assert len(states(tmp_path)) == 2


def test_the_address_is_of_what_determines_logits_and_nothing_else() -> None:
    golden, _ = made()
    elsewhere, _ = made(
        environment={"torch": "9"}, command="other", created="2030-01-01T00:00:00Z", full=True
    )
    assert elsewhere.address == golden.address
    key = golden.identity.key
    others = [
        replace(key, **{name: "d" * 64 if len(value) == 64 else "float16"})
        for name, value in key.to_json().items()
    ]
    assert len({golden.address, *(other.address for other in others)}) == 6
    assert set(Key.__slots__) == {"weights", "config", "inputs", "dtype", "tpcheck"}  # no degree
    assert (
        made(weights=WEIGHTS | {"head": "bfloat16 [11, 8] " + "e" * 64})[0].address
        != golden.address
    )


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path: Path, draw: st.DataObject) -> None:
    golden, data = made()
    folder = tmp_path / "flips"
    kept_in(folder, golden, data)
    name = draw.draw(st.sampled_from([golden.file, golden.data.file]))
    whole = (folder / name).read_bytes()
    at = draw.draw(st.integers(0, len(whole) - 1))
    mask = draw.draw(st.integers(1, 255))
    (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
    entry = next(entry for entry in scan(folder) if entry.file == golden.file)
    if name == golden.data.file:
        assert entry.state == "corrupt"
        assert "edited or swapped" in entry.problem
    elif entry.state == "ok":  # white space became other white space
        assert entry.golden == golden
    else:
        assert entry.problem
    (folder / name).write_bytes(whole)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_what_is_cut_off_is_refused(tmp_path: Path, draw: st.DataObject) -> None:
    golden, data = made()
    folder = tmp_path / "cuts"
    kept_in(folder, golden, data)
    name = draw.draw(st.sampled_from([golden.file, golden.data.file]))
    whole = (folder / name).read_bytes()
    kept = draw.draw(st.integers(0, len(whole.rstrip()) - 1))
    (folder / name).write_bytes(whole[:kept])
    entry = next(entry for entry in scan(folder) if entry.file == golden.file)
    assert entry.state == "corrupt"
    assert "cut off" in entry.problem
    (folder / name).write_bytes(whole)


def test_renamed_and_swapped_files_are_refused_by_name(tmp_path: Path) -> None:
    first, first_data = made()
    second, second_data = made(case_id="s1-b2-t3", oracle=logits(1))
    kept_in(tmp_path, first, first_data)
    kept_in(tmp_path, second, second_data)
    (tmp_path / first.data.file).write_bytes(second_data)
    assert states(tmp_path)[first.file] == "corrupt"
    assert states(tmp_path)[second.file] == "ok"
    (tmp_path / first.data.file).write_bytes(first_data)
    (tmp_path / second.file).rename(tmp_path / "other.json")
    entry = next(entry for entry in scan(tmp_path) if entry.file == "other.json")
    assert (entry.state, second.file in entry.problem) == ("corrupt", True)
    (tmp_path / first.data.file).unlink()
    assert states(tmp_path)[first.file] == "missing data"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": "tpcheck.golden/1"}, "golden.schema='tpcheck.golden/1'"),
        ({"address": "0" * 64}, "golden.address"),
        ({"weights": {}}, "golden.key.weights"),
        ({"config": {"hidden_size": 9}}, "golden.key.config"),
        ({"inputs": {}}, "golden.key.inputs"),
        ({"logits": {}}, "golden.logits"),
        ({"logits": {"A": 3}}, "golden.logits.A=3"),
        ({"full": "yes"}, "golden.full='yes'"),
        ({"together": [["s0-b2-t3"]]}, "golden.together[0]"),
        ({"error_count": -1.0}, "golden.error_count"),
        ({"data": {"file": "../x", "bytes": 1, "sha256": "0" * 64}}, "golden.data.file='../x'"),
        ({"data": {"file": "x", "bytes": -1, "sha256": "0" * 64}}, "golden.data.bytes=-1"),
        ({"data": {"file": "x", "bytes": 1, "sha256": "Z" * 64}}, "golden.data.sha256"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    golden, data = made()
    kept_in(tmp_path, golden, data)
    put(tmp_path, golden.file, forged(golden, **changes))
    entry = next(entry for entry in scan(tmp_path) if entry.file == golden.file)
    assert entry.state == ("unknown schema" if "schema" in changes else "corrupt")
    assert said in entry.problem


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"a":1,"a":2}', b"[" * 9999, b"\x80"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    assert states(tmp_path) == {"x.json": "corrupt"}


def test_data_made_by_hand_is_refused_although_its_digest_fits(tmp_path: Path) -> None:
    golden, data = made()
    tensors = load(data)
    shapes = {**tensors, "A.oracle.sums": torch.zeros(1, SUMS, dtype=torch.float64)}
    dtypes = {**tensors, "A.deployed.rms": tensors["A.deployed.rms"].float()}
    indices = {**tensors, "A.top.indices": tensors["A.top.indices"] + 1000}
    fewer = {name: one for name, one in tensors.items() if name != "A.top.oracle"}
    more = {**tensors, "B.top.oracle": tensors["A.top.oracle"].clone()}
    for forgery in (shapes, dtypes, indices, fewer, more):
        other = save(forgery)
        with pytest.raises(TPCheckError, match=r"safetensors: [AB]\."):
            unpack(other, with_data(golden, other))
    import pickle

    for other in (b"", b"not safetensors", pickle.dumps(torch.zeros)):
        with pytest.raises(TPCheckError, match="is no safetensors file"):
            unpack(other, with_data(golden, other))


def test_any_one_logit_moves_the_sketch_in_proportion() -> None:
    whole = logits(shape=(4, 5, 31))
    still = sketch(whole)
    scale = math.sqrt(31) * float(still.sums.square().mean().sqrt())
    for at in range(0, whole.numel(), 7):
        moved = whole.clone()
        moved.view(-1)[at] += 1e-6
        change = (sketch(moved).sums - still.sums).abs()
        position = at // 31
        sizes = sketch_weights(31)[at % 31].abs()
        assert torch.allclose(change[position] * math.sqrt(31), 1e-6 * sizes)
        assert int((change.sum(1) > 0).sum()) == 1
    assert scale > 0


def test_the_sketch_tells_how_far_apart_two_tensors_are() -> None:
    whole = logits(shape=(8, 16, 257))
    noise = 1e-3 * logits(1, (8, 16, 257))
    told = (sketch(whole + noise).sums - sketch(whole).sums).square().mean().sqrt()
    assert abs(float(told / noise.square().mean().sqrt()) - 1) < 0.1


def test_two_logits_that_change_places_are_seen() -> None:
    whole = logits(shape=(1, 1, 301))
    for other in range(1, 301):
        order = torch.arange(301)
        order[0], order[other] = other, 0
        assert not torch.equal(sketch(whole[..., order]).sums, sketch(whole).sums)


def test_what_is_not_finite_is_counted_and_hides_nothing_else() -> None:
    whole = logits(shape=(1, 2, 11))
    whole[0, 0, 3], whole[0, 0, 4], whole[0, 1, 5] = math.nan, math.inf, -math.inf
    made_ = sketch(whole)
    assert made_.strange.tolist() == [[1, 1, 0], [0, 0, 1]]
    assert bool(made_.sums.isfinite().all())
    other = whole.clone()
    other[0, 0, 0] += 1
    assert not torch.equal(sketch(other).sums[0], made_.sums[0])


def test_logits_that_change_places_are_seen_where_all_signs_agree() -> None:
    signs = sketch_weights(2000).sign()
    alike = ((signs @ signs.T) == SUMS).triu(1).nonzero().tolist()
    assert len(alike) > 10  # 2000 * 1999 / 2 pairs, one in 65,536
    for one, other in alike:
        whole = torch.zeros(1, 1, 2000, dtype=torch.float64)
        whole[..., one], whole[..., other] = 1.0, 1.5
        swapped = whole.clone()
        swapped[..., one], swapped[..., other] = 1.5, 1.0
        moved = (sketch(swapped).sums - sketch(whole).sums).abs().max() * math.sqrt(2000)
        assert float(moved) > 0.05


def test_weights_are_the_same_in_every_version() -> None:
    drawn = sketch_weights(5000)
    assert (drawn[:2, :4] * math.sqrt(38037.5)).round(decimals=9).tolist() == FIRST_WEIGHTS
    assert abs(float(drawn.mean())) < 0.02
    assert abs(float(drawn.square().mean()) - 1) < 0.01
    assert torch.equal(sketch_weights(7), drawn[:7])


FIRST_WEIGHTS = [[215.0, 190.0, 161.0, -239.0], [-128.0, -139.0, -251.0, 150.0]]


def test_chosen_positions_cover_first_and_last_of_every_row() -> None:
    for rows, length in ((1, 1), (2, 16), (8, 3), (100, 7)):
        chosen = chosen_positions((rows, length, 5), "key")
        assert {0, length - 1, rows * length - 1} <= set(chosen)
        assert max(chosen) < rows * length
        assert len(chosen) <= 24
        if rows <= 8:
            assert {row * length for row in range(rows)} <= set(chosen)
    assert chosen_positions((0, 4, 5), "key") == []
    assert chosen_positions((7,), "key") == [0]


def test_leftovers_are_passed_over_and_removed_by_the_next_writer(tmp_path: Path) -> None:
    golden, data = made()
    kept_in(tmp_path, golden, data)
    other, other_data = made(case_id="s1-b2-t3", oracle=logits(1))
    (tmp_path / other.data.file).write_bytes(other_data)
    (tmp_path / f".{golden.file}.{'0' * 32}.tmp").write_bytes(b"half")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    assert sorted(states(tmp_path).values()) == ["leftover", "ok", "temporary"]
    assert listing(tmp_path, None)["outcome"] == "BROKEN"
    prepare(tmp_path)
    assert set(states(tmp_path).values()) == {"ok"}
    assert (tmp_path / "README.md").exists()
    assert (tmp_path / "mine.safetensors").exists()
    assert listing(tmp_path, None)["outcome"] == "OK"


def test_the_data_of_a_manifest_that_cannot_be_read_is_no_leftover(tmp_path: Path) -> None:
    golden, data = made()
    kept_in(tmp_path, golden, data)
    (tmp_path / golden.file).write_bytes(b"{")
    assert states(tmp_path) == {golden.file: "corrupt"}
    prepare(tmp_path)
    assert (tmp_path / golden.data.file).exists()


def test_a_record_that_was_deleted_is_missed_by_its_siblings(tmp_path: Path) -> None:
    both = (("s0-b2-t3", "bfloat16"), ("s1-b2-t3", "bfloat16"))
    kept_in(tmp_path, *made(together=both))
    rows = listing(tmp_path, None)["records"]
    assert [(row["state"], row["case"]) for row in rows] == [
        ("ok", "s0-b2-t3"),
        ("missing", "s1-b2-t3"),
    ]
    assert listing(tmp_path, "other.py:build")["records"] == []
    assert listing(tmp_path, "other.py:build")["outcome"] == "BROKEN"  # nothing there is no pass


def test_a_full_disk_leaves_no_half_record(tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tests.golden_records import made, kept_in\n"
        "from tpcheck.errors import TPCheckError\n"
        "golden, data = made()\n"
        "limit = int(sys.argv[2])\n"
        "sys.dont_write_bytecode = True\n"  # half of a .pyc would stay there for everybody
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "try:\n    kept_in(Path(sys.argv[1]), golden, data)\n"
        "except TPCheckError as error:\n    print(error)\n"
    )
    golden, data = made()
    manifest = len(json.dumps(to_json(golden), indent=1))
    for limit in (100, manifest - 10 if manifest > len(data) else len(data) - 10):
        folder = tmp_path / str(limit)
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(limit)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "cannot be written: File too large" in done.stdout, done.stderr
        assert os.listdir(folder) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100


def test_a_folder_that_cannot_be_made_or_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/tpcheck")):
        with pytest.raises(TPCheckError, match="cannot be made"):
            prepare(folder)


def test_one_recorder_waits_for_another_and_then_says_so(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom tpcheck.golden.store import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(TPCheckError, match="another recorder has been writing to it"),
            locked(tmp_path, wait_s=0.1),
        ):
            pass
        other.kill()  # the kernel lets go of what a dead process held
    golden, data = made()
    with locked(tmp_path, wait_s=10):
        write(tmp_path, golden, data)
    assert states(tmp_path)[golden.file] == "ok"


def test_reading_lists_without_torch(tmp_path: Path) -> None:
    kept_in(tmp_path, *made())
    code = (
        "import sys\nfrom tpcheck.cli import main\n"
        f"sys.argv = ['tpcheck', 'golden', 'list', {str(tmp_path)!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OK: 1 record in")


def test_a_manifest_survives_json(tmp_path: Path) -> None:
    golden, _ = made()
    assert from_json(json.loads(json.dumps(to_json(golden)))) == golden


@settings(max_examples=150)
@given(draw=st.data())
def test_a_forged_manifest_is_read_or_refused_and_never_crashes(draw: st.DataObject) -> None:
    golden, _ = made()
    value: Any = to_json(golden)
    value.pop("checksum")
    at = value
    while True:  # anywhere in it, another value or none
        keys = list(at) if isinstance(at, dict) else range(len(at))
        key = draw.draw(st.sampled_from(list(keys)))
        inner = at[key]
        if not (isinstance(inner, (dict, list)) and inner and draw.draw(st.booleans())):
            break
        at = inner
    if draw.draw(st.booleans()):
        del at[key]
    else:
        others = (None, True, -1, 2**70, 1e308, "x", "../x", [], {}, [[]], ["s", "t"], {"a": {}})
        at[key] = draw.draw(st.sampled_from(others))
    with contextlib.suppress(TPCheckError):
        from_json(value | {"checksum": sha256_of(value)})
