"""The quality table: what each model still can, beside its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..harness import statistics as st
from ..harness.interfaces import MISSING
from ..harness.results import Results
from .options import NoOptions
from .recovery import LEVEL, OtherItems, average, estimate, inverse, perplexity_ratio, recovery
from .rows import (
    TRAINING,
    WHO,
    attention_of,
    drop_empty,
    failures,
    in_plan_order,
    measuring,
    of_suites,
    suites_with,
    table_of,
    teacher_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

AVERAGE, RECOVERY = "average %", "recovery %"
NO_ACCURACY = ("prefers", "win_rate", "lc_win_rate")
"""How shares begin that are no accuracies."""


@dataclass(frozen=True, slots=True)
class Column:
    """A metric of a task of a suite, and how it is printed."""

    suite: str
    task: str
    metric: str
    form: str
    """`share` and `rate` (printed in percent; the less of a rate the better, and a gap is a difference of shares),
    `perplexity`, `bits`, `plain`, or `none` for a suite or a task that was measured nowhere."""

    @property
    def where(self) -> tuple[str, str, str]:
        return self.suite, self.task, self.metric

    def shown(self, estimate: st.Estimate) -> st.Estimate:
        if self.form in ("share", "rate"):
            return estimate.scaled(100)
        if self.form == "perplexity":
            return estimate.exp()
        return estimate.scaled(1 / math.log(2)) if self.form == "bits" else estimate


RATIO = " / teacher's"
"""What ends the heading of a perplexity as a multiple of the teacher's."""


