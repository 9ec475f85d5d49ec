"""The plots of what training did: distance from the teacher by the attention that is left, and curves of losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from ..harness import statistics as st
from ..harness.results import Results
from .build import Plot
from .distillation import KL, PERPLEXITY, Row, ratios, rows_of, trained_on
from .plots import COLOURS, INK, MARKS, STROKES, canvas, canvases, colours_of, strokes_of, svg_of, wide_range
from .recovery import LEVEL, with_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

LEGEND = 100
"""Characters in a line of a legend."""
PARTS = {"loss": "loss", "ce": "cross entropy, nat", "kl": "divergence, nat"}
"""Columns of a stage's records that are drawn, and how they are called."""


@dataclass(frozen=True, slots=True)
class Line:
    """Models that were trained alike and keep different shares of attention, by share."""

    stages: tuple[str, ...]
    rule: str
    """That chooses the layers which keep attention; empty: evenly spread."""
    models: Mapping[float, Row]


def ladder(results: Results) -> tuple[Plot, ...]:
    """Perplexity as a multiple of the teacher's and KL by the share of attention kept, a line per way of training.

    Drawn where at least two shares were trained alike; models that differ otherwise are no line.
    """
    rows = rows_of(results)
    lines = lines_of(results, rows)
    stores = results.models.set_index("model")["store"]
    teachers = {stores[row.model]: row for row in rows if row.model in results.teachers}

    def over_teacher(row: Row) -> Mapping[tuple[str, str], st.Estimate]:
        return ratios(row, teachers.get(stores[row.model]))

    def apart(row: Row) -> Mapping[tuple[str, str], st.Estimate]:
        return {where: with_interval(part) for where, part in row.samples.items() if where[0] == KL}

    bars = f"bars are {100 * LEVEL:.0f}\u00a0% intervals"
    drawn = (
        _rungs("ladder-perplexity", "Perplexity by attention kept", "perplexity / teacher's", lines, over_teacher,
               f"At 100 % the teacher, trained on with the same tokens; the dotted line is the teacher; {bars}."),
        _rungs("ladder-divergence", "Divergence by attention kept", "KL(teacher || model), nat per token", lines, apart,
               f"At 100 % the teacher, trained on with the same tokens; the teacher itself has 0; {bars}."),
    )  # fmt: skip
    return tuple(plot for plot in drawn if plot is not None)


def lines_of(results: Results, rows: Sequence[Row]) -> list[Line]:
    """Those of a ladder, which at 100 % have the one model that tables call `trained on`."""
    models = results.models.set_index("model")
    alike: dict[Any, dict[str, list[tuple[float, Row]]]] = {}
    for row in rows:
        kept = _kept(models["keep"][row.model])
        if row.stages and not row.keeps_all and kept is not None:
            share, rule = kept
            way = (models["store"][row.model], models["backend"][row.model], row.stages)
            alike.setdefault(way, {}).setdefault(rule, []).append((share, row))
    lines = []
    for (_, _, stages), rules in alike.items():
        none = [(share, row) for share, row in rules.get("", []) if share == 0]
        for rule, group in rules.items():
            group = group if not rule else [*none, *group]
            shares = dict(group)
            if len(shares) < 2 or len(shares) < len(group):
                continue
            controls = [trained_on(row, rows) for row in shares.values()]
            if controls[0] is not None and all(control is controls[0] for control in controls):
                shares[1.0] = controls[0]
            lines.append(Line(stages, rule, dict(sorted(shares.items()))))
    return lines


def _kept(keep: Any) -> tuple[float, str] | None:
    """The share of attention that a plan asks for, and the rule that chooses the layers (empty: evenly spread; where
    none is kept there is nothing to choose); None where a plan names the layers."""
    if isinstance(keep, Real) and not isinstance(keep, bool):
        return float(keep), ""
    if isinstance(keep, Mapping) and isinstance(keep.get("share"), Real):
        return float(keep["share"]), "" if keep["use"] == "uniform" else str(keep["use"])
    return None


