"""Every block of README.md runs, and prints what the README shows.

`console` blocks are run command by command in one folder that holds the README's own files
(blocks whose first line is `# file: NAME`) and examples/; a comment `<!-- exit: N -->`
above a block gives its exit code, 0 if there is none. Every line shown has to be printed; numbers
may differ. `sh` blocks are set-up, which cannot run inside the tests it installs: they are
held against .ci/run, which runs the same commands from nothing.
"""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"(?:<!-- exit: (?P<exit>\d+) -->\n+)?^```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
PROGRAMS = {
    "tpcheck": [sys.executable, "-m", "tpcheck"],
    "python": [sys.executable],
    "pytest": [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
}


@dataclass(frozen=True, slots=True)
class Block:
    language: str
    body: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Command:
    line: str
    shown: tuple[str, ...]
    exit_code: int


BLOCKS = [
    Block(match["language"], match["body"], int(match["exit"] or 0))
    for match in BLOCK.finditer(README)
]


def commands() -> list[Command]:
    found = []
    for block in BLOCKS:
        if block.language == "console":
            for part in re.split(r"^\$ ", block.body, flags=re.MULTILINE)[1:]:
                line, *shown = part.splitlines()
                found.append(Command(line, tuple(filter(str.strip, shown)), block.exit_code))
    return found


def files() -> dict[str, str]:
    named = re.compile(r"# file: (\S+)\n")
    matches = [(named.match(b.body), b.body) for b in BLOCKS if b.language in ("python", "toml")]
    return {match[1]: body for match, body in matches if match}


def scripts() -> list[str]:
    return [
        block.body
        for block in BLOCKS
        if block.language == "python" and not block.body.startswith("# file: ")
    ]


def loosely(line: str) -> str:
    """Numbers, runs of blanks and rules differ between machines; words do not."""
    line = re.sub(r"\d+(\.\d+)*(e[-+]?\d+)?", "#", line)
    return re.sub(r"-{2,}", "--", " ".join(line.split()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8")
    if (ROOT / "examples").is_dir():
        shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.line)
def test_a_console_block_prints_what_it_shows(command: Command, folder: Path) -> None:
    program, *arguments = shlex.split(command.line)
    assert program in PROGRAMS, f"the README may run {', '.join(PROGRAMS)}"
    done = subprocess.run(
        [*PROGRAMS[program], *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )
    printed = done.stdout + done.stderr
    assert done.returncode == command.exit_code, printed
    lines = {loosely(line) for line in printed.splitlines()}
    missing = [line for line in command.shown if line != "..." and loosely(line) not in lines]
    assert not missing, "\n".join([*missing, "--- is not in ---", printed])


@pytest.mark.parametrize("script", scripts())
def test_a_python_block_runs(script: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert BLOCKS
    assert {block.language for block in BLOCKS} <= {"console", "python", "sh", "toml"}
    assert README.count("```") == 2 * len(BLOCKS)


def test_set_up_is_two_commands_and_ci_runs_them() -> None:
    setup = [block.body.strip() for block in BLOCKS if block.language == "sh"]
    assert len(setup) == 2
    ci = (ROOT / ".ci" / "run").read_text()
    install, run_tests = setup
    for step in ("python3 -m venv", "pip install", "-c constraints.txt -e '.[dev,hf]'"):
        assert step in install
        assert step in ci
    assert re.search(rf"^python -m {re.escape(run_tests.splitlines()[-1])}$", ci, re.MULTILINE)


def test_the_readme_opens_with_a_caught_failure() -> None:
    first = next(block for block in BLOCKS if block.language == "console")
    assert first.exit_code == 1
    assert "WRONG" in first.body


def test_the_second_example_is_what_stands_below_an_unmodified_module() -> None:
    example = (ROOT / "examples" / "own_module.py").read_text(encoding="utf-8")
    module, added = example.split("# ---- all that tpcheck needs: ----\n")
    assert "tpcheck" not in module.split('"""', 2)[2]
    assert any(block.body == added for block in BLOCKS)
    assert len([line for line in added.splitlines() if line.strip()]) <= 12


def test_examples_compile() -> None:
    for path in sorted((ROOT / "examples").glob("*.py")):
        compile(path.read_text(encoding="utf-8"), str(path), "exec")
