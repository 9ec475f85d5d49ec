"""Shared fixtures: real models and data where they are at hand, skipped with a reason where they are not."""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def leases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Steps that must be alone on the machine wait for no other run on it, nor for tests of another worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real teachers and data that is kept beside a checkout and never committed."""
    folder = Path(os.environ.get("MAMBABENCH_SHARED", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip("real models are not at hand (set MAMBABENCH_SHARED to their folder)")
    return folder


@pytest.fixture(scope="session")
def loaded() -> Callable[[Path], ModuleType]:
    """`loaded(file)`: a module that tests share, by its path: the folders beside it must not become importable."""

    def load(file: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"mambabench_test_{file.stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def stores(loaded: Callable[[Path], ModuleType]) -> ModuleType:
    """The builder of synthetic stores."""
    return loaded(Path(__file__).with_name("stores.py"))


@pytest.fixture
def interpret(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module anew, under another name, with its Triton kernels in Triton's interpreter, and those that it
    has from other modules too.

    Whether a kernel is interpreted is decided where it is decorated, which for those of Triton's own library is long
    past: they are exchanged meanwhile.
    """
    triton = pytest.importorskip("triton")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for library in (triton.language, triton.language.standard):
        for name, value in list(vars(library).items()):
            if isinstance(value, triton.runtime.JITFunction):
                monkeypatch.setattr(library, name, interpreter.InterpretedFunction(value.fn))

    def load(name: str) -> ModuleType:
        found = importlib.util.find_spec(name)
        assert found is not None
        assert found.origin is not None
        package, _, last = name.rpartition(".")
        spec = importlib.util.spec_from_file_location(f"{package}.interpreted_{last}", found.origin)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for other, value in list(vars(module).items()):
            if isinstance(value, triton.runtime.JITFunction):
                setattr(module, other, interpreter.InterpretedFunction(value.fn))
        return module

    return load


@pytest.fixture
def begin_early(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Whether kernels begin while the one before ends, from now on."""
    support = importlib.import_module("mambabench.kernels.support")

    def choose(early: bool) -> None:
        monkeypatch.setenv(support.EARLY, "" if early else "off")
        support.begins_early.cache_clear()

    yield choose
    support.begins_early.cache_clear()


@pytest.fixture(scope="session")
def mambabench() -> Run:
    """`mambabench(*arguments, on=(folders,), **environment)` in a child process."""

    def run(*arguments: object, on: Sequence[Path] = (), **environment: str) -> subprocess.CompletedProcess[str]:
        path = [*map(str, on), *filter(None, [os.environ.get("PYTHONPATH")])]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MAMBABENCH_")}
        settings = {
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONSAFEPATH": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "COLUMNS": "300",
        }
        return subprocess.run(
            [sys.executable, "-m", "mambabench", *map(str, arguments)],
            env={**clean, **settings, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Says once that there is no GPU, in place of an error of each test that asks for one."""
    if any(item.get_closest_marker("gpu") for item in items) and not config.getoption("collectonly"):
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("tests marked `gpu` need a CUDA device, and torch finds none")
