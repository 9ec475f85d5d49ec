"""Each metric against the teacher's: what was put in comes out, paired by item and clustered."""

import numpy as np
import pytest
from mambabench.harness.results import Results
from mambabench.reports.differences import Differences
from mambabench.reports.options import NoOptions


@pytest.fixture
def frame(stores, tmp_path):
    builder = stores.Builder(tmp_path / "store")
    hardness = np.random.default_rng(0).random(60)
    for model, share in (("teacher", 0.8), ("half", 0.7), ("none", 0.3)):
        builder.model(model, {"half": 0.5, "none": 0}.get(model), teacher=model == "teacher")
        rows = [
            {"task": "quiz", "item": str(place), "metric": metric, "value": value, "weight": weight}
            | {"cluster": f"passage {place // 3}", "better": better, "chance": chance}
            for place, hard in enumerate(hardness)
            for metric, value, weight, better, chance in (
                ("acc", float(hard < share), 1.0, "higher", 0.25),
                ("nll_per_token", (1 + hard - share) * (5 + place), 5.0 + place, "lower", None),
            )
        ]
        builder.step(f"{model}/-/tasks@seed0", records={"sample": rows})
    return Differences(NoOptions()).frame(Results.read([builder.write()]))


def test_there_is_a_row_for_each_metric_and_student(frame):
    assert list(zip(frame["metric"], frame["model"], strict=True)) == [
        *(("acc", "half"), ("acc", "none"), ("nll_per_token", "half"), ("nll_per_token", "none")),
    ]
    assert set(frame["clusters"]) == {20}


def test_differences_and_recovery_are_those_of_the_figures_beside_them(frame):
    for row in frame.to_dict("records"):
        gap = row["value"].value - row["teacher's"].value
        assert row["difference"].value == pytest.approx(gap)
        assert row["difference"].low - 1e-9 <= gap <= row["difference"].high + 1e-9
        if row["metric"] == "acc":
            assert row["chance %"] == 25
            expected = (row["value"].value - 0.25) / (row["teacher's"].value - 0.25)
            assert row["recovery %"].value == pytest.approx(100 * expected)
        else:
            assert row["recovery %"] is None


def test_what_is_the_same_for_every_item_has_no_error(frame):
    shifted = frame[(frame["metric"] == "nll_per_token") & (frame["model"] == "none")]["difference"].iloc[0]
    assert (shifted.value, shifted.low, shifted.high) == pytest.approx((0.5, 0.5, 0.5))
