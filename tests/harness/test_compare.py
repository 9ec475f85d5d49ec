"""The gate: what it says of known differences, and how often it cries wolf."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from mambabench import MambabenchError, Verdict, hookimpl
from mambabench.harness import plugins
from mambabench.harness import statistics as st
from mambabench.harness.cli.compare import compare_stores
from mambabench.harness.compare import PROCESS_SD, _Run, compare, decide, exit_code, latency, render_comparisons
from mambabench.harness.gates import Gate, Gates, Rule, read_gates
from mambabench.harness.results import Results
from rich.console import Console

RULE = Rule(margin=0.03, level=0.99, noise=None, ignore=False)
DATA = {"text": {"file": "/somewhere/text.txt", "fingerprint": "f1"}}


@pytest.fixture
def make(stores, tmp_path):
    """Makes a store of one half-attention model; keyword arguments say how it differs from the usual one."""

    def build(name, *, seeds=(0,), rng=0, drop=0.0, weights="w", slower=1.0, items=400, accepted=0.6, **options):
        builder = stores.Builder(tmp_path / name, seeds=seeds, began=1e6 if name == "base" else 2e6)
        if cpu := options.pop("cpu", ""):
            builder.environment["cpu"] = cpu
        builder.model("teacher", teacher=True)
        builder.model("half", keep=0.5)
        options = {"data": DATA, **options}
        state = options.pop("state", "ok")
        for seed in seeds:
            subject = builder.step(f"half/align@seed{seed}", "train", key=f"trained{seed}", artifact=f"{weights}{seed}")
            rows = stores.samples(np.random.default_rng([rng, seed]), items=items, chance=0.8)
            lost = np.random.default_rng([rng, seed, 1]).random(items) < drop
            rows = [{**row, "value": 0.0 if gone else row["value"]} for row, gone in zip(rows, lost, strict=True)]
            records = {"sample": rows + stores.losses_of_text(np.random.default_rng([rng, seed, 2]), nll=1.2)}
            label = f"half/-/tasks@seed{seed}"
            builder.step(label, records=records, subject=subject, state=state, reason="signal 11", **options)
            timed, rounds = stores.bursts(
                np.random.default_rng([rng, seed, 3]),
                {"subject": 0.002 * slower, "reference": 0.002},
                accepted=accepted,
                noise=0.005,
            )
            builder.step(
                f"half/lookup/speed@seed{seed}",
                records={"burst": timed, "round": rounds},
                subject=subject,
                traits=("pair", "alone"),
                decoder=stores.LOOKUP,
                reference=stores.PLAIN,
            )
        return builder.write()

    return build


def run(base, head, gates=None, verdicts=None):
    return compare(Results.read([base]), Results.read([head]), gates, verdicts)


def of(comparisons, metric):
    return [c for c in comparisons if c.metric.startswith(metric)]


def test_a_store_compared_with_itself_passes(make):
    store = make("base")
    comparisons = run(store, store)
    assert {c.verdict for c in comparisons} == {"pass"}
    assert exit_code(comparisons) == 0
    assert {c.metric.split(" ")[0] for c in comparisons} >= {"lookup/acc", "tpot", "ttft", "reference", "rounds"}
    assert all(c.difference == 0 for c in comparisons)
    assert all(c.detectable > 0 for c in of(comparisons, "tpot"))


def test_a_copied_store_passes(make, tmp_path):
    store = make("base")
    copy = shutil.copytree(store, tmp_path / "copy")
    assert exit_code(run(store, copy)) == 0


def test_lost_answers_of_one_artifact_fail(make):
    comparisons = run(make("base"), make("head", drop=0.15))
    (acc,) = of(comparisons, "lookup/acc")
    assert acc.verdict == "fail"
    assert acc.difference == pytest.approx(acc.head - acc.base)
    assert acc.low < acc.difference < acc.high < 0
    assert exit_code(comparisons) == 10


def test_a_better_head_passes_however_much_better_it_is(make):
    comparisons = run(make("base", drop=0.15), make("head"))
    (acc,) = of(comparisons, "lookup/acc")
    assert acc.verdict == "pass"
    assert acc.difference > 0
    assert acc.high > acc.margin


def test_quality_whose_interval_reaches_beyond_the_margin_is_inconclusive(make):
    base, head = make("base", items=60), make("head", rng=7, items=60)
    (acc,) = of(run(base, head), "lookup/acc")
    assert acc.verdict == "inconclusive"
    assert acc.detectable > acc.margin


def test_models_trained_anew_need_three_seeds(make):
    comparisons = run(make("base", seeds=(0, 1)), make("head", seeds=(0, 1), weights="v", drop=0.3))
    (acc,) = of(comparisons, "lookup/acc")
    assert acc.label == "half/-/tasks"
    assert acc.verdict == "inconclusive"
    assert "trained anew" in acc.reason
    assert not of(comparisons, "rounds")


def test_models_trained_anew_are_judged_by_seeds(make):
    seeds = (0, 1, 2)
    base = make("base", seeds=seeds)
    (acc,) = of(run(base, make("head", seeds=seeds, weights="v", drop=0.4)), "lookup/acc")
    assert acc.verdict == "fail"
    assert "3 seeds" in acc.reason


def test_equal_keys_with_other_weights_are_not_the_same_artifact(make):
    """A training step's key leaves out the code, so only the files tell."""
    same, other = make("same"), make("other", weights="v")
    base = make("base")
    assert of(run(base, same), "lookup/acc")[0].reason == "400 items"
    assert "trained anew" in of(run(base, other), "lookup/acc")[0].reason


