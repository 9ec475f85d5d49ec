"""What a wheel of the package holds, and the source distribution that one is built from elsewhere."""

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOMS = ("backends", "decoders", "distillers", "harness", "kernels", "plans", "reports")
TOP = {"__init__.py", "__main__.py", "py.typed"}


def build(checkout: Path) -> set[str]:
    """Builds a wheel of a checkout; returns the paths of the package's files, relative to the package."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(checkout / "wheels")]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(checkout)], check=True)
    (wheel,) = (checkout / "wheels").glob("mambabench-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert all(name.startswith("mambabench/") for name in names), "files beside the package"
    return {name.removeprefix("mambabench/") for name in names}


def of_the_package(names: Iterable[str]) -> set[str]:
    return {name for name in names if name in TOP or name.startswith(tuple(f"{room}/" for room in ROOMS))}


def test_the_wheel_holds_exactly_the_tracked_files_of_the_rooms(checkout: Path, tracked: list[str]) -> None:
    wanted = of_the_package(tracked)
    assert build(checkout) == wanted
    assert {"plans/tiny.toml", "distillers/tiny/teacher/model.safetensors"} < wanted


def test_the_source_distribution_holds_the_same_and_what_builds_it(checkout: Path, tracked: list[str]) -> None:
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist"], cwd=checkout, check=True)
    (file,) = (checkout / "dist").glob("mambabench-*.tar.gz")
    with tarfile.open(file) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert of_the_package(names) == of_the_package(tracked)
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_a_stale_build_folder_brings_no_deleted_module_back(checkout: Path) -> None:
    stale = checkout / "build" / "lib" / "mambabench" / "harness" / "deleted.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    assert "harness/deleted.py" not in build(checkout)
