"""The default plan, made small: it resumes after `kill -9`, runs nothing twice, and repeats only what changed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PLAN = Path(__file__).resolve().parents[2] / "plans" / "tiny.toml"
SMALL = (
    "stages.teach.tokens=20_000",
    "stages.align.tokens=8_000",
    "suites.tasks.limit=8",
    "suites.perplexity.limit=8",
    "suites.losslessness.prompts=4",
    "suites.losslessness.new_tokens=12",
    "suites.chat.limit=2",
    "suites.speed.pairs=2",
    "suites.speed.new_tokens=8",
)


def words(store, *more):
    overrides = [word for override in (*SMALL, *more) for word in ("--set", override)]
    return ["run", PLAN, "--store", store, *overrides]


def finished(store):
    return {folder.name for folder in (store / "steps").iterdir()} if (store / "steps").is_dir() else set()


def began(store):
    """When each finished step began; another time means that it ran again."""
    return {key: json.loads((store / "steps" / key / "outcome.json").read_text())["started"] for key in finished(store)}


def descendants(pid):
    """Processes below `pid`, from /proc, with the time at which each began."""
    parents, times = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields[0] != "Z":
                parents[int(entry.name)], times[int(entry.name)] = int(fields[1]), fields[19]
    below, queue = set(), [pid]
    while queue:
        at = queue.pop()
        children = {child for child, parent in parents.items() if parent == at}
        below |= children
        queue += children
    return {(child, times[child]) for child in below}


def alive(processes):
    """Which of the processes still live, told apart from later ones of the same number."""
    living = set()
    for pid, start in processes:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] != "Z" and fields[19] == start:
            living.add(pid)
    return living


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A store whose run was killed while steps were running: (store, steps done, survivors after two seconds)."""
    store = tmp_path_factory.mktemp("tiny") / "store"
    command = [sys.executable, "-m", "mambabench", *map(str, words(store))]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONSAFEPATH": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        deadline = time.monotonic() + 120
        while len(finished(store)) < 8 and time.monotonic() < deadline:
            time.sleep(0.02)
        below = descendants(run.pid)
        run.send_signal(signal.SIGKILL)
        run.wait()
    time.sleep(2)
    return store, began(store), below, alive(below)


@pytest.fixture(scope="module")
def resumed(killed, mambabench):
    store, *_ = killed
    return store, mambabench(*words(store))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the table of processes from /proc")
def test_nothing_of_a_killed_run_is_alive_two_seconds_later(killed):
    _, done, below, living = killed
    assert done
    assert below
    assert not living


@pytest.mark.slow
def test_the_next_run_finishes_the_rest_and_no_finished_step_runs_twice(killed, resumed):
    store, done, *_ = killed
    _, run = resumed
    assert run.returncode == 0, run.stderr
    assert " ok; " in run.stdout
    after = began(store)
    assert len(after) > len(done)
    assert {key: after[key] for key in done} == done


@pytest.mark.slow
def test_a_finished_plan_runs_nothing_and_ends_quickly(resumed, mambabench):
    store, _ = resumed
    before, start = began(store), time.perf_counter()
    run = mambabench(*words(store))
    assert time.perf_counter() - start < 3
    assert "0 ran now" in run.stdout
    assert began(store) == before


@pytest.mark.slow
def test_one_changed_option_of_one_suite_runs_only_its_steps(resumed, mambabench):
    store, _ = resumed
    before = finished(store)
    assert mambabench(*words(store, "suites.perplexity.limit=4")).returncode == 0
    new = [json.loads((store / "steps" / key / "step.json").read_text()) for key in finished(store) - before]
    assert sorted(step["labels"][0].split("@")[0] for step in new) == [
        f"{model}/-/perplexity" for model in ("half", "pure", "quarter", "teacher")
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