def test_a_slower_decoder_fails_and_the_reference_does_not(make):
    comparisons = run(make("base"), make("head", slower=1.25))
    (tpot,) = of(comparisons, "tpot")
    assert tpot.verdict == "fail"
    assert tpot.relative
    assert tpot.difference == pytest.approx(tpot.head / tpot.base - 1, rel=1e-6)
    assert tpot.difference == pytest.approx(0.25, abs=0.02)
    assert {c.verdict for c in of(comparisons, "reference tpot")} <= {"pass", "inconclusive"}


def test_a_gate_may_declare_the_noise_between_processes(make):
    base, head = make("base"), make("head")
    gates = Gates(gates=(Gate(metric="tpot", noise=0.001),))
    assert of(run(base, head), "tpot")[0].verdict == "inconclusive"
    assert of(run(base, head, gates), "tpot")[0].verdict == "pass"


def test_the_first_token_is_less_sure_between_processes_than_the_rest(make):
    comparisons = run(make("base"), make("head"))
    said = {name: of(comparisons, name)[0] for name in ("tpot", "ttft")}
    assert "2.0 % between processes" in said["tpot"].reason
    assert "15.0 % between processes" in said["ttft"].reason
    assert said["ttft"].detectable > 0.5 > said["tpot"].detectable


def test_more_rounds_for_the_same_text_fail_exactly(make):
    base, head = make("base", accepted=0.7), make("head", accepted=0.5)
    comparisons = run(base, head)
    assert of(comparisons, "rounds")[0].verdict == "fail"
    assert of(run(head, base), "rounds")[0].verdict == "pass"
    assert of(comparisons, "tokens")[0].verdict == "pass"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"config": {"limit": 10}}, "the suites differ (limit"),
        ({"data": {"text": {"file": "/somewhere/text.txt", "fingerprint": "f2"}}}, "the data differ (text)"),
        ({"device": "cuda:0"}, "the devices differ"),
        ({"cpu": "another CPU"}, "the devices differ (a CPU and another CPU)"),
        ({"state": "crashed"}, "head: crashed (signal 11)"),
        ({"items": 300}, "the items differ"),
    ],
)
def test_what_differs_is_not_comparable(make, change, reason):
    comparisons = run(make("base"), make("head", **change))
    (first, *_) = [c for c in comparisons if c.label == "half/-/tasks@seed0"]
    assert first.verdict == "not comparable"
    assert reason in first.reason
    assert math.isnan(first.difference)
    assert exit_code([first]) == 12


