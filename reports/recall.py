"""The tables of `recall`: what models still look up in the text before them, chosen and written, by distance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..harness import statistics as st
from ..harness.results import Results
from .options import NoOptions
from .recovery import LEVEL, OtherItems, above_chance, estimate, of_items
from .rows import attention_of, drop_empty, failures, measuring, of_suites, suites_with, table_of, teacher_of

SUITE = "recall"
FORMS = {"choice": "chosen", "generate": "written"}
"""Metric -> how tables call it."""
KINDS = ("phone-book", "needle", "multi-key", "copying")
"""In this order."""
DRAWS = 200
"""Of clusters, behind the interval of a reach."""


@dataclass(frozen=True, slots=True)
class Part:
    """Items of one model, in one or both forms, beside its teacher's."""

    model: str
    is_teacher: bool
    own: pd.DataFrame
    taught: pd.DataFrame

    def form(self, metric: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        return self.own[self.own["metric"] == metric], self.taught[self.taught["metric"] == metric]


class Recall:
    """One row per kind of question and model, the teacher first; its figures are in every row."""

    title = "Recall"
    note = (
        "Chosen: the answer is likelier than every wrong choice. Written: greedy text begins with it. Both ± standard "
        "error, clustered by text; the gap is chosen - written, in points, paired by item. Chance is that of one who "
        "picks a choice, or writes one of the values that the text tells. Recovery: what is above chance, as a share "
        f"of the teacher's, paired by item, with Fieller's {100 * LEVEL:.0f}\u00a0% interval. Reach: the longest "
        "distance at which a falling fit of recall is half way between chance and all, at most the longest asked "
        f"({100 * LEVEL:.0f}\u00a0% bootstrap interval over texts)."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        rows = []
        for (suite, kind), parts in _grouped(results, ["suite", "task"]):
            rows += [{"suite": suite, "task": kind, **_row(results, part, reach=True)} for part in parts]
        rows += _failed(results)
        if not rows:
            return None
        heads = [f"{name} %" for name in FORMS.values()]
        beside = [f"{name} {what}" for what in ("recovery %", "reach tokens") for name in FORMS.values()]
        others = [f"{who} {name} %" for who in ("teacher", "chance") for name in FORMS.values()]
        columns = ["suite", "task", "model", "attention", *heads, "gap points", *beside, *others, "items", "state"]
        return _shown(rows, columns, [*beside, "state"])


class RecallDistance:
    """One row per kind of question, length, depth and model."""

    title = "Recall by distance"
    note = (
        "As in the table before it, by the length of the text and where in it the answer stands (0 %: its beginning); "
        "distance: tokens from there to where it is asked for, the mean."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        rows = []
        for (suite, kind, length, depth), parts in _grouped(results, ["suite", "task", "length", "depth"]):
            for part in parts:
                where = {
                    "length": int(length),
                    "depth %": round(100 * depth),
                    "distance": round(part.own["distance"].mean()),
                }
                rows.append({"suite": suite, "task": kind, **where, **_row(results, part)})
        if not rows:
            return None
        heads = [f"{name} %" for name in FORMS.values()]
        beside = [f"{name} recovery %" for name in FORMS.values()]
        others = [f"{who} {name} %" for who in ("teacher", "chance") for name in FORMS.values()]
        columns = ["suite", "task", "length", "depth %", "distance", "model", *heads, *beside, *others, "items"]
        return _shown(rows, columns, beside)


def samples_of(results: Results) -> pd.DataFrame:
    """All samples of suites that use `recall`."""
    return of_suites(results.samples, suites_with(results, use=SUITE))


def reach(distance: st.Array, value: st.Array, chance: float) -> float:
    """The longest distance at which recall, fitted by the falling steps that are nearest to it, is at least half way
    between chance and all; 0 if it never is.

    >>> reach(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 0.0, 1.0, 0.0]), 0.0)
    3.0
    """
    from scipy.optimize import isotonic_regression

    places, index = np.unique(distance, return_inverse=True)
    weights = np.bincount(index)
    fitted = isotonic_regression(np.bincount(index, weights=value) / weights, weights=weights, increasing=False).x
    # What is exactly half way is a matter of rounding.
    high = places[fitted >= (1 + chance) / 2 - 1e-9]
    return float(high.max()) if len(high) else 0.0


def _grouped(results: Results, by: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], list[Part]]]:
    """Samples by columns, kinds in their order, lengths and depths ascending; within them the models in plan order."""
    samples = samples_of(results)
    if samples.empty:
        return
    teachers = teacher_of(results)
    order = {kind: place for place, kind in enumerate(dict.fromkeys([*KINDS, *samples["task"]]))}
    groups = {tuple(key): group for key, group in samples.groupby(list(by), sort=True)}
    for key in sorted(groups, key=lambda key: (key[0], order[key[1]], *key[2:])):
        of = dict(iter(groups[key].groupby("model", sort=False)))
        yield (
            key,
            [
                Part(model, model in results.teachers, of[model], of.get(teachers.get(model, ""), none))
                for model in results.models["model"]
                if model in of
                for none in [of[model].iloc[:0]]
            ],
        )


def _row(results: Results, part: Part, reach: bool = False) -> dict[str, Any]:
    row: dict[str, Any] = {"model": part.model, "items": part.own["item"].nunique()}
    row["attention"] = attention_of(results)[part.model]
    for metric, name in FORMS.items():
        own, taught = part.form(metric)
        if own.empty:
            continue
        chance = float(own["chance"].mean())
        row[f"{name} %"] = estimate(own).scaled(100)
        row[f"chance {name} %"] = 100 * chance
        if len(taught):
            row[f"teacher {name} %"] = estimate(taught).scaled(100)
            row[f"{name} recovery %"] = _recovery(part, own, taught, chance)
        if reach:
            row[f"{name} reach tokens"] = _reach(own, chance)
    chosen, written = part.form("choice")[0], part.form("generate")[0]
    if len(chosen) and len(written):
        pair = [of_items(of) for of in (written, chosen)]
        sides = [(of["value"].to_numpy(), of["weight"].to_numpy()) for of in pair]
        row["gap points"] = st.paired_difference(sides[0], sides[1], pair[0]["cluster"].to_numpy()).scaled(100)
    return row


def _recovery(part: Part, own: pd.DataFrame, taught: pd.DataFrame, chance: float) -> st.Estimate | str:
    try:
        found = above_chance(own, taught, chance)
    except OtherItems:
        return "not the teacher's items"
    if not np.isfinite(found.low):
        return "teacher at chance"
    return st.Estimate(value=100.0) if part.is_teacher else found.scaled(100)


def _reach(own: pd.DataFrame, chance: float) -> st.Estimate:
    items = of_items(own)
    distance, value = items["distance"].to_numpy(dtype=float), items["value"].to_numpy(dtype=float)
    return st.bootstrap(
        lambda drawn: reach(distance[drawn], value[drawn], chance), items["cluster"].to_numpy(), LEVEL, times=DRAWS
    )


def _failed(results: Results) -> list[dict[str, Any]]:
    cells = measuring(results, suites_with(results, use=SUITE))
    states = failures(cells, ("suite", "model"))
    measured = set(samples_of(results)["model"])
    return [
        {"suite": suite, "model": model, "state": state}
        for (suite, model), state in states.items()
        if model not in measured
    ]


def _shown(rows: Sequence[dict[str, Any]], columns: Sequence[str], may_lack: Sequence[str]) -> pd.DataFrame:
    frame = drop_empty(table_of(rows, columns), may_lack)
    return frame.drop(columns="suite") if frame["suite"].nunique() == 1 else frame
