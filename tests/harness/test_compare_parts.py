"""Comparisons of runs that were asked for a part of their plan (`--only`): what is left out, and what never is."""

import json

import numpy as np
import pytest
from mambabench.harness.compare import compare, exit_code, unasked
from mambabench.harness.results import Results
from mambabench.harness.store import Store

DONE, OTHER = "half/-/perplexity@seed0", "half/-/recall@seed0"
PLAN = """
schema = 1
name = "parts"
[teacher]
use = "toy"
path = "teacher"
[data]
one = { use = "act" }
two = { use = "act", do = "fail" }
[stages.align]
use = "toy-train"
data = "one"
[stages.tune]
use = "toy-train"
data = "two"
[models.half]
use = "toy"
keep = { use = "toy-select" }
train = ["align", "tune"]
"""


@pytest.fixture
def make(stores, tmp_path):
    """Makes a store of a plan of two labels: one was measured, the other is as `other` says, where there is one."""

    def build(name, *, asked=(DONE,), other="planned"):
        builder = stores.Builder(tmp_path / name, asked=asked, began=1e6 if name == "base" else 2e6)
        text = {"sample": stores.losses_of_text(np.random.default_rng(0), nll=1.0)}
        builder.step(DONE, records=text, subject=builder.step("half/align@seed0", "train", artifact="weights"))
        if other == "planned":
            builder.planned(OTHER)
        elif other == "skipped":
            builder.skip(OTHER, "too slow")
        elif other:
            builder.step(OTHER, records=text, state=other, reason="a bug")
        return Results.read([builder.write()])

    return build


def test_labels_that_no_run_of_either_store_was_asked_for_are_left_out_and_named(make):
    sides = make("base"), make("head")
    comparisons = compare(*sides)
    assert {c.label: c.verdict for c in comparisons} == {DONE: "pass"}
    assert exit_code(comparisons) == 0
    assert unasked(*sides) == [OTHER]


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ({"asked": (DONE, OTHER)}, "base: not run (no run was asked for it); head: not run"),
        ({"asked": None}, "base: not run (no run was asked for it); head: not run"),
        ({"other": "ok"}, "base: not run (no run was asked for it)"),
        ({"other": "error"}, "base: not run (no run was asked for it); head: error (a bug)"),
        ({"other": "blocked"}, "base: not run (no run was asked for it); head: blocked (a bug)"),
        ({"other": "skipped"}, "base: not run (no run was asked for it); head: skipped (too slow)"),
        ({"other": ""}, "missing in head"),
    ],
    ids=["asked for", "perhaps asked for", "done", "failed", "blocked", "skipped", "not planned"],
)
def test_a_label_of_which_one_side_knows_anything_is_never_left_out(make, head, reason):
    sides = make("base"), make("head", **head)
    for base, other in (sides, sides[::-1]):
        comparisons = compare(base, other)
        assert unasked(base, other) == []
        assert exit_code(comparisons) == 12
        assert [c.verdict for c in comparisons if c.label == OTHER] == ["not comparable"]
    assert [c.reason for c in compare(*sides) if c.label == OTHER] == [reason]


@pytest.mark.parametrize("state", ["error", "timeout", "crashed", "planned"])
def test_a_label_that_both_sides_were_asked_for_and_that_did_not_end_well_is_never_left_out(make, state):
    asked = () if state != "planned" else (DONE, OTHER)
    sides = make("base", asked=asked, other=state), make("head", asked=asked, other=state)
    assert unasked(*sides) == []
    assert exit_code(compare(*sides)) == 12


def test_runs_that_were_asked_for_nothing_in_common_are_no_pass(stores, tmp_path):
    sides = []
    for name in ("base", "head"):
        builder = stores.Builder(tmp_path / name, asked=())
        builder.planned(OTHER)
        sides.append(Results.read([builder.write()]))
    assert compare(*sides) == []
    assert exit_code([]) == 12


def test_compare_says_how_many_labels_neither_run_was_asked_for(mambabench, make):
    folders = [str(make(name).stores[0]) for name in ("base", "head")]
    done = mambabench("compare", *folders)
    told = ["left out: 1 label that neither run was asked for", "1 pass"]
    assert (done.returncode, done.stdout.splitlines()[-2:]) == (0, told)


def test_a_store_knows_what_any_of_its_runs_was_asked_for(mambabench, acting_file, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    file, store = tmp_path / "plan.toml", tmp_path / "store"
    file.write_text(PLAN)
    found = []
    for words in (("--only", "data/one"), ("--only", "half/select"), ()):
        mambabench("--plugin", acting_file, "run", file, "--store", store, *words)
        found.append(set(Store.open(store).run()["asked"]))
    assert found[0] == {"data/one"}
    assert found[1] == {"data/one", "teacher/convert", "half/select@seed0"}
    cells = Store.open(store).run()["cells"]
    assert found[2] == {cell["label"] for cell in cells} > found[1]
    assert set(Results.read([store]).cells["asked"]) == {True}


def test_a_store_of_an_older_version_was_asked_for_all_of_its_plan(mambabench, acting_file, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    file, store = tmp_path / "plan.toml", Store.create(tmp_path / "store")
    file.write_text(PLAN)
    store.write_run({"cells": [{"label": "data/two", "key": "older"}]})
    done = mambabench("--plugin", acting_file, "run", file, "--store", store.path, "--only", "data/one")
    assert done.returncode == 0, done.stderr
    assert json.loads(store.run_file.read_text())["asked"] == ["data/two", "data/one"]
