"""When a speed-up may be printed: what the check of losslessness has to cover."""

import math

import numpy as np
import pytest
from mambabench.reports.cells import number


class Timed:
    """A store of one model whose speed and losslessness are measured as each test says."""

    def __init__(self, stores, path, seeds=(0,)):
        self.stores, self.builder = stores, stores.Builder(path, seeds=seeds)
        self.builder.model("teacher", teacher=True)
        self.rng = np.random.default_rng(0)

    def speed(self, seed=0, temperature=0.0, batch=1, **options):
        seconds = {"subject": 0.0015, "reference": 0.002}
        timed, rounds = self.stores.bursts(self.rng, seconds, accepted=0.6, batch=batch)
        records = {
            kind: [{**row, "temperature": temperature} for row in rows]
            for kind, rows in (("burst", timed), ("round", rounds))
        }
        self.builder.step(f"teacher/lookup/speed@seed{seed}", records=records, traits=("pair", "alone"), **options)

    def check(self, seed=0, differing=0, suite="losslessness", batch=1, texts=4, **options):
        equal = [
            {**row, "metric": "equal", "value": float(i >= differing)}
            for i, row in enumerate(self.stores.samples(self.rng, f"batch {batch}", items=texts))
        ]
        records = {"sample": equal} if options.get("state", "ok") == "ok" else None
        label = f"teacher/lookup/{suite}@seed{seed}"
        self.builder.step(label, records=records, use="losslessness", traits=("pair",), **options)

    def near_ties(self, excused, usual, beyond=0, tokens=1_000, of=500, **options):
        """A check below float64, in which no text is equal. `excused`: of batch 1, or by batch size."""
        sizes = excused if isinstance(excused, dict) else {1: excused}
        counts = {("plain", "excused"): (usual, of), ("plain", "beyond_noise"): (0, of)}
        for size, near in sizes.items():
            counts |= {
                (f"batch {size}", "equal"): (0, 1),
                (f"batch {size}", "excused"): (near, tokens),
                (f"batch {size}", "beyond_noise"): (beyond if size == 1 else 0, tokens),
            }
        (like,) = self.stores.samples(self.rng, "batch 1", items=1)
        samples = [
            {**like, "task": task, "metric": metric, "value": float(value), "weight": float(weight)}
            for (task, metric), (value, weight) in counts.items()
        ]
        facts = [{"name": "noise", "value": 0.125, "unit": "logit", "arm": ""}]
        label = "teacher/lookup/losslessness@seed0"
        self.builder.step(
            label, records={"sample": samples}, use="losslessness", traits=("pair",), facts=facts, **options
        )


@pytest.fixture
def timed(stores, tmp_path, frames_of):
    made = {}

    def start(**options):
        made["it"] = Timed(stores, tmp_path / "store", **options)
        return made["it"]

    def found(table="speed", every=False):
        frame = frames_of(made["it"].builder.write())[table]
        rows = frame[frame["decoder"] == "lookup"].to_dict("records")
        if every:
            return rows
        (row,) = rows
        return row

    return start, found


def is_green(found):
    printed = not math.isnan(number(found.get("speed-up")))
    assert printed == (found["lossless"] == "yes")
    return printed


def test_a_green_check_covers_every_seed_that_was_timed(timed):
    start, found = timed
    store = start(seeds=(0, 1))
    for seed in (0, 1):
        store.speed(seed)
    store.check(0)
    store.check(1, state="crashed")
    assert not is_green(found())
    assert found()["lossless"] == "unchecked: seed 1"


def test_seeds_that_are_all_checked_are_green(timed):
    start, found = timed
    store = start(seeds=(0, 1))
    for seed in (0, 1):
        store.speed(seed)
        store.check(seed)
    assert is_green(found())


def test_a_check_that_serves_every_seed_is_green_for_every_seed(timed):
    start, found = timed
    store = start(seeds=(0, 1))
    for seed in (0, 1):
        store.speed(seed, key="speed")
        store.check(seed, key="check")
    assert is_green(found())


def test_a_check_on_another_kind_of_device_is_none(timed):
    start, found = timed
    store = start()
    store.speed(device="cuda:0")
    store.check(device="cpu")
    assert not is_green(found())
    assert found()["lossless"] == "unchecked: on cuda"


def test_a_check_on_another_gpu_of_the_kind_is_green(timed):
    start, found = timed
    store = start()
    store.speed(device="cuda:0")
    store.check(device="cuda:1")
    assert is_green(found())


