"""What `tpcheck diff` prints, in full, and its exit codes, files and streams."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import save_file

from tpcheck.cli import main
from tpcheck.report import read_report

Diff = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TP=1, and TP=2 with rank 1's piece of one weight off and one sum that rank 0 scaled."""
    folder = tmp_path_factory.mktemp("captures")
    (folder / "actual").mkdir()
    one = {
        "layers.2.up_proj": torch.arange(24.0).reshape(2, 12) + 1,
        "layers.10.up_proj": torch.arange(24.0).reshape(2, 12) + 1,
        "layers.2.down_proj": torch.arange(40.0).reshape(4, 10).cos(),
        "ids": torch.arange(4),
    }
    ranks: list[dict[str, torch.Tensor]] = [{}, {}]
    term = torch.arange(40.0).reshape(4, 10).sin()
    for rank in (0, 1):
        for name in ("layers.2.up_proj", "layers.10.up_proj"):
            ranks[rank][name] = one[name].chunk(2, 1)[rank].clone()
        sign = 1 - 2 * rank
        ranks[rank]["layers.2.down_proj"] = one["layers.2.down_proj"] / 2 + sign * term
        ranks[rank]["ids"] = one["ids"].clone()
    save_file(one, folder / "expected.safetensors")
    for rank in (0, 1):
        (folder / "good").mkdir(exist_ok=True)
        save_file(ranks[rank], folder / "good" / f"rank{rank}.safetensors")
    ranks[1]["layers.2.up_proj"][1, 2] += 0.5
    ranks[0]["layers.2.down_proj"] *= 1.25
    ranks[0]["rotary.cache"] = torch.ones(1)
    for rank in (0, 1):
        save_file(ranks[rank], folder / "actual" / f"rank{rank}.safetensors")
    return folder


