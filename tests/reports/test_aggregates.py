"""Metrics that are no mean over items: each with its error, beside the teacher's."""

import pytest
from mambabench.harness.results import Results
from mambabench.reports.aggregates import SE, Aggregates
from mambabench.reports.options import NoOptions


def fact(name, value, arm=""):
    return {"name": name, "value": value, "unit": "", "arm": arm}


@pytest.fixture
def builder(stores, tmp_path):
    builder = stores.Builder(tmp_path / "store", seeds=(0, 1))
    for model in ("teacher", "half"):
        builder.model(model, 0.5 if model == "half" else None, teacher=model == "teacher")
    for model, seed, value in (("teacher", 0, 0.4), ("half", 0, 0.2), ("half", 1, 0.3)):
        told = [fact("bbq: amb_bias_score", value), fact("bbq: amb_bias_score", 0.05, SE), fact("weights", 1)]
        builder.step(f"{model}/-/bias@seed{seed}", use="lm-eval", facts=told)
    return builder


def test_each_has_its_error_and_stands_beside_the_teacher(builder):
    frame = Aggregates(NoOptions()).frame(Results.read([builder.write()]))
    teacher, half = frame.to_dict("records")
    assert (teacher["task"], teacher["metric"], teacher["attention"]) == ("bbq", "amb_bias_score", "teacher")
    assert (half["value"].value, half["value"].se) == (pytest.approx(0.25), 0.05)
    assert half["value"].seed_se == pytest.approx(0.05)
    assert half["teacher's"] == teacher["value"]


def test_there_is_no_table_without_such_metrics(stores, tmp_path):
    builder = stores.Builder(tmp_path / "store")
    builder.model("teacher", teacher=True)
    builder.step("teacher/-/tasks@seed0", use="lm-eval", facts=[fact("weights", 1)])
    assert Aggregates(NoOptions()).frame(Results.read([builder.write()])) is None
