"""The tables of what a run took: cost per stage of training, and every step with its state."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..harness.results import Results
from .options import NoOptions
from .rows import drop_empty, failures, table_of

UNITS = {"byte": ("MB", 1e-6), "bytes": ("MB", 1e-6), "share": ("%", 100.0)}
FIRST = ("parameters", "weights MB", "trainable share %", "training tokens", "training wall s", "peak memory MB")
"""Facts that come first; those that a distiller adds follow them."""


class Cost:
    """One row per model and stage of its training; a stage that several models share stands in each.

    A model that was not trained has one row, so that the teacher is never missing.
    """

    title = "Cost"
    note = (
        "What each stage of training, and a choice of layers by trial, told of itself; numbers are means over seeds. "
        "Training wall and GPU: over all attempts, where one was resumed, with the work that was lost. "
        "Loss: the last one recorded. Weights: as loaded for decoding."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        cells = results.cells[results.cells["kind"] == "train"]
        known = results.facts
        facts, measured = known[known["kind"] == "train"], known[known["name"] == "weights"]
        selections = known[(known["kind"] == "select") & (known["arm"] == "")]
        if cells.empty and measured.empty and selections.empty:
            return None
        losses = results.losses
        states = failures(cells, ("model", "stage"))
        converted = failures(results.cells[results.cells["kind"] == "convert"], ("model",))
        rows: list[dict[str, Any]] = []
        told = dict.fromkeys(FIRST)
        weights = measured.groupby("model")["value"].max().astype(float) / 1e6
        for model in results.models["model"]:
            group = cells[cells["model"] == model]
            if len(chosen := selections[selections["model"] == model]):
                row = {"model": model, "stage": "(layers chosen)", "seeds": chosen["key"].nunique()}
                for (name, unit), values in chosen.groupby(["name", "unit"], sort=False):
                    heading, value = _fact(name, unit, values["value"])
                    row[heading] = value
                    told[heading] = None
                rows.append(row)
            if group.empty:
                made = known[(known["model"] == model) & (known["kind"] == "convert")]
                row = {"model": model, "stage": "", "seeds": 0, "weights MB": weights.get(model)}
                row["state"] = converted.get((model,))
                row |= dict(_fact(name, "", of["value"]) for name, of in made.groupby("name", sort=False))
                rows.append(row)
            for stage, of in group.groupby("stage", sort=False):
                finished = of[of["state"] == "ok"].drop_duplicates("key")
                mine = facts[(facts["model"] == model) & (facts["stage"] == stage)]
                row = {"model": model, "stage": stage, "seeds": len(finished)}
                row["weights MB"] = weights.get(model)
                for (name, unit), values in mine.groupby(["name", "unit"], sort=False):
                    heading, value = _fact(name, unit, values["value"])
                    row[heading] = value
                    told[heading] = None
                ends = losses[(losses["model"] == model) & (losses["stage"] == stage)].sort_values(
                    "step", kind="stable"
                )
                row["loss"] = float(ends.groupby("key")["loss"].last().mean()) if len(ends) else None
                row["state"] = states.get((model, stage))
                rows.append(row)
        frame = table_of(rows, ["model", "stage", "state", "seeds", *told, "loss"])
        if frame["seeds"].max() <= 1:
            frame = frame.drop(columns="seeds")
        return drop_empty(frame, [*told, "state", "stage", "loss"])


def _fact(name: str, unit: str, values: pd.Series[Any]) -> tuple[str, Any]:
    """Heading and value of a fact; numbers in readable units, averaged over seeds; other values as they are."""
    name = name.replace("_", " ")
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.isna().any():
        return name, ", ".join(dict.fromkeys(str(value) for value in values))
    shown, factor = UNITS.get("share" if name.endswith("share") else unit, (unit, 1.0))
    mean = float(numbers.mean()) * factor
    value = int(mean) if mean == int(mean) and factor == 1.0 else mean
    return name if shown in name.split() else f"{name} {shown}".strip(), value


class Steps:
    """Every label of the plan with its state, in plan order."""

    title = "Steps"
    note = (
        "Wall: of the last attempt, from its start to its end. "
        "Overhead: from that start to the first record and from the last record to the end. "
        "In plain PyTorch: operations of a step on a GPU that none of the fused kernels ran, and why."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        cells = results.cells
        if cells.empty:
            return None
        frame = pd.DataFrame(
            {
                "store": cells["store"],
                "label": cells["label"],
                "state": cells["state"],
                "reason": [str(reason or "").strip().splitlines()[-1:] for reason in cells["reason"]],
                "wall s": cells["wall_s"],
                "overhead s": cells["overhead_s"],
                "attempt": cells["attempt"],
                "device": cells["device"],
                "in plain PyTorch": cells["unfused"],
            }
        )
        frame["reason"] = ["".join(lines) for lines in frame["reason"]]
        if frame["store"].nunique() == 1:
            frame = frame.drop(columns="store")
        if (frame["attempt"].fillna(1) == 1).all():
            frame = frame.drop(columns="attempt")
        return drop_empty(frame, ["reason", "overhead s", "device", "in plain PyTorch"])
