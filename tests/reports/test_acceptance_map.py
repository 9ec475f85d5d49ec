"""The map of scripted acceptance: its table and its picture."""

import re

import pytest
from mambabench.harness.results import Results
from mambabench.reports.acceptance_map import AcceptanceMap
from mambabench.reports.cells import text
from mambabench.reports.map_plots import maps
from mambabench.reports.options import NoOptions

STEP = 0.004
"""Seconds of a plain step; a round takes a quarter more."""
READING = {"subject": 0.05, "reference": 0.0}
"""Seconds that pass before the first round, in which a draft reads the prompt."""
NEW = 25
ACCEPTED = {0: [3, 0, 4, 1, 2, 4, 4], 1: [2] * 8}
"""Of the rounds of the rows of every block."""


def request(batch, prompt):
    return {"batch": batch, "prompt_tokens": prompt, "new_tokens": NEW, "temperature": 0.0, "content": "text"}


def measured(block, batch, prompt, rate, k):
    """Bursts and rounds of both arms, whose rows make as many tokens in rounds that all take the same."""
    bursts, rounds = [], []
    for row in range(batch):
        where = {"block": block, "row": row, **request(batch, prompt)}
        for arm, tokens in (("reference", [1] * (NEW - 1)), ("subject", [each + 1 for each in ACCEPTED[row % 2]])):
            each = STEP * (1.25 if arm == "subject" else 1.0) * (1 + 0.01 * block)
            bursts.append({**where, "arm": arm, "burst": 0, "at_s": 0.1, "tokens": 1})
            for number, new in enumerate(tokens):
                at = {"burst": number + 1, "at_s": 0.1 + READING[arm] + each * (number + 1)}
                left = NEW - 1 - sum(tokens[:number])
                bursts.append({**where, "arm": arm, **at, "tokens": min(new, left)})
                if arm == "subject":
                    rounds.append({**where, "arm": arm, "round": number, "drafted": k, "accepted": new - 1})
    return bursts, [{**each, "scripted": rate} for each in rounds]


@pytest.fixture
def results(stores, tmp_path):
    """`results(**decoders)`: of rates and K by name, each with the same three requests."""

    def made(costs=True, drafting=None, **decoders):
        builder = stores.Builder(tmp_path / "store", decoders=("plain", *decoders))
        builder.model("half", 0.5)
        for name, (rate, k) in decoders.items():
            records = {"burst": [], "round": []}
            facts = []
            for place, (batch, prompt) in enumerate([(1, 16), (1, 64), (2, 16)]):
                for block in range(3):
                    bursts, rounds = measured(3 * place + block, batch, prompt, rate, k)
                    records["burst"] += bursts
                    records["round"] += rounds
                at = f"batch {batch}, prompt {prompt}"
                for drafts, arm, seconds in ((k, "subject", 1.2 * STEP), (0, "reference", STEP)) if costs else ():
                    named = f"cost of a round, K = {drafts}, {at}"
                    facts.append({"name": named, "value": seconds, "unit": "s", "arm": arm})
            label = f"half/{name}/speed@seed0"
            draft = (drafting or {}).get(name, {"use": "ngram"})
            decoder = {"plan_name": name, "kind": "decoder", "name": "scripted", "config": {"draft": draft}}
            builder.step(label, records=records, traits=("pair", "alone"), use="speed", facts=facts, decoder=decoder)
        return Results.read([builder.write()])

    return made


def table(results):
    return AcceptanceMap(NoOptions()).frame(results)


def test_cells_are_speed_ups_of_rounds_with_exactly_the_tokens_of_the_rate(results):
    frame = table(results(low=(0.5, 4), high=(0.8, 4)))
    places = ["batch 1, prompt 16", "batch 1, prompt 64", "batch 2, prompt 16"]
    assert frame.columns.tolist() == ["model", "decoder", "k", "scripted %", "tokens", *places, "of predicted"]
    assert frame[["decoder", "k", "scripted %"]].values.tolist() == [["low", 4, 50], ["high", 4, 80]]
    for row, tokens in zip(frame.to_dict("records"), (1.9375, 3.3616), strict=True):
        assert row["tokens"] == pytest.approx(tokens)
        for place in places:
            assert row[place].value == pytest.approx(tokens / 1.25)
        assert row["of predicted"].value == pytest.approx(1.2 / 1.25)
        assert row["of predicted"].low == pytest.approx(row["of predicted"].high)


def test_a_spread_between_blocks_is_an_interval_and_requests_that_were_not_measured_are_gaps(results):
    given = results(low=(0.5, 4), deep=(0.5, 8))
    timings = given.timings
    late = timings["arm"].eq("subject") & timings["block"].eq(1)
    timings.loc[late, "at_s"] *= 1.3
    drop = timings["decoder"].eq("deep") & timings["prompt_tokens"].eq(64)
    given.__dict__["timings"] = timings[~drop]
    low, deep = table(given).to_dict("records")
    spread, still = low["batch 1, prompt 16"], low["batch 1, prompt 64"]
    assert spread.low < spread.value < spread.high
    assert still.high - still.low < 1e-9
    assert text(deep["batch 1, prompt 64"]) == "–"
    assert deep["tokens"] == pytest.approx(2 - 0.5**8)


def test_where_no_round_was_scripted_there_is_no_map(results):
    given = results(low=(0.5, 4))
    given.rounds["scripted"] = float("nan")
    assert table(given) is None
    assert maps(given) == ()


def test_without_costs_nothing_is_predicted(results):
    assert "of predicted" not in table(results(costs=False, low=(0.5, 4)))


def test_drafts_that_differ_have_pictures_of_their_own(results):
    drafts = {"two": {"use": "layers", "count": 2}, "four": {"use": "layers", "count": 4}}
    given = results(drafting=drafts, two=(0.5, 4), four=(0.5, 4))
    assert {plot.name: plot.title.partition(": ")[2] for plot in maps(given)} == {
        "acceptance-map-half-1": "half, layers (count 2)",
        "acceptance-map-half-2": "half, layers (count 4)",
    }


def test_the_picture_says_that_acceptance_was_scripted(results):
    (plot,) = maps(results(low=(0.5, 2), high=(0.8, 4)))
    assert plot.title == "Speed-up at scripted acceptance: half"
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", plot.svg)
    assert {"batch 1", "batch 2", "K = 2", "K = 4", "prompt of 64", "speed-up, scripted"} <= set(texts)
    assert "no draft was as good" in plot.note
