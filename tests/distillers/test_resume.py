"""A run that is killed in the middle of a stage goes on from there, to the same losses, as if nothing had been."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import torch
from mambabench.harness.store import Store

PLAN = """
schema = 1
name = "resume"
[data]
text = { use = "tiny", part = "train", documents = 64 }
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
schedule = "stepwise"
data = "text"
tokens = 80_000
context = 80
batch = 8
kl = 0.5
[models.pure]
use = "mamba2-hybrid"
keep = 0
train = ["align"]
[limits]
checkpoint = 0.1
"""


def until(true, seconds):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def killed_in_the_middle(command, partial):
    """Runs until a checkpoint of the stage is whole and a record has followed it, and kills the run alone."""
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    events, begun = partial / "events.jsonl", []

    def halfway():
        assert run.poll() is None, "the run ended before it was to be killed"
        marks = list(partial.glob("scratch/trainer/checkpoint-*/whole"))
        if not marks:
            return False
        begun.append(max(int(mark.parent.name.rpartition("-")[2]) for mark in marks))
        lines = [json.loads(line) for line in events.read_text().splitlines() if line.endswith("}")]
        return max((line["step"] for line in lines if line["kind"] == "loss"), default=0) > begun[0]

    # However long it takes to compile: a run ends by itself, and that is told.
    until(halfway, math.inf)
    family = [run, *psutil.Process(run.pid).children(recursive=True)]
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    until(lambda: not any(psutil.pid_exists(each.pid) for each in family[1:]), 5.0)
    return begun[0]


def interrupted(tmp_path, mambabench, *options, begun=(), ended=()):
    """Losses of the stage of an uninterrupted run and of one that was killed, and the step of the first checkpoint.

    `begun` are further options of the run that is killed, `ended` of the one that resumes it.
    """
    file = tmp_path / "resume.toml"
    file.write_text(PLAN)
    found, steps = [], 0
    for name in ("whole", "killed"):
        store = tmp_path / name
        words = ["run", file, "--store", store, *options]
        last = [*words, *ended] if name == "killed" else words
        if name == "killed":
            key = next(cell["key"] for cell in found[0][0].run()["cells"] if cell["label"] == "pure/align@seed0")
            command = [sys.executable, "-P", "-m", "mambabench", *map(str, [*words, *begun])]
            steps = killed_in_the_middle(command, store / "partial" / key)
        done = mambabench(*last)
        assert done.returncode == 0, done.stderr
        at = Store.open(store)
        found.append((at, losses(at)))
    attempts = {at.outcome(next(iter(keys(at))))["attempt"] for at, _ in found}
    assert attempts == {1}, "a killed run uses up no attempt"
    return found[0][1], found[1][1], steps


def keys(store):
    return {cell["key"] for cell in store.run()["cells"] if cell["label"] == "pure/align@seed0"}


def losses(store):
    (key,) = keys(store)
    return pd.read_parquet(store.finished(key) / "losses.parquet").drop(columns=["key", "t"])


@pytest.mark.slow
@pytest.mark.parametrize(("begun", "ended", "parallel"), [(1, 1, "ddp"), (2, 2, "ddp"), (2, 1, "fsdp"), (1, 2, "fsdp")])
def test_a_killed_run_goes_on_to_the_same_losses(tmp_path, mambabench, begun, ended, parallel):
    """Every record once, from before the checkpoint and after it, across the layers' phases, in any number of ranks."""
    ranks = [("--set", f"limits.train_gpus={number}") for number in (begun, ended)]
    options = ("--set", f"stages.align.parallel={parallel}")
    whole, resumed, steps = interrupted(tmp_path, mambabench, *options, begun=ranks[0], ended=ranks[1])
    assert steps < whole["step"].max()
    assert len(whole) >= 50
    # Alone, bit for bit; several ranks add in another order.
    pd.testing.assert_frame_equal(whole, resumed, check_exact=begun == ended == 1, rtol=1e-3)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_options_that_take_less_memory(tmp_path, mambabench):
    less = [
        f"stages.align.{option}" for option in ("accumulation=8", "checkpointing=true", "slice=64", "parallel=fsdp")
    ]
    ended = [word for option in ("limits.train_gpus=2", *less) for word in ("--set", option)]
    whole, resumed, steps = interrupted(tmp_path, mambabench, ended=ended)
    assert 0 < steps < whole["step"].max()
    pd.testing.assert_frame_equal(whole, resumed, rtol=1e-3)


@pytest.mark.gpu
def test_a_killed_run_goes_on_to_the_same_losses_on_a_gpu(tmp_path, mambabench):
    """With frozen weights in bf16, trained ones in fp32, and kernels that add in any order (but need no tuning)."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    options = ("--gpus", "0", "--set", "models.pure.use=mamba", "--set", "stages.align.tokens=200_000")
    whole, resumed, _ = interrupted(tmp_path, mambabench, *options)
    assert list(resumed["step"]) == list(whole["step"])
    assert list(resumed["tokens"]) == list(whole["tokens"])
    assert ((resumed["loss"] - whole["loss"]).abs() <= 0.02 * whole["loss"]).all()
