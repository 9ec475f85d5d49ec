"""Installs the packages of examples/ for real, where child processes can see them."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
LISTENER = Path(__file__).with_name("listener.py")

Run = Callable[..., subprocess.CompletedProcess[str]]


def install(packages: Sequence[Path], folder: Path) -> Path:
    """pip-installs copies of packages (a build leaves files behind) into a folder of their own."""
    copies = [shutil.copytree(package, folder / "source" / package.name) for package in packages]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder / "target")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *map(str, copies)], check=True)
    return folder / "target"


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the example package is installed."""
    return install([EXAMPLES / "mambabench-bigram"], tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all broken packages are installed."""
    packages = sorted(path.parent for path in (EXAMPLES / "broken").glob("*/pyproject.toml"))
    return install(packages, tmp_path_factory.mktemp("broken"))


@dataclass(frozen=True)
class Finished:
    """A run of examples/plans/bigram.toml with the example package, and with listener.py listening."""

    store: Path
    run: subprocess.CompletedProcess[str]
    notes: tuple[str, ...]


@pytest.fixture(scope="session")
def finished(mambabench: Run, example: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    refused = ["--set", "decoders.refused.use=refused-here"]
    done = mambabench(
        *("--plugin", LISTENER, "run", EXAMPLES / "plans" / "bigram.toml", "--store", folder / "store", *refused),
        on=[example],
        LISTENER_NOTES=str(folder / "notes.txt"),
    )
    return Finished(folder / "store", done, tuple((folder / "notes.txt").read_text().splitlines()))
