"""The table of lm-eval's metrics that are no mean over items, such as F1, BLEU and the bias scores of BBQ."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..harness.results import Results
from ..harness.statistics import SE, Estimate
from .options import NoOptions
from .rows import attention_of, of_suites, suites_with, table_of, teacher_of

SUITE = "lm-eval"


class Aggregates:
    """One row per metric of a task and model, the teacher's figure beside it."""

    title = "Aggregates"
    note = (
        "Metrics that are computed over all items of a task at once, as lm-eval does: value ± standard error, by "
        "bootstrap over items (over texts where items share one). Means of seeds; a second ± is the error between them."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        facts = of_suites(results.facts, suites_with(results, use=SUITE))
        facts = facts[facts["name"].str.contains(": ", regex=False)]
        if facts.empty:
            return None
        teachers, attention = teacher_of(results), attention_of(results)
        order = results.models.set_index("model")["order"]
        rows: list[dict[str, Any]] = []
        for (suite, name), of in facts.groupby(["suite", "name"], sort=False):
            found = {str(model): _estimate(part) for model, part in of.groupby("model", sort=False)}
            task, _, metric = str(name).partition(": ")
            for model in sorted(found, key=order.__getitem__):
                row = {"suite": suite, "task": task, "metric": metric, "model": model, "value": found[model]}
                row["attention"] = attention[model]
                rows.append({**row, "teacher's": found.get(teachers.get(model, ""))})
        return table_of(rows, ["suite", "task", "metric", "model", "attention", "value", "teacher's"])


def _estimate(part: pd.DataFrame) -> Estimate:
    """The mean over seeds; its errors are of the same items, and so no smaller than those of one seed."""
    values, errors = (part.loc[part["arm"] == arm, "value"].astype(float) for arm in ("", SE))
    between = float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(value=float(values.mean()), se=float(errors.mean()), seed_se=between)
