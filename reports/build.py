"""A report as data: tables in order, plots, environment. A pure function of results; renderers only print it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..harness.interfaces import Table
from ..harness.results import Results
from .cells import CHECK
from .invariants import problems
from .provenance import NOTE, marked, other_code

if TYPE_CHECKING:
    from pandas import DataFrame

ORDER = (
    *("quality", "recall", "recall-distance", "agreement", "distillation", "differences", "speculation"),
    *("speed", "acceptance", "acceptance-map", "rounds", "losslessness"),
    *("cost", "steps"),
)
"""Built-in tables in this order, those of plug-ins before the last of them."""


@dataclass(frozen=True, slots=True)
class Section:
    """One table. Its frame has a column `check` where a row breaks an invariant, and a dagger after the names of models
    that other code made."""

    name: str
    title: str
    note: str
    frame: DataFrame


@dataclass(frozen=True, slots=True)
class Plot:
    name: str
    title: str
    note: str
    svg: str
    """Text takes the surrounding page's colour (`currentColor`)."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A table whose code failed: shown, and no reason to lose the others."""

    name: str
    error: str


@dataclass(frozen=True, slots=True)
class Report:
    title: str
    summary: tuple[str, ...]
    """Sentences on what was run and what did not end well."""
    sections: tuple[Section, ...]
    plots: tuple[Plot, ...]
    broken: tuple[Broken, ...]
    environment: Mapping[str, str]
    plans: Mapping[str, str]
    """The plans' texts by store."""


def build(results: Results, tables: Mapping[str, Callable[[], Table]], with_plots: bool = True) -> Report:
    """Makes a report of every table that has something to show. A table that cannot be made spoils no other."""
    sections: list[Section] = []
    frames: dict[str, DataFrame] = {}
    broken: list[Broken] = []
    older = other_code(results)
    for name in _ordered(tables):
        try:
            table = tables[name]()
            frame = table.frame(results)
            if frame is not None and len(frame):
                frame = checked(frame, results)
                sections.append(_section(name, table, frame, older))
                frames[name] = frame
        except (Exception, SystemExit) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
            broken.append(Broken(name, f"{type(error).__name__}: {error} ({place})"))
    plots: tuple[Plot, ...] = ()
    if with_plots:
        from .plots import plots_of

        plots = plots_of(frames, results)
    return Report(
        title=", ".join(dict.fromkeys(str(plan.get("name", store)) for store, plan in results.plan.items())),
        summary=_summary(results, older),
        sections=tuple(sections),
        plots=plots,
        broken=tuple(broken),
        environment=results.environment,
        plans={store: str(plan.get("toml", "")) for store, plan in results.plan.items()},
    )


def checked(frame: DataFrame, results: Results) -> DataFrame:
    """The frame with a column `check`, last, where a row breaks an invariant or its table already says so."""
    found = problems(frame, results)
    given = [str(cell or "") for cell in frame[CHECK]] if CHECK in frame else [""] * len(frame)
    notes = ["; ".join(part for part in (own, *more) if part) for own, more in zip(given, found, strict=True)]
    bare = frame.drop(columns=CHECK, errors="ignore")
    return bare.assign(**{CHECK: notes}) if any(notes) else bare


def _section(name: str, table: Table, frame: DataFrame, older: Mapping[str, str]) -> Section:
    shown = marked(frame, older)
    return Section(name, table.title, table.note if shown is frame else f"{table.note} {NOTE}".strip(), shown)


def _ordered(tables: Iterable[str]) -> list[str]:
    known = [name for name in ORDER if name in tables]
    others = [name for name in tables if name not in ORDER]
    last = [name for name in known if name == ORDER[-1]]
    return [*(name for name in known if name not in last), *others, *last]


def _summary(results: Results, older: Mapping[str, str]) -> tuple[str, ...]:
    cells, sentences = results.cells, []
    states = cells["state"].value_counts()
    failed = {state: int(n) for state, n in states.items() if state not in ("ok", "skipped")}
    models, teachers = len(results.models), len(results.teachers)
    sentences.append(
        f"{models} model{'s' if models != 1 else ''}, of which {teachers} teacher{'s' if teachers != 1 else ''}; "
        f"{int(states.get('ok', 0))} of {len(cells)} cells are done"
        + (f", {int(states['skipped'])} skipped by the plan" if "skipped" in states else "")
        + "."
    )
    if failed:
        sentences.append(
            "Not done: " + ", ".join(f"{n} {state}" for state, n in failed.items()) + "; the last table says why."
        )
    for store, plan in results.plan.items():
        code = plan.get("code", {})
        revision = (
            f" ({str(code['revision'])[:10]}{', with changes' if code.get('dirty') else ''})"
            if code.get("revision")
            else ""
        )
        seeds = plan.get("seeds", [])
        sentences.append(
            f"{store}: plan {str(plan.get('sha256', ''))[:10]}, seeds {', '.join(map(str, seeds))}, "
            f"mambabench {code.get('version', 'of unknown version')}{revision}."
        )
    if older:
        named = ", ".join(f"{model} ({made})" for model, made in older.items())
        sentences.append(f"{NOTE.removesuffix('.')}: {named}.")
    return tuple(sentences)
