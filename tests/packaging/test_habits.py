"""Habits that hold for the whole repository."""

import re
from pathlib import Path

from mambabench.harness.hooks import Hooks

HOOKS = sorted(name for name in vars(Hooks) if name.startswith("mambabench_"))
LONGEST = 500


def test_files_stay_under_500_lines(root: Path, tracked: list[str]) -> None:
    lengths = {
        name: len((root / name).read_text(encoding="utf-8").splitlines()) for name in tracked if name.endswith(".py")
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_every_hook_has_a_test_named_after_it(root: Path, tracked: list[str]) -> None:
    tests = [name for name in tracked if re.fullmatch(r"tests/.*test_\w+\.py", name)]
    text = "\n".join((root / name).read_text(encoding="utf-8") for name in tests)
    assert [hook for hook in HOOKS if not re.search(rf"^def test_{hook}\w*\(", text, re.MULTILINE)] == []


def test_every_hook_has_a_heading_in_the_plug_in_guide(root: Path) -> None:
    guide = (root / "docs" / "plugins.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ `(\w+)\(", guide, re.MULTILINE)
    assert sorted(headings) == HOOKS


def test_the_readme_and_the_ci_run_the_same_test_command(root: Path) -> None:
    command = "python3 -m venv .venv && .venv/bin/pip install nox && .venv/bin/nox -s tests"
    assert command in (root / "README.md").read_text(encoding="utf-8")
    assert command in (root / ".ci" / "run").read_text(encoding="utf-8")
