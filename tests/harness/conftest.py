"""A registry with the toy components, a plan that uses them, and what runs of steps need: a store and a launcher."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mambabench.harness import plugins
from mambabench.harness.keys import Fingerprints
from mambabench.harness.launchers.configs import LocalConfig
from mambabench.harness.launchers.local import LocalLauncher
from mambabench.harness.plan import Plan, read_plan
from mambabench.harness.runner import PRELOADED
from mambabench.harness.steps import Steps, expand
from mambabench.harness.store import Store

TOY, ACTING = (Path(__file__).with_name(f"{name}.py") for name in ("toy", "acting"))
SEEING = """
import torch
from mambabench.harness import environment
torch.cuda.is_available = lambda: True
environment._nvml = lambda: (["a GPU"] * {gpus}, "1")
"""

PLAN = """
schema = 1
name = "toy"
seeds = [0, 1]
[teacher]
use = "toy"
path = "teacher"
[data]
text = { use = "toy-source", part = "train" }
labels = { use = "toy-teacher-source" }
file = "text.txt"
[stages.align]
use = "toy-stage"
data = "labels"
[stages.tune]
use = "toy-stage"
data = "file"
lr = 1
[models.half]
use = "toy"
keep = 0.5
train = ["align", "tune"]
[models.other]
like = "half"
train = ["align"]
[models.next]
use = "toy"
keep = 0
start = "half"
train = ["align"]
[decoders.plain]
use = "toy-plain"
[decoders.quick]
use = "toy-lossless"
k = 2
[decoders.rough]
use = "toy-lossy"
[suites.score]
use = "toy-score"
data = "text"
[suites.generate]
use = "toy-generate"
[suites.speed]
use = "toy-speed"
[[skip]]
steps = "next/quick/*"
why = "too slow"
[limits]
timeout = "3 min"
"""
SMALL = """
schema = 1
name = "small"
[teacher]
path = "builtin:tiny"
[data]
text = { use = "tiny", part = "train", documents = 8 }
[stages.align]
use = "progressive"
data = "text"
tokens = 1_000
[models.half]
use = "mamba2-hybrid"
keep = 0.5
train = ["align"]
"""


@pytest.fixture
def registry() -> plugins.Registry:
    return plugins.load([TOY])


class Planner:
    """Writes plans into a folder and expands them."""

    def __init__(self, folder: Path, registry: plugins.Registry) -> None:
        self.folder, self.registry = folder, registry
        self.machine = {"torch": "2.13.0", "gpu": "none"}
        (folder / "teacher").mkdir()
        (folder / "teacher" / "config.json").write_text("{}")
        (folder / "text.txt").write_text("once upon a time")

    def read(self, text: str = PLAN, *overrides: str) -> Plan:
        file = self.folder / "toy.toml"
        file.write_text(text)
        return read_plan(file, self.registry, overrides)

    def steps(self, text: str = PLAN, *overrides: str) -> Steps:
        plan = self.read(text, *overrides)
        return expand(plan, self.registry, Fingerprints(self.folder / "cache.json"), self.machine)


@pytest.fixture
def planner(tmp_path: Path, registry: plugins.Registry) -> Planner:
    return Planner(tmp_path, registry)


@pytest.fixture
def plan_text() -> str:
    return PLAN


@pytest.fixture
def small_plan() -> str:
    """Of the shipped teacher and a hybrid."""
    return SMALL


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


@pytest.fixture(scope="module")
def launcher() -> Iterator[LocalLauncher]:
    made = LocalLauncher(LocalConfig(jobs=3))
    made.prepare(PRELOADED)
    yield made
    made.close()


@pytest.fixture(scope="session")
def acting_file() -> Path:
    """The local plug-in of components that act."""
    return ACTING


@pytest.fixture(scope="session")
def run_on_gpus(
    mambabench: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_on_gpus(folder, plan, gpus, *words)`: runs a plan of components that act, where so many GPUs are made to be
    seen; the store is `folder / "store"`."""

    def run(folder: Path, plan: str, gpus: int, *words: object) -> subprocess.CompletedProcess[str]:
        (folder / "seeing").mkdir()
        (folder / "seeing" / "sitecustomize.py").write_text(SEEING.format(gpus=gpus))
        (folder / "teacher").mkdir()
        (folder / "teacher" / "config.json").write_text("{}")
        file = folder / "plan.toml"
        file.write_text(plan)
        named = ("--store", folder / "store", "--gpus", ",".join(map(str, range(gpus))))
        command = ("--plugin", ACTING, "run", file, *named, *words)
        return mambabench(*command, on=[folder / "seeing"], XDG_RUNTIME_DIR=str(folder))

    return run
