"""What several tables share: the order of rows, and what stands where a number would if the step had ended well."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..harness.results import Results
from .cells import absent

if TYPE_CHECKING:
    from pandas import DataFrame


Who = tuple[str, str, str]
WHO = ["model", "decoder", "suite"]
"""What a row of decoding is about."""
TRAINING = "train-speed"
"""A suite of steps rather than texts, which has a table of its own."""


def in_plan_order(results: Results, of: Iterable[Who]) -> list[Who]:
    """Models, decoders (none is the first) and suites as the plan has them, others last; each once."""
    orders = (results.models["model"], ("", *results.decoders), results.suites["suite"])
    places = [{name: place for place, name in enumerate(dict.fromkeys(order))} for order in orders]

    def place(who: Who) -> list[tuple[int, str]]:
        return [(known.get(name, len(known)), name) for known, name in zip(places, who, strict=True)]

    return sorted(dict.fromkeys(of), key=place)


def measuring(results: Results, suites: set[tuple[str, str]]) -> DataFrame:
    """The cells that measure with these suites, but for those that the plan skips, which the table of steps has."""
    cells = results.measured
    return of_suites(cells[cells["state"] != "skipped"], suites)


def with_teachers(results: Results, rows: Sequence[dict[str, Any]], cells: DataFrame) -> list[dict[str, Any]]:
    """Rows, each teacher's first; one without any has a row that says why."""
    absent_ = [teacher for teacher in results.teachers if all(row["model"] != teacher for row in rows)]
    why = {True: "no records", False: "not planned"}
    added = [{"model": teacher, "state": why[bool((cells["model"] == teacher).any())]} for teacher in absent_]
    places = {name: place for place, name in enumerate(results.models["model"])}
    return sorted([*added, *rows], key=lambda row: places.get(row["model"], len(places)))


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
    return frame.loc[[pair in suites for pair in zip(frame["store"], frame["suite"], strict=True)]]


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


def only_failures(frame: DataFrame) -> DataFrame:
    """Without the column `state` where everything ended well."""
    return frame.drop(columns="state") if (frame["state"] == "ok").all() else frame


def drop_empty(frame: DataFrame, columns: Iterable[str]) -> DataFrame:
    """Without those of the columns that say nothing."""
    return frame.drop(columns=[name for name in columns if name in frame and all(map(absent, frame[name]))])


def called(request: Mapping[str, Any]) -> tuple[str, ...]:
    """How facts may call a kind of request: also by the length of its prompts and its temperature, where a step had
    several."""
    batch = f"batch {request.get('batch')}"
    prompt, at = f", prompt {request.get('prompt_tokens')}", f", temperature {request.get('temperature') or 0:g}"
    return f"{batch}{prompt}{at}", f"{batch}{prompt}", f"{batch}{at}", batch


def percent(share: float | None) -> float | None:
    """A share in percent; nothing stays nothing."""
    return None if share is None or math.isnan(share) else 100 * share


def teacher_of(results: Results) -> dict[str, str]:
    """The teacher of each model, which is that of its store; a teacher's is itself."""
    stores = dict(zip(results.models["model"], results.models["store"], strict=True))
    teachers = {stores[name]: name for name in results.teachers}
    return {name: teachers[store] for name, store in stores.items() if store in teachers}


def attention_of(results: Results) -> dict[str, str]:
    """What rows say of each model's attention."""
    models = results.models
    return {
        name: "teacher" if teacher else keep_of(keep)
        for name, keep, teacher in zip(models["model"], models["keep"], models["teacher"], strict=True)
    }


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
