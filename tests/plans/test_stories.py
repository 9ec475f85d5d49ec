"""The whole way on a real teacher: text that it writes itself, two hybrids, both decoders, a report."""

import csv
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plans" / "stories.toml"
SMALL = (
    "data.text.documents=160",
    "data.text.new_tokens=96",
    "data.unseen.documents=16",
    "data.unseen.first=160",
    "data.unseen.new_tokens=96",
    "stages.align.tokens=40_000",
    "stages.align.context=97",
    "suites.losslessness.new_tokens=24",
    "suites.speed.pairs=2",
    "suites.speed.new_tokens=16",
    "suites.speed.batch=[1]",
)


@pytest.fixture(scope="module")
def store(mambabench, shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories") / "store"
    overrides = [f"teacher.path={shared / 'models' / 'stories-260k'}", *SMALL]
    plan = [word for override in overrides for word in ("--set", override)]
    done = mambabench("run", EXAMPLE, "--store", folder, *plan)
    assert done.returncode == 0, done.stderr
    assert "18 ok" in done.stdout
    mambabench("report", folder, "--to", "csv")
    return folder


def table(store, name):
    with (store / "report" / "csv" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_teacher_predicts_its_own_text_best_and_more_attention_helps(store):
    rows = {row["model"]: row for row in table(store, "quality")}
    perplexity = next(name for name in rows["teacher"] if name.endswith("perplexity"))
    values = [float(rows[model][perplexity].split()[0]) for model in ("teacher", "forty", "pure")]
    assert values == sorted(values)
    assert values[-1] < 512, "a uniform guess over the vocabulary would do as well"


@pytest.mark.slow
def test_speculation_changes_no_text_of_a_real_model(store):
    rows = table(store, "losslessness")
    assert [row["model"] for row in rows] == ["teacher", "forty", "pure"]
    assert all(row["lossless"] == "yes" for row in rows)


@pytest.mark.slow
def test_both_decoders_of_every_model_are_timed(store):
    rows = table(store, "speed")
    assert [(row["model"], row["decoder"]) for row in rows] == [
        (model, decoder) for model in ("teacher", "forty", "pure") for decoder in ("plain", "lookup")
    ]
