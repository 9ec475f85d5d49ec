"""Steps that share a GPU say so, from the command line to their facts. The GPU is one that is made to be seen."""

import pytest
from mambabench.harness.store import Store

PLAN = """
schema = 1
name = "share"
[teacher]
use = "toy"
path = "teacher"
[data]
text = { use = "act" }
[stages.align]
use = "toy-train"
data = "text"
[models.half]
use = "toy"
keep = { use = "toy-select" }
train = ["align"]
"""


@pytest.mark.parametrize("share", [1, 2])
def test_a_stage_says_by_how_many_its_gpu_may_be_shared(run_on_gpus, tmp_path, share):
    store = tmp_path / "store"
    done = run_on_gpus(tmp_path, PLAN, 1, "--share", share)
    assert (store / "run.json").exists(), done.stderr
    at = Store.open(store)
    keys = {cell["label"]: cell["key"] for cell in at.run()["cells"]}
    outcome = at.outcome(keys["half/align@seed0"])
    assert outcome is not None, done.stderr
    assert (outcome["state"], outcome["detail"]["device"]) == ("ok", "cuda:0")
    assert outcome["detail"]["gpu_shared_by"] == share
    told = [fact["value"] for fact in outcome["facts"] if fact["name"] == "gpu_shared_by"]
    assert told == ([share] if share > 1 else [])
