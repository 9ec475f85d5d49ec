"""A report as data: tables in order, plots, environment. A pure function of results; renderers only print it."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..harness.interfaces import Table
from ..harness.results import Results
from ..harness.store import read_json
from .cells import CHECK
from .invariants import problems

if TYPE_CHECKING:
    from pandas import DataFrame

ORDER = ("quality", "speed", "acceptance", "losslessness", "cost", "steps")
"""Built-in tables in this order, those of plug-ins before the last of them."""


@dataclass(frozen=True, slots=True)
class Section:
    """One table. Its frame has a column `check` where a row breaks an invariant."""

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


def build(results: Results, tables: Mapping[str, Table], with_plots: bool = True) -> Report:
    """Makes a report of every table that has something to show."""
    sections, broken = [], []
    for name in _ordered(tables):
        table = tables[name]
        try:
            frame = table.frame(results)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
            broken.append(Broken(name, f"{type(error).__name__}: {error} ({place})"))
            continue
        if frame is not None and len(frame):
            sections.append(Section(name, table.title, table.note, checked(frame, results)))
    plots: tuple[Plot, ...] = ()
    if with_plots:
        from .plots import plots_of

        plots = plots_of({section.name: section.frame for section in sections}, results)
    return Report(
        title=", ".join(dict.fromkeys(str(plan.get("name", store)) for store, plan in results.plan.items())),
        summary=_summary(results),
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


def _ordered(tables: Mapping[str, Table]) -> list[str]:
    known = [name for name in ORDER if name in tables]
    others = [name for name in tables if name not in ORDER]
    last = [name for name in known if name == ORDER[-1]]
    return [*(name for name in known if name not in last), *others, *last]


def _summary(results: Results) -> tuple[str, ...]:
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
    older = _other_code(results)
    if older:
        sentences.append(f"Made by other code than this run's: {', '.join(older)}.")
    return tuple(sentences)


def _other_code(results: Results) -> list[str]:
    """Measured models whose artifact was made by another revision than that of the run, with that revision."""
    found = {}
    finished = results.cells[(results.cells["state"] == "ok") & (results.cells["kind"] == "measure")]
    for store, model, key in finished[["store", "model", "key"]].itertuples(index=False):
        subject = results.step(store, key).get("inputs", {}).get("subject")
        note = results.folder(store) / "steps" / str(subject) / "artifact" / "artifact.json"
        if subject is None or not note.is_file():
            continue
        made = read_json(note).get("code", {}).get("revision")
        if made != results.plan[store]["code"].get("revision"):
            found[model] = f"{model} ({str(made)[:10]})"
    return list(found.values())
