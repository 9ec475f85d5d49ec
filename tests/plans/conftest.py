"""Runs plans that come with the package, and reads the tables of their report."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

PLANS = Path(__file__).resolve().parents[2] / "plans" / "gpu"
Tables = dict[str, list[dict[str, str]]]


@pytest.fixture
def tables(mambabench, tmp_path: Path) -> Callable[..., Tables]:
    """`tables(name, *overrides)`: those of a plan for one GPU that was run on the CPU, by name; of a part of it with
    `only`."""

    def run(name: str, *overrides: str, only: Sequence[str] = ()) -> Tables:
        words = [word for override in overrides for word in ("--set", override)]
        words += [word for labels in only for word in ("--only", labels)]
        done = mambabench("run", PLANS / f"{name}.toml", "--store", tmp_path / "store", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        mambabench("report", tmp_path / "store", "--to", "csv")
        found = {}
        for file in (tmp_path / "store" / "report" / "csv").glob("*.csv"):
            with file.open() as stream:
                found[file.stem] = list(csv.DictReader(stream))
        return found

    return run