@pytest.fixture
def diff(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the command in this process; return its stdout without the versions, or its stderr."""

    def run(*arguments: str, exit_code: int, where: Path = folder) -> str:
        monkeypatch.chdir(where)
        monkeypatch.setattr(sys, "argv", ["tpcheck", "diff", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        out, errors = capfd.readouterr()
        assert end.value.code == exit_code, out + errors
        assert "Traceback" not in errors
        if exit_code == 2:
            assert out == ""
            return errors
        assert errors == ""
        return re.sub(r"torch \S+ · python \S+ · tpcheck \S+", "(versions)", out)

    return run


def test_two_captures_that_agree(diff: Diff) -> None:
    assert diff("expected.safetensors", "good", exit_code=0) == dedent("""\
        PASS: 4 tensors agree
        expected.safetensors against good  tp 2 · recorded files, nothing was run
        4 tensors: 3 bit for bit, 1 within their tolerance

        tensor              ranks hold      outcome    off / elements    worst     ulp    atol
                                                                         error            needed
        ------------------  --------------  ---------  ----------------  --------  -----  --------
        ids                 Replicate()     PASS       0 / 8             0         0      0
        layers.2.up_proj    Shard(dim=1)    PASS       0 / 24            0         0      0
        layers.2.down_proj  Partial("sum")  PASS       0 / 40            5.96e-08  1      5.99e-08
        layers.10.up_proj   Shard(dim=1)    PASS       0 / 24            0         0      0

        smallest  tolerance for all values, one of: atol=5.99e-08, rtol=3.86e-06, max_ulp=55, relative_rms=4.92e-08
        layout    Replicate() chosen by sizes (in 1 tensor)
        layout    Shard(dim=1) chosen by sizes (in 2 tensors)
        layout    Partial("sum") chosen by values (in 1 tensor)
        ran on    (versions)
        note      layers.2.down_proj: passed as terms of a sum, because their values add up; where each rank should hold the sum, an all-reduce is missing: say replicated in a shard map
        """)  # noqa: E501


def test_two_that_do_not(diff: Diff) -> None:
    assert diff("expected.safetensors", "actual", exit_code=1) == dedent("""\
        WRONG: 3 of 5 tensors do not agree; first layers.2.up_proj, rank 1, at [1, 8]
        expected.safetensors against actual  tp 2 · recorded files, nothing was run
        5 tensors: 2 bit for bit, 3 not

        tensor              ranks hold      outcome    off / elements    worst    ulp       atol      rank
                                                                         error              needed
        ------------------  --------------  ---------  ----------------  -------  --------  --------  ------
        rotary.cache                        WRONG
        ids                 Replicate()     PASS       0 / 8             0        0         0
        layers.2.up_proj    Shard(dim=1)    DRIFT      1 / 24            0.5      2.62e+05  0.5       1
        layers.2.down_proj  Partial("sum")  DRIFT      40 / 40           0.279    9.37e+06  0.281     0
        layers.10.up_proj   Shard(dim=1)    PASS       0 / 24            0        0         0

        WRONG  rotary.cache tp=2 float32
          capture: extra: ACTUAL holds it, EXPECTED does not
          repro: tpcheck diff expected.safetensors actual
          next:  record the same tensors, in the same dtype, on both sides

        DRIFT  layers.2.up_proj tp=2 float32
          allclose: 1 of 24 elements have other bits (no tolerance was given) on rank 1
            worst at [1, 8]: actual=21.5, but should be 21, 2.621e+05 ulp
          first     layers.2.up_proj, rank 1, at [1, 8], 2.62e+05 ulp
          layout    Shard(dim=1), chosen by sizes
          smallest  tolerance that passes, one of: atol=0.5, rtol=0.0239, max_ulp=2.63e+05, relative_rms=0.00718
          repro: tpcheck diff expected.safetensors actual
          next:  if parts are fused or ranks stand in another order there, say so with --shard-map

        DRIFT  layers.2.down_proj tp=2 float32
          allclose: 40 of 40 elements are off by more than rounding can explain ((ranks + 1) u sum|term|, Higham 2002
            section 4.2); rank 0's term is 1.25 times what it should be
            worst at [2, 0]: actual=0.687328577, but should be 0.408082068, 9.37e+06 ulp
          layout    Partial("sum"), chosen by values
          smallest  tolerance that passes, one of: atol=0.281, rtol=56.4, max_ulp=5.36e+08, relative_rms=0.281
          repro: tpcheck diff expected.safetensors actual
          next:  look at what that rank does there: rounding does not look like this

        smallest  tolerance for all values, one of: atol=0.5, rtol=56.4, max_ulp=5.36e+08, relative_rms=0.281
        layout    Replicate() chosen by sizes (in 1 tensor)
        layout    Shard(dim=1) chosen by sizes (in 2 tensors)
        layout    Partial("sum") chosen by values (in 1 tensor)
        ran on    (versions)
        note      no file says in which order tensors were made: they stand as a decoder's names run, and the first that differs is the first of those; --order says it otherwise
        """)  # noqa: E501


def test_a_shard_map_a_tolerance_file_and_an_order(folder: Path, diff: Diff) -> None:
    (folder / "map.toml").write_text(
        "[[shard]]\nmatch = '.*up_proj'\nlayout = 'concat'\ndim = 'features'\n"
        "dims = ['tokens', 'features']\n\n"
        "[[shard]]\nmatch = '.*down_proj'\nlayout = 'partial-sum'\n"
    )
    (folder / "tolerance.toml").write_text(
        "[[tolerance]]\nmatch = '.*down_proj'\nrelative_rms = 0.5\n\n"
        "[[tolerance]]\nmatch = '.*norm'\natol = 1e-3\n\n"
        "[[tolerance]]\nmatch = '.*'\natol = 0.5\n"
    )
    (folder / "order.txt").write_text("# as the model runs\n.*up_proj\n.*down_proj\n")
    rules = ["--shard-map", "map.toml", "--tolerance", "tolerance.toml", "--order", "order.txt"]
    assert diff("expected.safetensors", "actual", *rules, exit_code=1) == dedent("""\
        WRONG: 1 of 5 tensors does not agree; first rotary.cache: extra: ACTUAL holds it, EXPECTED does not
        expected.safetensors against actual  tp 2 · recorded files, nothing was run
        5 tensors: 2 bit for bit, 2 within their tolerance, 1 not

        tensor              ranks hold      outcome    off / elements    worst    ulp       atol
                                                                         error              needed
        ------------------  --------------  ---------  ----------------  -------  --------  --------
        layers.2.up_proj    Shard(dim=1)    PASS       0 / 24            0.5      2.62e+05  0.5
        layers.10.up_proj   Shard(dim=1)    PASS       0 / 24            0        0         0
        layers.2.down_proj  Partial("sum")  PASS       0 / 40            0.279    9.37e+06  0.281
        rotary.cache                        WRONG
        ids                 Replicate()     PASS       0 / 8             0        0         0

        WRONG  rotary.cache tp=2 float32
          capture: extra: ACTUAL holds it, EXPECTED does not
          repro: tpcheck diff expected.safetensors actual --shard-map map.toml --tolerance tolerance.toml --order order.txt
          next:  record the same tensors, in the same dtype, on both sides

        smallest  tolerance for all values, one of: atol=0.5, rtol=56.4, max_ulp=5.36e+08, relative_rms=0.281
        layout    Replicate() chosen by sizes (in 1 tensor)
        ran on    (versions)
        note      tolerance.toml: tolerance[1] ('.*norm') is used by no tensor
        """)  # noqa: E501


def test_every_file_is_written_and_the_report_is_read_back(folder: Path, diff: Diff) -> None:
    outputs = ["--json", "r.json", "--jsonl", "l.jsonl", "--html", "p.html", "--junit", "j.xml"]
    both = ("expected.safetensors", "actual")
    diff(*both, *outputs, "--markdown", "m.md", "--quiet", exit_code=1)
    report = read_report(folder / "r.json")
    lines = [json.loads(line) for line in (folder / "l.jsonl").read_text().splitlines()]
    assert [line["tensor"] for line in lines] == [v.case_id for v in report.verdicts]
    assert [line["outcome"] for line in lines] == [v.outcome for v in report.verdicts]
    page = (folder / "p.html").read_text()
    assert "<script" not in page
    assert all(v.case_id in page for v in report.verdicts)
    assert "layers.2.down_proj" in (folder / "m.md").read_text().replace("\\", "")
    assert 'failures="3"' in (folder / "j.xml").read_text()


def test_lines_can_be_streamed_and_stand_alone_on_stdout(diff: Diff) -> None:
    text = diff("expected.safetensors", "actual", "--jsonl", "-", exit_code=1)
    lines = [json.loads(line) for line in text.splitlines()]
    assert {"tensor", "outcome", "rank", "required_atol"} <= set(lines[-1])
    diff("expected.safetensors", "good", "--json", "-", "--jsonl", "lines.jsonl", exit_code=0)


def test_markup_and_control_characters_in_a_name_stay_text(tmp_path: Path, diff: Diff) -> None:
    name = "<b>\x1b[2J</b>\nPASS: 1 tensor agrees"
    save_file({name: torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({name: torch.zeros(2)}, tmp_path / "b.safetensors")
    text = diff("a.safetensors", "b.safetensors", "--html", "p.html", exit_code=1, where=tmp_path)
    page = (tmp_path / "p.html").read_text()
    assert "\x1b" not in text + page
    assert not any(line.startswith("PASS") for line in text.splitlines())
    assert "<b>" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.safetensors", "good"], "error: no.safetensors: is not there, but should be a"),
        (["good", "empty"], "error: empty: no *.safetensors file is there"),
        (["expected.safetensors", "w.pt"], "error: w.pt: is not read: a pickle can run code; w.pt"),
        (["good", "good", "--tolerance", "no.toml"], "error: no.toml: cannot be read: No such"),
        (["good", "good", "--tolerance", "bad.toml"], "error: bad.toml: has no catch-all"),
        (["good", "good", "--order", "no.txt"], "error: no.txt: cannot be read: No such file"),
        (["good", "good", "--atol", "-1"], "error: --atol=-1.0, but should be a finite number"),
        (["good", "good", "--atol", "1", "--oracle", "good"], "error: --oracle and --atol cannot"),
        (["good", "good", "--jsonl", "x", "--html", "x"], "error: --jsonl=x, but should differ"),
        (["good", "good", "--jsonl", "-", "--json", "-"], "error: --jsonl=-, but should differ"),
        (["good", "good", "--jsonl", "no/x"], "error: no/x: cannot be written: No such file"),
        (["good", "good", "--tp", "0"], "--tp"),
        (["good"], "ACTUAL"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    arguments: list[str], message: str, folder: Path, diff: Diff
) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "w.pt").write_bytes(b"")
    (folder / "bad.toml").write_text("[[tolerance]]\nmatch = 'a'\natol = 1\n")
    assert message in diff(*arguments, exit_code=2)
    assert not (folder / "x").exists()
