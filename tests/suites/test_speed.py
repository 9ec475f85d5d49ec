import dataclasses

import pandas
import pytest
import torch
from mambabench.decoders.ngram import NgramDraft
from mambabench.decoders.speculative import SpeculativeDecoder
from mambabench.decoders.standard import StandardDecoder
from mambabench.harness import metrics
from mambabench.harness.interfaces import Answer, Cost, MambabenchError
from mambabench.harness.mockmodel import MockStepper
from mambabench.harness.suites import traffic
from mambabench.harness.suites.configs import SpeedConfig
from mambabench.harness.suites.speed import Speed

TEXTS = ["abcabcabc", "gggfgggf", "edcba", "abababab", "fedfedfed"]
CONFIG = SpeedConfig(data="text", batch=(1, 2), prompt_tokens=5, new_tokens=9, pairs=3, warmup=1)


@pytest.fixture(autouse=True)
def little_to_copy(monkeypatch):
    monkeypatch.setitem(traffic.SIZES, "cpu", 1 << 20)


@pytest.fixture
def records(measure, lookup, plain):
    return measure(Speed(CONFIG), TEXTS, lookup, plain)


def of(records, kind):
    return pandas.DataFrame([{"key": "s", **r} for r in records if r["kind"] == kind])


def test_arms_alternate_and_answer_the_same_requests(records):
    bursts = of(records, "burst")
    first = bursts.drop_duplicates(["block", "arm"])[["block", "arm", "order"]].values.tolist()
    assert first == [
        row
        for block in range(6)
        for row in (
            [[block, "subject", 0], [block, "reference", 1]]
            if block % 2 == 0
            else [[block, "reference", 0], [block, "subject", 1]]
        )
    ]
    tokens = bursts.groupby(["block", "arm", "row"])["tokens"].sum()
    assert set(tokens) == {9}
    assert len(tokens) == 2 * (3 * 1 + 3 * 2)
    assert set(bursts["content"]) == {"text"}


def test_figures_agree_with_the_definitions(records):
    bursts, rounds = of(records, "burst"), of(records, "round")
    figures = metrics.speed_frame(bursts)
    assert sorted(zip(figures["batch"], figures["arm"], strict=True)) == [
        (batch, arm) for batch in (1, 2) for arm in ("reference", "subject")
    ]
    assert (figures["blocks"] == 3).all()
    one = bursts.query("arm == 'reference' and batch == 1").sort_values(["block", "burst"])
    by_hand = [(b["at_s"].iloc[-1] - b["at_s"].iloc[0]) / 8 for _, b in one.groupby("block")]
    mean = (by_hand[0] * by_hand[1] * by_hand[2]) ** (1 / 3)
    printed = figures.query("arm == 'reference' and batch == 1")["tpot_s"].item()
    assert printed == pytest.approx(mean, rel=1e-12)
    blocks = metrics.block_frame(bursts).query("batch == 2").pivot(index="block", columns="arm", values="tpot_s")
    paired = metrics.geometric_mean(blocks["reference"] / blocks["subject"])
    two = figures.query("batch == 2").set_index("arm")["tpot_s"]
    assert metrics.speedup(two["reference"], two["subject"]) == pytest.approx(paired, rel=1e-12)
    assert set(rounds["arm"]) == {"subject"}
    accepted = metrics.acceptance_frame(rounds)
    total = 1 + sum(accepted["by_position"].iloc[0])
    assert accepted["mean_accepted_length"].item() == pytest.approx(total, rel=1e-12)
    assert 1 <= total <= 4


def test_facts_name_warm_up_sizes_and_memory(records):
    facts = {(r["name"], r.get("arm", "")): r for r in records if r["kind"] == "fact"}
    assert facts["warm-up, batch 2", "reference"]["unit"] == "s"
    assert facts["weights", ""]["value"] == 16 * 8
    assert facts["bytes of a step, batch 2", ""]["value"] == 8 * 8 + 8 * 2 * (5 + 4) + 8 * 2
    assert facts["peak memory of the process", ""]["value"] > 2**20


def test_facts_tell_how_much_the_text_of_each_arm_loops(measure, lookup, plain):
    looping = measure(Speed(CONFIG), TEXTS, lookup, plain, make=lambda: MockStepper(habit=1.0))
    other = measure(Speed(CONFIG), TEXTS, lookup, plain, make=lambda: MockStepper(habit=0.0))
    shares = [
        {(r["name"], r["arm"]): r["value"] for r in records if r["kind"] == "fact" and r["unit"] == "share"}
        for records in (looping, other)
    ]
    for (name, arm), share in shares[0].items():
        assert name in ("distinct 4-grams, batch 1", "distinct 4-grams, batch 2")
        assert share == shares[0][name, "reference" if arm == "subject" else "subject"]
        assert 1 / 6 <= share < shares[1][name, arm] <= 1


