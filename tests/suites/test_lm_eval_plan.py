"""A task whose data lie on a hub that nobody reaches, in a plan beside others."""

import json

import pytest

pytest.importorskip("lm_eval")

from mambabench.harness.suites.lm_eval_data import ASK_S

PLAN = """
schema = 1
name = "far"
[teacher]
path = "{model}"
[data]
tasks = "tasks"
[suites.far]
use = "lm-eval"
tasks = ["arc_easy"]
[suites.near]
use = "lm-eval"
data = "tasks"
tasks = ["near"]
twins = true
"""
TASK = """
task: near
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["park", "house"]
doc_to_target: 0
"""


@pytest.mark.slow
def test_it_is_unsupported_within_seconds_and_the_rest_of_the_plan_has_its_figures(
    mambabench, shared, tmp_path, monkeypatch
):
    # Nothing answers there, and it takes as long as it is given to say so.
    monkeypatch.setenv("HF_ENDPOINT", "http://192.0.2.1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "near.yaml").write_text(TASK)
    items = [{"q": f"One day, {name} went to the"} for name in ("Lily", "Tim", "Tom")]
    (tmp_path / "tasks" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "plan.toml").write_text(PLAN.format(model=shared / "models" / "stories-260k"))
    done = mambabench("run", tmp_path / "plan.toml", "--store", tmp_path / "store")
    found = {}
    for path in tmp_path.glob("store/*/*/step.json"):
        outcome = json.loads(path.with_name("outcome.json").read_text())
        found |= dict.fromkeys(json.loads(path.read_text())["labels"], outcome)
    far, near = found["teacher/-/far@seed0"], found["teacher/-/near@seed0"]
    assert (far["state"], near["state"]) == ("unsupported", "ok"), done.stdout + done.stderr
    assert "the data of task 'arc_easy' cannot be had" in far["reason"]
    # Both take what it takes to import everything; what the hub may add is seconds.
    assert far["wall_s"] < near["wall_s"] + 2 * ASK_S
    report = mambabench("report", tmp_path / "store", "--to", "csv")
    assert report.returncode == 0, report.stderr
    table = (tmp_path / "store" / "report" / "csv" / "quality.csv").read_text()
    assert "generated" in table
    assert "gap" in table
