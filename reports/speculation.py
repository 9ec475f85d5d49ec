"""The table of drafting decoders on one page: what stands of their drafts, what that gains, and what to hold it
against. All of it is in other tables too, among much else."""

from __future__ import annotations

import pandas as pd

from ..harness.results import Results
from .cells import absent
from .options import NoOptions
from .speed import REQUESTS, figures

FIGURES = (
    *("k", "accepted length", "by position %", "scripted %", "speed-up", "lossless", "predicted", "of predicted"),
    *("TPOT ms", "reference TPOT ms", "distinct 4-grams %"),
)


class Speculation:
    """One row per model, decoder that drafts and kind of request whose speed was measured."""

    title = "Speculative decoding"
    note = (
        "Accepted length: tokens per round, the bonus token included. By position: shares of rounds that accept the "
        "draft's first, second, … token. TPOT: time per token after the first. Speed-up: reference decoder's TPOT / "
        "TPOT, printed only beside a green check. Predicted: the speed-up of this accepted length if all time were "
        "rounds, accepted length \u00d7 cost of a plain step / cost of a round, costs measured apart, where the host "
        "only starts rounds; with adaptive K what was expected of each window from the ones before. Of predicted: "
        "speed-up / predicted. Scripted: drafts stood by chance at this rate, whatever the model said. Distinct "
        "4-grams: of the runs of four tokens in a text, those that are different; text that loops has few, and is easy "
        "for n-grams."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        whole = figures(results)
        if whole is None or "accepted length" not in whole:
            return None
        rows = whole[[not absent(cell) for cell in whole["accepted length"]]]
        names = ["model", "decoder", *(name for name in REQUESTS if name in rows and rows[name].nunique() > 1)]
        shown = [name for name in FIGURES if name in rows and not all(map(absent, rows[name]))]
        return rows[[*names, *shown]].reset_index(drop=True)
