"""What two stores measured is known for the same by what is left of them."""

import json
import math
import shutil

import numpy as np
import pytest
from mambabench.harness.compare import compare, latency
from mambabench.harness.gates import Rule
from mambabench.harness.results import Results


@pytest.fixture
def make(stores, tmp_path):
    """Makes a store in which a trained model is measured."""

    def build(name, began):
        builder = stores.Builder(tmp_path / name, began=began)
        builder.model("teacher", teacher=True)
        builder.model("half", keep=0.5)
        subject = builder.step("half/align@seed0", "train", key="trained", artifact="weights")
        rows = stores.samples(np.random.default_rng(0), items=100, chance=0.8)
        builder.step("half/-/tasks@seed0", records={"sample": rows}, subject=subject)
        return builder.write()

    return build


def one(base, head):
    (comparison,) = compare(Results.read([base]), Results.read([head]))
    return comparison


def test_a_step_that_was_copied_without_its_model_is_the_same_measurement(make, tmp_path):
    store = make("base", 1e6)
    copy = shutil.copytree(store, tmp_path / "copy")
    shutil.rmtree(copy / "steps" / "trained")
    assert (one(store, copy).verdict, one(store, copy).reason) == ("pass", "100 items")


def test_a_model_whose_files_are_gone_is_not_said_to_be_trained_anew_for_sure(make):
    base, head = make("base", 1e6), make("head", 2e6)
    assert one(base, head).reason == "100 items"
    shutil.rmtree(base / "steps" / "trained" / "artifact")
    assert one(base, head).verdict == "inconclusive"
    assert one(base, head).reason.startswith("trained anew, perhaps: no artifact left in base; 3 seeds would decide")


@pytest.mark.parametrize("margin", [0.03, 3.0])
def test_a_measurement_beside_itself_tells_what_two_such_runs_would_see(margin):
    rule, blocks = Rule(margin=margin, level=0.99, noise=0.02, ignore=False), np.full(8, 0.002)
    itself, apart = (latency("x", "tpot", blocks, blocks, rule, (0.02, math.inf), of) for of in (blocks, None))
    assert itself.detectable == pytest.approx(apart.detectable)


def test_latencies_on_a_cpu_with_other_threads_are_not_compared(stores, tmp_path):
    for name, threads in (("base", 1), ("head", 2)):
        builder = stores.Builder(tmp_path / name)
        builder.model("teacher", teacher=True)
        seconds = {"subject": 0.002 / threads, "reference": 0.004 / threads}
        timed, _ = stores.bursts(np.random.default_rng(0), seconds, noise=0.005)
        options = {"decoder": stores.LOOKUP, "reference": stores.PLAIN, "subject": None}
        key = builder.step("teacher/lookup/speed@seed0", records={"burst": timed}, traits=("pair", "alone"), **options)
        outcome = builder.store.finished(key) / "outcome.json"
        record = json.loads(outcome.read_text())
        outcome.write_text(
            json.dumps({**record, "started": threads, "detail": {**record["detail"], "threads": threads}})
        )
        builder.write()
    made = compare(Results.read([tmp_path / "base"]), Results.read([tmp_path / "head"]))
    told = {comparison.metric: (comparison.verdict, comparison.reason) for comparison in made}
    assert told["latency"] == ("not comparable", "the threads differ (1 and 2)")
    assert set(told) == {"latency", "tokens"}
