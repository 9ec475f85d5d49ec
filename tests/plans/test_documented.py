"""What docs/training.md says of several GPUs and of less memory fits the plans that come with the package."""

import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from mambabench.harness.plan import read_plan
from mambabench.harness.plugins import registry

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ("tiny", *(f"gpu/{name}" for name in ("ladder", "ablations", "chain", "drafts", "recall", "shape-8b")))
PAPER = tuple(f"paper/{name}" for name in ("zephyr-7b", "llama3-8b", "llama3.1-8b", "llama3.2-3b"))


@pytest.fixture(scope="module")
def text():
    return (
        (ROOT / "docs" / "training.md").read_text().partition("## Several GPUs, less memory")[2].partition("\n## ")[0]
    )


@pytest.fixture(scope="module")
def commands(text):
    """What follows PLAN in each, but for the GPUs, which this machine may lack."""
    return [
        shlex.split(re.sub(r"--(gpus|share) [\d,]+", "", rest))
        for rest in re.findall(r"mambabench run PLAN (.*)", text)
    ]


@pytest.fixture(scope="module")
def options(text):
    """Name and value of each option in the table."""
    found = re.findall(r"^\| `(\w+) = \"?(\w+)\"?`", text, re.MULTILINE)
    return {name: "2" if value == "n" else value for name, value in found}


@pytest.fixture
def read(tmp_path):
    def read(name, *overrides):
        file = ROOT / "plans" / f"{name}.toml"
        table = tomllib.loads(file.read_text())
        given = ["teacher.path"] if "path" in table["teacher"] else []
        given += [f"models.{model}.path" for model, of in table["models"].items() if "path" in of]
        (tmp_path / "config.json").write_text("{}")
        return read_plan(file, registry(), [*(f"{key}={tmp_path}" for key in given), *overrides])

    return read


@pytest.mark.parametrize("name", [*TRAINING, *PAPER])
def test_every_plan_that_trains_takes_the_documented_options(read, commands, options, name):
    for words in commands:
        read(name, *(word for before, word in pairwise(words) if before == "--set"))
    stages = read(name).stages
    for option, value in options.items():
        taking = [stage for stage, choice in stages.items() if hasattr(choice.config, option)]
        if not taking:
            assert option == "precompute"
            continue
        given = read(name, f"stages.*.{option}={value}").stages
        assert all(str(getattr(given[stage].config, option)).lower() == value for stage in taking)
        assert all(given[stage] == stages[stage] for stage in stages.keys() - set(taking))


def test_the_command_line_takes_the_documented_commands(mambabench, tmp_path, commands, options):
    assert len(commands) == 3
    assert options.keys() == {"accumulation", "checkpointing", "slice", "parallel", "precompute"}
    for words in commands:
        done = mambabench("plan", ROOT / "plans" / "tiny.toml", "--store", tmp_path / "store", *words)
        assert done.returncode == 0, done.stderr


def test_an_option_that_no_stage_has_is_told_in_one_line(mambabench):
    done = mambabench("plan", ROOT / "examples" / "plans" / "recall.toml", "--set", "stages.*.precompute=true")
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("mambabench: --set stages.*.precompute=true: the plan has nothing of that name; known: ")
