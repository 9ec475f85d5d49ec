"""The table of what distillation left: distance from the teacher beside what it took, a row per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..harness import statistics as st
from ..harness.results import Results
from .options import NoOptions
from .recovery import LEVEL, OtherItems, estimate, perplexity_ratio
from .rows import attention_of, drop_empty, failures, measuring, of_suites, suites_with, table_of

SUITE = "divergence"
PERPLEXITY, KL = "nll_per_token", "kl_per_token"
RATIO, TRAINED_ON = " / teacher's", " / trained on"
SUMMED = {
    "training tokens M": ("training_tokens", 1e-6),
    "GPU s": ("training_gpu", 1.0),
    "wall s": ("training_wall", 1),
}
"""Heading -> fact and factor, of what stages add up to."""
HIGHEST = {"trained %": ("trainable_share", 100.0), "peak memory MB": ("peak_memory", 1e-6)}
"""Of what the greediest stage counts for."""
LAST = {
    "tokens/s": ("training_rate", 1.0),
    "MFU %": ("model_flop_utilisation", 100.0),
    "GPU shared by": ("gpu_shared_by", 1.0),
}
"""Of what the last stage counts for."""


@dataclass(frozen=True, slots=True)
class Row:
    """A model with what is known of it."""

    model: str
    samples: Mapping[tuple[str, str], pd.DataFrame]
    """By metric and task."""
    stages: tuple[str, ...]
    took: Mapping[str, float]
    keeps_all: bool
    """It was trained without losing any attention."""
    layers: str
    """Those that keep attention, counted from 0; where seeds chose differently, each choice once."""


class Distillation:
    """One row per model of a plan with the suite `divergence`, the teacher first."""

    title = "Distillation"
    note = (
        "Perplexity and KL(teacher || model) are per token, ± standard error over documents; a second ± is the error "
        f"between seeds. Ratios have {100 * LEVEL:.0f}\u00a0% intervals, paired by document, seeds included; "
        "'trained on' is the model that kept all attention and was trained alike: in the same stages, or with as many "
        "tokens and as much else frozen. Layers are those that keep attention, counted from 0. Tokens and seconds are "
        "sums over stages, means over seeds; trained % and memory are of the stage with most, rates of the last. GPU "
        "seconds: wall of a stage times its GPUs, of which others may have had a part."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        if measuring(results, suites_with(results, use=SUITE)).empty:
            return None
        cells, samples, rows = measuring(results, _suites(results)), _samples(results), rows_of(results)
        models, failed = results.models.set_index("model"), failures(cells, ("model",))
        attention = attention_of(results)
        teachers = {models["store"][row.model]: row for row in rows if row.model in results.teachers}
        tasks = list(samples.groupby(["metric", "task"], sort=False).groups)
        heads = {where: f"{where[1]} perplexity" if where[0] == PERPLEXITY else f"{where[1]} KL nat" for where in tasks}
        shown = []
        for row in rows:
            of: dict[str, Any] = {
                "model": row.model,
                "stages": ", ".join(row.stages),
                "state": failed.get((row.model,)),
            }
            of["attention"] = attention[row.model]
            of["layers"] = row.layers
            of["seeds"] = max((part["key"].nunique() for part in row.samples.values()), default=0)
            of |= row.took
            for where, part in row.samples.items():
                value = estimate(part)
                of[heads[where]] = value.exp() if where[0] == PERPLEXITY else value
            beside = {RATIO: teachers.get(models["store"][row.model]), TRAINED_ON: trained_on(row, rows)}
            for end, other in beside.items():
                of |= {heads[where] + end: ratio for where, ratio in ratios(row, other).items()}
            shown.append(of)
        figures = [head + end for head in heads.values() for end in ("", RATIO, TRAINED_ON)]
        took = [*HIGHEST, *SUMMED, *LAST]
        frame = table_of(
            shown, ["model", "attention", "layers", "stages", took[0], *figures, *took[2:], took[1], "seeds", "state"]
        )
        if frame["seeds"].max() <= 1:
            frame = frame.drop(columns="seeds")
        return drop_empty(frame, ["attention", "layers", "stages", *took, *figures, "state"])


def rows_of(results: Results) -> list[Row]:
    """One per model, in plan order."""
    samples = _samples(results)
    return [_row(results, samples, model) for model in results.models["model"]]


def _suites(results: Results) -> set[tuple[str, str]]:
    return suites_with(results, use=SUITE) | suites_with(results, use="perplexity")


def _samples(results: Results) -> pd.DataFrame:
    samples = of_suites(results.samples, _suites(results))
    return samples[samples["metric"].isin([PERPLEXITY, KL])]


def _row(results: Results, samples: pd.DataFrame, model: str) -> Row:
    own = samples[samples["model"] == model]
    parts: dict[tuple[str, str], pd.DataFrame] = dict(iter(own.groupby(["metric", "task"], sort=False)))
    cells = results.cells[(results.cells["kind"] == "train") & (results.cells["model"] == model)]
    stages = tuple(dict.fromkeys(cells["stage"]))
    facts = results.facts[(results.facts["kind"] == "train") & (results.facts["model"] == model)]
    keep = results.models.set_index("model")["keep"][model]
    return Row(model, parts, stages, _took(facts, stages), keep == 1 and bool(stages), _layers(results.facts, model))


def _layers(facts: pd.DataFrame, model: str) -> str:
    told = facts[(facts["model"] == model) & (facts["kind"] == "select") & (facts["name"] == "keeps_attention")]
    choices = (" ".join(str(int(layer)) for layer in of) for _, of in told.groupby("key", sort=False)["value"])
    return " or ".join(dict.fromkeys(choices))


def _took(facts: pd.DataFrame, stages: Sequence[str]) -> dict[str, float]:
    """What the stages of a model took, by heading."""
    took: dict[str, float] = {}
    numbers = facts.assign(value=pd.to_numeric(facts["value"], errors="coerce")).dropna(subset="value")
    means = numbers.groupby(["name", "stage"])["value"].mean()
    for headings, join in ((HIGHEST, max), (SUMMED, sum), (LAST, lambda values: values[-1])):
        for heading, (name, factor) in headings.items():
            values = [float(means[name, stage]) for stage in stages if (name, stage) in means.index]
            if values and (join is not sum or any(values)):
                took[heading] = factor * join(values)
    return took


def trained_on(row: Row, rows: Sequence[Row]) -> Row | None:
    """The one model that kept all attention and was trained as this one."""
    if not row.stages or row.keeps_all:
        return None
    candidates = [other for other in rows if other.keeps_all]
    same = [other for other in candidates if other.stages == row.stages]
    alike = [other for other in candidates if _effort(other) == _effort(row)]
    found = same or alike
    return found[0] if len(found) == 1 else None


def _effort(row: Row) -> tuple[float | None, bool]:
    """Tokens, and whether anything was frozen."""
    return row.took.get("training tokens M"), row.took.get("trained %", 0.0) == 100


def ratios(row: Row, other: Row | None) -> dict[tuple[str, str], st.Estimate]:
    """The row's perplexities over the other's, where both were measured on the same documents."""
    found: dict[tuple[str, str], st.Estimate] = {}
    for where, part in row.samples.items():
        if where[0] == PERPLEXITY and other is not None and where in other.samples:
            try:
                found[where] = st.Estimate(value=1.0) if other is row else perplexity_ratio(part, other.samples[where])
            except OtherItems:
                continue
    return found
