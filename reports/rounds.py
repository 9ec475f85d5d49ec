"""The table of rounds taken apart: where the time of decoding goes."""

from __future__ import annotations

import math
import re
from typing import Any

import pandas as pd

from ..harness.results import Results
from .options import NoOptions
from .rows import WHO, drop_empty, in_plan_order, table_of

FACT = re.compile(r"round, batch (\d+)(?:, prompt (\d+))?(?:, temperature ([\d.e-]+))?: (.*)")
REQUEST = ["batch", "prompt", "temperature"]
PARTS = {
    "draft %": "draft kernels",
    "target %": "target kernels",
    "picks %": "picks and bookkeeping",
    "between %": "between kernels",
    "host %": "waiting for the host",
}
OTHER = "not draft or target %"


class Rounds:
    """One row per model, decoder, suite and kind of request, of a suite `speed` with the option `profile`."""

    title = "Rounds"
    note = (
        "One round of decoding taken apart; shares are of its whole time. Picks: sampling, verdicts and bookkeeping. "
        "Between: what passes between kernels where the next round is always waiting. Host: what a round takes more "
        "in an answer. Without a GPU a part's time is all that passes in it. Means over seeds, "
        "and of the plan's first decoder over all that it was measured beside. A decoder that names other parts has no "
        "row."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        facts = results.facts[results.facts["arm"].isin(["subject", "reference"])]
        first = results.decoders[0] if results.decoders else ""
        facts = facts.assign(decoder=facts["decoder"].where(facts["arm"] == "subject", first))
        named = facts["name"].str.extract(FACT).set_axis([*REQUEST, "what"], axis=1)
        facts = facts.assign(**named).dropna(subset="what")
        rows: list[dict[str, Any]] = []
        groups = dict(iter(facts.groupby(WHO, sort=False)))
        for who in in_plan_order(results, list(groups)):
            requests = groups[who][REQUEST].astype(float)
            for (batch, prompt, at), of in groups[who].assign(**requests).groupby(REQUEST, dropna=False):
                means = of.assign(value=of["value"].astype(float)).groupby("what")["value"].mean()
                if not {"whole", *PARTS.values()} <= set(means.index):
                    continue
                whole = means["whole"]
                shares = {name: 100 * means[part] / whole for name, part in PARTS.items()}
                row = {**dict(zip(WHO, who, strict=True)), "batch": int(batch), "round ms": 1000 * whole, **shares}
                row["prompt"] = None if math.isnan(prompt) else int(prompt)
                row["temperature"] = None if math.isnan(at) else at
                row[OTHER] = 100 - shares["draft %"] - shares["target %"]
                row["kernels"] = round(means["kernels"]) if "kernels" in means else None
                rows.append(row)
        if not rows:
            return None
        columns = [*WHO, *REQUEST, "round ms", *PARTS, OTHER, "kernels"]
        return drop_empty(table_of(rows, columns), ["prompt", "temperature", "kernels"])
