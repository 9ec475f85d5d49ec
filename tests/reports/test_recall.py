"""Tables and plots of recall and agreement: figures that were put in come out, beside the teacher's, by distance."""

import re

import numpy as np
import pytest
from mambabench.harness.results import Results
from mambabench.reports import plots as drawing
from mambabench.reports.agreement import Agreement
from mambabench.reports.options import NoOptions
from mambabench.reports.plots import plots_of
from mambabench.reports.recall import Recall, RecallDistance, reach

MODELS = {"teacher": (None, 1.0), "half": (0.5, 0.9), "none": (0, 0.4)}


def questions(rng, written):
    """Two kinds at two lengths and depths: `written` right answers in the near half, a third of them in the far."""
    for kind in ("needle", "copying"):
        for length in (50, 100):
            for text in range(20):
                for depth in (0.0, 1.0):
                    draw = rng.random()
                    share = written if depth else written / 3
                    shared = {"task": kind, "item": f"{kind}/{length}/{text}/{depth}", "length": length, "depth": depth}
                    shared |= {"cluster": f"{kind}/{length}/{text}", "distance": 3 if depth else length - 10}
                    shared |= {"weight": 1.0, "better": "higher"}
                    yield {**shared, "metric": "generate", "value": float(draw < share), "chance": 0.125, "text": "a"}
                    right = float(draw < (1 + share) / 2)
                    yield {**shared, "metric": "choice", "value": right, "chance": 0.25, "text": None}


def depths(nat):
    for document in range(12):
        for depth, tokens in ((1, 7), (8, 20)):
            shared = {
                "task": "text",
                "item": f"d{document}",
                "weight": tokens,
                "depth": depth,
                "cluster": f"d{document}",
            }
            kl = nat * depth * tokens * (1 + 0.1 * (document % 3))
            yield {**shared, "metric": "kl_per_token", "value": kl, "better": "lower"}
            agreeing = tokens if not nat else tokens - 1 - document % 2
            yield {**shared, "metric": "top1_per_token", "value": float(agreeing), "better": "higher"}


@pytest.fixture(scope="module")
def results(stores, tmp_path_factory):
    builder = stores.Builder(tmp_path_factory.mktemp("recall") / "store")
    for model, (keep, written) in MODELS.items():
        builder.model(model, keep, teacher=model == "teacher")
        rows = list(questions(np.random.default_rng(0), written))
        builder.step(f"{model}/-/asked@seed0", records={"sample": rows}, use="recall")
        nat = {"teacher": 0.0, "half": 0.01, "none": 0.1}[model]
        builder.step(f"{model}/-/followed@seed0", records={"sample": list(depths(nat))}, use="agreement")
    builder.model("broken", 0)
    builder.step("broken/-/asked@seed0", state="timeout", reason="longer than 180 s", use="recall")
    return Results.read([builder.write()])


@pytest.fixture(scope="module")
def table(results):
    return Recall(NoOptions()).frame(results)


def right(results, model, kind, metric):
    samples = results.samples
    mine = (samples["model"] == model) & (samples["task"] == kind) & (samples["metric"] == metric)
    return 100 * samples[mine]["value"].mean()


def test_every_row_has_both_forms_the_teacher_and_chance(results, table):
    told = table[table["model"] != "broken"]
    assert list(zip(told["task"], told["model"], strict=True)) == [
        (kind, model) for kind in ("needle", "copying") for model in MODELS
    ]
    for row in told.to_dict("records"):
        for metric, name in (("choice", "chosen"), ("generate", "written")):
            assert row[f"{name} %"].value == pytest.approx(right(results, row["model"], row["task"], metric))
            assert row[f"teacher {name} %"].value == pytest.approx(right(results, "teacher", row["task"], metric))
            of, taught, chance = row[f"{name} %"].value, row[f"teacher {name} %"].value, row[f"chance {name} %"]
            assert row[f"{name} recovery %"].value == pytest.approx(100 * (of - chance) / (taught - chance))
            assert row[f"{name} % "[:-1]].se > 0
        assert (row["chance chosen %"], row["chance written %"]) == (25, 12.5)
        assert row["gap points"].value == pytest.approx(row["chosen %"].value - row["written %"].value)
        assert row["items"] == 80
    (state,) = table.loc[table["model"] == "broken", "state"]
    assert state == "timeout"


def test_the_paired_interval_of_recovery_holds_its_value(table):
    for cell in table.loc[table["model"] == "none", "written recovery %"]:
        assert cell.low < cell.value < cell.high < 100
    for cell in table.loc[table["model"] == "teacher", "written recovery %"]:
        assert (cell.value, str(cell.low)) == (100, "nan")


