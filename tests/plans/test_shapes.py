"""The plans that measure big shapes are accepted as they stand, and run whole at a small size on a CPU."""

from pathlib import Path

import pytest
from mambabench.harness.keys import Fingerprints
from mambabench.harness.plan import read_plan
from mambabench.harness.plugins import registry
from mambabench.harness.steps import expand

PLANS = Path(__file__).resolve().parents[2] / "plans" / "gpu"
SMALL = {"hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate": 48, "vocabulary": 300}
MAMBA = {"layers": 2, "hidden": 32, "head_dim": 8, "states": 8, "vocabulary": 300}
LAYERS = {"slice-8b": 4, "shape-8b": 32}
SMALLER = {
    "slice-8b": {"suites.*.context": [16, 64], "suites.*.tokens": 64, "suites.*.pairs": 2, "suites.*.steps": 2},
    "shape-8b": {
        "stages.align.tokens": 640,
        "stages.align.context": 16,
        "data.text.length": 16,
        "stages.make.layers": 4,
    },
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_shape_is_llama_3_s_of_8_billion(tmp_path, name):
    loaded = registry()
    plan = read_plan(PLANS / f"{name}.toml", loaded, [])
    made = plan.stages["make"].config
    assert (made.layers, made.hidden, made.intermediate, made.vocabulary) == (LAYERS[name], 4096, 14336, 128256)
    assert (made.heads, made.kv_heads, made.head_dim, made.tied) == (32, 8, 128, None)
    assert not any(step.lacking for step in expand(plan, loaded, Fingerprints(tmp_path), {}))


def overrides(name):
    """What makes the plan small."""
    sizes = {f"stages.make.{option}": value for option, value in SMALL.items()} | SMALLER[name]
    return [f"{option}={value}" for option, value in sizes.items()]


@pytest.mark.slow
def test_the_slice_has_a_row_for_each_model_and_window(tables):
    found = tables("slice-8b", *overrides("slice-8b"))
    skipped = {row["label"] for row in found["steps"] if row["state"] == "skipped"}
    assert skipped == {"teacher/-/all@seed0", "teacher/-/mixers@seed0", "mamba/-/mixers@seed0"}
    rows = found["training-speed"]
    cells = [("half", "all"), ("half", "mixers"), ("none", "all"), ("none", "mixers"), ("mamba", "all")]
    assert [(row["model"], row["suite"]) for row in rows] == [cell for cell in cells for _ in range(2)]
    for row in rows:
        assert float(row["tokens/s"]) > 0
        assert float(row["TFLOP a step"]) > 0
        assert float(row["of teacher's"]) > 0
        assert int(row["window tokens"]) * int(row["windows"]) == 64


@pytest.mark.slow
def test_the_small_slice_trains_mixers_and_all(tables):
    sizes = SMALL | {"layers": 4}
    given = [f"stages.make.{option}={value}" for option, value in sizes.items()]
    given += ["suites.*.context=[16]", "suites.*.tokens=32", "suites.*.pairs=2", "suites.*.steps=2"]
    rows = [row for row in tables("slice-28m", *given)["training-speed"] if row["model"] == "half"]
    assert [row["suite"] for row in rows] == ["mixers", "all"]
    assert all(float(row["tokens/s"]) > 0 and float(row["of teacher's"]) > 0 for row in rows)


@pytest.mark.slow
def test_the_whole_shape_takes_its_ten_steps(tables):
    cost = tables("shape-8b", *overrides("shape-8b"))["cost"]
    (stage,) = [row for row in cost if row["stage"] == "align"]
    assert float(stage["training steps"]) == 10
    assert float(stage["training tokens"]) == 640


@pytest.mark.parametrize("name", ["speed", "acceptance-map"])
def test_the_plans_of_speed_have_the_named_shapes(tmp_path, name):
    loaded = registry()
    plan = read_plan(PLANS / f"{name}.toml", loaded, [])
    made = plan.stages["llama-8b"].config
    assert (made.layers, made.hidden, made.intermediate, made.vocabulary) == (32, 4096, 14336, 128256)
    assert (made.heads, made.kv_heads, made.head_dim, made.tied) == (32, 8, 128, None)
    shapes = {of: plan.stages[f"mamba2-{of}"].config for of in ("2700m", "130m")}
    assert [(of.layers, of.hidden, of.states, of.head_dim) for of in shapes.values()] == [
        (64, 2560, 0, 64),
        (24, 768, 0, 64),
    ]
    steps = expand(plan, loaded, Fingerprints(tmp_path), {})
    assert {need for step in steps for need in step.lacking} <= {"mamba-ssm>=2.2 (not installed)"}


def test_the_map_s_rounds_have_the_tokens_of_the_rates_in_their_names():
    plan = read_plan(PLANS / "acceptance-map.toml", registry(), [])
    scripted = {name: of.config for name, of in plan.decoders.items() if of.name == "scripted"}
    assert len(scripted) == 9
    for name, config in scripted.items():
        k, rate = name.removeprefix("small-").removeprefix("k").split("-")
        assert config.k == int(k)
        assert config.tokens == pytest.approx(
            sum((int(rate) / 100) ** place for place in range(config.k + 1)), abs=1e-4
        )


@pytest.mark.slow
def test_the_map_has_a_row_for_each_rate_and_a_column_for_each_request(tables):
    sizes = small_shapes() | {"data.text.vocabulary": 300, "data.text.length": 40, "data.text.documents": 8}
    sizes |= {"suites.map.lengths": [8, 24], "suites.map.batch": [1, 2], "suites.map.batch_tokens": 24}
    sizes |= {"suites.map.new_tokens": 24, "suites.map.pairs": 2}
    part = ("half/k[28]-80/*", "half/k2-60/*", "mamba2/small-k4-80/*")
    found = tables("acceptance-map", *(f"{option}={value}" for option, value in sizes.items()), only=part)
    rows = found["acceptance-map"]
    half = [("half", "k2-60"), ("half", "k2-80"), ("half", "k8-80")]
    assert [(row["model"], row["decoder"]) for row in rows] == [*half, ("mamba2", "small-k4-80")]
    for row in rows:
        places = [name for name in row if name.startswith("batch") and name.rpartition(" ")[2].isdigit()]
        assert places == ["batch 1, prompt 8", "batch 1, prompt 24", "batch 2, prompt 8"]
        assert all(float(row[f"{place} low"]) < float(row[place]) < float(row[f"{place} high"]) for place in places)
        assert float(row["scripted %"]) == pytest.approx(float(row["decoder"].rpartition("-")[2]), abs=0.01)
        assert float(row["of predicted"]) > 0
    assert all("lossless" not in row or row["lossless"] == "scripted" for row in found["speed"] if row["k"])


def small_shapes():
    """Overrides that make the shapes of the plans of speed small."""
    sizes = {f"stages.llama-8b.{option}": value for option, value in SMALL.items()} | {"stages.llama-8b.layers": 4}
    for name in ("2700m", "130m"):
        sizes |= {f"stages.mamba2-{name}.{option}": value for option, value in MAMBA.items()}
    return sizes


@pytest.mark.slow
def test_every_engine_and_its_peers_have_a_row_of_speed(tables):
    sizes = small_shapes() | {"data.text.vocabulary": 300, "data.text.length": 24, "data.text.documents": 8}
    sizes |= {"suites.*.prompt_tokens": 12, "suites.*.new_tokens": 9, "suites.*.pairs": 1, "suites.speed-32.batch": [2]}
    sizes |= {"suites.speed.profile": 2}
    whole = tables("speed", *(f"{option}={value}" for option, value in sizes.items()))
    found = whole["speed"]
    timed = {(row["model"], row["decoder"], row["batch"]) for row in found if row["TPOT ms"]}
    llamas = [
        (model, decoder) for model in ("teacher", "half", "quarter", "none") for decoder in ("plain", "scripted-layers")
    ]
    both = [*llamas, ("mamba2", "plain"), ("mamba2", "scripted-small")]
    peers = {("transformers", "plain", "1"), ("transformers-static", "plain", "1")}
    assert timed == {(*of, batch) for of in both for batch in ("1", "2")} | peers
    assert "speed-up" not in found[0], "a scripted text is not lossless"
    scripted = [row for row in found if row["decoder"].startswith("scripted") and row["TPOT ms"]]
    assert all(row["accepted length"] and row["scripted %"] for row in scripted)
    apart = {(row["model"], row["decoder"]) for row in whole["rounds"]}
    assert apart >= set(both)