def test_an_option_that_is_off_and_that_the_other_side_s_code_did_not_have_yet_is_no_difference(make):
    base, head = make("base"), make("head", config={"limit": 0, "lengths": []})
    for comparisons in (run(base, head), run(head, base)):
        assert of(comparisons, "lookup/acc")[0].verdict == "pass"
    assert of(run(make("ten", config={"limit": 10}), head), "*")[0].reason == "the suites differ (limit: 10 and 0)"


def test_kinds_of_requests_in_one_step_are_compared_each_by_itself(stores, tmp_path):
    kinds = [{"prompt_tokens": prompt, "temperature": at} for prompt in (32, 512) for at in (0.0, 1.0)]
    made = []
    for name, slower in (("base", 1.0), ("head", 1.5)):
        builder = stores.Builder(tmp_path / name, began=1e6 if name == "base" else 2e6)
        builder.model("teacher", teacher=True)
        bursts = []
        for place, kind in enumerate(kinds):
            seconds = {"subject": 0.002 * (slower if kind == kinds[-1] else 1.0), "reference": 0.002}
            timed, _ = stores.bursts(np.random.default_rng(place), seconds, noise=0.005)
            bursts += [{**row, **kind, "block": 8 * place + row["block"]} for row in timed]
        builder.step("teacher/lookup/speed@seed0", records={"burst": bursts}, traits=("pair", "alone"))
        made.append(builder.write())
    found = {c.metric: c for c in of(run(*made), "tpot")}
    names = [f"tpot batch 1, prompt {kind['prompt_tokens']}, temperature {kind['temperature']}" for kind in kinds]
    assert list(found) == names
    assert [found[name].difference for name in names] == pytest.approx([0, 0, 0, 0.5])


def test_data_moved_to_another_folder_still_compare(make):
    moved = {"text": {"file": "/elsewhere/text.txt", "fingerprint": "f1"}}
    comparisons = run(make("base"), make("head", data=moved))
    assert of(comparisons, "lookup/acc")[0].verdict == "pass"


def test_what_a_step_ran_on_does_not_change_with_the_machine_of_a_later_run(make):
    base, head = make("base", device="cuda:0"), make("head", device="cuda:0")
    for store, last in ((base, {}), (head, {"gpu0": "another GPU", "gpu1": "a third"})):
        for file in store.glob("steps/*/outcome.json"):
            file.write_text(json.dumps({**json.loads(file.read_text()), "environment": {"gpu": "a GPU"}}))
        run_file = json.loads((store / "run.json").read_text())
        (store / "run.json").write_text(json.dumps({**run_file, "environment": last}))
    assert of(run(base, head), "lookup/acc")[0].verdict != "not comparable"


def test_a_label_missing_on_one_side_is_not_comparable(make):
    comparisons = run(make("base"), make("head", seeds=(0, 1)))
    missing = [c for c in comparisons if "missing in base" in c.reason]
    assert {c.label for c in missing} == {"half/-/tasks@seed1", "half/lookup/speed@seed1"}
    assert exit_code(comparisons) == 12


def test_labels_that_the_plan_skips_on_both_sides_are_left_out(stores, tmp_path):
    builder = stores.Builder(tmp_path / "store")
    builder.model("teacher", teacher=True)
    builder.skip("half/lookup/speed@seed0", "shown elsewhere")
    store = builder.write()
    assert run(store, store) == []
    assert exit_code([]) == 12


def test_other_options_of_the_decoder_leave_counts_incomparable(make):
    base, head = make("base"), make("head")
    for file in head.glob("steps/*/step.json"):
        file.write_text(file.read_text().replace('"k": 4', '"k": 6'))
    comparisons = run(base, head)
    assert of(comparisons, "rounds")[0].verdict == "not comparable"
    assert of(comparisons, "tpot")[0].verdict != "not comparable"