@pytest.mark.parametrize("warmup", [0, 1])
def test_sizes_are_those_of_the_states_that_each_decoder_opened(measure, lookup, plain, warmup):
    opened = set()

    class Noted(MockStepper):
        def open(self, batch, context, steps):
            opened.add((batch, context, steps))
            return super().open(batch, context, steps)

    records = measure(Speed(dataclasses.replace(CONFIG, warmup=warmup)), TEXTS, lookup, plain, make=Noted)
    facts = {(r["name"], r.get("arm", "")): r["value"] for r in records if r["kind"] == "fact"}
    assert opened == {(batch, 5 + 9, steps) for batch in (1, 2) for steps in (1, lookup.k + 1)}
    for batch in (1, 2):
        for arm, steps in (("subject", lookup.k + 1), ("reference", 1)):
            assert facts[f"KV cache, batch {batch}", arm] == 8 * batch * (5 + 9 + steps)
            assert facts[f"state, batch {batch}", arm] == 8 * batch * steps


def test_a_backend_that_does_not_know_what_it_holds_has_no_sizes(measure, plain):
    class Unknown(MockStepper):
        def cost(self, batch, context, steps):
            return Cost(weight_bytes=1, kv_bytes=1, state_bytes=1, flops=1)

    records = measure(Speed(CONFIG), TEXTS, plain, make=Unknown)
    names = {r["name"] for r in records if r["kind"] == "fact"}
    whats = ("warm-up", "distinct 4-grams", "bytes of a step", "cost of a round, K = 0")
    whole = {"peak memory of the process", "copy bandwidth", "read bandwidth"}
    assert names == {f"{what}, batch {batch}" for what in whats for batch in (1, 2)} | whole


def test_of_a_model_with_a_loop_of_its_own_no_bytes_of_a_step_are_told(measure, plain):
    class Own(MockStepper):
        traits = frozenset({"generate"})

        def generate(self, prompts, limits, emit):
            return plain.generate(MockStepper(), prompts, limits, emit)

    told = {r["name"] for r in measure(Speed(CONFIG), TEXTS, plain, make=Own) if r["kind"] == "fact"}
    assert "weights" in told
    assert not any("bytes of a step" in name for name in told)


def test_a_round_of_each_arm_has_its_cost_at_each_batch_size(records, lookup):
    costs = [r for r in records if r["kind"] == "fact" and r["name"].startswith("cost of a round")]
    known = {(r["name"], r["arm"]) for r in costs}
    assert known == {
        (f"cost of a round, K = {k}, batch {batch}", arm)
        for batch in (1, 2)
        for arm, k in (("subject", lookup.k), ("reference", 0))
    }
    assert all(r["unit"] == "s" and r["value"] > 0 for r in costs)


def test_arms_take_turns_when_the_costs_of_rounds_are_measured_and_medians_count(measure):
    class Priced(StandardDecoder):
        def __init__(self, k, told):
            super().__init__()
            self.k, self.told = k, iter(told)

        def costs(self, model, prompts, limits):
            asked.append(self.k)
            return {self.k: next(self.told)}

    asked = []
    arms = Priced(4, [3, 900, 1, 2, 800]), Priced(0, [7, 7, 700, 6, 8])
    records = measure(Speed(dataclasses.replace(CONFIG, batch=(1,))), TEXTS, *arms)
    assert asked == [4, 0] * 5
    told = {r["name"]: r["value"] for r in records if r["kind"] == "fact" and r["name"].startswith("cost of a round")}
    assert told == {"cost of a round, K = 4, batch 1": 3, "cost of a round, K = 0, batch 1": 7}


def test_what_a_decoder_tells_of_blocks_is_told_once_as_their_mean(measure, plain):
    class Telling(StandardDecoder):
        def generate(self, model, prompts, limits, emit):
            seen.append(len(prompts))
            emit("fact", name="blocks so far", value=len(seen), unit="blocks")
            return super().generate(model, prompts, limits, emit)

    seen = []
    config = dataclasses.replace(CONFIG, batch=(1,), warmup=0)
    told = [r for r in measure(Speed(config), TEXTS, Telling()) if r["kind"] == "fact" and r["unit"] == "blocks"]
    assert [(r["name"], r["value"], r["arm"]) for r in told] == [("blocks so far, batch 1", 2.0, "subject")]


def test_without_a_reference_there_is_one_arm_and_threads_come_back(measure, plain):
    before = torch.get_num_threads()
    records = measure(Speed(CONFIG), TEXTS, plain)
    assert {r["arm"] for r in records if r["kind"] == "burst"} == {"subject"}
    assert torch.get_num_threads() == before


