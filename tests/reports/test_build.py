"""Invariants mark rows; plug-in tables take part; broken ones do not spoil the rest."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from mambabench.harness.results import Results
from mambabench.harness.statistics import Estimate
from mambabench.reports.build import build, checked
from mambabench.reports.csv import Csv
from mambabench.reports.markdown import Markdown
from mambabench.reports.options import NoOptions
from mambabench.reports.provenance import other_code


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


def test_a_table_that_cannot_be_made_or_holds_no_frame_is_named_and_the_others_stand(make):
    class Untitled:
        def frame(self, results):
            return pd.DataFrame([{"model": "teacher"}])

    class Listing(Given):
        def frame(self, results):
            return [1, 2]

    def absent():
        raise ModuleNotFoundError("No module named 'house'")

    def leaving():
        raise SystemExit("no licence")

    tables = {"absent": absent, "leaving": leaving, "untitled": Untitled, "listing": lambda: Listing([])}
    report = build(Results.read([make()]), {**tables, "given": lambda: Given([{"model": "teacher"}])}, with_plots=False)
    assert [broken.name for broken in report.broken] == list(tables)
    assert report.broken[0].error.startswith("ModuleNotFoundError: No module named 'house'")
    assert [section.name for section in report.sections] == ["given"]


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


def test_recorded_answers_are_no_second_checkpoint(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store", seeds=(0, 1))
    builder.model("teacher", teacher=True)
    builder.model("half", keep=0.5)
    for model, seed in (("teacher", 0), ("half", 0), ("half", 1)):
        rows = stores.samples(np.random.default_rng(seed), "lookup")
        builder.step(f"{model}/-/tasks@seed{seed}", records={"sample": rows})
        rows = stores.samples(np.random.default_rng(2), "chat")
        builder.step(f"{model}/plain/chat@seed{seed}", "judge", {"sample": rows}, key=f"of-{model}", subject=None)
    assert "check" not in frames_of(builder.write())["quality"]


def test_sound_results_have_no_check_column(make, frames_of):
    for name, frame in frames_of(make()).items():
        assert "check" not in frame, name


OTHER = {"version": "0.1.0", "revision": "0123456789abcdef", "dirty": False}


@pytest.fixture
def made_by(stores, tmp_path, report_of):
    """The report of a store whose teacher and student, in stages, were made by given code."""

    def build(teacher=stores.CODE, stages=(stores.CODE,), ran=stores.CODE):
        builder = stores.Builder(tmp_path / "store", code=ran)
        builder.model("teacher", teacher=True)
        builder.model("half", 0.5)
        keys = {"teacher": builder.step("teacher/align@seed0", "train", artifact="w", code=teacher)}
        keys["half"] = keys["teacher"]
        for number, code in enumerate(stages):
            keys["half"] = builder.step(
                f"half/stage{number}@seed0", "train", artifact="v", code=code, parent=keys["half"]
            )
        for model in ("teacher", "half"):
            rows = stores.samples(np.random.default_rng(0))
            builder.step(f"{model}/-/tasks@seed0", records={"sample": rows}, subject=keys[model])
        return report_of(builder.write())

    return build


def names(report, name="quality"):
    (section,) = [section for section in report.sections if section.name == name]
    return section.frame["model"].tolist()


def test_models_made_by_other_code_are_marked_in_every_table(made_by):
    report = made_by(stages=(OTHER,))
    assert names(report) == ["teacher", "half †"]
    assert set(names(report, "cost")) == {"teacher", "half †"}
    for section in report.sections:
        assert section.note.endswith("† Made by other code than this run's.") == (section.name in ("quality", "cost"))
    assert report.summary[-1] == "† Made by other code than this run's: half (0123456789)."


def test_models_of_this_run_s_code_are_not_marked(made_by):
    report = made_by()
    assert names(report) == ["teacher", "half"]
    assert not any("other code" in text for text in (*report.summary, *(section.note for section in report.sections)))


def test_an_earlier_stage_of_a_model_marks_it(made_by, stores):
    assert names(made_by(stages=(OTHER, stores.CODE))) == ["teacher", "half †"]


def test_the_teacher_s_code_marks_only_the_teacher(made_by):
    assert names(made_by(teacher=OTHER)) == ["teacher †", "half"]


def test_a_model_that_is_the_teacher_s_artifact_is_marked_with_it(made_by):
    assert names(made_by(teacher=OTHER, stages=())) == ["teacher †", "half †"]


@pytest.mark.parametrize(
    ("made", "ran", "told"),
    [
        (None, {}, ""),
        ({"version": "0.1.0"}, {"version": "0.1.0", "revision": None, "dirty": None}, ""),
        ({"version": "0.1.0", "revision": "abc", "dirty": None}, {}, ""),
        (None, {"version": "0.1.0", "revision": "abc", "dirty": False}, "unknown code"),
        ({"version": "0.0.9", "revision": None}, {"version": "0.1.0", "revision": None}, "version 0.0.9"),
        ({"revision": "abc", "dirty": True}, {"revision": "abc", "dirty": False}, "abc with changes"),
        ({"revision": "abc", "dirty": True}, {"revision": "abc", "dirty": True}, ""),
    ],
)
def test_what_is_not_known_of_the_code_is_no_difference(made_by, made, ran, told):
    """Without anything known of a model's code it is not this run's; what the run does not know cannot differ."""
    report = made_by(stages=(made,), ran=ran)
    assert names(report)[1] == ("half †" if told else "half")
    if told:
        assert f"half ({told})" in report.summary[-1]


def test_the_outcome_says_the_code_where_the_artifact_does_not(stores, tmp_path):
    builder = stores.Builder(tmp_path / "store")
    builder.model("half", 0.5)
    key = builder.step("half/align@seed0", "train", artifact="w", code=None)
    builder.step("half/-/tasks@seed0", subject=key)
    store = builder.write()
    outcome = store / "steps" / key / "outcome.json"
    outcome.write_text(json.dumps({**json.loads(outcome.read_text()), "code": stores.CODE}))
    assert other_code(Results.read([store])) == {}
    outcome.write_text(json.dumps({**json.loads(outcome.read_text()), "code": OTHER}))
    assert other_code(Results.read([store])) == {"half": "0123456789"}


def test_a_store_whose_artifacts_were_deleted_still_has_a_report(made_by, stores, tmp_path):
    made_by(stages=(OTHER, stores.CODE))
    for folder in (tmp_path / "store" / "steps").iterdir():
        if (folder / "artifact").is_dir():
            shutil.rmtree(folder)
    assert other_code(Results.read([tmp_path / "store"])) == {}


def test_machine_readable_tables_keep_the_names_of_the_plan(made_by, tmp_path):
    report = made_by(stages=(OTHER,))
    folder = Csv(NoOptions()).render(report, tmp_path / "out")
    table = pd.read_csv(folder / "quality.csv")
    assert table[["model", "other code"]].to_numpy().tolist() == [["teacher", False], ["half", True]]
    assert "† Made by" in Markdown(NoOptions()).render(report, tmp_path / "out").read_text()