def test_a_renamed_decoder_is_the_same_decoder(make):
    """The plan's names are no part of a key, so a renamed reference leaves label and step as they were."""
    base, head = make("base"), make("head")
    for file in head.glob("steps/*/step.json"):
        file.write_text(file.read_text().replace('"plan_name": "plain"', '"plan_name": "greedy"'))
    assert {c.verdict for c in of(run(base, head), "rounds")} <= {"pass", "fail"}


def test_a_process_counts_once_in_the_noise_between_processes(make, tmp_path):
    """Three seeds are three processes: two degrees of freedom, too few to be believed, however often they are read."""
    store = make("base", seeds=(0, 1, 2))
    copy = shutil.copytree(store, tmp_path / "copy")
    fresh = make("head", seeds=(0, 1, 2))
    assert noise(store, store) == noise(store, copy) == (PROCESS_SD["tpot_s"], math.inf)
    assert noise(store, fresh)[1] == 4
    copy_speed(store, fresh, seed=0)
    assert noise(store, fresh) == (PROCESS_SD["tpot_s"], math.inf), "2 of base, 1 of the two that head measured itself"


def test_models_that_share_a_process_count_it_once(stores, tmp_path):
    builder = stores.Builder(tmp_path / "store", seeds=range(5))
    builder.model("teacher", teacher=True)
    builder.model("copy", keep=1.0)
    for seed in range(5):
        timed, _ = stores.bursts(np.random.default_rng(seed), {"subject": 0.002, "reference": 0.002})
        for model in ("teacher", "copy"):
            builder.step(f"{model}/lookup/speed@seed{seed}", records={"burst": timed}, key=f"shared{seed}")
    assert noise(builder.write(), builder.path)[1] == 4


def noise(base, head):
    return _Run(Results.read([base]), Results.read([head]), Gates())._process_noise("tpot_s")


def copy_speed(source, target, seed):
    """Replaces a step of the target by that of the source."""
    cells = Results.read([source]).cells
    (key,) = cells.loc[cells["label"] == f"half/lookup/speed@seed{seed}", "key"]
    shutil.rmtree(target / "steps" / key)
    shutil.copytree(source / "steps" / key, target / "steps" / key)


def test_exit_codes_are_those_of_the_strictest_verdict(make):
    store = make("base")
    first = run(store, store)[0]
    order = ["pass", "inconclusive", "not comparable", "fail"]
    for verdict, code in zip(order, (0, 11, 12, 10), strict=True):
        milder = [replace(first, verdict=name) for name in order[: order.index(verdict) + 1]]
        assert exit_code(milder[::-1]) == code


def test_mambabench_verdict_is_only_ever_stricter(make):
    """A plug-in's hook may turn a pass into a failure and not the other way round."""

    class House:
        @hookimpl
        def mambabench_verdict(self, comparison):
            return Verdict("fail" if comparison.metric == "lookup/acc" else "pass", "house rule")

    registry = plugins.load()
    registry.manager.register(House(), name="house")
    base, head = make("base"), make("head", slower=1.25)
    comparisons = run(base, head, verdicts=registry.verdicts)
    (acc,) = of(comparisons, "lookup/acc")
    assert (acc.verdict, acc.reason) == ("fail", "house rule")
    assert of(comparisons, "tpot")[0].verdict == "fail"
    assert of(comparisons, "tpot")[0].reason != "house rule"


class Raising:
    @hookimpl
    def mambabench_verdict(self, comparison):
        raise ValueError("no [such] rule")


class Chatty:
    @hookimpl
    def mambabench_verdict(self, comparison):
        return "fail"


class Misspelt:
    @hookimpl
    def mambabench_verdict(self, comparison):
        return Verdict("failed", "house rule")


class Numbering:
    @hookimpl
    def mambabench_verdict(self, comparison):
        return Verdict("fail", 12)


