"""Who may import what: the rooms of the package, and the model stack."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = ("backends", "decoders", "distillers", "harness", "kernels", "reports")
CONTRACT = tuple(f"harness.{name}" for name in ("answers", "cache", "documents", "hooks", "interfaces", "plugins"))
ALLOWED = {
    "harness": (),
    "backends": (*CONTRACT, "kernels"),
    "decoders": (*CONTRACT, "kernels"),
    "distillers": (*CONTRACT, "harness.parts", "harness.judges"),
    "kernels": (),
    "reports": (*CONTRACT, "harness.results", "harness.store", "harness.statistics", "harness.metrics"),
}
"""Modules of other rooms that a room may import, with all that is below them."""
WITH_TORCH = (
    "harness/child.py",
    "harness/conformance",
    "harness/forkserver.py",
    "harness/mockmodel.py",
    "harness/suites/",
)
"""The parts of the harness that run in a step's child process, or in a plug-in's tests."""
HEAVY = ("torch", "transformers", "lm_eval", "trl", "datasets", "accelerate", "triton")
LAZY = (*HEAVY, "scipy", "matplotlib", "pandas")


def imports(file: Path, module: str) -> Iterator[tuple[str, ast.stmt]]:
    """Absolute names of all modules that a file imports, also inside functions and for types."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.rsplit(".", node.level - 1)[0]
                base = f"{above}.{base}" if base else above
            # `from package import name` may name a module or something inside of the package.
            yield from ((f"{base}.{alias.name}", node) for alias in node.names)


def modules(root: Path, room: str) -> list[tuple[Path, str]]:
    files = sorted((root / room).rglob("*.py"))
    assert files, f"room {room} has no modules"
    return [(f, "mambabench." + f.relative_to(root).with_suffix("").as_posix().replace("/", ".")) for f in files]


def below(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def under_type_checking(file: Path) -> list[ast.stmt]:
    """The statements under `if TYPE_CHECKING:`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return [statement for block in blocks for statement in block.body]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_the_design_allows(root: Path, room: str) -> None:
    wrong = []
    for file, module in modules(root, room):
        for name, node in imports(file, module.removesuffix(".__init__")):
            if not below(name, "mambabench"):
                continue
            inner = name.removeprefix("mambabench.")
            if isinstance(node, ast.Import) or not node.level:
                wrong.append(f"{file}:{node.lineno}: {name} is not imported relatively")
            # What the package's own __init__ offers is the contract.
            elif inner.split(".")[0] in ROOMS and not any(below(inner, module) for module in (room, *ALLOWED[room])):
                wrong.append(f"{file}:{node.lineno}: {room} may not import {inner}")
    assert not wrong, "\n".join(wrong)


def test_kernels_import_nothing_of_ours(root: Path) -> None:
    for file, module in modules(root, "kernels"):
        for name, node in imports(file, module.removesuffix(".__init__")):
            assert not below(name, "mambabench") or below(name, "mambabench.kernels"), f"{file}:{node.lineno}: {name}"


def test_the_harness_imports_no_model_stack_outside_of_the_child(root: Path) -> None:
    wrong = []
    for file, module in modules(root, "harness"):
        if file.relative_to(root).as_posix().startswith(WITH_TORCH):
            continue
        for_types = {statement.lineno for statement in under_type_checking(file)}
        for name, node in imports(file, module):
            if name.split(".")[0] in HEAVY and node.lineno not in for_types:
                wrong.append(f"{file}:{node.lineno}: imports {name}")
    assert not wrong, "\n".join(wrong)


def loaded_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import mambabench",
        "import mambabench.harness.cli, mambabench.harness.cli.inspect, mambabench.harness.cli.run",
        "import mambabench.harness.cli.compare",
        "from mambabench.harness.plugins import registry; registry()",
    ],
)
def test_importing_what_lists_and_plans_loads_nothing_heavy(statement: str) -> None:
    assert not loaded_after(statement) & set(LAZY)


def test_reports_load_no_model_stack() -> None:
    assert not loaded_after("import mambabench.reports.plugin, mambabench.harness.results") & set(HEAVY)


def test_a_bare_kernels_is_not_ours(root: Path) -> None:
    """transformers imports a package named `kernels`; a child that runs from the checkout must not give it our room."""
    code = "import importlib.util, json\ns = importlib.util.find_spec('kernels')\nprint(json.dumps(s and s.origin))"
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, check=True, capture_output=True, text=True)
    origin = json.loads(done.stdout)
    assert origin is None or not Path(origin).resolve().is_relative_to(root / "kernels")
