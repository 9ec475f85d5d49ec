"""The default plan, made small: it resumes after `kill -9`, runs nothing twice, and repeats only what changed."""

import json
import random
import re
import time
from pathlib import Path

import pytest
from mambabench.distillers.tiny.writer import TASKS
from mambabench.harness.keys import Fingerprints
from mambabench.harness.plan import read_plan
from mambabench.harness.plugins import registry
from mambabench.harness.steps import expand

PLAN = Path(__file__).resolve().parents[2] / "plans" / "tiny.toml"
SMALL = (
    "stages.align.tokens=8_000",
    "stages.tune.tokens=4_000",
    "data.pairs.documents=32",
    "data.text.documents=400",
    "suites.tasks.limit=8",
    "suites.perplexity.limit=8",
    "suites.losslessness.prompts=4",
    "suites.losslessness.new_tokens=12",
    "suites.speed.pairs=2",
    "suites.speed.new_tokens=8",
)


def words(store, *more):
    overrides = [word for override in (*SMALL, *more) for word in ("--set", override)]
    return ["run", PLAN, "--store", store, *overrides]


def test_the_default_plan_takes_nothing_but_the_package(tmp_path):
    loaded = registry()
    plan = read_plan(PLAN, loaded)
    shipped = PLAN.parents[1] / "distillers" / "tiny" / "teacher" / "config.json"
    assert (Path(plan.teacher.path) / "config.json").samefile(shipped)
    assert not any(entry.file for entry in plan.data.values())
    steps = expand(plan, loaded, Fingerprints(tmp_path / "cache"), {})
    by_label = {label: step for step in steps for label in step.labels}
    (questions,) = by_label["half/plain/mt-bench@seed0"].record["data"].values()
    assert questions["step"] == by_label["data/questions"].key
    assert questions in by_label["half/plain/alpaca-eval@seed0"].record["data"].values()
    (asked,) = by_label["half/plain/mt-bench/answer@seed0"].record["data"].values()
    assert asked == {**questions, "inside": "question.jsonl"}
    assert not any(step.obstacle for step in steps)
    # Half, a quarter and none of four layers' attention, every stage, both decoders, and each task in both forms.
    layers = json.loads((Path(plan.teacher.path) / "config.json").read_text())["num_hidden_layers"]
    chosen = {name: model.selector.config for name, model in plan.models.items()}
    assert {name: of.share if hasattr(of, "share") else len(of.layers) / layers for name, of in chosen.items()} == {
        "half": 0.5,
        "quarter": 0.25,
        "pure": 0,
        "pure-mamba": 0,
    }
    assert {name: model.backend.name for name, model in plan.models.items()} == {
        **dict.fromkeys(("half", "quarter", "pure"), "mamba2-hybrid"),
        "pure-mamba": "mamba",
    }
    assert {stage.name for stage in plan.stages.values()} == {"progressive", "sft", "dpo"}
    assert {decoder.name for decoder in plan.decoders.values()} == {"standard", "speculative"}
    tasks = set(plan.suites["tasks"].config.tasks)
    assert {task.removesuffix("_generate") + "_generate" for task in tasks} < tasks
    assert {task.removeprefix("tiny_").removesuffix("_generate") for task in tasks} == set(TASKS)


def finished(store):
    return {folder.name for folder in (store / "steps").iterdir()} if (store / "steps").is_dir() else set()


@pytest.fixture(scope="module")
def killing(loaded):
    return loaded(PLAN.parents[1] / "tests" / "killing.py")


@pytest.fixture(scope="module")
def killed(tmp_path_factory, killing):
    """A store whose run was killed three times at random moments in its steps: (store, kills, when its steps began)."""
    store, moments = tmp_path_factory.mktemp("tiny") / "store", random.Random(0)
    kills = [killing.killed(words(store), store, moments.uniform(0.0, 2.0), finished=many) for many in (0, 3, 8)]
    return store, kills, killing.began(store)


@pytest.fixture(scope="module")
def resumed(killed, mambabench):
    store, *_ = killed
    return store, mambabench(*words(store))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads environments of processes")
def test_nothing_of_a_killed_run_is_alive_two_seconds_later(killed):
    _, kills, _ = killed
    assert any(kill.interrupted for kill in kills)
    assert not any(kill.survivors for kill in kills)


@pytest.mark.slow
def test_the_next_run_finishes_the_rest_and_no_finished_step_is_lost_or_runs_twice(killed, resumed, killing):
    store, kills, done = killed
    _, run = resumed
    assert run.returncode == 0, run.stderr
    assert re.search(r"(\d+) steps: \1 ok; ", run.stdout), run.stdout
    assert not any(kill.undone for kill in kills)
    after = killing.began(store)
    assert len(after) > len(done) >= 8
    assert {key: after[key] for key in done} == done


@pytest.mark.slow
def test_two_runs_on_one_store_do_each_step_once_and_have_the_numbers_of_one_that_was_killed(
    resumed, killing, tmp_path
):
    killed_store, _ = resumed
    store = tmp_path / "store"
    said = killing.at_once(words(store))
    attempts = killing.attempts(store)
    assert set(attempts) == finished(killed_store)
    assert set(attempts.values()) == {1}
    assert sum(int(re.search(r"; (\d+) ran now", each)[1]) for each in said) == len(attempts)
    assert killing.quality(store) == killing.quality(killed_store)


@pytest.mark.slow
def test_a_finished_plan_runs_nothing_and_ends_quickly(resumed, mambabench, killing):
    store, _ = resumed
    before, start = killing.began(store), time.perf_counter()
    run = mambabench(*words(store))
    assert time.perf_counter() - start < 3
    assert "0 ran now" in run.stdout
    assert killing.began(store) == before


@pytest.mark.slow
def test_one_changed_option_of_one_suite_runs_only_its_steps(resumed, mambabench):
    store, _ = resumed
    before = finished(store)
    assert mambabench(*words(store, "suites.perplexity.limit=4")).returncode == 0
    new = [json.loads((store / "steps" / key / "step.json").read_text()) for key in finished(store) - before]
    assert sorted(step["labels"][0].split("@")[0] for step in new) == [
        f"{model}/-/perplexity" for model in ("half", "pure-mamba", "pure", "quarter", "teacher")
    ]


@pytest.mark.slow
def test_the_report_has_the_teacher_in_every_table_of_models(resumed, mambabench):
    store, _ = resumed
    assert mambabench("report", store, "--to", "csv,html").returncode == 0
    tables = list((store / "report" / "csv").glob("*.csv"))
    wanted = {"quality", "speed", "losslessness", "acceptance", "answers", "judges", "cost", "steps"}
    assert wanted <= {table.stem for table in tables}
    for table in tables:
        header, first = table.read_text().splitlines()[:2]
        if table.stem == "differences":  # has the teacher's value beside each model's
            assert "teacher's" in header.split(",")
        elif table.stem not in ("judges", "steps"):
            assert first.startswith("teacher"), table.name
    assert "<script" not in (store / "report" / "report.html").read_text()


@pytest.mark.slow
def test_a_run_against_itself_does_not_fail(resumed, mambabench):
    store, _ = resumed
    assert mambabench("compare", store, store).returncode in (0, 11)
