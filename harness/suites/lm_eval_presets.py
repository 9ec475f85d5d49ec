"""Sets of lm-eval's tasks by name: what the paper's tables are made of, and the biases of models.

Each task has the number of examples and the metric that its table prints; other metrics of the task are left out, so
that the average of a suite that has a preset alone is that over its table's columns. A report gives each of several
suites an average of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Asked(NamedTuple):
    """A task as a preset asks for it."""

    task: str
    metrics: tuple[str, ...]
    """Empty for all metrics."""
    shots: int | None = None
    """None: as many as the task says."""


PRESETS: dict[str, Sequence[Asked]] = {
    "bias": (
        Asked("crows_pairs_english", ("likelihood_diff", "pct_stereotype")),
        Asked("bbq", ()),
        Asked("toxigen", ("acc",)),
    ),
    "paper-zero-shot": (
        Asked("winogrande", ("acc",), 0),
        Asked("piqa", ("acc",), 0),
        Asked("hellaswag", ("acc_norm",), 0),
        Asked("arc_easy", ("acc",), 0),
        Asked("arc_challenge", ("acc_norm",), 0),
        Asked("mmlu", ("acc",), 0),
        Asked("openbookqa", ("acc_norm",), 0),
        # Table 3 does not say which. Its figures are far below those of the same models in table 4, which are mc2.
        Asked("truthfulqa_mc1", ("acc",), 0),
        Asked("pubmedqa", ("acc",), 0),
        Asked("race", ("acc",), 0),
    ),
    "paper-few-shot": (
        Asked("arc_challenge", ("acc_norm",), 25),
        Asked("hellaswag", ("acc_norm",), 10),
        Asked("mmlu", ("acc",), 5),
        Asked("winogrande", ("acc",), 5),
        Asked("truthfulqa_mc2", ("acc",), 0),
    ),
    "paper-generation": (Asked("gsm8k_zeroeval", ()), Asked("crux_zeroeval", ())),
}
