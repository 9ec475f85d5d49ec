"""The example package in use: its backend in a plan, its decoder and suite in the run, its table in the report."""

import json
from pathlib import Path

import pytest

from .conftest import EXAMPLES, Finished, Run

pytestmark = pytest.mark.slow


def test_the_plan_of_the_example_runs(finished: Finished) -> None:
    states = {}
    for cell in json.loads((finished.store / "run.json").read_text())["cells"]:
        outcome = finished.store / "steps" / cell["key"] / "outcome.json"
        states[cell["label"]] = json.loads(outcome.read_text())["state"] if outcome.is_file() else "not ok"
    assert {label for label, state in states.items() if state != "ok"} == {
        label for label in states if "/refused/" in label
    }, finished.run.stdout + finished.run.stderr
    assert {"bigram/convert@seed0", "bigram/-/perplexity@seed0", "bigram/fresh/variety@seed0"} <= states.keys()


def test_its_table_is_in_the_report(mambabench: Run, finished: Finished, example: Path, tmp_path: Path) -> None:
    done = mambabench("report", finished.store, "--to", "md,html,csv", "--out", tmp_path, on=[example])
    assert done.returncode == 0, done.stderr
    for page in (*tmp_path.rglob("*.md"), *tmp_path.rglob("*.html")):
        assert "Variety of generated text" in page.read_text()
    (table,) = tmp_path.rglob("*variety*.csv")
    header, *rows = table.read_text().splitlines()
    assert {"model", "decoder", "distinct_1", "distinct_2", "distinct_4"} <= set(header.split(","))
    assert {tuple(row.split(",")[:2]) for row in rows} >= {
        ("teacher", "plain"),
        ("bigram", "plain"),
        ("bigram", "fresh"),
    }


def test_without_the_package_the_plan_is_refused_in_one_line(mambabench: Run) -> None:
    done = mambabench("plan", EXAMPLES / "plans" / "bigram.toml")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "bigram.toml: decoders.fresh.use: unknown decoder 'no-repeat'" in done.stderr
