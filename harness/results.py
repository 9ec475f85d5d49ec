"""What stores hold, as data frames: the input of every table, report and comparison.

Nothing is derived here beyond joining records with the labels of the plan. A step that serves several seeds or models
(a model that no seed changes) gives its records once per model, decoder and suite, so that nothing is counted twice.
A failure stays a state with a reason in `cells`; it has no records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from .events import EVENTS, events
from .interfaces import MISSING, MambabenchError
from .store import Store, inputs_of

WHO = ("store", "label", "key", "model", "decoder", "suite", "stage", "seed")
"""The columns that every frame of records has besides its own."""

FRAMES: Mapping[str, tuple[str, ...]] = {
    "samples": ("task", "item", "metric", "value", "weight", "cluster", "better"),
    "timings": ("arm", "block", "row", "burst", "at_s", "tokens"),
    "rounds": ("arm", "block", "row", "round", "drafted", "accepted"),
    "losses": ("step", "tokens", "loss"),
}
"""The parquet files of a step and the columns that are always there, even in an empty frame."""

MEASURED = ("measure", "judge")
"""Kinds of steps that are rows of tables: what a model scored, at once or in answers that were stored before."""

UNASKED = "no run was asked for it"
FACTS = ("name", "value", "unit", "arm")
CELLS = (
    *("store", "label", "key", "kind", "model", "decoder", "suite", "stage", "seed", "state", "reason"),
    *("wall_s", "overhead_s", "started", "attempt", "device", "threads", "peak_rss_bytes", "unfused", "asked"),
)


@dataclass(frozen=True)
class Results:
    """The contents of one or more stores. With more than one, models are named `store:model`."""

    stores: tuple[Path, ...]
    cells: pd.DataFrame
    """One row per label in plan order; `state` as of outcomes, or `interrupted`, `skipped`, `not run`. The `reason`
    beside `ok` is why a step did without some of its tasks. `asked` is false of what is not run where no run of the
    store was asked for it, as with `--only`."""
    models: pd.DataFrame
    """In plan order, the teacher first: store, model, backend, keep, teacher, order."""
    suites: pd.DataFrame
    """store, suite, use, traits (a frozen set)."""
    decoders: tuple[str, ...]
    """Names in plan order; the first is the reference of the others."""
    environment: Mapping[str, str]
    """Of the runs; where stores differ, their values in order."""
    plan: Mapping[str, Mapping[str, Any]]
    """By store: name, sha256, toml, seeds, and the code that ran it as `code`."""

    @classmethod
    def read(cls, stores: Sequence[Path]) -> Results:
        """Reads stores. Raises MambabenchError for a folder that is no store, or one of a newer schema."""
        if not stores:
            raise MambabenchError("no store was given")
        opened = dict(zip(_names(stores), (Store.open(Path(path)) for path in stores), strict=True))
        runs = {name: store.run() for name, store in opened.items()}
        several = len(runs) > 1
        cells = pd.DataFrame(_cells(opened, runs), columns=list(CELLS))
        cells = cells.astype({"asked": bool})
        cells["seed"] = pd.to_numeric(cells["seed"]).astype("Int64")
        models = pd.DataFrame(
            [
                {
                    "store": name,
                    "model": model["name"],
                    "order": order,
                    **{k: model.get(k) for k in ("backend", "keep")},
                }
                | {"teacher": bool(model.get("teacher"))}
                for name, run in runs.items()
                for order, model in enumerate(run.get("models", ()))
            ],
            columns=["store", "model", "backend", "keep", "teacher", "order"],
        )
        if several:
            for frame in (cells, models):
                named = frame["model"].fillna("") != ""
                frame.loc[named, "model"] = frame["store"][named] + ":" + frame["model"][named]
        suites = pd.DataFrame(
            [
                {"store": name, "suite": suite["name"], "use": suite["use"], "traits": frozenset(suite["traits"])}
                for name, run in runs.items()
                for suite in run.get("suites", ())
            ],
            columns=["store", "suite", "use", "traits"],
        )
        return cls(
            stores=tuple(Path(path) for path in stores),
            cells=cells,
            models=models,
            suites=suites,
            decoders=tuple(dict.fromkeys(name for run in runs.values() for name in run.get("decoders", ()))),
            environment=_merged([run.get("environment", {}) for run in runs.values()]),
            plan={name: {**run.get("plan", {}), "code": run.get("code", {})} for name, run in runs.items()},
        )

    @property
    def teachers(self) -> list[str]:
        return list(self.models.loc[self.models["teacher"], "model"])

    @cached_property
    def measured(self) -> pd.DataFrame:
        """The cells of what models scored."""
        return self.cells[self.cells["kind"].isin(MEASURED)]

    @cached_property
    def samples(self) -> pd.DataFrame:
        return self._records("samples")

    @cached_property
    def timings(self) -> pd.DataFrame:
        return self._records("timings")

    @cached_property
    def rounds(self) -> pd.DataFrame:
        return self._records("rounds")

    @cached_property
    def losses(self) -> pd.DataFrame:
        return self._records("losses")

    @cached_property
    def facts(self) -> pd.DataFrame:
        """One row per fact that a step told of itself, with the step's `kind`."""
        rows = [
            {
                **{column: owner[column] for column in (*WHO, "kind")},
                **{column: fact.get(column, "") for column in FACTS},
            }
            for owner in self._owners.to_dict("records")
            for fact in self.outcome(owner["store"], owner["key"]).get("facts", ())
        ]
        return pd.DataFrame(rows, columns=[*WHO, "kind", *FACTS])

    def step(self, store: str, key: str) -> Mapping[str, Any]:
        """What a finished step was asked to do (`step.json`)."""
        return self._opened[store].step(key)

    def subject(self, store: str, key: str) -> str | None:
        """The step that made the model which a measuring step is about, or which gave the answers to a judging step;
        None where answers are recorded ones."""
        step = self.step(store, key)
        return step.get("subject") or step.get("inputs", {}).get("subject")

    def is_excused(self, store: str, key: str) -> bool:
        """Whether a cell is one that the plan skips, or its step cannot run here, or waits for such steps alone."""
        state = self._opened[store].state(key) if key else "skipped"
        if state != "blocked":
            return state in ("skipped", "unsupported")
        needed = inputs_of(self.step(store, key))
        failed = [each for each in needed if self._opened[store].status(each, artifacts=False).state != "ok"]
        return bool(failed) and all(self.is_excused(store, each) for each in failed)

    def outcome(self, store: str, key: str) -> Mapping[str, Any]:
        """How a step ended (`outcome.json`, all of it)."""
        return self._opened[store].outcome(key, artifacts=False) or {}

    def events(self, store: str, key: str) -> Iterator[dict[str, Any]]:
        """All records of a finished step, those of attempts that did not end well too."""
        file = self._opened[store].records(key, EVENTS)
        return events(file) if file else iter(())

    def folder(self, store: str) -> Path:
        """Where a store of `cells` lies."""
        return self._opened[store].path

    @cached_property
    def _opened(self) -> Mapping[str, Store]:
        return dict(zip(_names(self.stores), (Store.open(path) for path in self.stores), strict=True))

    @cached_property
    def _owners(self) -> pd.DataFrame:
        """Finished cells, one per step and what it is about: seeds that share a step are one row, the first's."""
        finished = self.cells[self.cells["state"] == "ok"]
        return finished.drop_duplicates(["store", "key", "model", "decoder", "suite", "stage"])

    def _records(self, name: str) -> pd.DataFrame:
        columns = FRAMES[name]
        tables = []
        for store, opened in self._opened.items():
            keys = self._owners.loc[self._owners["store"] == store, "key"].unique()
            files = [file for key in keys if (file := opened.records(key, f"{name}.parquet"))]
            if files:
                tables.append(_dataset(files).assign(store=store))
        if not tables:
            return pd.DataFrame(columns=[*WHO, *columns])
        records = pd.concat(tables, ignore_index=True)
        missing = [column for column in columns if column not in records]
        if missing:
            raise MambabenchError(f"{name}.parquet in {self.stores[0]} has no column {missing[0]!r}")
        joined = self._owners[list(WHO)].merge(records, on=["store", "key"], how="inner", sort=False)
        others = [column for column in joined if column not in (*WHO, *columns)]
        return joined[[*WHO, *columns, *others]]


