"""The three stages one after the other, from a plan: a row for each of them."""

import csv
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plans" / "chain.toml"
SMALL = (
    "stages.align.tokens=4_000",
    "stages.tune.tokens=4_000",
    "data.pairs.documents=64",
    "data.unseen.documents=8",
    "data.tasks.items=8",
    "data.other-pairs.documents=8",
)


@pytest.mark.slow
def test_every_stage_has_a_row_with_every_task(mambabench, tmp_path):
    plan = [word for override in SMALL for word in ("--set", override)]
    done = mambabench("run", EXAMPLE, "--store", tmp_path / "store", *plan)
    assert done.returncode == 0, done.stderr
    mambabench("report", tmp_path / "store", "--to", "csv")
    with (tmp_path / "store" / "report" / "csv" / "quality.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["teacher", "aligned", "tuned", "preferred"]
    tasks = ("tiny_lookup acc %", "tiny_copy_generate exact_match %", "other-pairs prefers_chosen %")
    for column in (*tasks, "unseen perplexity", "unseen kl_per_token"):
        assert all(row[column] for row in rows)