@pytest.mark.parametrize(
    ("device", "dtype", "verdict"),
    [
        ("cpu", "", "yes"),
        ("cpu", "float64", "yes"),
        ("cpu", "float32", "yes"),
        ("cpu", "bfloat16", "unchecked: in float32"),
        ("cuda:0", "", "yes"),
        ("cuda:0", "bfloat16", "yes"),
        ("cuda:0", "float64", "unchecked: in bfloat16"),
    ],
)
def test_a_check_in_another_dtype_vouches_only_for_a_cpu_s_and_in_float64(timed, device, dtype, verdict):
    start, found = timed
    store = start()
    store.speed(device=device)
    store.check(device=device, config={"dtype": dtype})
    assert found()["lossless"] == verdict
    assert is_green(found()) == (verdict == "yes")


@pytest.mark.parametrize(
    ("batch", "texts", "verdict"), [(1, 4, "unchecked: batch 4"), (4, 4, "yes"), (4, 3, "unchecked: batch 4")]
)
def test_greedy_text_is_green_only_at_batch_sizes_for_which_there_were_texts(timed, batch, texts, verdict):
    start, found = timed
    store = start()
    store.speed(batch=4)
    store.check(batch=batch, texts=texts)
    assert found()["lossless"] == verdict
    assert is_green(found()) == (verdict == "yes")


def test_one_check_has_to_be_like_all_of_what_was_timed(timed):
    start, found = timed
    store = start()
    store.speed(batch=4, device="cuda:0")
    store.check(batch=4, texts=8, config={"dtype": "float64"}, device="cuda:0")
    store.check(batch=1, suite="small", device="cuda:0")
    assert found()["lossless"] == "unchecked: batch 4"


def test_sampled_text_was_not_checked(timed):
    start, found = timed
    store = start()
    store.speed(temperature=1.0)
    store.check()
    assert not is_green(found())
    assert found()["lossless"] == "unchecked: sampled"


def scripted(store, stores, differing=4):
    """Its checks are as green as they can be if none of four texts differs."""
    for suite, use in (("speed", "speed"), ("losslessness", "losslessness")):
        timings, rounds = stores.bursts(store.rng, {"subject": 0.0015, "reference": 0.002}, accepted=0.6)
        records = {"burst": timings, "round": [{**row, "scripted": 0.75} for row in rounds]}
        if suite == "losslessness":
            samples = stores.samples(store.rng, "batch 1", items=4)
            equal = [{**row, "metric": "equal", "value": float(i >= differing)} for i, row in enumerate(samples)]
            records = {"sample": equal, "round": records["round"]}
        traits = ("pair", "alone") if suite == "speed" else ("pair",)
        store.builder.step(f"teacher/lookup/{suite}@seed0", records=records, use=use, traits=traits)


@pytest.mark.parametrize("table", ["speculation", "speed", "acceptance", "losslessness"])
def test_scripted_acceptance_is_labelled_wherever_it_is_printed(timed, stores, table):
    start, found = timed
    scripted(start(), stores)
    row = next(row for row in found(table, every=True) if row["accepted length"])
    assert row["scripted %"] == 75


@pytest.mark.parametrize("table", ["speculation", "speed"])
def test_nothing_vouches_for_the_speed_up_of_scripted_acceptance(timed, stores, table):
    start, found = timed
    scripted(start(), stores, differing=0)
    row = next(row for row in found(table, every=True) if row["accepted length"])
    assert row["lossless"] == "scripted"
    assert not is_green(row)


def test_no_picture_of_what_decoders_do_has_scripted_acceptance(stores, tmp_path, report_of):
    store = Timed(stores, tmp_path / "store")
    rows = stores.samples(store.rng, items=20)
    store.builder.step("teacher/-/tasks@seed0", records={"sample": rows}, use="lm-eval", traits=("score",))
    scripted(store, stores)
    plots = {plot.name: plot.svg for plot in report_of(store.builder.write(), with_plots=True).plots}
    assert "accepted-lengths" not in plots
    assert ">plain</text>" in plots["quality-speed"]
    assert ">lookup</text>" not in plots["quality-speed"]