def test_sampled_arms_are_measured_at_their_temperature(measure, lookup, plain):
    config = SpeedConfig(data="text", prompt_tokens=4, new_tokens=5, pairs=2, temperature=0.8)
    records = measure(Speed(config), TEXTS, lookup, plain)
    assert {r["temperature"] for r in records if r["kind"] in ("burst", "round")} == {0.8}


def test_a_step_measures_several_temperatures_and_names_facts_by_them(measure, lookup, plain):
    config = SpeedConfig(data="text", prompt_tokens=4, new_tokens=5, pairs=2, temperatures=(0.0, 0.8), profile=2)
    records = measure(Speed(config), TEXTS, lookup, plain)
    bursts = of(records, "burst")
    assert bursts.groupby("temperature")["block"].unique().map(list).to_dict() == {0.0: [0, 1], 0.8: [2, 3]}
    facts = {(r["name"], r.get("arm", "")) for r in records if r["kind"] == "fact"}
    for at in ("batch 1, temperature 0", "batch 1, temperature 0.8"):
        for name, arm in ((f"cost of a round, K = 0, {at}", "reference"), (f"round, {at}: whole", "subject")):
            assert (name, arm) in facts


def test_a_decoder_that_stops_early_is_an_error(measure, plain):
    class Short:
        def generate(self, model, prompts, limits, emit):
            return [Answer((1,), "a", "length") for _ in prompts]

    with pytest.raises(MambabenchError, match="yielded 1 tokens, not the 9"):
        measure(Speed(CONFIG), TEXTS, Short(), plain)


def test_a_round_of_each_arm_and_batch_is_taken_apart(measure, lookup, plain):
    config = dataclasses.replace(CONFIG, profile=3)
    facts = of(measure(Speed(config), TEXTS, lookup, plain), "fact")
    told = facts[facts["name"].str.startswith("round, batch")]
    assert set(told["arm"]) == {"subject", "reference"}
    for batch in (1, 2):
        mine = told[told["name"].str.startswith(f"round, batch {batch}: ")].set_index(["arm", "name"])["value"]
        whole, target = (mine.xs(f"round, batch {batch}: {what}", level="name") for what in ("whole", "target kernels"))
        assert (target > 0).all()
        assert (whole > target).all()


def test_the_memory_of_snapshots_stands_beside_that_of_replay(measure):
    class Keeping(MockStepper):
        traits = frozenset({"rollback", "snapshots"})

        def open(self, batch, context, steps, rollback="replay"):
            return super().open(batch, context, steps)

        def cost(self, batch, context, steps, rollback="replay"):
            cost = super().cost(batch, context, steps)
            return dataclasses.replace(cost, held_state_bytes=7 if rollback == "snapshot" else 3)

    ways = (SpeculativeDecoder(NgramDraft(), 2, rollback=rollback) for rollback in ("snapshot", "replay"))
    facts = of(measure(Speed(CONFIG), TEXTS, *ways, make=Keeping), "fact").set_index(["name", "arm"])["value"]
    assert facts["state, batch 2", "subject"] == 7
    assert facts["state, batch 2", "reference"] == 3


def test_a_step_measures_several_lengths_of_prompts_with_each_batch_that_is_not_too_large(measure, lookup, plain):
    config = dataclasses.replace(CONFIG, lengths=(4, 8), batch_tokens=8, pairs=2, profile=1)
    records = measure(Speed(config), TEXTS, lookup, plain)
    requests = [(1, 4), (2, 4), (1, 8)]
    bursts = of(records, "burst")
    assert bursts.drop_duplicates("block")[["batch", "prompt_tokens"]].apply(tuple, axis=1).tolist() == [
        request for request in requests for _ in range(2)
    ]
    facts = of(records, "fact").set_index(["name", "arm"])["value"]
    for batch, prompt in requests:
        at = f"batch {batch}, prompt {prompt}"
        assert facts[f"bytes of a step, {at}", ""] == 8 * 8 + 8 * batch * (prompt + 4) + 8 * batch
        assert facts[f"KV cache, {at}", "reference"] == 8 * batch * (prompt + 9 + 1)
        assert facts[f"round, {at}: whole", "subject"] > 0
    assert not any("batch 2, prompt 8" in name for name, _ in facts.index)
    assert [r["total"] for r in records if r["kind"] == "progress"] == [6] * 7


def test_reading_is_measured_beside_copying():
    before = torch.get_num_threads()
    found = traffic.bandwidths("cpu")
    assert set(found) == {"copy", "read"}
    assert all(1e6 < speed < 1e13 for speed in found.values())
    assert torch.get_num_threads() == before


@pytest.mark.gpu
def test_memory_of_a_gpu_is_read_about_as_fast_as_it_is_copied():
    found = traffic.bandwidths("cuda:0")
    assert 0.9 < found["read"] / found["copy"] < 1.3
