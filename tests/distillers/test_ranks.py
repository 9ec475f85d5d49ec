"""Several processes that train together do what one does with the same batch."""

import json
from pathlib import Path

import pytest
from mambabench.harness.store import Store
from safetensors.torch import load_file

PLAN = """
schema = 1
name = "ranks"
[data]
text = { use = "standin", part = "train", documents = 48 }
pairs = { use = "standin", part = "pairs", documents = 20 }
[teacher]
train = ["teach"]
[stages.teach]
use = "train-teacher"
data = "text"
tokens = 2_000
layers = 2
hidden = 16
intermediate = 16
context = 80
[stages.align]
use = "progressive"
data = "text"
tokens = 1_000
align_tokens = 500
schedule = "stepwise"
context = 48
batch = 8
kl = 0.5
[stages.tune]                          # less than one pass: at its end a batch has fewer windows, which ranks fill up
use = "sft"
data = "text"
tokens = 1_400
context = 48
batch = 8
kl = 0.5
slice = 16
[stages.prefer]
use = "dpo"
data = "pairs"
epochs = 2
batch = 4
accumulation = 2
lr = 1e-3
[models.pure]
use = "mamba2-hybrid"
chunk = 16
keep = 0
train = ["align", "tune", "prefer"]
"""
STAGES = ("teacher/teach", "pure/align", "pure/tune", "pure/prefer")


@pytest.fixture
def run(mambabench, tmp_path):
    """Runs the plan; returns each stage's records of losses and its weights."""
    file = tmp_path / "ranks.toml"
    file.write_text(PLAN)

    def run(name, *overrides):
        store = tmp_path / name
        words = [word for override in overrides for word in ("--set", override)]
        done = mambabench("run", file, "--store", store, *words)
        assert done.returncode == 0, done.stderr
        at = Store.open(store)
        keys = {cell["label"].partition("@")[0]: cell["key"] for cell in at.run()["cells"]}
        return keys, {stage: (losses(at, keys[stage]), weights(at, keys[stage])) for stage in STAGES}

    return run


def losses(store, key):
    events = map(json.loads, (store.finished(key) / "events.jsonl").read_text().splitlines())
    return [{k: v for k, v in event.items() if k not in ("kind", "t")} for event in events if event["kind"] == "loss"]


def weights(store, key):
    return load_file(Path(store.artifact(key)) / "model.safetensors")


@pytest.mark.slow
def test_two_ranks_train_as_one_does(run):
    keys, alone = run("alone")
    same, pair = run("pair", "limits.train_gpus=2")
    assert same == keys
    for stage in STAGES:
        (one, before), (two, after) = alone[stage], pair[stage]
        assert len(one) == len(two) >= 3
        for record, again in zip(one, two, strict=True):
            assert again == pytest.approx(record, rel=1e-3), stage
        assert before.keys() == after.keys()
        for name, weight in before.items():
            assert (weight - after[name]).abs().max() <= 2e-4 * weight.abs().max() + 1e-7, (stage, name)


def test_a_batch_that_ranks_cannot_share_is_refused(mambabench, tmp_path):
    file = tmp_path / "ranks.toml"
    file.write_text(PLAN)
    wrong = ("--set", "limits.train_gpus=2", "--set", "stages.teach.batch=3")
    done = mambabench("run", file, "--store", tmp_path / "store", "--only", "teacher/teach", *wrong)
    assert done.returncode == 1
    assert "batch = 3 with accumulation = 1 cannot be split among 2 GPUs" in done.stderr
