"""The plots of a report, as SVG that keeps its text as text and takes the page's colours.

Text and axes are drawn in a marker colour that becomes `currentColor`, so one picture suits light and dark pages; data
are drawn in middle tones that stand out on both. matplotlib is imported when a plot is drawn, without pyplot.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..harness.results import Results
from .build import Plot
from .cells import is_numeric, number
from .quality import AVERAGE
from .speed import SCRIPTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

INK = "#010203"
"""Drawn as this, shown in the page's colour."""
COLOURS = ("#4c8dd6", "#e0803a", "#3fa37a", "#c85fa8", "#8f7ae0", "#b8982f", "#d75a5a", "#5aa9b8")
MARKS = ("o", "s", "D", "^", "v", "P", "X")
STROKES = ("-", "--", ":", "-.")
ENTRY = 1.4
"""Inches of a name in a legend."""


def plots_of(frames: Mapping[str, DataFrame], results: Results) -> tuple[Plot, ...]:
    """The plots for which there is data."""
    from .map_plots import maps
    from .recall_plots import by_depth, by_distance
    from .training_plots import ladder, loss_curves

    measured = (_quality_and_speed(frames, results), _accepted_lengths(results))
    rungs = ladder(results) if "distillation" in frames else ()
    scripted = maps(results) if "acceptance-map" in frames else ()
    told = [by_distance(results)] if "recall" in frames else []
    told += [by_depth(results)] if "agreement" in frames else []
    return (*rungs, *(plot for plot in (*told, *measured) if plot is not None), *scripted, *loss_curves(results))


def _quality_and_speed(frames: Mapping[str, DataFrame], results: Results) -> Plot | None:
    if "quality" not in frames or "speed" not in frames:
        return None
    quality, speed = frames["quality"], frames["speed"]
    measure = _measure(quality)
    if measure is None or "tokens/s" not in speed:
        return None
    # A model's quality is that of its own text.
    speed = speed[[not str(verdict).startswith(("no:", SCRIPTED)) for verdict in speed["lossless"]]]
    # One request stands for all: the smallest batch, and the first of what else may differ.
    for column in ("batch", "prompt", "new", "temperature", "content"):
        if column in speed and speed[column].notna().any():
            values = speed[column].dropna()
            speed = speed[speed[column] == (values.min() if column == "batch" else values.iloc[0])]
    rows = quality[quality["decoder"] == ""] if "decoder" in quality else quality
    values = {row["model"]: row[measure] for row in rows.to_dict("records") if is_numeric(row.get(measure))}
    points = [
        (row["model"], row["decoder"], row["tokens/s"], values[row["model"]])
        for row in speed.to_dict("records")
        if row["model"] in values and not math.isnan(number(row["tokens/s"]))
    ]
    if not points:
        return None
    figure, axes = canvas()
    colours = colours_of([point[0] for point in points], results)
    strokes = strokes_of(colours)
    marks = dict(zip(dict.fromkeys(point[1] for point in points), itertools.cycle(MARKS), strict=False))
    for model, decoder, speed_, value in points:
        error = getattr(value, "se", math.nan)
        axes.errorbar(
            speed_, number(value), yerr=error if math.isfinite(error) else None,
            fmt=marks[decoder], color=colours[model], markersize=7, capsize=2, elinewidth=1,
            markerfacecolor="none" if strokes[model] != STROKES[0] else None,
        )  # fmt: skip
    legend(figure, colours, marks)
    if measure.endswith("perplexity"):
        wide_range(axes, [number(point[3]) for point in points])
    axes.set_xlabel("decoding speed, tokens/s")
    axes.set_ylabel(measure)
    axes.margins(0.08)
    better = "lower" if measure.endswith("perplexity") else "higher"
    batch = "" if "batch" not in speed else f" at batch {int(speed['batch'].iloc[0])}"
    note = f"One point per model and decoder{batch}; {better} and further right is better; bars are standard errors."
    note += " Hollow points are of models with broken lines." if len(colours) > len(COLOURS) else ""
    return Plot("quality-speed", "Quality against decoding speed", note, svg_of(figure))


def _measure(quality: DataFrame) -> str | None:
    """The column that stands for quality: the average, else the first accuracy, else the first perplexity."""
    if AVERAGE in quality:
        return AVERAGE
    named = [str(name) for name in quality.columns if any(is_numeric(cell) for cell in quality[name])]
    for ending in (" %", "perplexity"):
        for name in named:
            if name.endswith(ending) and not name.startswith("recovery"):
                return name
    return None


