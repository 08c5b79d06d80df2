"""The Markdown of a drift report in full, for a run that passes and for one that is wrong."""

# ruff: noqa: E501 - a row of a Markdown table is one line

from __future__ import annotations

from textwrap import dedent

from tests.drift_reports import report_of, usual
from tpcheck.render.drift_markdown import render_drift_markdown


def test_a_profile_for_the_summary_of_a_job() -> None:
    assert render_drift_markdown(usual(1.5, width=True, fallback=True)) == dedent("""\
        ## PASS (structure); deployed path not exercised: nccl

        `models.py:build tp 2, 4 · bfloat16 · gloo`: 2 verdicts: 2 PASS

        ### bfloat16, 64 tokens; \\* as it is deployed

        | tp | on the wire | error in eps TP=1, TP=N | ratio (predicted) \\[95 %\\] | flips (margin) | KL mean | 65504 / largest | verdict |
        | --- | --- | --- | --- | --- | --- | --- | --- |
        | 2 | bfloat16 \\* | 2, 3 | 1.50 (1.25) \\[1.35, 1.65\\] | 2 (0.25) | 1.0e-04 | 16,376 | PASS |
        | 2 | int4\\_wire | 2, 30 | 15.00 (1.25) \\[13.50, 16.50\\] | 2 (0.25) | 1.0e-04 | 16,376 | above |
        | 4 | bfloat16 \\* | 2, 3.25 | 1.62 (1.25) \\[1.46, 1.79\\] | 2 (0.25) | 1.0e-04 | 16,376 | PASS |
        | 4 | int4\\_wire | 2, 30 | 15.00 (1.25) \\[13.50, 16.50\\] | 2 (0.25) | 1.0e-04 | 16,376 | above |

        - tp 2, 4: 2 row-parallel layers show ring in bfloat16: no alarm can be raised, not asked
        - tp 2, 4: allclose(1e-2, 1e-2) against TP=1 fails; 0.02 for both is needed
        - tp 2, 4: drift begins in layers.0.self\\_attn.o\\_proj; the largest ratio is 1.2, after layers.0

        ### what scoring at TP=1 buys, and costs; times of one forward, on gloo on cpu

        | tp | dtype | level | ratio before -> after | log-probability off TP=1 by at most | TP=1's bits | bytes received | held at once | time (deployed) |
        | --- | --- | --- | --- | --- | --- | --- | --- | --- |
        | 2 | bfloat16 | full | 1.5 -> 1 | 0.05 -> 0 | yes | 2 KiB | 1 KiB | 2 ms (1) |

        - **bfloat16**: tp=1: a forward takes 2 ms, against 5 ms at tp=2

        | tp | forward | from - to | communication | share | slowest / mean rank |
        | --- | --- | --- | --- | --- | --- |
        | 1 | 2 ms | 1 ms - 3 ms | 0 ms | 0 % | 1.00 |
        | 2 | 5 ms | 4 ms - 6 ms | 3 ms | 60 % | 1.00 |

        - **path**: gloo · 4 all\\_reduce
        - **not deployed**: backend gloo, not nccl
        - **ran on**: torch 2.13.0 · python 3.11.7 · device cpu · tpcheck 0.1.0
        """)


def test_a_wrong_subject_has_no_profile() -> None:
    report = report_of((2, "bfloat16", "WRONG", None), (4, "bfloat16", "WRONG", None))
    assert render_drift_markdown(report) == dedent("""\
        ## WRONG: not the same function; deployed path not exercised: nccl

        `models.py:build tp 2, 4 · bfloat16 · gloo`: 2 verdicts: 2 WRONG

        ```text
        WRONG  s0-b2-t16 tp=2 bfloat16
          drift: not the same function: how far another function is off says nothing
          repro: tpcheck run models.py:build --tp 2
          next:  look at what the subject does differently at tp=2
        ```

        and 1 more that are not PASS: the JSON report has all

        No drift was measured: not the same function: how far another function is off says nothing

        - **path**: gloo · 4 all\\_reduce
        - **not deployed**: backend gloo, not nccl
        - **ran on**: torch 2.13.0 · python 3.11.7 · device cpu · tpcheck 0.1.0
        """)
