"""Several processes that train together do what one does with the same batch."""

import json
from dataclasses import dataclass

import pytest
import torch
from mambabench.harness.store import Store
from safetensors.torch import load_file
from torch import Tensor

PLAN = """
schema = 1
name = "ranks"
[data]
text = { use = "tiny", part = "train", documents = 48 }
pairs = { use = "tiny", part = "preferences", documents = 20 }
[teacher]
train = ["teach"]
[stages.teach]
use = "train-teacher"
data = "text"
tokens = 3_000
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
[stages.tune]                          # more than one pass: one batch has windows of both
use = "sft"
data = "text"
tokens = 5_000
context = 48
batch = 8
kl = 0.5
slice = 16
[stages.prefer]
use = "dpo"
data = "pairs"
epochs = 2
batch = 4
accumulation = 4                       # a rank has two of them
precompute = true
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

    def run(name, *overrides, gpus=""):
        store = tmp_path / name
        words = [word for override in overrides for word in ("--set", override)]
        words += ["--gpus", gpus] if gpus else []
        done = mambabench("run", file, "--store", store, *words)
        assert done.returncode == 0, done.stderr
        at = Store.open(store)
        keys = {cell["label"].partition("@")[0]: cell["key"] for cell in at.run()["cells"]}
        return keys, {stage: result(at, keys[stage]) for stage in STAGES}

    return run


@dataclass
class Result:
    losses: list[dict[str, float]]
    weights: dict[str, Tensor]
    facts: dict[str, float]


def result(store, key):
    events = [json.loads(line) for line in (store.finished(key) / "events.jsonl").read_text().splitlines()]
    losses = [{k: v for k, v in each.items() if k not in ("kind", "t")} for each in events if each["kind"] == "loss"]
    facts = {event["name"]: event["value"] for event in events if event["kind"] == "fact"}
    return Result(losses, load_file(store.artifact(key) / "model.safetensors"), facts)


@pytest.mark.slow
def test_two_ranks_train_as_one_does(run):
    """With a copy of the weights each, or with half of them each."""
    keys, alone = run("alone")
    for parallel, share in (("ddp", 1.0), ("fsdp", 0.5)):
        options = [f"stages.{stage}.parallel={parallel}" for stage in ("align", "tune", "prefer")]
        same, pair = run(parallel, "limits.train_gpus=2", *options)
        assert same == keys
        for stage in STAGES:
            one, two = alone[stage], pair[stage]
            assert len(one.losses) == len(two.losses) >= 3
            for record, again in zip(one.losses, two.losses, strict=True):
                assert again == pytest.approx(record, rel=1e-3), stage
            assert one.weights.keys() == two.weights.keys()
            for name, weight in one.weights.items():
                assert weight.dtype == two.weights[name].dtype
                assert (weight - two.weights[name]).abs().max() <= 2e-4 * weight.abs().max() + 1e-7, (stage, name)
            assert two.facts["ranks"] == 2
            expected = share if stage != "teacher/teach" else 1.0
            assert two.facts["weights_held_share"] == pytest.approx(expected, abs=0.1), stage


def test_a_batch_that_ranks_cannot_share_is_refused(mambabench, tmp_path):
    file = tmp_path / "ranks.toml"
    file.write_text(PLAN)
    wrong = ("--set", "limits.train_gpus=2", "--set", "stages.prefer.batch=7", "--set", "stages.prefer.accumulation=1")
    for command in (("plan", file), ("run", file, "--store", tmp_path / "store")):
        done = mambabench(*command, *wrong)
        assert done.returncode != 0
        told = f"mambabench: {file}: stages.prefer.batch: expected a multiple of limits.train_gpus = 2, got 7"
        assert done.stderr.strip() == told
    assert not (tmp_path / "store").exists()


@pytest.mark.gpu
@pytest.mark.parametrize(("parallel", "share"), [("ddp", 1.0), ("fsdp", 0.5)])
def test_two_gpus_train_as_one_does(run, parallel, share):
    """The same loss curves at the same batch, but for the rounding of bf16."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"torch finds {torch.cuda.device_count()} GPUs, and two are needed")
    _, alone = run("alone", gpus="0")
    options = [f"stages.{stage}.parallel={parallel}" for stage in ("align", "tune", "prefer")]
    _, pair = run("pair", "limits.train_gpus=2", *options, gpus="0,1")
    for stage in STAGES:
        one, two = alone[stage], pair[stage]
        assert [record["tokens"] for record in one.losses] == [record["tokens"] for record in two.losses]
        assert [record["loss"] for record in two.losses] == pytest.approx(
            [record["loss"] for record in one.losses], rel=5e-3
        )
        assert all(weight.dtype == one.weights[name].dtype for name, weight in two.weights.items())
        assert two.facts["training_gpu"] == pytest.approx(2 * two.facts["training_wall"])
        expected = share if stage != "teacher/teach" else 1.0
        assert two.facts["weights_held_share"] == pytest.approx(expected, abs=0.1), stage