def test_a_check_that_does_not_say_at_which_batch_size_is_none_of_greedy_text(timed, stores):
    start, found = timed
    store = start()
    store.speed()
    rows = [{**row, "metric": "equal", "value": 1.0} for row in stores.samples(store.rng, "whole", items=4)]
    store.builder.step("teacher/lookup/own@seed0", records={"sample": rows}, use="losslessness", traits=("pair",))
    assert found()["lossless"] == "unchecked: batch 1"
    assert not is_green(found())


def test_a_check_that_compared_no_text_is_none(timed):
    start, found = timed
    store = start()
    store.speed()
    store.builder.step("teacher/lookup/losslessness@seed0", use="losslessness", traits=("pair",))
    assert found()["lossless"] == "unchecked"
    assert not is_green(found())


def test_one_differing_text_of_any_check_is_red(timed):
    start, found = timed
    store = start(seeds=(0, 1))
    for seed in (0, 1):
        store.speed(seed)
        store.check(seed, differing=seed)
    assert found()["lossless"] == "no: 1 of 8 texts differ"
    assert not is_green(found())


@pytest.mark.parametrize(
    ("excused", "usual", "beyond", "verdict"),
    [
        (15, 5, 0, "yes"),
        (0, 0, 0, "yes"),
        (15, 5, 1, "no: 1 of 1000 tokens are beyond the noise"),
        (16, 5, 0, "unchecked: too few near ties to tell (16 of 1000, 5 of 500)"),
        (60, 5, 0, "no: 60 of 1000 tokens excused, in the reference's text 5 of 500"),
    ],
)
def test_below_float64_near_ties_decide_and_no_more_of_them_than_the_reference_needs(
    timed, excused, usual, beyond, verdict
):
    start, found = timed
    store = start()
    store.speed()
    store.near_ties(excused, usual, beyond)
    assert found()["lossless"] == verdict
    assert is_green(found()) == (verdict == "yes")
    row = found("losslessness")
    assert (row["lossless"], row["noise"], row["beyond noise"]) == (verdict, 0.125, beyond)
    assert (row["excused %"], row["reference's %"]) == (excused / 10, usual / 5)


def test_near_ties_of_nearly_the_same_texts_at_several_batch_sizes_are_not_added_up(timed):
    start, found = timed
    store = start()
    store.speed()
    store.near_ties({1: 44, 4: 44, 8: 44}, 200, of=10_000)
    # One size alone has too few to tell, and the others say the same again; 132 of 3,000 would be enough.
    assert found()["lossless"] == "unchecked: too few near ties to tell (44 of 1000 at batch 1, 200 of 10000)"


@pytest.mark.parametrize(
    ("excused", "verdict"),
    [
        ({1: 18, 4: 27}, "yes"),
        ({1: 18, 4: 90}, "no: 90 of 1000 tokens excused at batch 4, in the reference's text 9 of 500"),
        ({1: 38, 4: 90}, "no: 90 of 1000 tokens excused at batch 4, in the reference's text 9 of 500"),
        ({1: 18, 4: 38}, "unchecked: too few near ties to tell (38 of 1000 at batch 4, 9 of 500)"),
    ],
)
def test_each_batch_size_is_held_against_the_reference_by_itself(timed, excused, verdict):
    start, found = timed
    store = start()
    store.speed()
    store.near_ties(excused, 9)
    assert found()["lossless"] == verdict


def test_a_check_in_float64_beside_one_below_it_must_be_green_too(timed):
    start, found = timed
    store = start()
    store.speed()
    store.near_ties(5, 5)
    store.check(differing=1, suite="exactly")
    assert found()["lossless"] == "no: 1 of 4 texts differ"


@pytest.mark.parametrize(
    ("at", "value", "verdict"),
    [
        (1, 95.0, "yes"),
        (1, 180.0, "no: sampled text is unlike the reference's (p = 2e-06)"),
        (0.5, 95.0, "unchecked: sampled"),
    ],
)
def test_sampled_text_is_green_by_what_was_drawn_at_its_temperature(timed, at, value, verdict):
    start, found = timed
    store = start()
    store.speed(temperature=1.0)
    store.check()
    (like,) = store.stores.samples(store.rng, f"temperature {at:g}", items=1)
    drawn = {**like, "metric": "chi_square_tokens", "value": value, "weight": 100.0}
    label = "teacher/lookup/drawn@seed0"
    store.builder.step(label, records={"sample": [drawn]}, use="losslessness", traits=("pair",))
    assert found()["lossless"] == verdict
    assert is_green(found()) == (verdict == "yes")