class Quality:
    """One row per model, the teacher first; a decoder that is not lossless has rows of its own.

    A column whose step failed shows the state; a suite that failed everywhere has one column of states, and so has a
    task that steps did without.
    """

    title = "Quality"
    note = (
        "Value ± standard error over items (clustered); a second ± is the error between seeds. "
        "Perplexity is per token of the teacher's tokenizer. "
        "The average is over the first accuracy of each task of each suite; where several suites have accuracies, each "
        "with more than one has an average and a recovery of its own. Nothing that lacks a task is averaged; the last "
        "table says why one is missing. "
        "Recovery is the share of the teacher's average (of the inverse perplexity where there are no accuracies). "
        f"Intervals are {100 * LEVEL:.0f}\u00a0%, paired by item with the teacher, seeds included."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        suites = suites_with(results, traits=("score", "generate")) - suites_with(results, use=TRAINING)
        samples = _merged(results, of_suites(results.samples, suites))
        cells = _merged(results, measuring(results, suites))
        if cells.empty:
            return None
        missing = _missing(_merged(results, of_suites(results.facts, suites)))
        columns = _columns(samples, cells, missing)
        names = _names(columns)
        averages = _averages(columns)
        failed = failures(cells, WHO)
        teachers, attention = teacher_of(results), attention_of(results)
        groups = dict(iter(samples.groupby(["model", "decoder"], sort=False)))
        rows = []
        for model, decoder in _rows(results, cells):
            parts = _parts(groups.get((model, decoder), samples.iloc[:0]))
            is_teacher = model in results.teachers
            states = {column.suite: failed.get((model, decoder, column.suite)) for column in columns}
            without = missing.get((model, decoder), set())
            row = _row(parts, columns, names, states, without)
            notes = [states[suite] for suite in dict.fromkeys(of[0] for of in parts) if states[suite]]
            taught = _parts(groups.get((teachers.get(model, ""), ""), samples.iloc[:0]))
            try:
                row |= _beside(parts, taught, columns, names, averages, is_teacher)
            except OtherItems:
                notes.append("not the teacher's items")
            row |= {"model": model, "decoder": decoder, "check": "; ".join(str(note) for note in notes)}
            row["attention"] = attention[model]
            row["seeds"] = max((part["key"].nunique() for part in parts.values()), default=0)
            rows.append(row)
        figures = [head for column in columns for head in (names[column], names[column] + RATIO)]
        means = [prefix + head for prefix in averages for head in (AVERAGE, RECOVERY)]
        frame = table_of(rows, ["model", "decoder", "attention", *means, *figures, "seeds", "check"])
        if frame["seeds"].max() <= 1:
            frame = frame.drop(columns="seeds")
        if len(averages[""]) < 2:
            frame = frame.drop(columns=AVERAGE)
        ratios = [head for head in figures if head.endswith(RATIO)]
        frame = drop_empty(frame, ["decoder", "attention", *ratios, *means, "check"])
        frame.attrs["averages"] = {
            prefix + AVERAGE: [names[column] for column in averaged]
            for prefix, averaged in averages.items()
            if prefix + AVERAGE in frame
        }
        return frame


Parts = dict[tuple[str, str, str], pd.DataFrame]
"""Samples of one row by suite, task and metric."""


def _parts(group: pd.DataFrame) -> Parts:
    return dict(iter(group.groupby(["suite", "task", "metric"], sort=False)))


def _row(
    parts: Parts,
    columns: Sequence[Column],
    names: Mapping[Column, str],
    states: Mapping[str, str | None],
    without: set[tuple[str, str]],
) -> dict[str, Any]:
    """The figures of a row, or the states of the steps that failed."""
    row: dict[str, Any] = {}
    for column in columns:
        if column.where in parts:
            row[names[column]] = column.shown(estimate(parts[column.where]))
        elif (column.suite, column.task) in without:
            row[names[column]] = MISSING
        else:
            row[names[column]] = states.get(column.suite)
    return row


def _beside(
    parts: Parts,
    taught: Parts,
    columns: Sequence[Column],
    names: Mapping[Column, str],
    averages: Mapping[str, Sequence[Column]],
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
    for prefix, averaged in averages.items():
        if not averaged or not all(column.where in parts for column in averaged):
            continue
        mine = [parts[column.where] for column in averaged]
        row[prefix + AVERAGE] = average(mine).scaled(100)
        if is_teacher:
            row[prefix + RECOVERY] = st.Estimate(value=100.0)
        elif all(column.where in taught for column in averaged):
            row[prefix + RECOVERY] = recovery(mine, [taught[column.where] for column in averaged]).scaled(100)
    if ratios and not averages[""]:
        row[RECOVERY] = st.Estimate(value=100.0) if is_teacher else inverse(ratios[0]).scaled(100)
    return row


def _missing(facts: pd.DataFrame) -> dict[tuple[str, str], set[tuple[str, str]]]:
    """Suites and tasks that a model and its decoder did without."""
    told = facts[facts["name"] == MISSING].groupby(["model", "decoder"], sort=False)
    return {who: set(zip(of["suite"], of["arm"], strict=True)) for who, of in told}


def _merged(results: Results, frame: pd.DataFrame) -> pd.DataFrame:
    """What only scores and what the first decoder generates share a row, named without a decoder."""
    first = results.decoders[0] if results.decoders else ""
    return frame.assign(decoder=frame["decoder"].where(frame["decoder"] != first, ""))


def _rows(results: Results, cells: pd.DataFrame) -> list[tuple[str, str]]:
    """Models and decoders in plan order; every teacher, and every model that has a row, has one without a decoder."""
    planned = list(cells[WHO].itertuples(index=False, name=None))
    bare = [(model, "", "") for model in [*results.teachers, *cells["model"]]]
    return list(dict.fromkeys((model, decoder) for model, decoder, _ in in_plan_order(results, [*bare, *planned])))


def _columns(
    samples: pd.DataFrame, cells: pd.DataFrame, missing: Mapping[tuple[str, str], set[tuple[str, str]]]
) -> list[Column]:
    """Tasks and metrics in the order of their first record; how each is printed is seen from its values.

    A suite without records has a column too, for the states of its steps, and so has a task that is missing.
    """
    columns = []
    for (suite, task, metric), group in samples.groupby(["suite", "task", "metric"], sort=False):
        least = -1 if metric == "gap" else 0
        shares = (group["weight"] == 1).all() and group["value"].between(least, 1).all()
        form = "plain"
        if metric.startswith(("nll_per_token", "nll_per_word")):
            form = "perplexity"
        elif metric.startswith("nll_per_byte"):
            form = "bits"
        elif shares and ("unit" not in group or group["unit"].isna().all()) and group["better"].nunique() == 1:
            form = "share" if group["better"].iloc[0] == "higher" else "rate"
        columns.append(Column(suite, task, metric, form))
    measured = {(column.suite, column.task) for column in columns}
    columns += [Column(*where, "", "none") for where in sorted(set().union(*missing.values()) - measured)]
    known = {column.suite for column in columns}
    return columns + [Column(suite, "", "", "none") for suite in dict.fromkeys(cells["suite"]) if suite not in known]


def _averages(columns: Sequence[Column]) -> dict[str, list[Column]]:
    """What is averaged, by what stands before the heading: everything, and where several suites have accuracies, each
    suite that has more than one, such as all tasks of one of the paper's tables."""
    every = _averaged(columns)
    of_suites = {column.suite: [other for other in every if other.suite == column.suite] for column in every}
    own = {f"{suite} ": mine for suite, mine in of_suites.items() if len(mine) > 1}
    return {"": every, **(own if len(of_suites) > 1 else {})}


def _averaged(columns: Sequence[Column]) -> list[Column]:
    """The first accuracy of each task of each suite, and beside them what is missing. To prefer as somebody did is no
    accuracy: a teacher that was not trained for it is no measure. Neither is to be preferred to another system."""
    first: dict[tuple[str, str], Column] = {}
    for column in columns:
        if column.form == "share" and not column.metric.startswith(NO_ACCURACY):
            first.setdefault((column.suite, column.task), column)
    suites = {suite for suite, _ in first}
    missing = [column for column in columns if column.form == "none" and column.task and column.suite in suites]
    return [*first.values(), *missing]


def _names(columns: Sequence[Column]) -> dict[Column, str]:
    """Headings, with the suite's name only where two suites have one task and metric, or one lacks another's task."""
    words = {"share": " %", "rate": " %", "perplexity": "", "bits": "", "plain": ""}
    heads = {}
    for column in columns:
        metric = column.metric
        if column.form == "perplexity":
            metric = metric.replace("nll_per_token", "perplexity").replace("nll_per_word", "perplexity per word")
        elif column.form == "bits":
            metric = metric.replace("nll_per_byte", "bits per byte")
        none = column.task or column.suite
        heads[column] = none if column.form == "none" else f"{column.task} {metric}{words[column.form]}"
    alike = list(heads.values())
    # What is missing has no metric, and may be any of those that another suite has of the task.
    alike += {column.task for column in columns if column.form != "none"}
    return {column: f"{column.suite}: {head}" if alike.count(head) > 1 else head for column, head in heads.items()}
