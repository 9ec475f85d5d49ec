"""The quality table: what each model still can, beside its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..harness import statistics as st
from ..harness.results import Results
from .options import NoOptions
from .rows import by_plan, drop_empty, failures, keep_of, of_suites, suites_with, table_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LEVEL = 0.95
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


class Quality:
    """One row per model, the teacher first; a decoder that is not lossless has rows of its own.

    Errors are clustered standard errors over items, then those between seeds. Recovery is paired by item with the
    teacher. A column whose step failed shows the state.
    """

    title = "Quality"
    note = (
        "Value ± standard error over items (clustered); a second ± is the error between seeds. "
        "Perplexity is per token of the teacher's tokenizer. "
        f"The average is over the first accuracy of each task; recovery is its share of the teacher's, with a "
        f"{100 * LEVEL:.0f}\u00a0% interval paired by item, that between seeds included."
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
        averaged = list({column.task: column for column in reversed(columns) if column.form == "share"}.values())[::-1]
        names = _names(columns)
        rows = []
        groups = _rows(results, samples, cells)
        failed = failures(cells, ("model", "decoder", "suite"))
        teachers = {name: group for (name, decoder), group in groups.items() if not decoder}
        stores = results.models.set_index("model")["store"].to_dict()
        keeps = results.models.set_index("model")["keep"].to_dict()
        teacher_of = {stores[name]: name for name in results.teachers}
        for (model, decoder), group in groups.items():
            row: dict[str, Any] = {"model": model, "decoder": decoder, "attention": keep_of(keeps.get(model))}
            if model in results.teachers:
                row["attention"] = "teacher"
            parts = dict(iter(group.groupby(["suite", "task", "metric"], sort=False)))
            notes = []
            for column in columns:
                state = failed.get((model, decoder, column.suite)) or _first_failure(
                    results, failed, model, column.suite
                )
                part = parts.get(column.where)
                if part is not None:
                    row[names[column]] = column.shown(_estimate(part))
                    if state and state not in notes:
                        notes.append(state)
                elif state and not decoder:
                    row[names[column]] = state
            if averaged and all(column.where in parts for column in averaged):
                average = _average([parts[column.where] for column in averaged])
                row[AVERAGE] = average.scaled(100)
                teacher = teachers.get(teacher_of.get(stores.get(model), ""))
                if model in results.teachers:
                    row[RECOVERY] = st.Estimate(value=100.0)
                elif teacher is not None:
                    row[RECOVERY], note = _recovery(parts, teacher, averaged, average)
                    notes += [note] if note else []
            row["seeds"] = int(group["key"].groupby(group["suite"]).nunique().max()) if len(group) else 0
            row["check"] = "; ".join(notes)
            rows.append(row)
        order = ["model", "decoder", "attention", *names.values(), AVERAGE, RECOVERY, "seeds", "check"]
        frame = table_of(rows, order)
        if len(averaged) < 2:
            frame = frame.drop(columns=AVERAGE)
        if frame["seeds"].max() <= 1:
            frame = frame.drop(columns="seeds")
        frame = drop_empty(frame, ["decoder", "attention", RECOVERY, "check"])
        if AVERAGE in frame:
            frame.attrs["averages"] = {AVERAGE: [names[column] for column in averaged]}
        return frame


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


def _first_failure(results: Results, failed: Mapping[tuple[Any, ...], str], model: str, suite: str) -> str | None:
    return failed.get((model, results.decoders[0], suite)) if results.decoders else None


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


def _estimate(part: pd.DataFrame) -> st.Estimate:
    columns = (part[name].to_numpy() for name in ("value", "weight", "cluster", "key"))
    return st.over_seeds(*columns)


def _by_item(part: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of each item, in the order of items."""
    keyed = part.assign(again=part.groupby(["key", "item"]).cumcount())
    means = keyed.groupby(["item", "again"], sort=True)[["value", "weight"]].mean()
    return means.assign(cluster=keyed.groupby(["item", "again"], sort=True)["cluster"].first())


def _average(parts: Sequence[pd.DataFrame]) -> st.Estimate:
    """The average of tasks; its error between seeds is the spread of the seeds' averages."""
    of_items = st.average([_estimate(part) for part in parts])
    sums = [part.groupby("key" if len(parts) == 1 else "seed")[["value", "weight"]].sum() for part in parts]
    of_seeds = sum((of["value"] / of["weight"]).rename("ratio") for of in sums) / len(parts)
    return replace(of_items, seed_se=st.mean(of_seeds.dropna()).se)


def _recovery(
    parts: Mapping[Any, pd.DataFrame], teacher: pd.DataFrame, columns: Sequence[Column], average: st.Estimate
) -> tuple[st.Estimate | None, str]:
    """A model's share of its teacher's average, and why there is none."""
    taught = dict(iter(teacher.groupby(["suite", "task", "metric"], sort=False)))
    tasks = []
    for column in columns:
        if column.where not in taught:
            return None, ""
        own, reference = _by_item(parts[column.where]), _by_item(taught[column.where])
        if not own.index.equals(reference.index):
            return None, f"{column.task}: not the teacher's items"
        arrays = (side[name].to_numpy() for side in (own, reference) for name in ("value", "weight"))
        tasks.append(st.PairedTask(*arrays, own["cluster"].to_numpy()))
    share = st.recovery(tasks)
    if math.isfinite(average.seed_se):
        between = average.seed_se * share.value / average.value if average.value else math.nan
        seeds = float(parts[columns[0].where]["seed"].nunique() - 1)
        share = st.combine(share.value, [(share.se**2, share.df), (between**2, seeds)], share.n)
    return share.with_interval(LEVEL).scaled(100), ""
