"""A stage that names its teacher waits for that model, and its key follows it."""

import json

import pytest
from mambabench.harness.interfaces import MambabenchError
from mambabench.harness.keys import Fingerprints
from mambabench.harness.plan import read_plan
from mambabench.harness.plugins import registry
from mambabench.harness.steps import expand

PLAN = """
schema = 1
name = "named"
seeds = [0]
[teacher]
path = "small"
[data]
text = "text.txt"
[stages.align]
use = "progressive"
data = "text"
tokens = 100
[stages.tune]
use = "sft"
data = "text"
tokens = 100
kl = 1.0
teacher = "big"
[models.big]
use = "teacher"
path = "big"
[models.half]
use = "mamba2-hybrid"
keep = 0.5
train = ["align", "tune"]
"""


@pytest.fixture
def steps(tmp_path):
    for name, size in (("small", 8), ("big", 16)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": size}))
    (tmp_path / "text.txt").write_text("once")

    def expanded(text=PLAN):
        (tmp_path / "plan.toml").write_text(text)
        loaded = registry()
        return expand(read_plan(tmp_path / "plan.toml", loaded, []), loaded, Fingerprints(tmp_path / "cache"), {})

    return expanded


def keys(steps):
    return {cell.label: cell.key for cell in steps.cells}


def test_the_stage_has_the_named_model_as_an_input(steps, tmp_path):
    before = steps()
    tune = before.steps[keys(before)["half/tune@seed0"]]
    assert keys(before)["big/convert@seed0"] in tune.all_inputs
    assert tune.record["models"]["big"]["step"] == keys(before)["big/convert@seed0"]
    (tmp_path / "big" / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 32}))
    after = keys(steps())
    assert after["half/tune@seed0"] != keys(before)["half/tune@seed0"]
    assert after["half/align@seed0"] == keys(before)["half/align@seed0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('teacher = "big"', 'teacher = "bog"'), r"stages.tune.teacher: unknown model 'bog'; did you mean 'big'"),
        (('teacher = "big"', 'teacher = "half"'), "a circle of models: half -> half"),
    ],
)
def test_names_that_lead_nowhere_are_refused(steps, change, message):
    with pytest.raises(MambabenchError, match=message):
        steps(PLAN.replace(*change))


def test_a_stage_that_makes_the_teacher_cannot_ask_a_model_made_of_it(steps):
    made = PLAN.replace('path = "small"', 'train = ["make", "tune"]').replace(
        "[stages.align]",
        '[stages.make]\nuse = "random-teacher"\nlayers = 2\nhidden = 8\nheads = 1\nintermediate = 8\nvocabulary = 300\n'
        "[stages.align]",
    )
    with pytest.raises(MambabenchError, match=r"stages.tune.teacher: 'big' is not there yet: this makes the teacher"):
        steps(made)
