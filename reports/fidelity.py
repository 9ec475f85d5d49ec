"""The tables of `init-fidelity`: how near converted models are to their teacher, untrained and after training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..harness.results import Results
from .options import NoOptions
from .recovery import estimate
from .rows import drop_empty, failures, measuring, of_suites, suites_with, table_of

SUITE, METRIC, TRAINED = "init-fidelity", "kl_per_token", "trained "
LAYER = ("cosine", "relative error")


@dataclass(frozen=True, slots=True)
class Pair:
    """A conversion as it began and after a training; either may not have been measured."""

    before: str | None
    after: str | None

    @property
    def model(self) -> str:
        return str(self.before or self.after)


class Fidelity:
    """One row per model; a model that was trained from another's very conversion stands in the other's row."""

    title = "Init fidelity"
    note = (
        "KL: KL(teacher || model) per token, ± standard error over documents. "
        "Cosine and relative error: of a converted layer's output against that of the attention that it replaces, "
        "on the teacher's own hidden states; means over converted layers. "
        "Trained: the same after the stages named, from the same initial weights."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        suites = suites_with(results, use=SUITE)
        cells = measuring(results, suites)
        if cells.empty:
            return None
        samples = of_suites(results.samples, suites)
        samples = samples[samples["metric"] == METRIC]
        layers = _layers(results)
        failed = failures(cells, ("model",))
        rows: list[dict[str, Any]] = []
        for pair in _pairs(results, cells):
            row: dict[str, Any] = {"model": pair.model, "state": failed.get((pair.model,))}
            for head, model in (("", pair.before), (TRAINED, pair.after)):
                for task, part in samples[samples["model"] == model].groupby("task", sort=False):
                    row[f"{head}{task} KL nat"] = estimate(part)
                of_model = layers[layers["model"] == model]
                if len(of_model):
                    row["layers"] = of_model["layer"].nunique()
                    row |= {f"{head}{name}": float(of_model[name].mean()) for name in LAYER}
            if pair.after is not None:
                row["stages"] = _stages(results, pair.after)
            rows.append(row)
        heads = dict.fromkeys(f"{task} KL nat" for task in samples["task"])
        figures = [*heads, *LAYER]
        trained = [TRAINED + name for name in figures]
        frame = table_of(rows, ["model", "layers", *figures, "stages", *trained, "state"])
        return drop_empty(frame, ["layers", *LAYER, "stages", *trained, "state"])


class FidelityLayers:
    """One row per model and converted layer."""

    title = "Init fidelity by layer"
    note = "As in the table before it, layer by layer."

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        cells = measuring(results, suites_with(results, use=SUITE))
        layers = _layers(results)
        rows: list[dict[str, Any]] = []
        for pair in _pairs(results, cells):
            of_pair = layers[layers["model"].isin([pair.before, pair.after])]
            for layer, group in of_pair.groupby("layer"):
                row: dict[str, Any] = {"model": pair.model, "layer": layer}
                for head, model in (("", pair.before), (TRAINED, pair.after)):
                    own = group[group["model"] == model]
                    row |= {f"{head}{name}": float(own[name].mean()) for name in LAYER if len(own)}
                rows.append(row)
        if not rows:
            return None
        trained = [TRAINED + name for name in LAYER]
        return drop_empty(table_of(rows, ["model", "layer", *LAYER, *trained]), [*LAYER, *trained])


def _layers(results: Results) -> pd.DataFrame:
    """One row per model, seed and converted layer: model, seed, layer, and the columns `LAYER`."""
    facts = of_suites(results.facts, suites_with(results, use=SUITE))
    facts = facts[facts["arm"].str.startswith("layer ")]
    names = {name.replace(" ", "_"): name for name in LAYER}
    facts = facts[facts["name"].isin(names)].assign(layer=facts["arm"].str.removeprefix("layer ").astype(int))
    wide = facts.pivot_table(index=["model", "key", "layer"], columns="name", values="value", aggfunc="first")
    return wide.rename(columns=names).reset_index()


def _pairs(results: Results, cells: pd.DataFrame) -> Iterator[Pair]:
    """Measured models in plan order, trained ones beside the conversion that they were trained from."""
    origins = {str(model): _origin(results, of.iloc[0]) for model, of in cells.groupby("model", sort=False)}
    order = [model for model in results.models["model"] if model in origins]
    untrained = {origins[model][0]: model for model in order if not origins[model][1]}
    trained = [model for model in order if origins[model][1]]
    for model in order:
        origin, is_trained = origins[model]
        after: list[str | None] = [other for other in trained if origins[other][0] == origin]
        if not is_trained:
            yield from (Pair(model, other) for other in after or [None])
        elif origin not in untrained:
            yield Pair(None, model)


def _origin(results: Results, cell: Any) -> tuple[tuple[str, str], bool]:
    """Store and key of the step that converted a measured model, and whether it was trained since."""
    store = str(cell["store"])
    if cell["state"] != "ok":
        return (store, str(cell["key"])), False
    training = results.cells[(results.cells["store"] == store) & (results.cells["kind"] == "train")]
    key = first = str(results.step(store, cell["key"])["inputs"]["subject"])
    while key in set(training["key"]) and (parent := results.step(store, key)["inputs"].get("parent")):
        key = str(parent)
    return (store, key), key != first


def _stages(results: Results, model: str) -> str:
    cells = results.cells[(results.cells["kind"] == "train") & (results.cells["model"] == model)]
    return ", ".join(dict.fromkeys(cells["stage"]))
