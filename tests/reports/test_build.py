"""Invariants mark rows; plug-in tables take part; broken ones do not spoil the rest."""

import numpy as np
import pandas as pd
import pytest
from mambabench.harness.results import Results
from mambabench.harness.statistics import Estimate
from mambabench.reports.build import checked


class Given:
    """A table as a plug-in might bring it."""

    title = "Given"
    note = "As given."

    def __init__(self, rows):
        self.rows = rows

    def frame(self, results):
        return pd.DataFrame(self.rows)


def test_a_table_of_a_plug_in_stands_before_the_steps(make, report_of):
    report = report_of(make(), given=Given([{"model": "teacher", "figure": 1.5}]))
    names = [section.name for section in report.sections]
    assert names[-2:] == ["given", "steps"]
    assert report.sections[-2].title == "Given"


def test_a_table_that_raises_is_named_and_the_others_stand(make, report_of):
    class Raising(Given):
        def frame(self, results):
            raise KeyError("no such column")

    report = report_of(make(), raising=Raising([]))
    assert [broken.name for broken in report.broken] == ["raising"]
    assert "no such column" in report.broken[0].error
    assert "quality" in [section.name for section in report.sections]


def test_an_empty_or_absent_table_is_left_out(make, report_of):
    class Absent(Given):
        def frame(self, results):
            return None

    names = [section.name for section in report_of(make(), absent=Absent([]), empty=Given([])).sections]
    assert not {"absent", "empty"} & set(names)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"accepted length": 5.5, "k": 4}, "accepted length 5.5 is not between 1 and 5"),
        ({"accepted length": Estimate(value=0.5), "k": 4}, "accepted length 0.5 is not between 1 and 5"),
        ({"accepted length": 2.0, "k": 2, "1st %": 60.0, "2nd %": 30.0}, "not 1 + the sum"),
        ({"speed-up": 2.0, "TPOT ms": 2.0, "reference TPOT ms": 3.0, "lossless": "yes"}, "not the quotient"),
        (
            {"speed-up": 2.0, "TPOT ms": 2.0, "reference TPOT ms": 4.0, "lossless": "no: 1 of 3"},
            "without a green check",
        ),
        ({"speed-up": 2.0}, "not the quotient"),
    ],
)
def test_a_row_that_breaks_an_invariant_is_marked(make, report_of, broken, message):
    good = {"model": "teacher", "accepted length": 1.9, "k": 2, "1st %": 60.0, "2nd %": 30.0}
    good |= {"speed-up": 2.0, "TPOT ms": 2.0, "reference TPOT ms": 4.0, "lossless": "yes"}
    kept = {name: value for name, value in good.items() if name in (*broken, "model")}
    report = report_of(
        make(), given=Given([kept if broken != {"speed-up": 2.0} else good, {"model": "half", **broken}])
    )
    (frame,) = [section.frame for section in report.sections if section.name == "given"]
    first, second = frame["check"]
    assert first == ""
    assert message in second


def test_an_average_that_is_none_is_marked(make):
    frame = pd.DataFrame([{"one": 1.0, "two": 2.0, "mean": 1.5}, {"one": 1.0, "two": 2.0, "mean": 1.8}])
    frame.attrs["averages"] = {"mean": ["one", "two"]}
    assert checked(frame, Results.read([make()]))["check"].tolist() == ["", "mean is not the average of one, two"]


def test_a_row_of_two_checkpoints_is_marked(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store")
    builder.model("teacher", teacher=True)
    for suite, subject in (("one", "first"), ("two", "second")):
        rows = stores.samples(np.random.default_rng(0), suite)
        builder.step(f"teacher/-/{suite}@seed0", records={"sample": rows}, subject=subject)
    assert frames_of(builder.write())["quality"]["check"].tolist() == ["seed 0: several checkpoints in one row"]


def test_sound_results_have_no_check_column(make, frames_of):
    for name, frame in frames_of(make()).items():
        assert "check" not in frame, name


def test_models_made_by_other_code_are_named(stores, tmp_path, report_of):
    builder = stores.Builder(tmp_path / "store")
    builder.model("teacher", teacher=True)
    builder.model("half", 0.5)
    for model, revision in (("teacher", "abc"), ("half", "0123456789abcdef")):
        key = builder.step(f"{model}/align@seed0", "train", artifact="w", revision=revision)
        rows = stores.samples(np.random.default_rng(0))
        builder.step(f"{model}/-/tasks@seed0", records={"sample": rows}, subject=key)
    assert report_of(builder.write()).summary[-1] == "Made by other code than this run's: half (0123456789)."
