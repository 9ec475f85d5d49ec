"""The quality table: what each model still can, beside its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..harness import statistics as st
from ..harness.results import Results
from .options import NoOptions
from .recovery import LEVEL, OtherItems, average, estimate, inverse, perplexity_ratio, recovery
from .rows import by_plan, drop_empty, failures, keep_of, of_suites, suites_with, table_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

AVERAGE, RECOVERY = "average %", "recovery %"


@dataclass(frozen=True, slots=True)
class Column:
    """A metric of a task of a suite, and how it is printed."""

    suite: str
    task: str
    metric: str
    form: str
    """`share` (printed in percent), `perplexity`, `bits`, or `plain`."""

    @property
    def where(self) -> tuple[str, str, str]:
        return self.suite, self.task, self.metric

    def shown(self, estimate: st.Estimate) -> st.Estimate:
        if self.form == "share":
            return estimate.scaled(100)
        if self.form == "perplexity":
            return estimate.exp()
        return estimate.scaled(1 / math.log(2)) if self.form == "bits" else estimate


RATIO = " / teacher's"
"""What ends the heading of a perplexity as a multiple of the teacher's."""


class Quality:
    """One row per model, the teacher first; a decoder that is not lossless has rows of its own.

    A column whose step failed shows the state.
    """

    title = "Quality"
    note = (
        "Value ± standard error over items (clustered); a second ± is the error between seeds. "
        "Perplexity is per token of the teacher's tokenizer. The average is over the first accuracy of each task. "
        "Recovery is the share of the teacher's average (of the inverse perplexity where there are no accuracies). "
        f"Intervals are {100 * LEVEL:.0f}\u00a0%, paired by item with the teacher, seeds included."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        suites = suites_with(results, traits=("score", "generate"))
        samples = of_suites(results.samples, suites)
        cells = of_suites(results.cells[results.cells["kind"] == "measure"], suites)
        if samples.empty:
            return None
        columns = _columns(samples)
        names = _names(columns)
        averaged = list({column.task: column for column in reversed(columns) if column.form == "share"}.values())[::-1]
        groups = {of: _parts(group) for of, group in _rows(results, samples, cells).items()}
        failed = failures(cells, ("model", "decoder", "suite"))
        models = results.models.set_index("model")
        teachers = {models["store"][name]: name for name in results.teachers}
        first = results.decoders[0] if results.decoders else ""
        rows = []
        for (model, decoder), parts in groups.items():
            is_teacher = model in results.teachers
            states = {
                column.suite: failed.get((model, decoder, column.suite)) or failed.get((model, first, column.suite))
                for column in columns
            }
            row = _row(parts, columns, names, {} if decoder else states)
            notes = [states[suite] for suite in dict.fromkeys(of[0] for of in parts) if states[suite]]
            taught = groups.get((teachers.get(models["store"][model], ""), ""), {})
            try:
                row |= _beside(parts, taught, columns, names, averaged, is_teacher)
            except OtherItems:
                notes.append("not the teacher's items")
            row |= {"model": model, "decoder": decoder, "check": "; ".join(str(note) for note in notes)}
            row["attention"] = "teacher" if is_teacher else keep_of(models["keep"][model])
            row["seeds"] = max((part["key"].nunique() for part in parts.values()), default=0)
            rows.append(row)
        figures = [head for column in columns for head in (names[column], names[column] + RATIO)]
        frame = table_of(rows, ["model", "decoder", "attention", *figures, AVERAGE, RECOVERY, "seeds", "check"])
        if frame["seeds"].max() <= 1:
            frame = frame.drop(columns="seeds")
        if len(averaged) < 2:
            frame = frame.drop(columns=AVERAGE)
        ratios = [head for head in figures if head.endswith(RATIO)]
        frame = drop_empty(frame, ["decoder", "attention", *ratios, AVERAGE, RECOVERY, "check"])
        if AVERAGE in frame:
            frame.attrs["averages"] = {AVERAGE: [names[column] for column in averaged]}
        return frame


Parts = dict[tuple[str, str, str], pd.DataFrame]
"""Samples of one row by suite, task and metric."""


def _parts(group: pd.DataFrame) -> Parts:
    return dict(iter(group.groupby(["suite", "task", "metric"], sort=False)))


def _row(
    parts: Parts, columns: Sequence[Column], names: Mapping[Column, str], states: Mapping[str, str | None]
) -> dict[str, Any]:
    """The figures of a row, or the states of the steps that failed."""
    row: dict[str, Any] = {}
    for column in columns:
        if column.where in parts:
            row[names[column]] = column.shown(estimate(parts[column.where]))
        else:
            row[names[column]] = states.get(column.suite)
    return row


def _beside(
    parts: Parts,
    taught: Parts,
    columns: Sequence[Column],
    names: Mapping[Column, str],
    averaged: Sequence[Column],
    is_teacher: bool,
) -> dict[str, Any]:
    """Averages and what sets a model against its teacher. An average that lacks a task is none."""
    row: dict[str, Any] = {}
    ratios = []
    for column in columns:
        if column.form == "perplexity" and column.where in parts and column.where in taught:
            own = st.Estimate(value=1.0)
            ratio = own if is_teacher else perplexity_ratio(parts[column.where], taught[column.where])
            row[names[column] + RATIO] = ratio
            ratios.append(ratio)
    if averaged and all(column.where in parts for column in averaged):
        mine = [parts[column.where] for column in averaged]
        row[AVERAGE] = average(mine).scaled(100)
        if is_teacher:
            row[RECOVERY] = st.Estimate(value=100.0)
        elif all(column.where in taught for column in averaged):
            row[RECOVERY] = recovery(mine, [taught[column.where] for column in averaged]).scaled(100)
    elif ratios and not averaged:
        row[RECOVERY] = st.Estimate(value=100.0) if is_teacher else inverse(ratios[0]).scaled(100)
    return row


def _rows(results: Results, samples: pd.DataFrame, cells: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Samples by row. What only scores and what the first decoder generates share a row, named without a decoder."""
    first = results.decoders[0] if results.decoders else ""
    merged = samples.assign(decoder=samples["decoder"].where(samples["decoder"] != first, ""))
    groups = {(model, decoder): group for model, decoder, group in by_plan(results, merged)}
    order = [(model, "") for model in results.models["model"] if (cells["model"] == model).any()]
    rows: dict[tuple[str, str], pd.DataFrame] = {}
    for model, _ in order:
        rows[model, ""] = groups.get((model, ""), samples.iloc[:0])
        rows |= {key: group for key, group in groups.items() if key[0] == model and key[1]}
    return rows


def _columns(samples: pd.DataFrame) -> list[Column]:
    """Tasks and metrics in the order of their first record; how each is printed is seen from its values."""
    columns = []
    for (suite, task, metric), group in samples.groupby(["suite", "task", "metric"], sort=False):
        shares = (group["weight"] == 1).all() and group["value"].between(0, 1).all()
        form = "plain"
        if metric.startswith(("nll_per_token", "nll_per_word")):
            form = "perplexity"
        elif metric.startswith("nll_per_byte"):
            form = "bits"
        elif shares and (group["better"] == "higher").all():
            form = "share"
        columns.append(Column(suite, task, metric, form))
    return columns


def _names(columns: Sequence[Column]) -> dict[Column, str]:
    """Headings, with the suite's name only where two suites have one task and metric."""
    words = {"share": " %", "perplexity": "", "bits": "", "plain": ""}
    heads = {}
    for column in columns:
        metric = column.metric
        if column.form == "perplexity":
            metric = metric.replace("nll_per_token", "perplexity").replace("nll_per_word", "perplexity per word")
        elif column.form == "bits":
            metric = metric.replace("nll_per_byte", "bits per byte")
        heads[column] = f"{column.task} {metric}{words[column.form]}"
    alike = list(heads.values())
    return {column: f"{column.suite}: {head}" if alike.count(head) > 1 else head for column, head in heads.items()}
