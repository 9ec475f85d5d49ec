"""The command line: quick answers, one line for what went wrong, exit codes."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mambabench.harness import cli, plugins
from mambabench.harness.environment import machine_facts
from mambabench.harness.keys import Fingerprints
from mambabench.harness.plan import read_plan
from mambabench.harness.steps import expand
from mambabench.harness.store import Store

COMMAND = """
from dataclasses import dataclass
from mambabench import Component, hookimpl

@dataclass(frozen=True)
class Config:
    pass

@hookimpl
def mambabench_components():
    return [
        Component(kind="command", name="gone", target="no_such_package.module:command", config=Config),
        Component(kind="launcher", name="far", target="x:y", config=Config, requires=("no-such-package>=1",)),
    ]
"""


@pytest.fixture
def local(tmp_path):
    file = tmp_path / "local.py"
    file.write_text(COMMAND)
    return file


def test_a_broken_command_of_a_plug_in_leaves_the_others_alone(mambabench, local):
    listed = mambabench("--plugin", local, "--help")
    assert listed.returncode == 0
    assert "(broken) local.py" in listed.stdout
    assert "compare" in listed.stdout
    used = mambabench("--plugin", local, "gone")
    assert used.returncode == 1
    assert used.stderr.strip().splitlines()[-1].startswith("mambabench: the command 'gone' of local.py")


def test_a_launcher_whose_requirements_are_not_installed_is_one_line(mambabench, local, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    (tmp_path / "plan.toml").write_text('schema = 1\nname = "x"\n[teacher]\npath = "teacher"\n')
    words = ("run", tmp_path / "plan.toml", "--store", tmp_path / "store", "--launcher", "far")
    done = mambabench("--plugin", local, *words)
    assert done.returncode == 1
    told = "launcher 'far': not installed as required: no-such-package>=1 (not installed)"
    assert done.stderr.strip().splitlines()[-1] == f"mambabench: {told}"
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("show", "none"), 1, "mambabench: none: not a store of results (it has no run.json)"),
        (("plan", "none.toml"), 1, "mambabench: none.toml: no such plan"),
        (("--plugin", "none.py", "plugins"), 1, "none.py: no such file"),
        (("plan", "none.toml", "--gpus", "0, 0"), 2, "expected numbers of GPUs such as 0,1, got '0, 0'"),
        (("plan", "none.toml", "--gpus", "²"), 2, "expected numbers of GPUs such as 0,1, got '²'"),
        (("generate", "none"), 1, "mambabench: none: neither an artifact of a store nor a transformers folder"),
        (("list", "decodr"), 2, "'decodr' is not one of"),
        (("nothing",), 2, "No such command 'nothing'"),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(mambabench, tmp_path, arguments, code, line):
    done = mambabench(*arguments)
    assert done.returncode == code
    assert line in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_that_takes_nothing_is_one_line(monkeypatch, capsys):
    def write(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "report.md")

    monkeypatch.setattr(cli, "cli", write)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["report", "store"])
    assert capsys.readouterr().err == "mambabench: report.md: Read-only file system\n"


def test_show_takes_a_step_for_done_whose_artifact_was_deleted(mambabench, stores, tmp_path):
    builder = stores.Builder(tmp_path / "store")
    facts = [{"name": "training_tokens", "value": 64, "unit": "tokens"}]
    key = builder.step("half/align@seed0", kind="train", facts=facts, artifact="weights")
    store = builder.write()
    shutil.rmtree(store / "steps" / key / "artifact")
    line = mambabench("show", store).stdout.splitlines()[1]
    assert line.split()[:2] == ["half/align@seed0", "ok"]
    assert line.endswith("artifact/artifact.json: missing; made anew where a run needs it")
    told = mambabench("show", store, "half/align@seed0").stdout
    assert "wall    3.00 s" in told
    assert "64 tokens" in told


def test_show_puts_figures_below_each_other_and_shortens_them(mambabench, stores, tmp_path):
    builder = stores.Builder(tmp_path / "store")
    facts = [
        {"name": "distinct 4-grams, batch 1", "value": 0.4528301886792453, "unit": "share"},
        {"name": "weights", "value": 2_850_400, "unit": "byte"},
    ]
    builder.step("half/lookup/speed@seed0", kind="measure", facts=facts)
    lines = mambabench("show", builder.write(), "half/lookup/speed").stdout.splitlines()
    assert lines[-2:] == ["  distinct 4-grams, batch 1  0.45283 share", "  weights                    2850400 byte"]


@pytest.mark.parametrize(
    ("state", "asked", "told"),
    [
        ("error", (), "3 to run; 1 failed before, --retry runs it again and what it blocks (1)"),
        ("crashed", (), "5 to run"),
        ("error", ("--set", "data.text.documents=9"), "5 to run"),
    ],
)
def test_plan_counts_what_failed_apart_from_what_would_run(mambabench, small_plan, tmp_path, state, asked, told):
    file, store = tmp_path / "plan.toml", Store.create(tmp_path / "store")
    file.write_text(small_plan)
    loaded = plugins.registry(())
    steps = expand(read_plan(file, loaded), loaded, Fingerprints(tmp_path / "cache.json"), machine_facts(()))
    (step,) = (step for step in steps if "data/text" in step.labels)
    store.write_run({})
    store.prepare(step.key, step.to_json())
    store.fail(step.key, {"state": state, "reason": "a bug", "attempt": 1, "wall_s": 1.0})
    done = mambabench("plan", file, "--store", store.path, *asked)
    assert done.stdout.splitlines()[-1] == f"5 steps, {told}; store {store.path}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_output_that_is_full_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mambabench", "list"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "mambabench: No space left on device\n")


@pytest.mark.parametrize("words", [("list", "--options"), ("--help",), ("compare", "STORE", "STORE")])
def test_a_reader_that_is_gone_ends_a_command_quietly_and_is_no_verdict(stores, tmp_path, words):
    builder = stores.Builder(tmp_path / "store")
    builder.step("half/-/perplexity@seed0")
    store = str(builder.write())
    words = [word.replace("STORE", store) for word in words]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "mambabench", *words], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_compare_ends_with_the_strictest_verdict_first(mambabench, stores, tmp_path):
    folders = []
    for name, labels in (("base", ("perplexity", "other")), ("head", ("perplexity",))):
        builder = stores.Builder(tmp_path / name)
        for label in labels:
            text = stores.losses_of_text(np.random.default_rng(0), nll=1.0)
            builder.step(f"teacher/-/{label}@seed0", records={"sample": text}, use="perplexity")
        folders.append(builder.write())
    done = mambabench("compare", *folders)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (12, "1 not comparable, 1 pass")


def test_help_says_all_of_each_command(mambabench):
    commands = mambabench("--help").stdout.partition("Commands:")[2].strip().splitlines()
    assert {"run", "compare", "generate", "kernels", "report"} <= {line.split()[0] for line in commands}
    assert not [line for line in commands if line.endswith("...")]


def test_list_shows_options_as_a_plan_has_them(mambabench):
    told = dict(
        line.split(maxsplit=1) for line in mambabench("list", "--options").stdout.splitlines() if line[0] == " "
    )
    assert told["rollback"] == '"replay" | "snapshot" = "replay"'
    assert told["draft"] == 'draft = "ngram"'
    assert told["judge"] == "judge (may be left out)"
    assert told["kinds"].endswith('= ["phone-book", "needle", "multi-key", "copying"]')
    assert told["pairs"] == "whole number = 8"
    assert told["annotator"] == 'text = "weighted_alpaca_eval_gpt4_turbo"'
    assert told["path"] == "file (must be given)"


@pytest.mark.parametrize("verb", [("plugins",), ("list",)])
def test_listing_answers_at_once(mambabench, verb):
    """In seconds of a processor: other tests may have it meanwhile."""

    def spent():
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    times = []
    for _ in range(3):
        before = spent()
        assert mambabench(*verb).returncode == 0
        times.append(spent() - before)
    assert min(times) < 0.5
