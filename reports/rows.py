"""What several tables share: the order of rows, and what stands where a number would if the step had ended well."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..harness.results import Results
from .cells import absent

if TYPE_CHECKING:
    from pandas import DataFrame


def by_plan(results: Results, frame: DataFrame) -> Iterator[tuple[str, str, DataFrame]]:
    """A frame's rows by model and decoder, in plan order: (model, decoder, rows)."""
    groups = dict(iter(frame.groupby(["model", "decoder"], sort=False)))
    for model in [*results.models["model"], *sorted(set(frame["model"]) - set(results.models["model"]))]:
        for decoder in dict.fromkeys(["", *results.decoders, *frame["decoder"]]):
            if (model, decoder) in groups:
                yield model, decoder, groups[model, decoder]


def suites_with(results: Results, traits: Iterable[str] = (), use: str = "") -> set[tuple[str, str]]:
    """(store, suite) of the suites that have one of the traits, or use a component."""
    wanted = set(traits)
    return {
        (row["store"], row["suite"])
        for row in results.suites.to_dict("records")
        if wanted & row["traits"] or (use and row["use"] == use)
    }


def of_suites(frame: DataFrame, suites: set[tuple[str, str]]) -> DataFrame:
    """The rows of a frame that belong to suites."""
    return frame[[pair in suites for pair in zip(frame["store"], frame["suite"], strict=True)]]


def failures(cells: DataFrame, key: Iterable[str]) -> dict[tuple[Any, ...], str]:
    """States of the cells that did not end well, by columns; where seeds differ, how many of how many."""
    found: dict[tuple[Any, ...], str] = {}
    for of, group in cells.groupby(list(key), sort=False, dropna=False):
        bad = group[group["state"] != "ok"]
        if len(bad):
            states = ", ".join(dict.fromkeys(bad["state"]))
            found[of] = states if len(bad) == len(group) else f"{len(bad)} of {len(group)} seeds: {states}"
    return found


def table_of(rows: Sequence[Mapping[str, Any]], columns: Iterable[str] | None = None) -> DataFrame:
    """A frame whose cells keep their types: whole numbers stay whole beside gaps."""
    import pandas

    names = list(columns) if columns is not None else list(dict.fromkeys(name for row in rows for name in row))
    return pandas.DataFrame([{name: row.get(name) for name in names} for row in rows], columns=names, dtype=object)


def drop_empty(frame: DataFrame, columns: Iterable[str]) -> DataFrame:
    """Without those of the columns that say nothing."""
    return frame.drop(columns=[name for name in columns if name in frame and all(map(absent, frame[name]))])


def keep_of(value: Any) -> str:
    """The attention that a model keeps, as the plan says it."""
    if value is None or value == "":
        return ""
    if isinstance(value, float | int) and not isinstance(value, bool):
        return f"{100 * value:g} %"
    if isinstance(value, list | tuple):
        return "layers " + ", ".join(map(str, value))
    if isinstance(value, dict):
        options = ", ".join(f"{name} {option}" for name, option in value.items() if name != "use")
        return f"{value.get('use', '')} ({options})" if options else str(value.get("use", ""))
    return str(value)
