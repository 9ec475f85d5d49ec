"""A registry with the toy components, and a plan that uses them."""

from pathlib import Path

import pytest
from mambabench.harness import plugins
from mambabench.harness.keys import Fingerprints
from mambabench.harness.plan import Plan, read_plan
from mambabench.harness.steps import Steps, expand

TOY = Path(__file__).with_name("toy.py")

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
