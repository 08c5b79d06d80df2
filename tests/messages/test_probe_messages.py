"""What `tpcheck probe` prints, in full: a clean machine, one that is not, and two that differ."""

from __future__ import annotations

from dataclasses import replace
from textwrap import dedent
from typing import Any

import pytest

from tpcheck.numerics.order import Chunk
from tpcheck.probes.command import probe_record
from tpcheck.probes.sweep import MessageProbe, ProbeReport, SwitchPoint
from tpcheck.render.probe import format_order, render_probe, tree_lines

ENVIRONMENT = {"tpcheck": "0.1.0", "backend": "gloo", "torch": "2.13.0", "variables": {}}
HOPS = (Chunk(0, 50, ((1, 2), 0), "bfloat16"), Chunk(50, 100, ((0, 2), 1), "bfloat16"))
WIDE = (Chunk(0, 1, ((0, 1), 2), "float32"),)


def message(count: int, chunks: tuple[Chunk, ...], **changes: Any) -> MessageProbe:
    one = MessageProbe(
        tp_size=3,
        dtype="bfloat16",
        count=count,
        order="read",
        wire="bfloat16",
        chunks=chunks,
        repeatable=True,
        disagreeing_ranks=(),
        reproduced=True,
        average=("sum, then divide",),
    )
    return replace(one, **changes)


CLEAN = ProbeReport(
    "all_reduce",
    ENVIRONMENT,
    (message(1, WIDE), message(100, HOPS)),
    (SwitchPoint(3, "bfloat16", 41, 42, "accumulator float32 -> bfloat16"),),
)


def test_a_machine_on_which_everything_is_read() -> None:
    assert render_probe(probe_record(CLEAN, None)) == dedent("""\
        all_reduce on gloo, tp 3: repeatable, the same on all ranks, and emulated bit for bit in all 2 messages

        tp    dtype     elements    orders    accumulator    wire      AVG
        ----  --------  ----------  --------  -------------  --------  ----------------
        3     bfloat16  1           1         float32        bfloat16  sum, then divide
        3     bfloat16  100         2         bfloat16       bfloat16  sum, then divide

        switch: tp 3 bfloat16: accumulator float32 -> bfloat16 between 41 and 42 elements
        float32 in the accumulator or on the wire: the same bits

        tp 3, 100 elements of bfloat16:
          0 to 49: (1+2)+0
          50 to 99: (0+2)+1
          the first of them as a tree:
            +
              +
                rank 1
                rank 2
              rank 0""")  # noqa: E501


def test_where_nothing_is_read_nothing_is_said_of_switches() -> None:
    lost = {"order": "unreadable", "wire": None, "reproduced": None, "reason": "changes"}
    messages = tuple(message(count, (), **lost, average=None) for count in (1, 100))
    shown = render_probe(probe_record(replace(CLEAN, messages=messages, switch_points=()), None))
    assert "switch" not in shown


def test_a_machine_on_which_hardly_anything_is() -> None:
    unreadable = {"order": "unreadable", "wire": None, "reproduced": None}
    changing = "the bits change from call to call"
    unknown = "no one accumulator explains how it rounds"
    no_float = "what is on the wire is no plain float"
    report = replace(
        CLEAN,
        messages=(
            message(1, (), **unreadable, reason=no_float, average=None),
            message(2, (), **unreadable, reason=changing, repeatable=False, average=()),
            message(4, (Chunk(0, 4, None, "float64"),), order="invisible", disagreeing_ranks=(2,)),
            message(8, (Chunk(0, 8, (0, 1, 2), None),), reproduced=False, reason=unknown),
            message(9, (Chunk(0, 9, ((0, 1), 2), "any"),), reproduced=False),
        ),
        switch_points=(),
    )
    assert render_probe(probe_record(report, None)) == dedent("""\
        all_reduce on gloo: not every message is read, repeatable and the same on all ranks
          what is on the wire is no plain float: tp 3 bfloat16 [1]
          other bits in another call: tp 3 bfloat16 [2]
          other bits than rank 0 has, on 2: tp 3 bfloat16 [4]
          no one accumulator explains how it rounds: tp 3 bfloat16 [8]
          read, but random operands come out with other bits: tp 3 bfloat16 [9]

        tp    dtype     elements    orders      accumulator    wire      AVG
        ----  --------  ----------  ----------  -------------  --------  ----------------
        3     bfloat16  1           unreadable  -              -         -
        3     bfloat16  2           unreadable  -              -         unknown
        3     bfloat16  4           invisible   float64        bfloat16  sum, then divide
        3     bfloat16  8           1           unknown        bfloat16  sum, then divide
        3     bfloat16  9           1           any            bfloat16  sum, then divide

        no switch of the reduction from 4 to 9 elements
        float64 in the accumulator or on the wire: the same bits

        tp 3, 9 elements of bfloat16:
          0 to 8: (0+1)+2
          the first of them as a tree:
            +
              +
                rank 0
                rank 1
              rank 2""")


def test_two_machines_that_differ() -> None:
    swapped = (replace(HOPS[0], tree=((0, 1), 2)), HOPS[1])
    other = replace(
        CLEAN,
        environment={**ENVIRONMENT, "torch": "2.11.0", "variables": {"NCCL_ALGO": "Tree"}},
        messages=(message(1, WIDE), message(100, swapped), message(200, swapped)),
    )
    text = render_probe(probe_record(CLEAN, other, "other.json"))
    assert text.partition("\n\n")[0] == dedent("""\
        DIFFERS from other.json: 1 of 2 messages are reduced differently
          tp 3 bfloat16 [100]: order=(1+2)+0 at element 0 (of 50 that differ), but there (0+1)+2
          around it, NCCL_ALGO: null, there Tree
          around it, torch: 2.13.0, there 2.11.0
          messages not compared, only there: 1""")
    only_switches = replace(CLEAN, switch_points=())
    text = render_probe(probe_record(CLEAN, only_switches, "other.json"))
    assert text.partition("\n\n")[0] == dedent("""\
        DIFFERS from other.json: other switch points
          tp 3 bfloat16: switch_points=after 41: accumulator float32 -> bfloat16, but there none""")


@pytest.mark.parametrize(
    ("order", "text"),
    [
        (None, "invisible"),
        ((0, 1), "0+1"),
        ((((1, 2), 3), 0), "((1+2)+3)+0"),
        (((0, 1), (2, 3)), "(0+1)+(2+3)"),
        ((0, 1, 2), "sum(0, 1, 2)"),
        ([[[0, 1], 4], [2, 3]], "((0+1)+4)+(2+3)"),
        (((0, 1, 2), 3), "sum(0, 1, 2)+3"),
    ],
)
def test_an_order_as_a_sum(order: Any, text: str) -> None:
    assert format_order(order) == text


def test_an_order_as_a_tree() -> None:
    lines = ["+", "  +", "    rank 1", "    rank 2", "  rank 0"]
    assert list(tree_lines(((1, 2), 0))) == lines
