"""The built-in tables: their figures against the records, their order, and what stands in for failures."""

import math

import numpy as np
import pytest
from mambabench.harness import metrics
from mambabench.harness.results import Results
from mambabench.reports.cells import number, text


def row(frame, **where):
    for name, value in where.items():
        frame = frame[frame[name] == value]
    (found,) = frame.to_dict("records")
    return found


def test_the_teacher_is_the_first_row_of_every_table(make, frames_of):
    frames = frames_of(make())
    for name in ("quality", "speed", "acceptance", "losslessness", "cost"):
        assert frames[name]["model"].iloc[0] == "teacher"
        order = list(dict.fromkeys(frames[name]["model"]))
        assert order == [model for model in ("teacher", "half", "pure") if model in order]


def test_quality_is_recomputed_from_the_samples(make, frames_of):
    store = make()
    samples = Results.read([store]).samples
    half = row(frames_of(store)["quality"], model="half")
    lookup = samples[(samples["model"] == "half") & (samples["task"] == "lookup")]["value"]
    assert half["lookup acc %"].value == pytest.approx(100 * lookup.mean())
    assert half["lookup acc %"].se == pytest.approx(100 * lookup.std(ddof=1) / math.sqrt(len(lookup)))
    text_ = samples[(samples["model"] == "half") & (samples["metric"] == "nll_per_token")]
    assert half["unseen perplexity"].value == pytest.approx(math.exp(text_["value"].sum() / text_["weight"].sum()))
    assert half["average %"].value == pytest.approx((half["lookup acc %"].value + half["copy acc %"].value) / 2)


def test_recovery_is_the_share_of_the_teacher_s_average(make, frames_of):
    quality = frames_of(make())["quality"]
    teacher, half = row(quality, model="teacher"), row(quality, model="half")
    recovery = half["recovery %"]
    assert recovery.value == pytest.approx(100 * half["average %"].value / teacher["average %"].value)
    assert recovery.low < recovery.value < recovery.high
    assert text(teacher["recovery %"]) == "100.0"


def test_several_seeds_are_one_row_with_the_error_between_them(make, frames_of):
    quality = frames_of(make(seeds=(0, 1, 2)))["quality"]
    assert list(quality["model"]) == ["teacher", "half", "pure"]
    assert list(quality["seeds"]) == [1, 3, 3]
    assert math.isnan(row(quality, model="teacher")["lookup acc %"].seed_se)
    assert text(row(quality, model="half")["lookup acc %"]).count("±") == 2
    assert row(quality, model="half")["average %"].seed_se > 0


def test_a_failure_is_printed_as_its_state_and_never_as_a_number(make, frames_of):
    frames = frames_of(make())
    pure = row(frames["quality"], model="pure")
    assert pure["unseen perplexity"] == "timeout"
    speed = row(frames["speed"], model="pure")
    assert speed["state"] == "crashed"
    assert all(math.isnan(number(cell)) for cell in speed.values())
    assert row(frames["steps"], label="pure/-/perplexity@seed0")["reason"] == "longer than 180 s"
    assert row(frames["steps"], label="pure/lookup/other@seed0")["state"] == "skipped"


