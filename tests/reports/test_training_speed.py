"""The table of training speed: quotients of what it prints, and no place in the table of decoding."""

import math

import numpy as np
import pytest
from mambabench.harness.results import Results
from mambabench.reports.options import NoOptions
from mambabench.reports.quality import Quality
from mambabench.reports.speed import Speed
from mambabench.reports.training_speed import TrainingSpeed

STEP_S = {("subject", 2048): 0.5, ("reference", 2048): 0.45, ("subject", 16384): 0.6, ("reference", 16384): 0.9}
TOKENS = 16_384


def bursts(seconds, arms=("subject", "reference"), pairs=6):
    """Steps of blocks whose geometric mean is that of `seconds`: a slow drift that both arms share."""
    rows, block = [], 0
    for context in (2048, 16384):
        for pair in range(pairs):
            drift = math.exp(0.02 * (pair - (pairs - 1) / 2))
            for arm in arms:
                rows += [
                    {"arm": arm, "block": block, "row": 0, "burst": number, "tokens": TOKENS}
                    | {"at_s": (number + 1) * seconds[arm, context] * drift}
                    | {"batch": TOKENS // context, "prompt_tokens": context}
                    for number in range(4)
                ]
            block += 1
    return rows


def facts(arms=("subject", "reference")):
    told = [{"name": "FLOP/s of the device", "value": 989e12}]
    for arm in arms:
        told.append({"name": "trained parameters", "value": 3e8, "arm": arm})
        for context in (2048, 16384):
            told.append({"name": f"FLOPs a step, {context} tokens", "value": 2e14, "arm": arm})
            told.append({"name": f"peak memory, {context} tokens", "value": 40e9 + context, "arm": arm})
    return told


@pytest.fixture
def store(stores, tmp_path):
    builder = stores.Builder(tmp_path / "store")
    for model in ("teacher", "half", "pure"):
        builder.model(model, 0.5, teacher=model == "teacher")
    alone = {"subject": 0.45}
    records = {"burst": bursts({("subject", context): alone["subject"] for context in (2048, 16384)}, ("subject",))}
    traits, use = ("score", "alone"), "train-speed"
    builder.step("teacher/-/steps@seed0", records=records, use=use, traits=traits, facts=facts(("subject",)))
    builder.step("half/-/steps@seed0", records={"burst": bursts(STEP_S)}, use=use, traits=traits, facts=facts())
    builder.step("pure/-/steps@seed0", use=use, traits=traits, state="out-of-memory", reason="141 GiB")
    return builder.write()


def test_a_row_says_what_a_step_takes_and_its_quotient_is_of_printed_figures(store):
    frame = TrainingSpeed(NoOptions()).frame(Results.read([store]))
    assert list(zip(frame["model"], frame["window tokens"], strict=True)) == [
        ("teacher", 2048),
        ("teacher", 16384),
        ("half", 2048),
        ("half", 16384),
        ("pure", None),
    ]
    short, long = frame.to_dict("records")[2:4]
    assert short["step ms"] == pytest.approx(500)
    assert short["tokens/s"] == pytest.approx(TOKENS / 0.5)
    assert short["of teacher's"].value == pytest.approx(0.9)
    assert short["of teacher's"].value == pytest.approx(short["tokens/s"] / short["teacher's tokens/s"])
    assert long["of teacher's"].value == pytest.approx(1.5)
    assert long["of teacher's"].low <= 1.5 <= long["of teacher's"].high
    assert (short["windows"], long["windows"]) == (8, 1)
    assert short["peak GB"] == pytest.approx(40, rel=1e-3)
    assert short["TFLOP a step"] == pytest.approx(200)
    assert short["MFU %"] == pytest.approx(100 * 2e14 / 0.5 / 989e12)
    assert short["trained M"] == 300
    assert list(frame["state"]) == ["ok"] * 4 + ["out-of-memory"]


def test_the_interval_is_that_of_paired_blocks(stores, tmp_path):
    """What both models share of a block's noise is no part of the ratio's."""
    rng = np.random.default_rng(0)
    widths = []
    for shared in (True, False):
        builder = stores.Builder(tmp_path / f"{shared}")
        builder.model("half")
        rows = bursts(STEP_S)
        noise = {(row["block"], row["arm"]): rng.normal(0, 0.05) for row in rows}
        for row in rows:
            row["at_s"] *= math.exp(noise[row["block"], "subject" if shared else row["arm"]])
        builder.step("half/-/steps@seed0", records={"burst": rows}, use="train-speed", traits=("score", "alone"))
        ratio = TrainingSpeed(NoOptions()).frame(Results.read([builder.write()])).iloc[0]["of teacher's"]
        widths.append(ratio.high - ratio.low)
    assert widths[0] < 1e-9 < 0.02 < widths[1]


def test_training_steps_are_neither_decoding_nor_quality(store):
    assert Speed(NoOptions()).frame(Results.read([store])) is None
    assert Quality(NoOptions()).frame(Results.read([store])) is None


def test_without_the_suite_there_is_no_table(stores, tmp_path):
    builder = stores.Builder(tmp_path / "other")
    builder.model("half")
    builder.step("half/-/tasks@seed0")
    assert TrainingSpeed(NoOptions()).frame(Results.read([builder.write()])) is None
