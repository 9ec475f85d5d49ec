"""Maps the rooms beside this file to the package `mambabench`; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

DATA = ["**/*.toml", "**/*.jinja", "**/*.css", "**/*.csv", "**/*.json", "**/*.jsonl", "**/*.yaml", "**/*.safetensors"]
ROOMS = [f"mambabench.{name}" for name in find_packages(exclude=["tests*", "examples*", "docs*"])]


class BuildPy(build_py):
    """Leaves the scripts that stand beside the package's own `__init__.py` out of it."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[:2] not in {("mambabench", "noxfile"), ("mambabench", "setup")}]


# An older build would put modules back that were deleted since.
shutil.rmtree(Path(__file__).parent / "build" / "lib", ignore_errors=True)

setup(
    packages=["mambabench", *ROOMS],
    package_dir={"mambabench": "."},
    package_data={"mambabench": ["py.typed"], **dict.fromkeys(ROOMS, DATA)},
    include_package_data=False,
    cmdclass={"build_py": BuildPy},
)
