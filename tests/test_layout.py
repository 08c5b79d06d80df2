"""The shape of the package: what imports what, what loads torch, what public names survive.

Evidence: imports are read from the source (also those inside functions; not those for type checkers
only), and everything about a fresh start is proven in a subprocess.
"""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tpcheck

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tpcheck"

ORDER = (
    "errors",
    "json_reader machine",
    "placement trace environment files progress",
    "model_digest outputs",
    "numerics quantization",
    "spec",
    "hf pieces",
    "shard_plan",
    "engines sharding",
    "planning plan_memory",
    "header_check",
    "plan_command",
    "records",
    "groups",
    "reference",
    "observation",
    "faults",
    "loading",
    "subjects",
    "adapters",
    "inputs execution",
    "comparison building",
    "captures",
    "evidence",
    "fallback width_cost",
    "conduct reconciliation",
    "localization",
    "checks",
    "divergence case_runs",
    "drift_explanations",
    "explanations",
    "investigation provenance",
    "verdict",
    "repro",
    "strategies doctor run_plan search",
    "judging",
    "generated sensitivity fault_cells",
    "workflow fault_matrix",
    "drift_profiles golden probes",
    "cli_commands",
    "plugin",
    "cli pytest_plugin",
    "__main__",
)
"""Left may not import right; names on one line do not import each other."""

TORCH_FREE = {
    "report": {"errors", "environment", "records", "files", "json_reader"},
    "render": {"errors", "environment", "records", "report"},
    "deployment_gate": set(
        "errors environment records files json_reader machine model_digest report".split()
    ),
}
"""Read on machines without torch, so these may import nothing else. The surfaces use them."""

SURFACES = {"__init__", "cli", "pytest_plugin", "__main__"}

PUBLIC_FUNCTIONS = set("run drift plan diff gate require subject golden_record selfcheck".split())
"""Of the contract, now or later: none may be the name of a module directly under tpcheck/."""

CALLS = {
    "diff": "import torch; one = torch.arange(4.0)\n"
    "assert tpcheck.diff({'x': one}, [{'x': one[:1]}, {'x': one[1:]}]).outcome == 'PASS'",
    "plan": "assert tpcheck.plan({'num_attention_heads': 6}, 'vllm', 4)[0].outcome == 'error'",
    "subject": "tpcheck.subject(vocab_size=8, seq_len=4)(lambda tp: None)",
    "drift": "assert tpcheck.drift('builtin:llama-tiny', (2,), backend='sim', wires=('float32',),"
    " dtypes=('bfloat16',)).drift['rows'][0]['epsilons'] > 0",
    "gate": "tpcheck.gate(tpcheck.run('builtin:llama-tiny', (2,), backend='sim'), {'tp': [2],"
    " 'dtypes': ['bfloat16'], 'backends': ['sim'], 'require_deployed_path': False,"
    " 'min_sensitivity': 0})",
    "require": "try:\n"
    "    tpcheck.require('none.json', model_dir='.', tp_size=2, public_key='none.pub')\n"
    "    raise SystemExit('nothing refused')\n"
    "except tpcheck.GateRefused as refused:\n"
    "    assert 'none.json: cannot be read' in refused.refusals[0].reason",
    "run": "assert tpcheck.run('builtin:llama-tiny', (2,), backend='sim').outcome == 'PASS'",
}
"""How each public function is called; a new one needs a line here."""


def modules() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(path)
    return found


MODULES = modules()


def imports_of(path: Path) -> set[str]:
    """Return the direct children of tpcheck that a file imports at run time."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "tpcheck":
                names.update(f"tpcheck.{alias.name}" for alias in node.names)
            else:
                names.add(node.module or "")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    ours = {name for name in names if name.split(".")[0] == "tpcheck"}
    return {name.split(".")[1] if "." in name else "__init__" for name in ours}


def fresh(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_has_its_place() -> None:
    placed = {name for line in ORDER for name in line.split()} | set(TORCH_FREE) | {"__init__"}
    assert set(MODULES) <= placed, "add the new module to ORDER"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_left_does_not_import_right(name: str) -> None:
    level = {module: i for i, line in enumerate(ORDER) for module in line.split()}
    for path in MODULES[name]:
        for imported in imports_of(path) - {name}:
            where = f"{path.relative_to(ROOT)} imports {imported}"
            assert imported in MODULES, f"{where}, which is no module"
            assert imported not in SURFACES or (name, imported) == ("__main__", "cli"), where
            if name in TORCH_FREE:
                assert imported in TORCH_FREE[name], where
            elif imported in TORCH_FREE:
                assert level[name] >= level["workflow"], where
            else:
                assert level[imported] < level[name], where


def test_the_import_reader_sees_what_it_should(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "from tpcheck import workflow\nimport tpcheck.spec\nif TYPE_CHECKING:\n"
        "    import tpcheck.report\ndef f():\n    from tpcheck.groups.pool import x\n"
        "import tpcheck\n"
    )
    assert imports_of(file) == {"workflow", "spec", "groups", "__init__"}


def test_no_module_carries_the_name_of_a_public_function() -> None:
    assert not set(MODULES) & (PUBLIC_FUNCTIONS | set(CALLS))


def test_surfaces_reports_and_gates_load_no_torch() -> None:
    names = ["tpcheck", "tpcheck.cli", "tpcheck.subjects", "tpcheck.environment", "tpcheck.spec"]
    names += ["tpcheck.pytest_plugin"] if "pytest_plugin" in MODULES else []
    for name in TORCH_FREE:
        for path in MODULES.get(name, []):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(parts).removesuffix(".__init__"))
    fresh(
        f"import sys, importlib\nfor name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
        "import tpcheck\n"
        "tpcheck.Shard, tpcheck.Report, tpcheck.TPCheckError, tpcheck.subject, dir(tpcheck)\n"
        "assert 'torch' not in sys.modules\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        *([name, "--help"] for name in ("run", "plan", "probe", "gate", "diff", "golden")),
        ["golden", "record", "--help"],
    ],
)
def test_help_loads_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['tpcheck', *{arguments!r}]\n"
        "from tpcheck.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'rich' not in sys.modules\n"
    )
    assert "tpcheck" in fresh(code)


def test_every_public_name_is_there_and_nothing_else() -> None:
    assert set(tpcheck.__all__) == set(tpcheck._HOMES) | {"__version__"}
    for name in tpcheck.__all__:
        assert getattr(tpcheck, name) is not None
        assert name in dir(tpcheck)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        tpcheck.nonsense  # noqa: B018


def test_every_public_function_has_a_call() -> None:
    functions = {
        name
        for name in tpcheck.__all__
        if callable(getattr(tpcheck, name)) and type(getattr(tpcheck, name)).__name__ == "function"
    }
    assert functions == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("everything", [False, True], ids=["alone", "after every submodule"])
def test_public_functions_work_twice(name: str, everything: bool) -> None:
    walk = (
        "import pkgutil, importlib\n"
        "for module in pkgutil.walk_packages(tpcheck.__path__, 'tpcheck.'):\n"
        "    importlib.import_module(module.name)\n"
    )
    fresh(f"import tpcheck\n{walk if everything else ''}{CALLS[name]}\n{CALLS[name]}\n")


def test_the_hooks_are_what_ci_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    hooks = re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(hooks) == 5
    assert [line for line in ci if line in hooks] == hooks


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(one for extra in extras for one in extra)]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in pins if "==" in line}
    assert {re.split(r"[><=\[ ]", one)[0] for one in wanted} - {"tpcheck"} == pinned


def test_no_file_is_too_long_to_read() -> None:
    for path in PACKAGE.rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"
