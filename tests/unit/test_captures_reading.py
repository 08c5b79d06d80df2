"""Captures as they lie on disks: every way to name ranks is read, and what is wrong with one file
is a finding beside the others, never a crash, a hang or an unpickling.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import tpcheck
from tpcheck.captures.order import in_order, natural_key
from tpcheck.captures.reading import read_capture
from tpcheck.captures.tensors import stored
from tpcheck.errors import TPCheckError
from tpcheck.header_check.headers import read_header
from tpcheck.records import Report

W = torch.arange(12.0).reshape(4, 3)
HALVES = (W[:2].contiguous(), W[2:].contiguous())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """EXPECTED as a file, ACTUAL as a folder with a file per rank."""
    save_file({"w": W, "s": torch.ones(2)}, tmp_path / "expected.safetensors")
    (tmp_path / "actual").mkdir()
    for rank, half in enumerate(HALVES):
        path = tmp_path / "actual" / f"rank{rank}.safetensors"
        save_file({"w": half, "s": torch.ones(2)}, path)
    return tmp_path


def diff(folder: Path, **options: Any) -> Report:
    return tpcheck.diff(folder / "expected.safetensors", folder / "actual", **options)


def outcomes(report: Report) -> dict[str, str]:
    return {verdict.case_id: verdict.outcome for verdict in report.verdicts}


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (("rank0.safetensors", "rank_1.safetensors"), None),
        (("tp2-rank0.safetensors", "tp2-rank1.safetensors"), None),
        (("rank0/a.safetensors", "rank1/a.safetensors"), None),
        (("mp_rank_00/model.safetensors", "mp_rank_01/model.safetensors"), None),
        (("model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors"), None),
        (("gpu0.safetensors", "gpu1.safetensors"), r"gpu(\d+)"),
        (("tp_rank_0_pp_rank_0.safetensors", "tp_rank_1_pp_rank_0.safetensors"), r"tp_rank_(\d+)"),
    ],
)
def test_ranks_are_told_from_names(names: Any, pattern: str | None, tmp_path: Path) -> None:
    for name, half in zip(names, HALVES, strict=True):
        (tmp_path / "actual" / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"w": half}, tmp_path / "actual" / name)
    report = tpcheck.diff({"w": W}, tmp_path / "actual", rank_pattern=pattern)
    assert outcomes(report) == {"w": "PASS"}
    assert report.verdicts[0].tp_size == 2


def test_files_without_a_rank_are_one_ranks(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        save_file({name: W + i}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    index = {"weight_map": {n: f"model-0000{i}-of-00002.safetensors" for i, n in enumerate("ab")}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert outcomes(tpcheck.diff({"a": W, "b": W + 1}, tmp_path)) == {"a": "PASS", "b": "PASS"}
    index["weight_map"]["c"] = "model-00000-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    report = tpcheck.diff({"a": W, "b": W + 1, "c": W}, tmp_path)
    assert outcomes(report)["c"] == "WRONG"
    assert "according to" in report.verdicts[2].reasons[0]
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "ERROR" in outcomes(tpcheck.diff({"a": W, "b": W + 1}, tmp_path)).values()


def test_a_folder_of_ranks_can_be_read_as_one(tmp_path: Path) -> None:
    save_file({"a": W}, tmp_path / "rank0.safetensors")
    save_file({"b": W}, tmp_path / "rank1.safetensors")
    report = tpcheck.diff({"a": W, "b": W}, tmp_path, rank_pattern="none")
    assert (report.outcome, report.verdicts[0].tp_size) == ("PASS", 1)


@pytest.mark.parametrize(
    ("names", "pattern", "message"),
    [
        (["tp_rank_0_pp_rank_1.safetensors"], None, "holds several ranks, .0, 1."),
        (["rank0.safetensors", "all.safetensors"], None, "is named after a rank, all.safetensors"),
        (["rank0.safetensors"], "rank", "has 0 groups, but should have one"),
        (["rank0.safetensors"], "rank(", "is no regular expression"),
        (["rank99999999.safetensors"], None, "ranks go up to 65536"),
        (["weights.pt"], None, "weights.pt is a pickle: where you trust it, write it anew"),
        (["notes.txt"], None, "no .*safetensors file is there"),
    ],
)
def test_a_capture_that_cannot_be_understood_is_the_users_mistake(
    names: list[str], pattern: str | None, message: str, tmp_path: Path
) -> None:
    for name in names:
        save_file({"w": W}, tmp_path / name)
    with pytest.raises(TPCheckError, match=message):
        tpcheck.diff({"w": W}, tmp_path, rank_pattern=pattern)


@pytest.mark.parametrize("name", ["nothing", "x.pt", "x.txt", "pipe.safetensors"])
def test_a_path_that_is_no_capture_is_the_users_mistake(name: str, tmp_path: Path) -> None:
    if name == "pipe.safetensors":
        os.mkfifo(tmp_path / name)
    elif name != "nothing":
        (tmp_path / name).write_bytes(pickle.dumps({"w": [1]}))
    with pytest.raises(TPCheckError, match=name):
        tpcheck.diff({"w": W}, tmp_path / name)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda data: b"", "0 bytes, but should begin with"),
        (lambda data: data[:6], "6 bytes, but should begin with"),
        (lambda data: data[:40], "it is cut short"),
        (lambda data: data[:-1], "it is cut short"),
        (lambda data: data + b"x", "something stands behind them"),
        (lambda data: struct.pack("<Q", 2**63) + data[8:], "it is cut short"),
        (lambda data: data.replace(b'"F32"', b'"F99"'), "dtype='F99'"),
        (lambda data: data.replace(b'"F32"', b'"F32 '), "its header is not JSON"),
        (lambda data: pickle.dumps(os.system), "header"),
    ],
)
def test_a_damaged_file_is_a_finding_that_names_rank_and_file(
    damage: Any, text: str, folder: Path
) -> None:
    path = folder / "actual" / "rank1.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    report = diff(folder)
    found = outcomes(report)
    assert found.pop(f"ACTUAL {path.parent / path.name}") == "ERROR"
    reason = report.verdicts[0].reasons[0]
    assert reason.startswith("capture: rank 1: ")
    assert text in reason
    assert found == {"s": "WRONG", "w": "WRONG"}
    lacking = [v.checks["tiling"].reason for v in report.verdicts[1:]]
    assert all(one.startswith("rank 1 recorded no such tensor") for one in lacking)


def test_a_damaged_expected_file_does_not_make_everything_extra(folder: Path) -> None:
    (folder / "expected.safetensors").write_bytes(b"12345678")
    assert list(outcomes(diff(folder)).values()) == ["ERROR"]


def test_no_regular_file_is_ever_opened(folder: Path) -> None:
    os.mkfifo(folder / "actual" / "rank2.safetensors")
    (folder / "actual" / "rank3.safetensors").symlink_to("rank3.safetensors")
    (folder / "actual" / "rank4.safetensors").mkdir()
    found = [v.reasons[0] for v in diff(folder).verdicts if v.outcome == "ERROR"]
    assert [one.partition(": rank ")[2][:1] for one in found] == ["2", "3", "4"]
    assert all("is no regular file" in one for one in found)


def test_a_file_that_becomes_shorter_while_it_is_read_is_a_finding(folder: Path) -> None:
    path = folder / "expected.safetensors"
    tensor = stored(path, read_header(path)["w"])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TPCheckError, match="became shorter while it was read"):
        tensor.read(0, 12)


def test_a_tensor_in_two_files_of_a_rank_is_a_finding(folder: Path) -> None:
    save_file({"w": HALVES[0]}, folder / "actual" / "rank0-more.safetensors")
    report = diff(folder)
    assert outcomes(report) == {"s": "PASS", "w": "WRONG"}
    assert "which one counts is not known" in report.verdicts[1].reasons[0]


def test_ranks_that_no_name_tells_ask_for_a_pattern(folder: Path) -> None:
    for rank in (0, 1):
        (folder / "actual" / f"rank{rank}.safetensors").rename(
            folder / "actual" / f"tp{rank}.safetensors"
        )
    report = diff(folder)
    assert report.outcome == "WRONG"
    assert "if each is a rank's, say which with --rank-pattern" in report.verdicts[0].reasons[0]
    assert diff(folder, rank_pattern=r"tp(\d+)").outcome == "PASS"


def test_ranks_that_left_no_file_are_named(folder: Path) -> None:
    (folder / "actual" / "rank1.safetensors").rename(folder / "actual" / "rank3.safetensors")
    report = diff(folder)
    assert report.verdicts[0].reasons[0] == (
        "capture: no file of rank 1, 2, but 4 ranks should have recorded"
    )
    more = diff(folder, tp_size=5).verdicts[0].reasons[0]
    assert more == "capture: no file of rank 1, 2, 4, but 5 ranks should have recorded"


def test_the_degree_in_the_metadata_or_asked_for_catches_a_lost_last_rank(folder: Path) -> None:
    (folder / "actual" / "rank1.safetensors").unlink()
    same = {"s": torch.ones(2)}
    save_file(same, folder / "actual" / "rank0.safetensors")
    save_file(same, folder / "expected.safetensors")
    assert diff(folder).outcome == "PASS"
    assert diff(folder, tp_size=2).outcome == "WRONG"
    save_file(same, folder / "actual" / "rank0.safetensors", metadata={"tp_size": "2"})
    assert "rank 1: no file of rank 1" in diff(folder).verdicts[0].reasons[0]


def test_files_of_an_older_run_at_another_degree_are_a_finding(folder: Path) -> None:
    same, actual = {"s": torch.ones(2)}, folder / "actual"
    save_file(same, folder / "expected.safetensors")
    for rank in range(4):  # a copy that is right says nothing of the run that left it there
        metadata = {"tp_size": "2"} if rank < 2 else None
        save_file(same, actual / f"rank{rank}.safetensors", metadata=metadata)
    assert diff(folder).verdicts[0].reasons == (
        "capture: recorded at tp_size=2 by their own words, by ranks up to 3: files of different"
        " runs",
    )
    for rank in range(4):
        metadata = {"tp_size": "2" if rank < 2 else "4"}
        save_file(same, actual / f"rank{rank}.safetensors", metadata=metadata)
    assert "recorded at tp_size=2 and 4 by" in diff(folder).verdicts[0].reasons[0]
    for rank in range(4):
        save_file(same, actual / f"rank{rank}.safetensors", metadata={"tp_size": "4"})
    assert diff(folder).outcome == "PASS"


def test_a_file_that_would_be_passed_over_is_an_error(folder: Path) -> None:
    deep = folder / "actual" / "rank0" / "layers"
    deep.mkdir(parents=True)
    save_file({"extra": torch.ones(2)}, deep / "more.safetensors")
    with pytest.raises(TPCheckError, match=r"rank0/layers/more.safetensors lies deeper than one"):
        diff(folder)


def test_a_capture_held_against_itself_says_so(folder: Path) -> None:
    path = folder / "expected.safetensors"
    (folder / "link.safetensors").symlink_to(path)
    report = tpcheck.diff(path, folder / "link.safetensors")
    assert report.outcome == "PASS"
    assert report.notes == (f"{path} is on both sides: it was compared with itself",)
    assert diff(folder).notes == ()


def test_more_ranks_than_asked_for_is_a_finding(folder: Path) -> None:
    report = diff(folder, tp_size=1)
    assert report.verdicts[0].reasons == ("capture: ranks that recorded: 2, but should be --tp 1",)


def test_one_ranks_file_alone_is_not_taken_for_the_whole(folder: Path) -> None:
    same = {"s": torch.ones(2)}
    path = folder / "actual" / "rank1.safetensors"
    save_file(same, path, metadata={"tp_size": "2"})
    report = tpcheck.diff(same, path)
    assert report.verdicts[0].outcome == "ERROR"
    assert "recorded at tp_size=2 by its own words" in report.verdicts[0].reasons[0]
    assert tpcheck.diff(same, path, rank_pattern="none").outcome == "PASS"
    assert tpcheck.diff(same, same, tp_size=2).verdicts[0].reasons == (
        "capture: ranks that recorded: 1, but should be --tp 2",
    )


def test_the_order_that_a_recorder_wrote_is_kept(folder: Path) -> None:
    tensors = {"w": W, "s": torch.ones(2)}
    for order, names in (('["w", "s"]', ["w", "s"]), ("[1]", ["s", "w"]), ("{", ["s", "w"])):
        save_file(tensors, folder / "expected.safetensors", metadata={"order": order})
        assert list(outcomes(diff(folder))) == names


def test_a_pickle_beside_captures_is_left_alone_and_mentioned(folder: Path) -> None:
    (folder / "actual" / "state.pt").write_bytes(b"x")
    assert any("state.pt is not read: a pickle can run code" in one for one in diff(folder).notes)


def test_elements_narrower_than_a_byte_are_compared_as_bytes(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}}
    text = json.dumps(header).encode()
    for name, data in (("a", b"abc"), ("b", b"abd")):
        whole = struct.pack("<Q", len(text)) + text + data
        (tmp_path / f"{name}.safetensors").write_bytes(whole)
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert tpcheck.diff(a, a).outcome == "PASS"
    assert tpcheck.diff(a, b).outcome == "WRONG"
    assert tpcheck.diff(a, {"w": torch.zeros(2, 3)}).outcome == "WRONG"


def test_a_shape_that_no_memory_holds_is_compared_where_it_has_no_elements(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    path = tmp_path / "a.safetensors"
    assert outcomes(tpcheck.diff(path, path)) == {"w": "PASS", "(everything)": "INCONCLUSIVE"}


OPENED: list[str] = []
_WATCHING = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _WATCHING and (event == "pickle.find_class" or event in ("exec", "compile")):
        OPENED.append(event)


@pytest.mark.filterwarnings("error")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_to_a_file_crashes_a_reader_or_unpickles(
    folder: Path, data: st.DataObject
) -> None:
    global _WATCHING
    whole = (folder / "expected.safetensors").read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    at = data.draw(st.integers(0, max(0, cut - 1)))
    some = data.draw(st.binary(max_size=12))
    damaged = whole[:at] + some + whole[min(cut, at + len(some)) : cut]
    (folder / "actual" / "rank1.safetensors").write_bytes(damaged)
    sys.addaudithook(_watch) if not hasattr(_watch, "there") else None
    _watch.there = True  # type: ignore[attr-defined]
    _WATCHING = True
    try:
        report = diff(folder)
    finally:
        _WATCHING = False
    assert report.outcome != "PASS"  # rank 1 holds half of w, this is all of it or damaged
    assert OPENED == []


def test_names_are_ordered_by_the_numbers_in_them() -> None:
    names = ["layers.10.b", "layers.2.a", "layers.2", "embed", "layers.010.b", "7"]
    found = sorted(names, key=natural_key)
    assert found == ["7", "embed", "layers.2", "layers.2.a", "layers.10.b", "layers.010.b"]


@pytest.mark.parametrize(
    ("stack", "layer", "around"),
    [
        (
            "model.layers",
            "input_layernorm self_attn.q_proj self_attn.rotary_emb self_attn.o_proj self_attn"
            " post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.act_fn mlp.down_proj mlp",
            "model.embed_tokens {} model.norm model lm_head",
        ),
        (
            "transformer.h",
            "ln_1 attn.c_attn attn.c_proj attn ln_2 mlp.c_fc mlp.act mlp.c_proj mlp",
            "transformer.wte {} transformer.ln_f lm_head",
        ),
        (
            "decoder.layers",
            "input_layernorm self_attention.linear_qkv self_attention.core_attention"
            " self_attention.linear_proj self_attention pre_mlp_layernorm mlp.linear_fc1"
            " mlp.linear_fc2 mlp",
            "embedding.word_embeddings {} decoder.final_layernorm output_layer",
        ),
        (
            "model.layers",
            "self_attn.qkv_proj self_attn.q_norm self_attn.attn self_attn.o_proj mlp.gate"
            " mlp.experts.0.gate_up_proj mlp.experts.0.down_proj mlp.experts.1 mlp",
            "model.embed_tokens {} model.norm logits",
        ),
    ],
    ids=["Llama", "GPT-2", "Megatron", "experts"],
)
def test_without_an_order_names_stand_as_a_decoder_runs(
    stack: str, layer: str, around: str
) -> None:
    layers = [f"{stack}.{i}" for i in (2, 10)]
    inner = [name for one in layers for name in (*(f"{one}.{n}" for n in layer.split()), one)]
    names = around.format(" ".join(inner)).split()
    assert in_order(sorted(names), ()) == (names, [])


def test_where_the_order_was_guessed_from_names_the_report_says_so(folder: Path) -> None:
    save_file({"mlp.up_proj": W, "mlp.down_proj": W.clone()}, folder / "expected.safetensors")
    for rank in (0, 1):
        wrong = {"mlp.up_proj": W + 1, "mlp.down_proj": W + 2}
        save_file(wrong, folder / "actual" / f"rank{rank}.safetensors")
    first, _ = (report := diff(folder)).verdicts
    assert first.case_id == "mlp.up_proj"
    assert first.first_divergence is not None
    assert any("--order" in note for note in report.notes)
    told = diff(folder, order=["mlp.down_proj", "mlp.up_proj"])
    assert not any("--order" in note for note in told.notes)
    assert told.verdicts[0].case_id == "mlp.down_proj"


def test_a_name_goes_before_patterns_and_the_rest_comes_last() -> None:
    lines = (r"layers\.\d+", "layers.1", "nothing")
    found, unused = in_order(["a", "layers.1", "layers.0"], lines)
    assert found == ["layers.0", "layers.1", "a"]
    assert unused == ["nothing"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# a\n\n", "is empty"),
        ("a\n(\n", "line 2='[(]', but should be a regular"),
    ],
)
def test_an_order_file_without_an_order_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "order.txt").write_text(text)
    with pytest.raises(TPCheckError, match=message):
        tpcheck.diff({"w": W}, {"w": W}, order=tmp_path / "order.txt")


def test_what_is_no_tensor_is_refused() -> None:
    for bad in (torch.ones(2).to_sparse(), torch.ones(2, device="meta"), [1.0]):
        with pytest.raises(TPCheckError, match="should be a dense tensor with values"):
            read_capture({"w": bad})  # type: ignore[dict-item]
    with pytest.raises(TPCheckError, match="a capture of no ranks"):
        read_capture([])
