"""The text report in full, for one failing and one passing run: what users read, to the letter."""

from dataclasses import replace
from textwrap import dedent

from tpcheck.records import Check, FirstDivergence, Path, Report, Verdict
from tpcheck.render.html import render_html
from tpcheck.render.markdown import render_markdown
from tpcheck.render.text import render_text

GLOO = Path("gloo", {"all_reduce": 4}, False, ("backend gloo, not nccl",))
SOURCE = "1e-12: no cast narrower than float64"
ENVIRONMENT = {"torch": "2.13.0", "python": "3.11.7", "device": "cpu"}
SKIPPED = Check("SKIPPED", "the subject exposes no shards")


def passing(tp_size: int) -> Verdict:
    checks = {
        "plan": Check("PASS"),
        "structural": Check("PASS", "", {"relative_rms": 1.234e-15, "limit": 1e-12}),
        "drift": Check("PASS", "", {"ratio": 1.1, "expected": 1.05, "limit": 3.0}),
        "allclose": Check("FAIL", "outside", {"required_atol": 0.0312, "source": "derived"}),
        "tiling": SKIPPED,
    }
    return Verdict("s7-b2-t16", tp_size, "bfloat16", "PASS", checks)


def wrong() -> Verdict:
    structural = {"dtype": "float64", "limit": 1e-12, "source": SOURCE, "relative_rms": 0.24}
    drift = {"expected": 1.8, "ratio": 31.0, "limit": 3.0, "epsilons": 27.5}
    allclose = {"atol": 0.01, "rtol": 0.01, "required_atol": 0.61, "source": "user"}
    reason = "A: relative_rms=0.24, but should be at most 1e-12; worst at [0, 5, 33]: 1 for 2"
    checks = {
        "plan": Check("PASS"),
        "structural": Check("FAIL", reason, structural),
        "drift": Check("FAIL", "error is 31 x that of TP=1", drift),
        "allclose": Check("FAIL", "outside", {**allclose, "decides": True}),
        "tiling": SKIPPED,
    }
    return Verdict(
        "s7-b2-t16",
        4,
        "bfloat16",
        "WRONG",
        checks,
        (f"structural: {reason}", "drift: error is 31 x that of TP=1", "allclose: outside"),
        FirstDivergence("layers.0.self_attn.o_proj", 3, "[0, 5, 32:64]", 16.0),
        "tpcheck run models.py:build --tp 4 --seed 7 --case s7-b2-t16",
    )


def test_a_wrong_subject() -> None:
    report = Report("models.py:build", (passing(2), wrong()), ENVIRONMENT, GLOO, "0.1.0")
    assert render_text(report) == dedent("""\
        WRONG: not the same function; deployed path not exercised: nccl
        models.py:build  tp 2, 4 · bfloat16 · gloo
        2 verdicts: 1 WRONG, 1 PASS

        case       tp    dtype     outcome    structural        drift                 atol      failed
                                              / limit           (expected) / limit    needed
        ---------  ----  --------  ---------  ----------------  --------------------  --------  --------------------
        s7-b2-t16  2     bfloat16  PASS       1.23e-15 / 1e-12  1.1 (1.05) / 3        0.0312
        s7-b2-t16  4     bfloat16  WRONG      0.24 / 1e-12      31 (1.8) / 3          0.61      structural, drift +1

        WRONG  s7-b2-t16 tp=4 bfloat16
          structural: A: relative_rms=0.24, but should be at most 1e-12; worst at [0, 5, 33]: 1 for 2
          drift: error is 31 x that of TP=1
          allclose: outside
          first       layers.0.self_attn.o_proj, rank 3, at [0, 5, 32:64], 16 ulp
          structural  relative rms 0.24, limit 1e-12 in float64 (1e-12: no cast narrower than float64)
          drift       ratio 31, expected 1.8, limit 3, epsilons 27.5
          allclose    required atol 0.61, atol 0.01, rtol 0.01 (user)
          repro: tpcheck run models.py:build --tp 4 --seed 7 --case s7-b2-t16
          next:  compare layers.0.self_attn.o_proj on rank 3 with what TP=1 does there

        skipped       tiling: the subject exposes no shards (in 2 verdicts)
        path          gloo · 4 all_reduce
        not deployed  backend gloo, not nccl
        ran on        torch 2.13.0 · python 3.11.7 · device cpu · tpcheck 0.1.0""")  # noqa: E501


def test_a_passing_subject() -> None:
    report = Report("models.py:build", (passing(2),), ENVIRONMENT, GLOO, "0.1.0")
    assert render_text(report) == dedent("""\
        PASS (structure); deployed path not exercised: nccl
        models.py:build  tp 2 · bfloat16 · gloo
        1 verdict: 1 PASS

        case       tp    dtype     outcome    structural        drift                 atol
                                              / limit           (expected) / limit    needed
        ---------  ----  --------  ---------  ----------------  --------------------  --------
        s7-b2-t16  2     bfloat16  PASS       1.23e-15 / 1e-12  1.1 (1.05) / 3        0.0312

        skipped       tiling: the subject exposes no shards (in 1 verdict)
        path          gloo · 4 all_reduce
        not deployed  backend gloo, not nccl
        ran on        torch 2.13.0 · python 3.11.7 · device cpu · tpcheck 0.1.0""")