def _names(stores: Sequence[Path]) -> list[str]:
    """Folder names, or whole paths where two are alike."""
    names = [Path(path).resolve().name for path in stores]
    if len(set(names)) == len(names):
        return names
    names = [str(path) for path in stores]
    for name in names:
        if names.count(name) > 1:
            raise MambabenchError(f"{name}: this store was given twice")
    return names


def _cells(stores: Mapping[str, Store], runs: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for name, run in runs.items():
        # Stores of older versions do not say it.
        asked = set(run.get("asked", (cell["label"] for cell in run.get("cells", ()))))
        for cell in run.get("cells", ()):
            row: dict[str, Any] = {**dict.fromkeys(CELLS), **{column: cell.get(column, "") for column in CELLS[1:9]}}
            row |= {"store": name, "asked": True}
            if cell.get("why"):
                yield {**row, "state": "skipped", "reason": cell["why"]}
                continue
            status = stores[name].status(cell["key"], artifacts=False)
            if status.state == "absent":
                left_out = cell["label"] not in asked
                yield {**row, "state": "not run", "reason": UNASKED if left_out else "", "asked": not left_out}
                continue
            record = status.record or {}
            detail = record.get("detail", {})
            yield {
                **row,
                "state": status.state,
                "reason": status.reason or _missing(record.get("facts", ())),
                **{column: record.get(column) for column in ("wall_s", "started", "attempt")},
                **{column: detail.get(column) for column in ("device", "threads", "peak_rss_bytes")},
                "overhead_s": _overhead(record.get("wall_s"), detail),
                "unfused": _unfused(detail.get("kernels", {})),
            }


def _overhead(wall: float | None, detail: Mapping[str, Any]) -> float | None:
    """Seconds from a step's start to its first record and from its last record to its end."""
    first, last = detail.get("first_record_s"), detail.get("last_record_s")
    return None if first is None or last is None or wall is None else float(first + wall - last)


def _missing(facts: Sequence[Mapping[str, Any]]) -> str:
    """Why a step that ended well did without some of its tasks."""
    return "; ".join(str(fact["value"]) for fact in facts if fact["name"] == MISSING)


def _unfused(kernels: Mapping[str, Mapping[str, Any]]) -> str:
    """The operations that no fused kernel ran on a GPU, and why."""
    plain = (f"{name} ({'; '.join(how['reasons'])})" for name, how in kernels.items() if not how["fused"])
    return ", ".join(plain)


def _dataset(files: Sequence[Path]) -> pd.DataFrame:
    """Reads parquet files of steps as one data set; columns may differ between files."""
    schema = pa.unify_schemas([pq.read_schema(file) for file in files], promote_options="permissive")
    return ds.dataset([str(file) for file in files], schema=schema, format="parquet").to_table().to_pandas()


def _merged(environments: Sequence[Mapping[str, str]]) -> dict[str, str]:
    keys = dict.fromkeys(key for environment in environments for key in environment)
    return {
        key: " | ".join(dict.fromkeys(str(environment.get(key, "not known")) for environment in environments))
        for key in keys
    }
