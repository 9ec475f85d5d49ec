"""Two GPUs: quality side by side, speed alone, a training on both. The GPUs are ones that are made to be seen."""

import pytest
from mambabench.harness.store import Store

PLAN = """
schema = 1
name = "two"
[teacher]
use = "toy"
path = "teacher"
[data]
text = { use = "act" }
[stages.alone]
use = "toy-train"
data = "text"
[stages.together]
use = "toy-train-together"
data = "text"
[models.one]
use = "toy"
keep = { use = "toy-select" }
train = ["alone"]
[models.two]
like = "one"
train = ["together"]
[decoders.plain]
use = "toy-decoder"
[suites.quality]
use = "toy-measure"
seconds = 1.5
[suites.speed]
use = "toy-speed"
seconds = 0.3
[limits]
train_gpus = 2
"""


@pytest.fixture(scope="module")
def outcomes(run_on_gpus, tmp_path_factory):
    """By label, each with its step's `begin` and `end` in Unix time."""
    folder = tmp_path_factory.mktemp("two")
    done = run_on_gpus(folder, PLAN, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    store = Store.open(folder / "store")
    found = {}
    for cell in store.run()["cells"]:
        outcome = store.outcome(cell["key"])
        begin = outcome["started"]
        found[cell["label"].removesuffix("@seed0")] = {**outcome, "begin": begin, "end": begin + outcome["wall_s"]}
    return found


def of(outcomes, suite):
    return [outcome for label, outcome in outcomes.items() if label.endswith(suite)]


def beside(one, other):
    return one["begin"] < other["end"] and other["begin"] < one["end"]


def test_quality_is_measured_side_by_side_on_gpus_of_their_own(outcomes):
    pairs = [
        (one["detail"]["gpus"], other["detail"]["gpus"])
        for one in of(outcomes, "/quality")
        for other in of(outcomes, "/quality")
        if one is not other and beside(one, other)
    ]
    assert pairs
    assert {frozenset(pair) for pair in pairs} == {frozenset(("0", "1"))}


def test_speed_is_measured_alone(outcomes):
    speeds = of(outcomes, "/speed")
    assert len(speeds) == 3
    for one in speeds:
        assert one["detail"]["gpus"] in ("0", "1")
        others = {id(other): other for other in outcomes.values() if other["started"] != one["started"]}
        assert not any(beside(one, other) for other in others.values())


def test_a_training_on_two_gpus_takes_both_leases(outcomes):
    together = outcomes["two/together"]
    assert (together["detail"]["gpus"], outcomes["one/alone"]["detail"]["gpus"] in ("0", "1")) == ("0,1", True)
    assert not any(
        beside(together, other)
        for other in outcomes.values()
        if other["detail"].get("gpus") and other["started"] != together["started"]
    )