def test_a_pass_with_a_remark_shows_it_in_every_rendering() -> None:
    remark = "ERROR in simulation but PASS on gloo: the subject shares process state"
    verdicts = [replace(passing(size), reasons=(f"{remark}\nmore",)) for size in (2, 4)]
    report = Report("models.py:build", tuple(verdicts), ENVIRONMENT, GLOO, "0.1.0")
    shown = f"\n\nremark        {remark} (in 2 verdicts)\nskipped       tiling: the subject"
    assert shown in render_text(report)
    assert f"- **remark**: {remark} (in 2 verdicts)\n" in render_markdown(report)
    assert f"{remark} (in 2 verdicts)" in render_html(report)


def test_a_tolerance_below_the_floor() -> None:
    sentence = (
        "same function; your tolerance 1e-2 is below this dtype's floor"
        " (TP=1 itself is 0.031 from float64); smallest that passes: 0.06"
    )
    facts = {"atol": 0.01, "rtol": 0.01, "required_atol": 0.06, "source": "user", "decides": True}
    verdict = Verdict(
        "s7-b2-t16",
        2,
        "bfloat16",
        "DRIFT",
        {"allclose": Check("FAIL", "outside", facts)},
        (sentence, "allclose: outside"),
        None,
        "tpcheck run models.py:build --tp 2 --atol 0.01",
    )
    path = Path("nccl", {"all_reduce": 4}, True, ())
    text = render_text(Report("models.py:build", (verdict,), ENVIRONMENT, path, "0.1.0"))
    assert text == dedent("""\
        DRIFT: same function; your tolerance 1e-2 is below this dtype's floor (TP=1 itself is 0.031 from float64); smallest that passes: 0.06
        models.py:build  tp 2 · bfloat16 · nccl
        1 verdict: 1 DRIFT

        case       tp    dtype     outcome    atol      failed
                                              needed
        ---------  ----  --------  ---------  --------  --------
        s7-b2-t16  2     bfloat16  DRIFT      0.06      allclose

        DRIFT  s7-b2-t16 tp=2 bfloat16
          same function; your tolerance 1e-2 is below this dtype's floor (TP=1 itself is 0.031 from float64); smallest
            that passes: 0.06
          allclose: outside
          allclose  required atol 0.06, atol 0.01, rtol 0.01 (user)
          repro: tpcheck run models.py:build --tp 2 --atol 0.01
          next:  allow --atol 0.06, or leave --atol and --rtol out: a derived tolerance never decides

        path    nccl · 4 all_reduce
        ran on  torch 2.13.0 · python 3.11.7 · device cpu · tpcheck 0.1.0""")  # noqa: E501


def test_remarks_and_a_script_are_never_cut_off_and_stacks_show_the_users_frames() -> None:
    stack = (
        "rank 0 stack:\n"
        '  File "/env/tpcheck/execution.py", line 7, in execute\n'
        "    output = function(*arguments)\n"
        '  File "/env/torch/nn/modules/module.py", line 9, in _call_impl\n'
        "    return forward_call(*args)\n"
        '  File "/home/models.py", line 5, in forward\n'
        "    return tp.all_reduce(y)\n"
        '  File "/env/tpcheck/groups/base.py", line 3, in all_reduce\n'
        "    return self._call(x)\n"
    )
    error = Verdict(
        "s0-b1-t1",
        2,
        "bfloat16",
        "ERROR",
        {"schedule": Check("FAIL", "rank 0 waits in all_reduce", {"kind": "schedule"})},
        ("rank 0 waits in all_reduce", stack, "confirmed on gloo"),
        None,
        "tpcheck run models.py:build --tp 2",
        "import torch\nprint(1)\n",
    )
    text = render_text(Report("models.py:build", (error,), ENVIRONMENT, GLOO, "0.1.0"))
    assert (
        dedent("""\
        ERROR  s0-b1-t1 tp=2 bfloat16
          rank 0 waits in all_reduce
          rank 0 stack:
            File "/home/models.py", line 5, in forward
              return tp.all_reduce(y)
          confirmed on gloo
          schedule  kind schedule
          repro: tpcheck run models.py:build --tp 2
          next:  read the first reason: it names the rank, and what the others waited for
          the same with torch alone:

        import torch
        print(1)""")
        in text
    )


def test_what_follows_the_checks_is_shown_whatever_their_number() -> None:
    reasons = ("structural: a", "drift: b", "decode: c", "tiling: d", "confirmed on gloo")
    verdict = Verdict("s0-b1-t1", 2, "bfloat16", "WRONG", {}, reasons)
    text = render_text(Report("m.py:b", (verdict,), ENVIRONMENT, GLOO, "0.1.0"))
    assert "  ... and 1 more reason\n  confirmed on gloo\n" in text
