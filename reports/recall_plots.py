"""The plots of what models recall by distance, and of how they leave their teacher with depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from ..harness.results import Results
from . import agreement, recall
from .build import Plot
from .plots import INK, MARKS, colours_of, grid, legend, strokes_of, svg_of
from .recovery import LEVEL, with_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE = 1.9
"""Inches of a column of axes, beside what labels need."""


def by_distance(results: Results) -> Plot | None:
    """Recall in both forms, a column per kind of question and a row per form: a line per model over the distances,
    marked by the length of the text."""
    samples = recall.samples_of(results)
    if samples.empty:
        return None
    asked = set(samples["task"])
    kinds, lengths = [kind for kind in recall.KINDS if kind in asked], sorted(set(samples["length"]))
    models = [model for model in results.models["model"] if model in set(samples["model"])]
    colours = colours_of(models, results)
    marks = dict(zip(lengths, MARKS * len(lengths), strict=False))
    figure, axes = grid(len(recall.FORMS), len(kinds), (max(6.4, WIDE * len(kinds) + 1), 2.1 * len(recall.FORMS) + 1))
    for row, (metric, name) in enumerate(recall.FORMS.items()):
        for column, kind in enumerate(kinds):
            panel = axes[row * len(kinds) + column]
            here = samples[(samples["task"] == kind) & (samples["metric"] == metric)]
            _lines(panel, here, colours, marks, aside=0.008 * samples["distance"].max())
            panel.axhline(100 * here["chance"].mean(), color=INK, linewidth=1, linestyle=":")
            panel.set_ylim(-4, 104)
            panel.set_xlim(0, 1.08 * samples["distance"].max())
            if row == 0:
                panel.set_title(kind, color=INK, fontsize=10)
            if row == len(recall.FORMS) - 1:
                panel.set_xlabel("distance, tokens")
            if column == 0:
                panel.set_ylabel(f"{name}, %")
            else:
                panel.tick_params(labelleft=False)
    legend(figure, colours, {f"{length:g} tokens": mark for length, mark in marks.items()})
    note = (
        "Questions whose answers stand in the text before them, by how far back. Above: the answer is likelier than "
        "wrong choices. Below: the model writes it. Marks are lengths of texts, dotted lines chance, bars "
        f"{100 * LEVEL:.0f}\u00a0% intervals."
    )
    return Plot("recall", "Recall by distance and length", note, svg_of(figure))


def _lines(panel: Axes, here: pd.DataFrame, colours: dict[str, str], marks: dict[float, str], aside: float) -> None:
    """A line per model, `aside` of the one before, so that none hides another."""
    for place, (model, stroke) in enumerate(strokes_of(colours).items()):
        cells = [
            (
                float(cell["distance"].mean()) + aside * (place - (len(colours) - 1) / 2),
                length,
                with_interval(cell).scaled(100),
            )
            for (length, _), cell in here[here["model"] == model].groupby(["length", "depth"])
        ]
        cells.sort(key=lambda cell: cell[0])
        panel.plot(
            [x for x, _, _ in cells], [y.value for _, _, y in cells], stroke, color=colours[model],
            linewidth=1.2, alpha=0.8,
        )  # fmt: skip
        for x, length, y in cells:
            panel.errorbar(
                x, y.value, yerr=[[y.value - max(y.low, 0)], [min(y.high, 100) - y.value]] if y.se > 0 else None,
                fmt=marks[length], color=colours[model], markersize=4, elinewidth=0.7, capsize=1.5,
            )  # fmt: skip


def by_depth(results: Results) -> Plot | None:
    """KL and equal likeliest tokens by depth: a line per model but the teachers."""
    samples = agreement.samples_of(results)
    samples = samples[~samples["model"].isin(results.teachers)]
    if samples.empty or samples["depth"].nunique() < 2:
        return None
    tasks = list(dict.fromkeys(samples["task"]))
    models = [model for model in results.models["model"] if model in set(samples["model"])]
    colours = colours_of(models, results)
    figure, axes = grid(1, 2, (6.4, 4.0))
    for panel, metric, label, factor in (
        (axes[0], agreement.KL, "KL(teacher || model), nat per token", 1),
        (axes[1], agreement.TOP, "same likeliest token, %", 100),
    ):
        for model, stroke in strokes_of(colours).items():
            for which, task in enumerate(tasks):
                rows = samples[(samples["model"] == model) & (samples["task"] == task) & (samples["metric"] == metric)]
                points = [(depth, with_interval(of).scaled(factor)) for depth, of in rows.groupby("depth")]
                panel.errorbar(
                    [x for x, _ in points], [y.value for _, y in points],
                    yerr=[[max(y.value - y.low, 0) if y.se > 0 else 0 for _, y in points],
                          [max(y.high - y.value, 0) if y.se > 0 else 0 for _, y in points]],
                    fmt=MARKS[which % len(MARKS)] + stroke, color=colours[model],
                    markersize=4, linewidth=1.3, elinewidth=0.8, capsize=2,
                )  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_xlabel("depth in the text, tokens")
        panel.set_ylabel(label)
    marks = {task: MARKS[which % len(MARKS)] for which, task in enumerate(tasks)} if len(tasks) > 1 else {}
    legend(figure, colours, marks)
    note = (
        "Teacher-forced, by how many tokens of the document stand before the one that is predicted; a point stands at "
        f"the least depth of its group, bars are {100 * LEVEL:.0f}\u00a0% intervals over documents."
    )
    return Plot("agreement", "Agreement with the teacher by depth", note, svg_of(figure))
