"""A line per way of training, whose models differ in the attention that is left; a curve per model and stage."""

import re

import numpy as np
import pytest
from mambabench.harness.results import Results
from mambabench.reports.distillation import rows_of
from mambabench.reports.plots import COLOURS, canvas, colours_of, legend, svg_of
from mambabench.reports.training_plots import ladder, lines_of, loss_curves

NLL = {"on": 0.98, "half": 1.05, "quarter": 1.1, "on-all": 0.9, "half-all": 0.95, "none-all": 2.0}
KEEP = {"on": 1, "half": 0.5, "quarter": 0.25, "on-all": 1, "half-all": 0.5, "none-all": 0}


@pytest.fixture
def made(stores, tmp_path):
    """Results of a plan with two ways of training; more models are given as (name, share)."""

    def make(*more):
        builder = stores.Builder(tmp_path / "store")
        builder.model("teacher", None, teacher=True)
        for model, nll in {"teacher": 1.0, **NLL, **{name: 1.2 for name, _ in more}}.items():
            if model != "teacher":
                builder.model(model, {**KEEP, **dict(more)}[model])
                whole = model.endswith("all")
                facts = [
                    {"name": "training_tokens", "value": 1000},
                    {"name": "trainable_share", "value": 1.0 if whole else 0.2},
                ]
                losses = [
                    {"step": step, "tokens": 10 * step, "loss": 5.0 / step, "ce": 4.0 / step, "kl": 1.0 / step}
                    for step in range(1, 9)
                ]
                stage = "all" if whole else "attention" if model == "on" else "mixers"
                builder.step(f"{model}/{stage}@seed0", "train", {"loss": losses}, facts=facts)
            text = stores.losses_of_text(np.random.default_rng(0), nll=nll, task="val")
            builder.step(f"{model}/-/perplexity@seed0", records={"sample": text}, use="perplexity")
            kl = [{**row, "metric": "kl_per_token", "value": 0.1 * row["weight"] * nll} for row in text]
            builder.step(f"{model}/-/divergence@seed0", records={"sample": kl}, use="divergence")
        return Results.read([builder.write()])

    return make


def shares(results):
    return {
        line.stages: {share: row.model for share, row in line.models.items()}
        for line in lines_of(results, rows_of(results))
    }


def test_a_line_joins_models_that_were_trained_alike_and_ends_at_the_teacher_trained_on(made):
    assert shares(made()) == {
        ("mixers",): {0.25: "quarter", 0.5: "half", 1.0: "on"},
        ("all",): {0.0: "none-all", 0.5: "half-all", 1.0: "on-all"},
    }


def test_a_rule_that_chooses_layers_has_a_line_of_its_own_from_the_model_without_attention_on(made):
    chosen = [(f"chosen-{share:g}", {"use": "kl-guided", "share": share, "model": "bare"}) for share in (0.25, 0.5)]
    results = made(("bare", 0), *chosen)
    lines = {
        line.rule: {share: row.model for share, row in line.models.items()}
        for line in lines_of(results, rows_of(results))
        if line.stages == ("mixers",)
    }
    assert lines == {
        "": {0.0: "bare", 0.25: "quarter", 0.5: "half", 1.0: "on"},
        "kl-guided": {0.0: "bare", 0.25: "chosen-0.25", 0.5: "chosen-0.5", 1.0: "on"},
    }
    (plot, _) = ladder(results)
    assert "mixers, kl-guided" in re.findall(r"<text[^>]*>([^<]*)</text>", plot.svg)


def test_models_that_differ_in_more_than_their_share_are_no_line(made):
    assert set(shares(made(("half-random", 0.5)))) == {("all",)}
    assert set(shares(made(("chosen", [1, 3])))) == {("mixers",), ("all",)}


def test_the_ladder_names_its_lines_and_shares(made):
    plots = {plot.name: plot for plot in ladder(made())}
    assert set(plots) == {"ladder-perplexity", "ladder-divergence"}
    for plot in plots.values():
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", plot.svg)
        assert {"mixers", "all", "0", "25", "50", "100"} <= set(texts)
        assert "95\u00a0% intervals" in plot.note


def test_a_share_alone_is_no_ladder(made, monkeypatch):
    for model in ("half", "none-all"):
        monkeypatch.delitem(NLL, model)
    assert ladder(made()) == ()


def test_every_stage_has_a_plot_with_a_curve_per_model_and_part(made):
    plots = {plot.name: plot.svg for plot in loss_curves(made())}
    assert set(plots) == {"losses-attention", "losses-mixers", "losses-all"}
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", plots["losses-mixers"])
    assert sorted(text for text in texts if text in KEEP) == ["half", "quarter"]
    assert {"loss", "cross entropy, nat", "divergence, nat"} <= set(texts)


def test_a_stage_that_two_models_share_is_drawn_once_and_a_single_record_not_at_all(stores, tmp_path):
    builder = stores.Builder(tmp_path / "store")
    for model in ("aligned", "tuned"):
        builder.model(model, 0.5)
        losses = [{"step": step, "tokens": step, "loss": 1.0 / step} for step in (1, 2)]
        builder.step(f"{model}/align@seed0", "train", {"loss": losses}, key="k" * 20)
    builder.step("tuned/tune@seed0", "train", {"loss": [{"step": 1, "tokens": 1, "loss": 1.0}]})
    (plot,) = loss_curves(Results.read([builder.write()]))
    assert plot.name == "losses-align"
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", plot.svg)
    assert "aligned" in texts
    assert "tuned" not in texts


def test_a_model_has_the_same_colour_in_every_plot(made):
    results = made()
    names = list(results.models["model"])
    colours = colours_of(names, results)
    assert len(set(colours.values())) == len(names) <= len(COLOURS)
    assert colours_of(names[::-2], results) == {name: colours[name] for name in names[::-2]}
    (mixers,) = (plot.svg for plot in loss_curves(results) if plot.name == "losses-mixers")
    drawn = {name for name in names if colours[name] in mixers}
    assert drawn == {"half", "quarter"}


def test_where_colours_begin_anew_a_legend_has_other_strokes():
    models = [f"model {number}" for number in range(len(COLOURS) + 2)]
    figure, _ = canvas()
    legend(figure, {model: COLOURS[place % len(COLOURS)] for place, model in enumerate(models)}, {"plain": "o"})
    assert svg_of(figure).count("stroke-dasharray") == 2