def test_by_distance_there_is_a_row_for_each_place_and_model(results):
    frame = RecallDistance(NoOptions()).frame(results)
    assert len(frame) == 2 * 2 * 2 * 3
    places = frame[["length", "depth %", "distance"]].drop_duplicates()
    assert set(places.itertuples(index=False, name=None)) == {(50, 0, 40), (50, 100, 3), (100, 0, 90), (100, 100, 3)}
    near = frame[(frame["depth %"] == 100) & (frame["model"] == "teacher")]
    assert [cell.value for cell in near["written %"]] == [100] * 4


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
@pytest.mark.parametrize("taught", [0.18, 0.0], ids=["at chance", "below"])
def test_where_the_teacher_is_at_chance_nothing_is_recovered(stores, tmp_path, seeds, taught):
    builder = stores.Builder(tmp_path / "store", seeds=seeds)
    for model in ("teacher", "half"):
        builder.model(model, 0.5, teacher=model == "teacher")
        for seed in seeds[:1] if model == "teacher" else seeds:
            rows = list(questions(np.random.default_rng(len(model) + seed), taught + 0.05 * seed))
            builder.step(f"{model}/-/asked@seed{seed}", records={"sample": rows}, use="recall")
    frame = Recall(NoOptions()).frame(Results.read([builder.write()]))
    assert set(frame["written recovery %"]) == {"teacher at chance"}


def test_reach_is_where_recall_has_fallen_half_way():
    distance = np.repeat([10.0, 20.0, 40.0, 80.0], 20)
    share = np.repeat([1.0, 0.8, 0.6, 0.3], 20)
    value = (np.tile(np.arange(20), 4) < 20 * share).astype(float)
    assert reach(distance, value, 0.0) == 40
    assert reach(distance, value, 0.5) == 20
    assert reach(distance, np.zeros(80), 0.0) == 0
    # A single far success lifts nothing.
    value[-1] = 1.0
    assert reach(distance, value, 0.0) == 40


def test_agreement_is_told_by_depth(results):
    frame = Agreement(NoOptions()).frame(results)
    assert list(zip(frame["depth"], frame["model"], strict=True)) == [
        (depth, model) for depth in ("1–7", "from 8") for model in MODELS
    ]
    of = {(row["depth"], row["model"]): row for row in frame.to_dict("records")}
    assert (of["1–7", "teacher"]["KL nat"].value, of["1–7", "teacher"]["same token %"].value) == (0, 100)
    assert of["from 8", "half"]["KL nat"].value == pytest.approx(0.08 * 1.1)
    assert of["from 8", "half"]["same token %"].value == pytest.approx(100 * 18.5 / 20)
    assert of["from 8", "half"]["tokens"] == 12 * 20


def test_plots_show_kinds_forms_lengths_and_models(results, table):
    frames = {"recall": table, "agreement": Agreement(NoOptions()).frame(results)}
    plots = {plot.name: plot for plot in plots_of(frames, results)}
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", plots["recall"].svg)
    assert {"needle", "copying", "chosen, %", "written, %", "50 tokens", "100 tokens", *MODELS} <= set(texts)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", plots["agreement"].svg)
    assert {"same likeliest token, %", "half", "none"} <= set(texts)
    assert "teacher" not in texts


def test_models_whose_colours_begin_anew_are_drawn_as_the_legend_has_them(results, table, monkeypatch):
    monkeypatch.setattr(drawing, "COLOURS", drawing.COLOURS[:1])
    frames = {"recall": table, "agreement": Agreement(NoOptions()).frame(results)}
    dotted = {plot.name: plot.svg.count("stroke-dasharray") for plot in plots_of(frames, results)}
    panels, chance, legend = 4, 1, 2
    assert dotted["recall"] == panels * (legend + chance) + legend
    panels, legend = 2, 1
    assert dotted["agreement"] == panels * legend + legend


def test_what_seeds_add_widens_the_intervals(stores, tmp_path):
    widths = []
    for seeds, spread in (((0,), 0.0), ((0, 1), 0.0), ((0, 1), 0.2)):
        builder = stores.Builder(tmp_path / f"store-{len(widths)}", seeds=seeds)
        builder.model("teacher", teacher=True)
        builder.step("teacher/-/asked@seed0", records={"sample": list(questions(np.random.default_rng(0), 1.0))},
                     use="recall")  # fmt: skip
        builder.model("half", 0.5)
        for seed in seeds:
            rows = list(questions(np.random.default_rng(0), 0.8 - spread * seed))
            builder.step(f"half/-/asked@seed{seed}", records={"sample": rows}, use="recall")
        frame = Recall(NoOptions()).frame(Results.read([builder.write()]))
        cell = frame.loc[(frame["model"] == "half") & (frame["task"] == "needle"), "written recovery %"].iloc[0]
        assert cell.low < cell.value < cell.high
        widths.append(cell.high - cell.low)
    one, same, other = widths
    assert same == pytest.approx(one, rel=0.1)
    assert other > 3 * one
