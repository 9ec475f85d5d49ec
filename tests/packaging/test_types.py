"""mypy sees through the layout: a mistake in one room about another room's types is found."""

import shutil
import subprocess
import sys
from pathlib import Path

# Types of third parties are not followed here, which is what makes this quick.
SETTINGS = """
[tool.mypy]
python_version = "3.11"
[[tool.mypy.overrides]]
module = ["torch.*", "pandas.*", "pluggy.*"]
follow_imports = "skip"
"""
PLANTED = """
from ..harness.interfaces import Needs

needs = Needs(gpus="one")
"""


def test_mypy_finds_a_planted_error_across_rooms(root: Path, tracked: list[str], tmp_path: Path) -> None:
    for name in tracked:
        if name.endswith(".py") and name.split("/")[0] in {"__init__.py", "backends", "harness"}:
            target = tmp_path / "mambabench" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, target)
    (tmp_path / "mambabench" / "backends" / "planted.py").write_text(PLANTED)
    (tmp_path / "pyproject.toml").write_text(SETTINGS)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "-m", "mambabench.backends.planted"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "planted.py:4: error" in done.stdout, done.stdout + done.stderr
    assert '"Needs" has incompatible type "str"; expected "int"' in done.stdout
