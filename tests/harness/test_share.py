"""Steps that share a GPU say so, from the command line to their facts. The GPU is one that is made to be seen."""

from pathlib import Path

import pytest
from mambabench.harness.store import Store

ACTING = Path(__file__).with_name("acting.py")
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


SEEING = """
import torch
from mambabench.harness import environment
torch.cuda.is_available = lambda: True
environment._nvml = lambda: (["a GPU"], "1")
"""


@pytest.mark.parametrize("share", [1, 2])
def test_a_stage_says_by_how_many_its_gpu_may_be_shared(mambabench, tmp_path, share):
    seeing = tmp_path / "seeing"
    seeing.mkdir()
    (seeing / "sitecustomize.py").write_text(SEEING)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    file = tmp_path / "share.toml"
    file.write_text(PLAN)
    store = tmp_path / "store"
    words = ("--plugin", ACTING, "run", file, "--store", store, "--gpus", "0", "--share", share)
    done = mambabench(*words, on=[seeing], XDG_RUNTIME_DIR=str(tmp_path))
    assert (store / "run.json").exists(), done.stderr
    at = Store.open(store)
    keys = {cell["label"]: cell["key"] for cell in at.run()["cells"]}
    outcome = at.outcome(keys["half/align@seed0"])
    assert outcome is not None, done.stderr
    assert (outcome["state"], outcome["detail"]["device"]) == ("ok", "cuda:0")
    assert outcome["detail"]["gpu_shared_by"] == share
    told = [fact["value"] for fact in outcome["facts"] if fact["name"] == "gpu_shared_by"]
    assert told == ([share] if share > 1 else [])