@pytest.mark.parametrize(
    ("house", "error"),
    [
        (Raising, "ValueError: no [such] rule"),
        (Chatty, "TypeError: the answer must be a Verdict or None, is 'fail'"),
        (Misspelt, "ValueError: unknown verdict 'failed'; did you mean 'fail'?"),
        (Numbering, "TypeError: the reason must be text, is 12"),
    ],
)
def test_a_verdict_hook_that_fails_never_passes_in_silence(make, monkeypatch, house, error):
    registry = plugins.load()
    registry.manager.register(house(), name="house")
    monkeypatch.setattr(plugins, "registry", lambda: registry)
    store = make("base")
    comparisons = run(store, store, verdicts=registry.verdicts)
    assert {c.verdict for c in comparisons} == {"inconclusive"}
    assert {c.reason for c in comparisons} == {f"mambabench_verdict of plug-in house failed: {error}"}
    registry.failures.clear()
    done = CliRunner().invoke(compare_stores, [str(store), str(store)], standalone_mode=False)
    assert done.return_value == 11
    assert f"plug-in house: mambabench_verdict failed {len(comparisons)} times: {error}" in done.stderr


def test_a_failed_verdict_hook_does_not_soften_a_failure(make):
    registry = plugins.load()
    registry.manager.register(Raising(), name="house")
    comparisons = run(make("base"), make("head", slower=1.25), verdicts=registry.verdicts)
    assert of(comparisons, "tpot")[0].verdict == "fail"
    assert exit_code(comparisons) == 10


def test_a_broken_plug_in_is_named_beside_a_comparison(make, monkeypatch, tmp_path):
    file = tmp_path / "gatekeeper.py"
    file.write_text("import nothing_of_this_name\n")
    registry = plugins.load([file])
    monkeypatch.setattr(plugins, "registry", lambda: registry)
    store = make("base")
    done = CliRunner().invoke(compare_stores, [str(store), str(store)], standalone_mode=False)
    assert "plug-in gatekeeper.py local file is broken (import) and gave no verdict" in done.stderr


def test_the_table_names_every_label_and_the_smallest_visible_change(make):
    console = Console(width=240)
    comparisons = run(make("base"), make("head", drop=0.15))
    with console.capture() as captured:
        console.print(render_comparisons(comparisons))
    text = captured.get()
    assert "half/-/tasks@seed0" in text
    assert "sees" in text
    assert text.count("fail") == sum(c.verdict == "fail" for c in comparisons)


def test_gates_of_a_file_hold_for_the_labels_and_metrics_that_they_name(tmp_path, make):
    file = tmp_path / "gates.toml"
    file.write_text(
        '[default]\nquality = 0.02\n[[gate]]\nlabels = "half/*"\nmetric = "acc"\nmargin = 0.5\n'
        '[[gate]]\nlabels = "*/speed*"\nignore = true\n'
    )
    comparisons = run(make("base"), make("head", drop=0.15), read_gates(file))
    assert {c.metric: c.margin for c in comparisons} == {"lookup/acc": 0.5, "unseen/nll_per_token": 0.02}
    assert of(comparisons, "lookup/acc")[0].verdict == "pass"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[gate]]\nlables = 'x'", "gate.0.lables: unknown key; did you mean 'labels'?"),
        ("[[gate]]\nmargin = true", "gate.0.margin: expected a number, got true"),
        ("[[gate]]\nmargin = -0.1", "gate.0.margin: expected a number that is not negative, got -0.1"),
        ("[default]\nlevel = 99", "default.level: expected a level from 0.5 to below 1, got 99"),
        ("[default]\nspeed = 0.1", "default.speed: unknown key"),
        ("[gate]\nmargin = 0.1", "gate: expected tables written [[gate]]"),
        ("[[gate]]\nlabels = 3", "gate.0.labels: expected a text in quotes, got 3"),
        ("margin 0.1", "not valid TOML"),
    ],
)
def test_a_mistake_in_the_gates_is_one_line(tmp_path, text, message):
    file = tmp_path / "gates.toml"
    file.write_text(text)
    with pytest.raises(MambabenchError) as caught:
        read_gates(file)
    assert str(caught.value).startswith(f"{file}: {message}")
    assert "\n" not in str(caught.value)


