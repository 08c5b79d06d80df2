"""A stack leads to the user's line, whatever torch put around it, and is told once."""

from tpcheck.records import Check, Path, Report, Verdict
from tpcheck.render.stacks import MAX_LINES, shown_stack, told_once
from tpcheck.render.text import render_text

TORCH = "/env/lib/python3.11/site-packages/torch"


def frame(path: str, code: str = "x = y") -> list[str]:
    return [f'  File "{path}", line 7, in forward', f"    {code}"]


def through_torch(count: int) -> list[str]:
    return [line for i in range(count) for line in frame(f"{TORCH}/tensor/_{i}.py")]


def test_the_users_frames_outlive_those_of_a_chain_of_exceptions_in_torch() -> None:
    chain = [
        "Traceback (most recent call last):",
        *through_torch(30),
        "RuntimeError: a and b must have the same reduction dim",
        "",
        "The above exception was the direct cause of the following exception:",
        "",
        "Traceback (most recent call last):",
        *frame("/home/model.py", "h = layer(h)"),
        *through_torch(9),
        "RuntimeError: Sharding propagation failed",
    ]
    shown = shown_stack(chain)
    assert "    h = layer(h)" in shown
    assert len(shown) <= MAX_LINES
    assert [line for line in shown if "_29.py" in line or "_8.py" in line] == [
        f'  File "{TORCH}/tensor/_29.py", line 7, in forward',  # where each was raised
        f'  File "{TORCH}/tensor/_8.py", line 7, in forward',
    ]
    assert shown[-1] == "RuntimeError: Sharding propagation failed"


def test_frames_between_the_users_are_left_out_of_a_short_stack() -> None:
    between = [
        *frame("/env/tpcheck/observation/dispatch.py"),
        *frame(f"{TORCH}/_ops.py"),
        *frame(f"{TORCH}/utils/_contextlib.py"),
    ]
    mine = [*frame("/home/model.py"), *frame(f"{TORCH}/nn/functional.py")]
    assert shown_stack([*between, *mine, "ValueError: no"]) == [*mine, "ValueError: no"]


def test_a_stack_of_nothing_but_inner_frames_is_shown() -> None:
    lines = frame("/env/tpcheck/execution.py")
    assert shown_stack(lines) == lines


def test_a_stack_of_the_users_own_keeps_both_ends() -> None:
    shown = shown_stack([line for i in range(40) for line in frame(f"/home/m{i}.py")])
    assert (shown[0], shown[-2]) == (frame("/home/m0.py")[0], frame("/home/m39.py")[0])
    assert f"... {80 - MAX_LINES} more lines" in shown


def test_ranks_that_stand_at_the_same_place_share_one_stack() -> None:
    reasons = ["rank 0 raised", *(f"rank {rank} stack:\n  here" for rank in (1, 2, 4))]
    reasons += ["rank 5 stack:\n  there", "rank 6 stack:\n  there"]
    assert told_once(reasons) == [
        "rank 0 raised",
        "ranks 1-2, 4 stack:\n  here",
        "ranks 5-6 stack:\n  there",
    ]


def test_a_text_of_many_lines_stands_at_the_end_of_its_traceback_only() -> None:
    text = "RuntimeError: sizes:\n\tup: [4]\n\tdown: [8]"
    traceback = f"Traceback (most recent call last):\n{text}"
    verdict = Verdict(
        "s0-b1-t1",
        2,
        "bfloat16",
        "ERROR",
        {"schedule": Check("FAIL", text, {"kind": "raised"})},
        (f"rank 0 raised {text}", traceback),
        None,
        "tpcheck run m.py:b --tp 2",
    )
    shown = render_text(Report("m.py:b", (verdict,), {}, Path("gloo", {}, True, ()), "0.1.0"))
    assert shown.count("RuntimeError: sizes:") == 2
    assert shown.count("down: [8]") == 1
    assert told_once(["one\n  fact", "Traceback:\n  another"]) == [
        "one\n  fact",
        "Traceback:\n  another",
    ]
