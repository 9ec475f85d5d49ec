"""Shared fixtures: real models and data where they are at hand, skipped with a reason where they are not."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real teachers and data that is kept beside a checkout and never committed."""
    folder = Path(os.environ.get("MAMBABENCH_SHARED", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip("real models are not at hand (set MAMBABENCH_SHARED to their folder)")
    return folder
