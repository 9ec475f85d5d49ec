"""A row per model: distance from the teacher, beside what it took."""

import math

import numpy as np
import pytest
from mambabench.harness.results import Results
from mambabench.reports.distillation import Distillation
from mambabench.reports.options import NoOptions
from mambabench.reports.quality import Quality

NLL = {"teacher": 1.0, "on": 0.98, "half": 1.05, "on-all": 0.9, "half-all": 0.95}
SHARES = {"half": 0.3, "on": 0.2, "half-all": 1.0, "on-all": 1.0}


def fact(name, value, unit=""):
    return {"name": name, "value": value, "unit": unit}


@pytest.fixture
def results(stores, tmp_path):
    return Results.read([made(stores, tmp_path / "store", (0, 1))])


def made(stores, path, seeds):
    builder = stores.Builder(path, seeds=seeds)
    for model, keep in (("teacher", None), ("on", 1), ("half", 0.5), ("on-all", 1), ("half-all", 0.5), ("late", 0)):
        builder.model(model, keep, teacher=model == "teacher")
    for model in NLL:
        for seed in seeds if model != "teacher" else seeds[:1]:
            if model != "teacher":
                stage = "all" if model.endswith("all") else "rest" if model == "on" else "mixers"
                took = [fact("training_tokens", 3_000_000), fact("training_gpu", 10 + 2 * seed, "s")]
                took += [fact("trainable_share", SHARES[model]), fact("peak_memory", 5e9), fact("training_rate", 1e5)]
                took += [fact("model_flop_utilisation", 0.25 + 0.1 * seed), fact("gpu_shared_by", 4)]
                builder.step(f"{model}/{stage}@seed{seed}", "train", facts=took)
            # The same documents for all, whose losses differ by a constant but for what seeds add.
            text = stores.losses_of_text(np.random.default_rng(0), nll=NLL[model] + 0.01 * seed, task="val")
            builder.step(f"{model}/-/perplexity@seed{seed}", records={"sample": text}, use="perplexity")
            kl = [{**row, "metric": "kl_per_token", "value": 0.1 * row["weight"] * NLL[model]} for row in text]
            builder.step(f"{model}/-/divergence@seed{seed}", records={"sample": kl}, use="divergence")
    builder.step("late/-/divergence@seed0", use="divergence", state="timeout", reason="longer than 180 s")
    return builder.write()


def test_every_model_stands_beside_its_teacher_and_the_one_that_was_trained_alike(results):
    frame = Distillation(NoOptions()).frame(results)
    rows = {row["model"]: row for row in frame.to_dict("records")}
    assert list(rows) == ["teacher", "on", "half", "on-all", "half-all", "late"]
    half = rows["half"]
    assert (half["attention"], half["stages"], half["seeds"]) == ("50 %", "mixers", 2)
    teacher = rows["teacher"]["val perplexity"].value
    assert half["val perplexity"].value == pytest.approx(teacher * half["val perplexity / teacher's"].value)
    assert half["val perplexity / teacher's"].value == pytest.approx(math.exp(0.055), rel=1e-6)
    assert half["val perplexity / trained on"].value == pytest.approx(math.exp(0.07), rel=1e-6)
    assert rows["half-all"]["val perplexity / trained on"].value == pytest.approx(math.exp(0.05), rel=1e-6)
    assert half["val perplexity / teacher's"].low < half["val perplexity / teacher's"].value
    assert half["val KL nat"].value == pytest.approx(0.105)
    assert math.isfinite(half["val perplexity"].seed_se)
    assert rows["on"]["val perplexity / trained on"] is None
    assert rows["teacher"]["val perplexity / teacher's"].value == 1
    assert rows["late"]["state"] == "timeout"


def test_what_it_took_is_added_over_stages_and_averaged_over_seeds(results):
    half = Distillation(NoOptions()).frame(results).set_index("model").loc["half"]
    assert half["training tokens M"] == pytest.approx(3.0)
    assert half["GPU s"] == pytest.approx(11)
    assert half["trained %"] == pytest.approx(30)
    assert half["peak memory MB"] == pytest.approx(5000)
    assert half["tokens/s"] == pytest.approx(1e5)
    assert half["MFU %"] == pytest.approx(30)
    assert half["GPU shared by"] == 4


def test_the_layers_that_keep_attention_stand_beside_their_share_each_choice_once(stores, tmp_path):
    builder = stores.Builder(tmp_path / "store", seeds=(0, 1, 2))
    builder.model("guided", {"use": "kl-guided", "share": 0.5})
    for seed, layers in enumerate(((0, 4), (0, 7), (0, 4))):
        told = [{**fact("keeps_attention", layer), "arm": f"layer {layer}"} for layer in layers]
        builder.step(f"guided/select@seed{seed}", "select", facts=told)
        text = stores.losses_of_text(np.random.default_rng(0), nll=1.0, task="val")
        builder.step(f"guided/-/divergence@seed{seed}", records={"sample": text}, use="divergence")
    frame = Distillation(NoOptions()).frame(Results.read([builder.write()]))
    assert frame.set_index("model").loc["guided", "layers"] == "0 4 or 0 7"


def test_one_seed_has_no_column_of_seeds_and_no_divergence_no_table(stores, tmp_path, make):
    frame = Distillation(NoOptions()).frame(Results.read([made(stores, tmp_path / "one", (0,))]))
    assert "seeds" not in frame
    assert Distillation(NoOptions()).frame(Results.read([make()])) is None


def test_preferences_are_no_part_of_the_average(stores, tmp_path):
    builder = stores.Builder(tmp_path / "store")
    rng = np.random.default_rng(0)
    for model, nll in (("teacher", 1.0), ("half", 1.1)):
        builder.model(model, None if model == "teacher" else 0.5, teacher=model == "teacher")
        builder.step(f"{model}/-/perplexity@seed0", records={"sample": stores.losses_of_text(rng, nll)})
        pairs = stores.samples(rng, "pairs", metric="prefers_chosen", chance=0.3)
        builder.step(f"{model}/-/preferences@seed0", records={"sample": pairs}, use="preferences")
    frame = Quality(NoOptions()).frame(Results.read([builder.write()])).set_index("model")
    assert frame["pairs prefers_chosen %"]["half"].value < 60
    ratio = frame["unseen perplexity / teacher's"]["half"].value
    assert frame["recovery %"]["half"].value == pytest.approx(100 / ratio)
