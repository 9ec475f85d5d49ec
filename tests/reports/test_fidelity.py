"""The tables of `init-fidelity` set a trained model beside the very conversion that it was trained from."""

import numpy as np
import pytest
from mambabench.harness.results import Results
from mambabench.reports.fidelity import Fidelity, FidelityLayers
from mambabench.reports.options import NoOptions

LAYERS = {"half": {0: (0.1, 2.0), 2: (0.3, 1.0)}, "half-trained": {0: (0.5, 0.9), 2: (0.7, 0.7)}}


@pytest.fixture
def store(stores, tmp_path):
    """A teacher, an untrained and a trained model of one conversion, and one that was only measured trained."""
    builder, rng = stores.Builder(tmp_path / "store"), np.random.default_rng(0)
    for model in ("teacher", "half", "half-trained", "alone", "late"):
        builder.model(model, 0.5, teacher=model == "teacher")
    converted = {model: builder.step(f"{model}/convert@seed0", "convert", key=f"convert-{model}") for model in LAYERS}
    assert len(converted) == 2
    one = builder.step("half-trained/align@seed0", "train", key="align", parent="convert-half")
    builder.step("half-trained/tune@seed0", "train", key="tune", parent=one)
    builder.step("alone/align@seed0", "train", key="align-alone", parent="convert-half-trained")
    subjects = {"teacher": "convert-teacher", "half": "convert-half", "half-trained": "tune", "alone": "align-alone"}
    for place, (model, subject) in enumerate(subjects.items()):
        kl = [{**row, "metric": "kl_per_token"} for row in stores.losses_of_text(rng, nll=float(place), task="unseen")]
        facts = [
            {"name": name, "value": value, "arm": f"layer {layer}"}
            for layer, values in LAYERS.get(model, {}).items()
            for name, value in zip(("cosine", "relative_error"), values, strict=True)
        ]
        label = f"{model}/-/fidelity@seed0"
        builder.step(label, records={"sample": kl}, use="init-fidelity", subject=subject, facts=facts)
    builder.step("late/-/fidelity@seed0", use="init-fidelity", state="timeout", reason="longer than 180 s")
    return builder.write()


def test_a_trained_model_stands_beside_its_conversion(store):
    frame = Fidelity(NoOptions()).frame(Results.read([store]))
    assert list(frame["model"]) == ["teacher", "half", "alone", "late"]
    teacher, half, alone, late = frame.to_dict("records")
    assert half["layers"] == 2
    assert (half["cosine"], half["relative error"]) == (pytest.approx(0.2), pytest.approx(1.5))
    assert (half["trained cosine"], half["trained relative error"]) == (pytest.approx(0.6), pytest.approx(0.8))
    assert half["stages"] == "align, tune"
    assert half["unseen KL nat"].value == pytest.approx(1, abs=0.1)
    assert half["trained unseen KL nat"].value == pytest.approx(2, abs=0.1)
    assert teacher["trained unseen KL nat"] is None
    assert alone["unseen KL nat"] is None
    assert alone["trained unseen KL nat"].value == pytest.approx(3, abs=0.1)
    assert late["state"] == "timeout"


def test_every_converted_layer_has_a_row(store):
    frame = FidelityLayers(NoOptions()).frame(Results.read([store]))
    rows = [tuple(row) for row in frame.itertuples(index=False)]
    assert rows == [("half", 0, 0.1, 2.0, 0.5, 0.9), ("half", 2, 0.3, 1.0, 0.7, 0.7)]


def test_without_the_suite_there_is_no_table(make):
    results = Results.read([make()])
    assert Fidelity(NoOptions()).frame(results) is None
    assert FidelityLayers(NoOptions()).frame(results) is None
