"""The picture of scripted acceptance: speed-up over the rate at which drafts stand, a panel per batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..harness.results import Results
from .acceptance_map import NAMES, OTHERS, Cell, cells_of, tokens_of
from .build import Plot
from .plots import COLOURS, INK, MARKS, STROKES, canvases, svg_of
from .speed import LEVEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOM = 1.5
"""Height of the picture over the highest point: lines go on to drafts that always stand."""
FINE = 50
"""Pieces of a line."""


def maps(results: Results) -> tuple[Plot, ...]:
    """A picture for each model, where rounds were scripted; one for each draft, temperature and so on, of several."""
    models: dict[str, dict[tuple[str, ...], list[Cell]]] = {}
    for cell in cells_of(results):
        others = (f"{NAMES.get(name, name)} {cell.request.get(name)}" for name in OTHERS)
        models.setdefault(cell.who[0], {}).setdefault((cell.draft, *others), []).append(cell)
    plots = []
    for model, pictures in models.items():
        for number, (of, cells) in enumerate(pictures.items(), 1):
            differing = [
                part for part, column in zip(of, zip(*pictures, strict=True), strict=True) if len(set(column)) > 1
            ]
            name = f"{model}-{number}" if differing else model
            plots.append(_map(name, ", ".join([model, *differing]), cells))
    return tuple(plots)


def _map(name: str, model: str, cells: Sequence[Cell]) -> Plot:
    batches = sorted({cell.place[0] for cell in cells})
    prompts = sorted({cell.place[1] for cell in cells})
    ks = sorted({cell.k for cell in cells})
    figure, every = canvases(len(batches))
    highest = max(max(cell.speed_up.value, cell.predicted or 0) for cell in cells)
    for batch, axes in zip(batches, every, strict=True):
        for k in ks:
            for prompt in prompts:
                of = [cell for cell in cells if cell.k == k and cell.place == (batch, prompt)]
                _draw(axes, of, COLOURS[ks.index(k) % len(COLOURS)], prompts.index(prompt))
        axes.axhline(1, color=INK, linewidth=1, linestyle=":")
        axes.set_title(f"batch {batch}", color=INK, fontsize=9)
        axes.set_ylim(0, ROOM * highest)
        axes.set_xlim(0, 100)
        axes.set_xlabel("drafts that stand, %")
    every[0].set_ylabel("speed-up, scripted")
    for at, k in enumerate(ks):
        every[0].plot([], [], color=COLOURS[at % len(COLOURS)], label=f"K = {k}")
    for at, prompt in enumerate(prompts):
        every[0].plot([], [], _stroke(at), color=INK, markersize=5, label=f"prompt of {prompt:,}")
    figure.legend(
        *every[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
    )
    note = (
        "Chance lets drafts stand at set rates, if those before them do; no draft was as good. Points are measured, "
        f"with {100 * LEVEL:.0f}\u00a0% intervals; lines are tokens of a round at a rate \u00d7 cost of a plain step / "
        "cost of a round."
    )
    return Plot(f"acceptance-map-{name}", f"Speed-up at scripted acceptance: {model}", note, svg_of(figure))


def _stroke(at: int) -> str:
    return MARKS[at % len(MARKS)] + STROKES[at % len(STROKES)]


def _draw(axes: Axes, cells: Sequence[Cell], colour: str, at: int) -> None:
    """The points of one K and length of prompts, and what is predicted of every rate: a round costs what it costs."""
    slopes = [cell.predicted / cell.tokens for cell in cells if cell.predicted]
    if slopes:
        slope = sum(slopes) / len(slopes)
        rates = [place / FINE for place in range(FINE + 1)]
        heights = [slope * tokens_of(rate, cells[0].k) for rate in rates]
        axes.plot([100 * rate for rate in rates], heights, STROKES[at % len(STROKES)], color=colour, linewidth=1)
    for cell in cells:
        value = cell.speed_up
        known = value.high > value.low
        bars = [[value.value - value.low], [value.high - value.value]] if known else None
        axes.errorbar(
            100 * cell.rate, value.value, yerr=bars,
            fmt=MARKS[at % len(MARKS)], color=colour, markersize=5, capsize=2, elinewidth=1,
        )  # fmt: skip