def test_an_average_lacking_a_task_is_not_printed(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store")
    builder.model("teacher", teacher=True)
    builder.model("half", 0.5)
    rng = np.random.default_rng(0)
    for model in ("teacher", "half"):
        builder.step(f"{model}/-/one@seed0", records={"sample": stores.samples(rng, "one")})
    builder.step("teacher/-/two@seed0", records={"sample": stores.samples(rng, "two")})
    builder.step("half/-/two@seed0", state="error", reason="no such file")
    quality = frames_of(builder.write())["quality"]
    assert text(row(quality, model="half")["average %"]) == "–"
    assert row(quality, model="half")["two acc %"] == "error"


def test_a_task_that_steps_did_without_is_told_and_has_no_average(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store")
    builder.model("teacher", teacher=True)
    builder.model("half", 0.5)
    rng = np.random.default_rng(0)
    for model in ("teacher", "half"):
        builder.step(
            f"{model}/-/tasks@seed0",
            records={"sample": [*stores.samples(rng, "one"), *stores.samples(rng, "two")]},
            facts=[{"name": "missing", "arm": "three", "value": "no such folder", "unit": ""}],
        )
    frames = frames_of(builder.write())
    quality = frames["quality"]
    assert list(quality["three"]) == ["missing", "missing"]
    assert list(frames["steps"]["reason"]) == ["no such folder"] * 2
    assert not any(name.startswith(("average", "recovery")) for name in quality)


def test_a_task_that_one_of_two_suites_did_without_is_told_of_that_one(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store")
    builder.model("teacher", teacher=True)
    rng = np.random.default_rng(0)
    left_out = [{"name": "missing", "arm": "two", "value": "no such folder", "unit": ""}]
    builder.step("teacher/-/few-shot@seed0", records={"sample": stores.samples(rng, "one")}, facts=left_out)
    rows = [*stores.samples(rng, "one"), *stores.samples(rng, "two")]
    builder.step("teacher/-/zero-shot@seed0", records={"sample": rows})
    quality = frames_of(builder.write())["quality"]
    assert list(quality["few-shot: two"]) == ["missing"]
    assert quality.attrs["averages"] == {"zero-shot average %": ["zero-shot: one acc %", "two acc %"]}


def test_seeds_that_failed_are_told_beside_the_number(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store", seeds=(0, 1))
    builder.model("teacher", teacher=True)
    builder.step("teacher/-/tasks@seed0", records={"sample": stores.samples(np.random.default_rng(0))})
    builder.step("teacher/-/tasks@seed1", state="out-of-memory")
    quality = frames_of(builder.write())["quality"]
    assert quality["check"].tolist() == ["1 of 2 seeds: out-of-memory"]


def test_a_decoder_that_changes_the_text_has_a_row_of_its_own(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store", seeds=(0,), decoders=("plain", "lossy"))
    builder.model("teacher", teacher=True)
    rng = np.random.default_rng(0)
    builder.step("teacher/-/tasks@seed0", records={"sample": stores.samples(rng, "score")})
    for decoder in ("plain", "lossy"):
        rows = stores.samples(rng, "written", "exact_match")
        builder.step(f"teacher/{decoder}/chat@seed0", records={"sample": rows}, traits=("generate",))
    quality = frames_of(builder.write())["quality"]
    assert quality["decoder"].tolist() == ["", "lossy"]
    assert text(row(quality, decoder="lossy")["score acc %"]) == "–"
    assert number(row(quality, decoder="lossy")["written exact_match %"]) > 0


def test_speed_is_that_of_the_definitions(make, frames_of):
    store = make()
    speed = frames_of(store)["speed"]
    timings = Results.read([store]).timings
    of = timings[timings["model"] == "half"]
    figures = metrics.speed_frame(of, by=("label",)).set_index("arm")
    lookup, plain = row(speed, model="half", decoder="lookup"), row(speed, model="half", decoder="plain")
    for shown, arm in ((lookup, "subject"), (plain, "reference")):
        assert shown["TPOT ms"] == pytest.approx(1e3 * figures.loc[arm, "tpot_s"])
        assert shown["TTFT ms"] == pytest.approx(1e3 * figures.loc[arm, "ttft_s"])
        assert shown["tokens/s"] == pytest.approx(figures.loc[arm, "decode_tokens_per_s"])
    assert lookup["speed-up"].value == pytest.approx(plain["TPOT ms"] / lookup["TPOT ms"])
    assert lookup["speed-up"].low < lookup["speed-up"].value < lookup["speed-up"].high
    assert lookup["weights MB"] == 2.0
    assert lookup["distinct 4-grams %"] == 25
    assert math.isnan(number(plain["distinct 4-grams %"]))
    for what, speed in (("copy", 4e9), ("read", 5e9)):
        assert plain[f"{what} bandwidth %"] == pytest.approx(100 * (4e6 / speed) / (plain["TPOT ms"] / 1e3))
        assert math.isnan(number(lookup[f"{what} bandwidth %"]))


def test_a_first_decoder_that_drafts_takes_no_plain_steps(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store", seeds=(0,), decoders=("eager", "lookup"))
    builder.model("teacher", teacher=True)
    seconds = {"subject": 0.0022, "reference": 0.002}
    timed, rounds = stores.bursts(np.random.default_rng(0), seconds, accepted=0.6)
    rounds += [{**of, "arm": "reference", "drafted": 2, "accepted": 1} for of in rounds]
    facts = [
        {"name": "bytes of a step, batch 1", "value": 4e6, "unit": "byte"},
        {"name": "copy bandwidth", "value": 4e9, "unit": "byte/s"},
    ]
    records, traits = {"burst": timed, "round": rounds}, ("pair", "alone")
    builder.step("teacher/lookup/speed@seed0", records=records, traits=traits, facts=facts)
    speed = frames_of(builder.write())["speed"]
    eager = row(speed, decoder="eager")
    assert (eager["accepted length"].value, eager["k"]) == (2, 2)
    assert eager["lossless"] == "reference"
    assert "copy bandwidth %" not in speed


def test_speculation_shows_what_its_rounds_gain_beside_what_they_should(make, frames_of):
    frames = frames_of(make())
    found = frames["speculation"]
    assert found["model"].tolist() == ["teacher", "half"]
    lookup, timed = row(found, model="half", decoder="lookup"), row(frames["speed"], model="half", decoder="lookup")
    for same in ("TPOT ms", "reference TPOT ms", "speed-up", "lossless", "distinct 4-grams %"):
        assert text(lookup[same]) == text(timed[same]) != "–"
    assert lookup["predicted"] == pytest.approx(lookup["accepted length"].value * 0.001 / 0.002)
    assert lookup["of predicted"] == pytest.approx(lookup["speed-up"].value / lookup["predicted"])
    positions = [int(share) for share in lookup["by position %"].split()]
    assert len(positions) == lookup["k"] == 4
    assert sum(positions) / 100 + 1 == pytest.approx(lookup["accepted length"].value, abs=0.02)
    assert not {"predicted", "of predicted", "by position %"} & set(frames["speed"])


def test_of_adaptive_rounds_the_prediction_is_what_was_expected_of_windows(make, frames_of):
    costs = (("cost of a round, K = 2", 0.0015), ("adaptive K, predicted time per token", 0.0008))
    lookup = row(frames_of(make(told=costs))["speculation"], model="half", decoder="lookup")
    assert lookup["predicted"] == pytest.approx(0.001 / 0.0008)
    assert lookup["of predicted"] == pytest.approx(lookup["speed-up"].value / 1.25)


def test_what_the_plan_skips_has_rows_in_the_table_of_steps_alone(make, frames_of):
    frames = frames_of(make())
    assert "skipped" in set(frames["steps"]["state"])
    for name in ("speed", "acceptance", "losslessness"):
        assert not frames[name].isin(["skipped"]).any(axis=None)
        assert "other" not in set(frames[name].get("suite", []))


def test_without_a_cost_for_its_k_no_speed_up_is_predicted(make, frames_of):
    found = frames_of(make(told=(("cost of a round, K = 2", 0.0015),)))["speculation"]
    assert not {"predicted", "of predicted"} & set(found)
    assert "speed-up" in found


@pytest.mark.parametrize(
    ("options", "lossless"),
    [({}, "yes"), ({"differing": 3}, "no: 3 of 16 texts differ"), ({"check": False}, "unchecked")],
)
def test_a_speed_up_is_printed_only_beside_a_green_check(make, frames_of, options, lossless):
    lookup = row(frames_of(make(**options))["speed"], model="half", decoder="lookup")
    assert lookup["lossless"] == lossless
    assert ("speed-up" in lookup and not math.isnan(number(lookup["speed-up"]))) == (lossless == "yes")


def test_the_accepted_length_is_one_and_the_sum_of_the_positions(make, frames_of):
    acceptance = frames_of(make())["acceptance"]
    measured = [record for record in acceptance.to_dict("records") if record["state"] == "ok"]
    assert len(measured) == 4
    for record in measured:
        positions = [record[f"{place} %"] for place in ("1st", "2nd", "3rd", "4th")]
        assert record["accepted length"].value == pytest.approx(1 + sum(positions) / 100)
        assert record["accepted length"].se > 0
        assert (record["k"], record["drafted"]) == (4, 4)


def test_cost_shows_what_the_stages_told(make, frames_of):
    half = row(frames_of(make(seeds=(0, 1)))["cost"], model="half")
    assert half["training tokens"] == 300_000
    assert half["weights MB"] == 2.0
    assert half["trainable share %"] == 25.0
    assert half["peak memory MB"] == 512.0
    assert half["loss"] == 1.0
    assert half["seeds"] == 2
    assert not [name for name in half if "step wall" in name]


def test_training_that_failed_is_told_in_the_table_of_cost(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store", seeds=(0, 1))
    builder.model("teacher", teacher=True)
    builder.model("half", 0.5)
    builder.model("pure", 0)
    builder.step("half/align@seed0", "train", facts=[{"name": "parameters", "value": 12}])
    builder.step("half/align@seed1", "train", state="out-of-memory")
    builder.step("pure/convert@seed0", "convert", state="unsupported", reason="no such layer")
    cost = frames_of(builder.write())["cost"]
    assert [text(cell) for cell in cost["state"]] == ["–", "1 of 2 seeds: out-of-memory", "unsupported"]


def test_the_teacher_has_a_row_of_cost_even_where_the_plan_does_not_train_it(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store")
    builder.model("teacher", teacher=True)
    builder.model("half", 0.5)
    builder.step("half/align@seed0", "train", facts=[{"name": "parameters", "value": 12}])
    for model in ("teacher", "half"):
        builder.step(f"{model}/lookup/speed@seed0", facts=[{"name": "weights", "value": 3e6, "unit": "byte"}])
    cost = frames_of(builder.write())["cost"]
    assert cost["model"].tolist() == ["teacher", "half"]
    assert cost["weights MB"].tolist() == [3.0, 3.0]
    assert [text(cell) for cell in cost["parameters"]] == ["–", "12"]


@pytest.mark.parametrize("trains", [True, False])
def test_choosing_layers_by_trial_has_its_cost(stores, tmp_path, frames_of, trains):
    builder = stores.Builder(tmp_path / "store")
    builder.model("teacher", teacher=True)
    builder.model("half", {"use": "kl-guided", "share": 0.5})
    told = [{"name": "kl_gain", "value": 0.1, "arm": "layer 0"}, {"name": "selection_tokens", "value": 5000}]
    told.append({"name": "selection_wall", "value": 7.5, "unit": "s"})
    builder.step("half/select@seed0", "select", facts=told)
    if trains:
        builder.step("half/align@seed0", "train", facts=[{"name": "parameters", "value": 12}])
    cost = frames_of(builder.write())["cost"]
    assert cost["stage"].tolist() == ["", "(layers chosen)", "align" if trains else ""]
    chosen = cost.iloc[1]
    assert (chosen["model"], chosen["selection tokens"], chosen["selection wall s"]) == ("half", 5000, 7.5)
    assert "kl gain" not in cost


def test_perplexity_is_set_against_the_teacher_s_by_item(make, frames_of):
    quality = frames_of(make())["quality"]
    teacher, half = row(quality, model="teacher"), row(quality, model="half")
    ratio = half["unseen perplexity / teacher's"]
    assert ratio.value == pytest.approx(half["unseen perplexity"].value / teacher["unseen perplexity"].value)
    assert ratio.low < ratio.value < ratio.high
    assert teacher["unseen perplexity / teacher's"].value == 1.0
    assert text(row(quality, model="pure")["unseen perplexity / teacher's"]) == "–"


def test_without_accuracies_recovery_is_that_of_perplexity(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store")
    builder.model("teacher", teacher=True)
    builder.model("half", 0.5)
    for seed, (model, nll) in enumerate((("teacher", 1.0), ("half", 1.5))):
        rows = stores.losses_of_text(np.random.default_rng(seed), nll)
        rows = [{**row, "weight": 100.0, "value": row["value"] / row["weight"] * 100.0} for row in rows]
        builder.step(f"{model}/-/perplexity@seed0", records={"sample": rows})
    quality = frames_of(builder.write())["quality"]
    recovery, ratio = (row(quality, model="half")[name] for name in ("recovery %", "unseen perplexity / teacher's"))
    assert recovery.value == pytest.approx(100 / ratio.value)
    assert recovery.value == pytest.approx(100 * math.exp(-0.5), rel=0.1)
    assert recovery.low < recovery.value < recovery.high


def test_a_store_without_results_has_its_states(stores, tmp_path, report_of):
    builder = stores.Builder(tmp_path / "store")
    builder.model("teacher", teacher=True)
    builder.step("teacher/-/tasks@seed0", state="error", reason="Traceback\nValueError: no")
    report = report_of(builder.write())
    assert [section.name for section in report.sections] == ["quality", "steps"]
    assert report.broken == ()
    assert row(report.sections[0].frame, model="teacher")["tasks"] == "error"
    assert report.sections[1].frame["reason"].tolist() == ["ValueError: no"]
    assert "1 error" in report.summary[1]


@pytest.fixture
def failing(stores, tmp_path):
    """A plan whose suites all ended badly for some model, and one of them for every model."""

    def build(state="timeout", models=("teacher", "half"), fine=()):
        builder = stores.Builder(tmp_path / "store")
        rng = np.random.default_rng(0)
        timed, rounds = stores.bursts(rng, {"subject": 0.0022, "reference": 0.002}, accepted=0.6)
        equal = [{**row, "metric": "equal", "value": 1.0} for row in stores.samples(rng, "batch 1", items=4)]
        for model in models:
            builder.model(model, teacher=model == "teacher")
            for suite, decoder, use, traits, records in (
                ("chat", "-", "lm-eval", ("score",), {}),
                ("tasks", "-", "lm-eval", ("score",), {"sample": stores.samples(rng)}),
                ("lossless", "lookup", "losslessness", ("pair",), {"sample": equal, "round": rounds}),
                ("speed", "lookup", "speed", ("pair", "alone"), {"burst": timed, "round": rounds}),
            ):
                good = model in fine and suite != "chat"
                builder.step(
                    f"{model}/{decoder}/{suite}@seed0",
                    records=records if good else None,
                    state="ok" if good else state,
                    reason="" if good else "why",
                    use=use,
                    traits=traits,
                )
        return builder.write()

    return build


@pytest.mark.parametrize("state", ["timeout", "unsupported", "blocked", "out-of-memory"])
@pytest.mark.parametrize("fine", [(), ("half",), ("teacher",)])
def test_a_model_whose_suites_failed_keeps_its_rows_and_columns(failing, report_of, state, fine):
    report = report_of(failing(state, fine=fine))
    assert report.broken == ()
    frames = {section.name: section.frame for section in report.sections}
    quality = frames.pop("quality")
    assert list(quality["model"]) == ["teacher", "half"]
    assert list(quality["chat"]) == [state, state]
    tasks = "lookup acc %" if fine else "tasks"
    assert [isinstance(cell, str) for cell in quality[tasks]] == [model not in fine for model in quality["model"]]
    assert set(quality[tasks][~quality["model"].isin(fine)]) == {state}
    for name in ("speed", "acceptance", "losslessness"):
        for model in ("teacher", "half"):
            rows = frames[name][frames[name]["model"] == model]
            states = ["ok"] if model in fine else [state]
            assert list(dict.fromkeys(rows["state"])) == states, name
            if model not in fine:
                assert set(rows["decoder"]) == {"lookup"}
                assert all(math.isnan(number(cell)) for cell in rows.to_numpy().ravel()), name
        assert frames[name]["model"].iloc[0] == "teacher"


def test_a_teacher_that_a_suite_did_not_measure_has_a_row_nevertheless(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store")
    rng = np.random.default_rng(0)
    builder.model("teacher", teacher=True)
    builder.model("half", 0.5)
    timed, rounds = stores.bursts(rng, {"subject": 0.0022, "reference": 0.002}, accepted=0.6)
    builder.step("half/lookup/speed@seed0", records={"burst": timed, "round": rounds}, traits=("pair", "alone"))
    builder.step("half/-/tasks@seed0", records={"sample": stores.samples(rng)})
    frames = frames_of(builder.write())
    assert frames["quality"]["model"].tolist() == ["teacher", "half"]
    for name in ("speed", "acceptance"):
        assert frames[name][["model", "state"]].iloc[0].tolist() == ["teacher", "not planned"]


def test_a_decoder_that_never_drafts_is_not_in_the_table_of_drafts(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store", decoders=("plain", "lookup", "cold"))
    rng = np.random.default_rng(0)
    timed, rounds = stores.bursts(rng, {"subject": 0.0022, "reference": 0.002}, accepted=0.6)
    for model in ("teacher", "half"):
        builder.model(model, teacher=model == "teacher")
    for label, records in (("teacher/lookup", {"burst": timed, "round": rounds}), ("teacher/cold", {"burst": timed})):
        builder.step(f"{label}/speed@seed0", records=records, traits=("pair", "alone"))
    for decoder in ("lookup", "cold"):
        builder.step(f"half/{decoder}/speed@seed0", state="crashed", traits=("pair", "alone"))
    acceptance = frames_of(builder.write())["acceptance"]
    assert acceptance[["model", "decoder", "state"]].to_numpy().tolist() == [
        ["teacher", "lookup", "ok"],
        ["half", "lookup", "crashed"],
    ]


def test_a_lossy_decoder_that_failed_has_a_row_with_its_state(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store", decoders=("plain", "lossy"))
    builder.model("teacher", teacher=True)
    rows = stores.samples(np.random.default_rng(0), "written", "exact_match")
    builder.step("teacher/plain/chat@seed0", records={"sample": rows}, traits=("generate",))
    builder.step("teacher/lossy/chat@seed0", state="crashed", traits=("generate",))
    quality = frames_of(builder.write())["quality"]
    assert row(quality, decoder="lossy")["written exact_match %"] == "crashed"
    assert number(row(quality, decoder="")["written exact_match %"]) > 0


def test_seeds_that_failed_are_told_in_the_rows_of_decoding(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store", seeds=(0, 1))
    builder.model("teacher", teacher=True)
    rng = np.random.default_rng(0)
    timed, rounds = stores.bursts(rng, {"subject": 0.0022, "reference": 0.002}, accepted=0.6)
    equal = [{**row, "metric": "equal", "value": 1.0} for row in stores.samples(rng, "batch 1", items=4)]
    for suite, traits, records in (
        ("losslessness", ("pair",), {"sample": equal}),
        ("speed", ("pair", "alone"), {"burst": timed, "round": rounds}),
    ):
        builder.step(f"teacher/lookup/{suite}@seed0", records=records, traits=traits)
        builder.step(f"teacher/lookup/{suite}@seed1", state="timeout", traits=traits)
    frames = frames_of(builder.write())
    told = "1 of 2 seeds: timeout"
    assert row(frames["speed"], decoder="lookup")["state"] == told
    assert row(frames["losslessness"], decoder="lookup")["state"] == told
    assert row(frames["losslessness"], decoder="lookup")["lossless"] == "partly"
    assert row(frames["acceptance"], suite="speed")["state"] == told


def test_each_of_several_suites_has_an_average_of_its_own(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store")
    builder.model("teacher", teacher=True)
    builder.model("half", 0.5)
    tasks = {"zero-shot": ("piqa", "race", "copa"), "few-shot": ("piqa", "mmlu"), "written": ("gsm8k",)}
    rng = np.random.default_rng(0)
    for model, chance in (("teacher", 0.9), ("half", 0.6)):
        for suite, names in tasks.items():
            rows = [row for name in names for row in stores.samples(rng, name, chance=chance)]
            if (model, suite) == ("half", "written"):
                builder.step(f"{model}/-/{suite}@seed0", state="timeout")
            else:
                builder.step(f"{model}/-/{suite}@seed0", records={"sample": rows})
    quality = frames_of(builder.write())["quality"]
    assert list(quality)[2:8] == [
        *("average %", "recovery %", "zero-shot average %", "zero-shot recovery %"),
        *("few-shot average %", "few-shot recovery %"),
    ]
    teacher, half = row(quality, model="teacher"), row(quality, model="half")
    columns = {
        "zero-shot": ["zero-shot: piqa acc %", "race acc %", "copa acc %"],
        "few-shot": ["few-shot: piqa acc %", "mmlu acc %"],
    }
    for suite, names in columns.items():
        for of in (teacher, half):
            assert of[f"{suite} average %"].value == pytest.approx(sum(of[name].value for name in names) / len(names))
        recovery = half[f"{suite} recovery %"]
        share = half[f"{suite} average %"].value / teacher[f"{suite} average %"].value
        assert recovery.value == pytest.approx(100 * share)
        assert recovery.low < recovery.value < recovery.high
        assert text(teacher[f"{suite} recovery %"]) == "100.0"
    assert text(half["average %"]) == text(half["recovery %"]) == "–"
    every = [*columns["zero-shot"], *columns["few-shot"], "gsm8k acc %"]
    assert teacher["average %"].value == pytest.approx(sum(teacher[name].value for name in every) / 6)
    assert quality.attrs["averages"] == {
        "average %": every,
        **{f"{suite} average %": names for suite, names in columns.items()},
    }


def test_the_average_of_one_suite_stands_once(make, frames_of):
    assert [name for name in frames_of(make())["quality"] if "average" in name or "recovery" in name] == [
        "average %",
        "recovery %",
    ]


def test_tasks_of_one_name_in_two_suites_are_two_in_the_average(stores, tmp_path, frames_of):
    builder = stores.Builder(tmp_path / "store")
    builder.model("teacher", teacher=True)
    for seed, (suite, chance) in enumerate((("zero-shot", 0.4), ("few-shot", 0.9))):
        rows = stores.samples(np.random.default_rng(seed), "lookup", chance=chance)
        builder.step(f"teacher/-/{suite}@seed0", records={"sample": rows})
    teacher = row(frames_of(builder.write())["quality"], model="teacher")
    parts = [teacher[f"{suite}: lookup acc %"].value for suite in ("zero-shot", "few-shot")]
    assert abs(parts[0] - parts[1]) > 20
    assert teacher["average %"].value == pytest.approx(sum(parts) / 2)
