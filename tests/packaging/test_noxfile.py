"""The noxfile: what it writes into constraints.txt, and whom it turns away."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("nox", reason="nox is not installed here")

FREEZE = """\
-e git+ssh://git@host.example/mambabench.git@0123abc#egg=mambabench
Jinja2==3.1.6
absl-py==2.5.1
mambabench @ file:///home/someone/mambabench
pip==23.2.1
torch==2.13.0+cpu
triton @ file:///opt/wheels/triton-3.7.1%2Blocal-cp311-cp311-manylinux_2_28_x86_64.whl#sha256=00ff
zstd @ git+https://host.example/zstd@main
"""


@pytest.fixture(scope="module")
def noxfile() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "noxfile.py"
    spec = importlib.util.spec_from_file_location("noxfile_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pins_are_sorted_and_free_of_paths_hosts_build_tags_and_ourselves(noxfile: ModuleType) -> None:
    assert noxfile.pins(FREEZE) == ["absl-py==2.5.1", "Jinja2==3.1.6", "torch==2.13.0", "triton==3.7.1"]


def test_constraints_are_what_lock_would_write(noxfile: ModuleType, root: Path) -> None:
    text = (root / "constraints.txt").read_text(encoding="utf-8")
    assert text == "\n".join(noxfile.pins(text)) + "\n"
    assert "torch==2.13.0\n" in text


def test_an_old_python_is_refused_in_one_line(root: Path) -> None:
    code = f"import sys, runpy; sys.version_info = (3, 9, 2); runpy.run_path({str(root / 'noxfile.py')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "mambabench needs Python 3.11 or newer; this nox runs on Python 3.9.2\n"
