"""The report's table of variety: one row per model and decoder, one column per length of n-gram."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .plugin import VarietyConfig

if TYPE_CHECKING:
    from mambabench.harness.results import Results
    from pandas import DataFrame


class Variety:
    """The table `variety`. Imports no torch, as reports are made where no model runs."""

    title = "Variety of generated text"
    note = "Different n-grams among all n-grams of the generated text, in percent; a text that loops has few."

    def __init__(self, config: VarietyConfig) -> None:
        self.config = config

    def frame(self, results: Results) -> DataFrame | None:
        samples = results.samples[results.samples["task"] == "distinct"]
        if samples.empty:
            return None
        sums = samples.groupby(["model", "decoder", "metric"], sort=False)[["value", "weight"]].sum()
        percent = (100 * sums["value"] / sums["weight"]).round(1)
        return percent.unstack("metric").reset_index().rename_axis(columns=None)