def _rungs(
    name: str,
    title: str,
    unit: str,
    lines: Sequence[Line],
    measure: Callable[[Row], Mapping[tuple[str, str], st.Estimate]],
    note: str,
) -> Plot | None:
    """A line per way of training and text."""
    known = [[(share, measure(row)) for share, row in line.models.items()] for line in lines]
    tasks = list(dict.fromkeys(where for line in known for _, values in line for where in values))
    figure, axes = canvas()
    heights: list[float] = []
    for place, (line, values) in enumerate(zip(lines, known, strict=True)):
        for which, task in enumerate(tasks):
            points = [(100 * share, of[task]) for share, of in values if task in of]
            if len(points) < 2:
                continue
            axes.errorbar(
                [share for share, _ in points], [point.value for _, point in points], yerr=_bars(points),
                fmt=MARKS[which % len(MARKS)] + STROKES[which % len(STROKES)], color=COLOURS[place % len(COLOURS)],
                markersize=5, capsize=2, linewidth=1.5, elinewidth=1,
                label=", ".join(filter(None, (" → ".join(line.stages), line.rule, task[1] if len(tasks) > 1 else ""))),
            )  # fmt: skip
            heights += [point.value for _, point in points]
    if not heights:
        return None
    if tasks[0][0] == PERPLEXITY:
        axes.axhline(1, color=INK, linewidth=1, linestyle=":")
    wide_range(axes, heights)
    axes.set_xticks(sorted({100 * share for line in lines for share in line.models}))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("attention kept, % of layers")
    axes.set_ylabel(unit)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return Plot(name, title, note, svg_of(figure))


def _bars(points: Sequence[tuple[float, st.Estimate]]) -> list[list[float]]:
    """Down and up from each value; none where the error is unknown."""
    ends = [(point.value - point.low, point.high - point.value) for _, point in points]
    return [[end if end > 0 else 0.0 for end in side] for side in zip(*ends, strict=True)]


def loss_curves(results: Results) -> tuple[Plot, ...]:
    """The losses of each stage against tokens, a line per model; means over seeds."""
    places = {model: place for place, model in enumerate(results.models["model"])}
    losses = results.losses.sort_values("model", key=lambda models: models.map(places), kind="stable")
    stages = losses.drop_duplicates(["store", "key", "step"]).groupby("stage", sort=False)
    drawn = (_curves(stage, of, results) for stage, of in stages)
    return tuple(plot for plot in drawn if plot is not None)


def _curves(stage: Any, losses: DataFrame, results: Results) -> Plot | None:
    parts = [part for part in PARTS if part in losses and losses[part].notna().any()]
    if parts == ["loss", "ce"]:
        parts = ["loss"]
    lines = {
        str(model): own.groupby("step")[["tokens", *parts]].mean().sort_index()
        for model, own in losses.groupby("model", sort=False)
    }
    if max(len(line) for line in lines.values()) < 2:
        return None
    colours = colours_of([*lines], results)
    figure, every = canvases(len(parts))
    for part, axes in zip(parts, every, strict=True):
        for model, stroke in strokes_of(colours).items():
            line = lines[model]
            axes.plot(line["tokens"], line[part], stroke, label=model, linewidth=1.2, color=colours[model])
        wide_range(axes, [float(value) for line in lines.values() for value in line[part].dropna()])
        _count_tokens(axes)
        axes.set_ylabel(PARTS[part])
    columns = max(1, min(len(lines), LEGEND // (max(map(len, lines)) + 8)))
    legend = {"loc": "outside lower center", "frameon": False, "fontsize": 8, "labelcolor": INK}
    figure.legend(*every[0].get_legend_handles_labels(), ncols=columns, **legend)
    note = "Means since the record before. A stage that several models share is drawn once."
    return Plot(f"losses-{stage}", f"Losses of stage {stage}", note, svg_of(figure))


def _count_tokens(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens")
