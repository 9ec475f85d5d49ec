"""The table of what each model loses or gains against its teacher, metric by metric, on the same items."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from ..harness.results import Results
from .options import NoOptions
from .recovery import LEVEL, OtherItems, above_chance, difference, estimate
from .rows import TRAINING, attention_of, drop_empty, of_suites, suites_with, table_of, teacher_of


class Differences:
    """One row per metric of a task and model; the teacher's figure is in every row."""

    title = "Differences from the teacher"
    note = (
        "Model - teacher, paired by item and clustered, with its "
        f"{100 * LEVEL:.0f}\u00a0% interval, seeds included. Metrics are as recorded: shares (0 to 1), nat per token "
        "or what else a suite has. Where chance is known, recovery is what is above it as a share of the teacher's; "
        "'teacher at chance' where the teacher cannot be told from it. Clusters: texts, documents or subjects whose "
        "items are not independent."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        suites = suites_with(results, traits=("score", "generate")) - suites_with(results, use=TRAINING)
        samples = of_suites(results.samples, suites)
        models = results.models.set_index("model")
        teachers, attention = teacher_of(results), attention_of(results)
        first = results.decoders[0] if results.decoders else ""
        samples = samples.assign(decoder=samples["decoder"].where(samples["decoder"] != first, ""))
        rows = []
        for (suite, task, metric), group in samples.groupby(["suite", "task", "metric"], sort=False):
            parts = dict(iter(group.groupby(["model", "decoder"], sort=False)))
            for model, decoder in sorted(parts, key=lambda who: (models["order"][who[0]], who[1])):
                taught = parts.get((teachers.get(model, ""), ""))
                if model in results.teachers or taught is None:
                    continue
                row = {"suite": suite, "task": task, "metric": metric, "model": model, "decoder": decoder}
                row["attention"] = attention[model]
                rows.append({**row, **_row(parts[model, decoder], taught)})
        if not rows:
            return None
        columns = ["suite", "task", "metric", "model", "decoder", "attention", "value", "teacher's", "difference"]
        frame = table_of(rows, [*columns, "better", "chance %", "recovery %", "items", "clusters", "check"])
        return drop_empty(frame, ["decoder", "chance %", "recovery %", "check"])


def _row(own: pd.DataFrame, taught: pd.DataFrame) -> dict[str, Any]:
    row: dict[str, Any] = {"value": estimate(own), "teacher's": estimate(taught), "better": own["better"].iloc[0]}
    row |= {"items": own["item"].nunique(), "clusters": own["cluster"].nunique()}
    try:
        row["difference"] = difference(own, taught)
        if "chance" in own and own["chance"].notna().all():
            chance = float(own["chance"].mean())
            share = above_chance(own, taught, chance)
            known = math.isfinite(share.low)
            row |= {"chance %": 100 * chance, "recovery %": share.scaled(100) if known else "teacher at chance"}
    except OtherItems:
        row["check"] = "not the teacher's items"
    return row