def test_the_rule_needs_certainty_and_size():
    assert decide(-0.04, -0.03, -0.035, 0.03) == "fail"
    assert decide(-0.02, -0.01, -0.015, 0.03) == "pass"
    assert decide(-0.05, 0.01, -0.02, 0.03) == "inconclusive"
    assert decide(-0.05, -0.001, -0.02, 0.03) == "inconclusive"
    assert decide(math.nan, math.nan, 0.1, 0.03) == "inconclusive"
    assert decide(0.01, 0.01, 0.01, 0.0, "equal") == "fail"
    assert decide(0.0, 0.0, 0.0, 0.0, "equal") == "pass"


def quality_alarms(rng, items, redrawn, drop, times):
    """Share of failures of paired 0/1 items at a margin of 1 point; a share of them is answered anew by luck."""
    failures = 0
    for _ in range(times):
        base = (rng.random(items) < 0.7).astype(float)
        head = np.where(rng.random(items) < redrawn, (rng.random(items) < 0.7).astype(float), base)
        head = np.where(rng.random(items) < drop, 0.0, head)
        difference = st.paired_difference((base, np.ones(items)), (head, np.ones(items)), np.arange(items))
        failures += decide(*difference.interval(0.99), difference.value, 0.01) == "fail"
    return failures / times


def latency_alarms(rng, process_sd, iteration_sd, slope, slower, times, blocks=8):
    """Share of failures of two runs, each of one process: drift, luck of the process, noise of the blocks."""
    failures = 0
    for _ in range(times):
        clock = np.arange(blocks) / blocks
        sides = [
            np.exp(slope * clock + rng.normal(0, process_sd) + rng.normal(0, iteration_sd, blocks) + shift)
            for shift in (0.0, np.log1p(slower))
        ]
        made = latency("x", "tpot", *sides, rule=RULE, noise=(0.02, math.inf))
        failures += made.verdict == "fail"
    return failures / times


def test_false_alarms_of_quality_stay_below_two_percent():
    rng = np.random.default_rng(0)
    for items in (50, 300, 1500):
        assert quality_alarms(rng, items, 0.3, 0.0, 600) <= 0.02


def test_a_loss_of_three_points_is_seen_in_1500_items():
    assert quality_alarms(np.random.default_rng(1), 1500, 0.1, 0.05, 300) >= 0.9


def test_false_alarms_of_seeds_stay_below_two_percent():
    rng = np.random.default_rng(2)
    failures = 0
    for _ in range(2000):
        base, head = 0.8 + rng.normal(0, 0.015, (2, 3))
        difference = st.welch(base, head)
        failures += decide(*difference.interval(0.99), difference.value, 0.01) == "fail"
    assert failures / 2000 <= 0.02


@pytest.mark.parametrize(("process_sd", "iteration_sd"), [(0.007, 0.005), (0.02, 0.02), (0.02, 0.05)])
def test_false_alarms_of_latency_stay_below_two_percent(process_sd, iteration_sd):
    """A quiet GPU, a noisy host, two shared cores; each with a drift of 2 % over the run."""
    assert latency_alarms(np.random.default_rng(3), process_sd, iteration_sd, 0.02, 0.0, 1000) <= 0.02


def test_a_slow_down_of_a_tenth_is_seen_on_a_quiet_machine_and_a_fifth_on_a_noisy_one():
    rng = np.random.default_rng(4)
    assert latency_alarms(rng, 0.007, 0.005, 0.02, 0.10, 300) >= 0.95
    assert latency_alarms(rng, 0.02, 0.02, 0.02, 0.20, 300) >= 0.95
