"""Shared fixtures: real models and data where they are at hand, skipped with a reason where they are not."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real teachers and data that is kept beside a checkout and never committed."""
    folder = Path(os.environ.get("MAMBABENCH_SHARED", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip("real models are not at hand (set MAMBABENCH_SHARED to their folder)")
    return folder


@pytest.fixture(scope="session")
def stores() -> ModuleType:
    """The builder of synthetic stores; loaded by path, since the folders beside it must not become importable."""
    spec = importlib.util.spec_from_file_location("mambabench_test_stores", Path(__file__).with_name("stores.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