def wide_range(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where values differ by more than a factor of five, labelled with plain numbers."""
    if min(values) <= 0 or max(values) < 5 * min(values):
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _accepted_lengths(results: Results) -> Plot | None:
    rounds = results.rounds[results.rounds["arm"] == "subject"]
    if "scripted" in rounds:
        rounds = rounds[rounds["scripted"].isna()]
    if rounds.empty:
        return None
    timed = rounds[rounds["suite"].isin(results.timings["suite"].unique())]
    rounds = timed if len(timed) else rounds
    at = ""
    if "temperature" in rounds and rounds["temperature"].nunique() > 1:
        rounds = rounds[rounds["temperature"] == rounds["temperature"].min()]
        at = f" At temperature {rounds['temperature'].iloc[0]:g}."
    groups = [(of, group["accepted"] + 1) for of, group in rounds.groupby(["model", "decoder"], sort=False)]
    order = {name: place for place, name in enumerate(results.models["model"])}
    groups.sort(key=lambda group: order.get(group[0][0], len(order)))
    models = [model for (model, _), _ in groups]
    alone = len(set(models)) == len(models)
    colours = [*colours_of(models, results).values()] if alone else COLOURS
    figure, axes = canvas()
    longest = int(max(lengths.max() for _, lengths in groups))
    width = 0.8 / len(groups)
    for place, ((model, decoder), lengths) in enumerate(groups):
        shares = [100 * float((lengths == length).mean()) for length in range(1, longest + 1)]
        shift = (place - (len(groups) - 1) / 2) * width
        axes.bar(
            [length + shift for length in range(1, longest + 1)], shares, width * 0.92,
            color=colours[place % len(colours)], label=f"{model}, {decoder} (mean {lengths.mean():.2f})",
        )  # fmt: skip
    axes.set_xticks(range(1, longest + 1))
    axes.set_xlabel("accepted length, tokens per round")
    axes.set_ylabel("share of rounds, %")
    axes.legend(frameon=False, fontsize=9 if len(groups) <= 6 else 7, labelcolor=INK)
    note = f"Tokens that a round of verification yields, the correction or bonus token included.{at}"
    return Plot("accepted-lengths", "Accepted lengths", note, svg_of(figure))


def colours_of(models: Sequence[str], results: Results) -> dict[str, str]:
    """The colours of models: the same in all plots of a report, where there are enough for all of its models."""
    known = [*results.models["model"].drop_duplicates()]
    order = known if len(known) <= len(COLOURS) and set(models) <= set(known) else [*dict.fromkeys(models)]
    return {model: COLOURS[order.index(model) % len(COLOURS)] for model in models}


def strokes_of(colours: Mapping[str, str]) -> dict[str, Any]:
    """The lines of models, which differ where colours begin anew."""
    return {model: STROKES[place // len(COLOURS) % len(STROKES)] for place, model in enumerate(colours)}


def canvas() -> tuple[Any, Axes]:
    """A figure with one pair of axes."""
    figure, (axes,) = canvases(1)
    return figure, axes


def canvases(count: int) -> tuple[Any, Sequence[Axes]]:
    """A figure with axes side by side."""
    return grid(1, count, (6.4, 4.0))


def grid(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Any, Sequence[Axes]]:
    """A figure with rows of axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    every = [figure.add_subplot(rows, columns, place + 1) for place in range(rows * columns)]
    for axes in every:
        _dress(axes)
    return figure, every


def legend(figure: Any, colours: Mapping[str, str], marks: Mapping[str, str]) -> None:
    """Below everything: models by colour, broken where colours begin anew, and what else there is by mark."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colours[model], linewidth=3, linestyle=stroke, label=model)
        for model, stroke in strokes_of(colours).items()
    ]
    handles += [Line2D([], [], color=INK, marker=mark, linestyle="", label=name) for name, mark in marks.items()]
    columns = int(figure.get_figwidth() / ENTRY)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), columns), frameon=False, fontsize=9,
        labelcolor=INK,
    )  # fmt: skip


def _dress(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(True, color="#8888", linewidth=0.5, alpha=0.35)
    axes.set_axisbelow(True)


def svg_of(figure: Any) -> str:
    """The figure as an SVG element, the same bytes every time."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mambabench", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    return re.sub(r"(?<=font: )([\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
