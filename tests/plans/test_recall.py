"""The plan of recall from end to end, small: every model asked in both forms beside its teacher, and the figure."""

import csv
import tomllib
from pathlib import Path

import pytest
from mambabench.distillers.tiny.language import OF_PART, WORDS
from mambabench.distillers.tiny.writer import noted

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plans" / "recall.toml"
SMALL = (
    "stages.align.tokens=4_000",
    "data.unseen.documents=8",
    "data.tasks.items=8",
    "suites.recall.items=2",
    "suites.recall.lengths=[56]",
)


def test_what_is_asked_is_written_as_the_teacher_learnt_it_and_about_names_that_it_did_not():
    asked = tomllib.loads(EXAMPLE.read_text())["suites"]["recall"]
    facts = list(zip(asked["keys"], asked["values"], strict=True))
    book = asked["separator"].join(asked["entry"].format(key=key, value=value) for key, value in facts)
    assert asked["opening"] + book + asked["closing"] == " ".join(noted([word for fact in facts for word in fact]))
    assert set(asked["values"]) <= set(WORDS["things"])
    for names in (asked["keys"], asked["words"]):
        assert set(names) <= set(OF_PART[True])
        assert all(len({name[part] for name in names}) == len(names) for part in (slice(2), slice(-2, None)))


@pytest.mark.slow
def test_models_at_every_share_are_asked_in_both_forms(mambabench, tmp_path):
    plan = [word for override in SMALL for word in ("--set", override)]
    done = mambabench("run", EXAMPLE, "--store", tmp_path / "store", *plan)
    assert done.returncode == 0, done.stderr
    mambabench("report", tmp_path / "store", "--to", "csv,md")
    found = {}
    for name in ("recall", "recall-distance", "agreement", "differences", "quality"):
        with (tmp_path / "store" / "report" / "csv" / f"{name}.csv").open() as file:
            found[name] = list(csv.DictReader(file))
    models = ["teacher", "all", "half", "quarter", "none"]
    assert [row["model"] for row in found["recall"]] == 4 * models
    for row in found["recall"]:
        assert row["chosen %"]
        assert row["teacher written %"]
        assert row["chance chosen %"] == "25.0"
    assert {row["model"] for row in found["agreement"]} == set(models)
    # Where every layer keeps attention, the converted model is its teacher.
    for row in found["differences"]:
        assert row["model"] != "all" or abs(float(row["difference"])) < 1e-4
    assert all(row[f"{suite}: unseen perplexity"] for row in found["quality"] for suite in ("packed", "sliding"))
    assert (tmp_path / "store" / "report" / "recall.svg").stat().st_size > 10_000
