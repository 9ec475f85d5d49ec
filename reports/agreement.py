"""The table of `agreement`: how a model leaves its teacher with the depth of the text."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..harness.results import Results
from .options import NoOptions
from .recovery import estimate
from .rows import attention_of, drop_empty, failures, measuring, of_suites, suites_with, table_of

SUITE = "agreement"
KL, TOP = "kl_per_token", "top1_per_token"


class Agreement:
    """One row per text, group of depths and model."""

    title = "Agreement with the teacher by depth"
    note = (
        "Teacher-forced on given texts: KL(teacher || model) per token, and how often both find the same token "
        "likeliest, ± standard error over documents; a second ± is the error between seeds. Depth: tokens of the "
        "document before the one that is predicted. The teacher agrees with itself by definition."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        cells = measuring(results, suites_with(results, use=SUITE))
        if cells.empty:
            return None
        samples = samples_of(results)
        attention = attention_of(results)
        order = {model: place for place, model in enumerate(results.models["model"])}
        edges = sorted(set(samples["depth"])) if len(samples) else []
        names = {edge: _named(edges, place) for place, edge in enumerate(edges)}
        rows: list[dict[str, Any]] = []
        groups = {tuple(key): group for key, group in samples.groupby(["suite", "task", "depth", "model"], sort=False)}
        for suite, task, depth, model in sorted(groups, key=lambda key: (key[0], key[1], key[2], order[key[3]])):
            group = groups[suite, task, depth, model]
            row: dict[str, Any] = {"suite": suite, "text": task, "depth": names[depth], "model": model}
            row["attention"] = attention[model]
            row["KL nat"] = estimate(group[group["metric"] == KL])
            row["same token %"] = estimate(group[group["metric"] == TOP]).scaled(100)
            row["tokens"] = int(group.loc[group["metric"] == KL, "weight"].sum() / group["key"].nunique())
            rows.append(row)
        failed = failures(cells, ("suite", "model"))
        rows += [{"suite": suite, "model": model, "state": state} for (suite, model), state in failed.items()]
        columns = ["suite", "text", "depth", "model", "attention", "KL nat", "same token %", "tokens", "state"]
        frame = drop_empty(table_of(rows, columns), ["state"])
        return frame.drop(columns="suite") if frame["suite"].nunique() == 1 else frame


def samples_of(results: Results) -> pd.DataFrame:
    """All samples of suites that use `agreement`."""
    return of_suites(results.samples, suites_with(results, use=SUITE))


def _named(edges: list[int], place: int) -> str:
    begin = int(edges[place])
    return f"{begin}–{int(edges[place + 1]) - 1}" if place + 1 < len(edges) else f"from {begin}"
