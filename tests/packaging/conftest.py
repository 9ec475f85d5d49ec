"""The tracked files of the repository, as git lists them, and a clean copy of them."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tracked(root: Path) -> list[str]:
    """Paths of all tracked files that exist, relative to the root, with `/`."""
    if not (root / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of tracked files")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    return [name for name in listing.split("\0") if name and (root / name).is_file()]


@pytest.fixture
def checkout(root: Path, tracked: list[str], tmp_path: Path) -> Path:
    """A copy of the tracked files, without whatever else lies in the working tree."""
    for name in tracked:
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, target)
    return tmp_path / "checkout"
