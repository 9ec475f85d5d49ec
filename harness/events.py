"""The recorder: every record of a step is one line of events.jsonl, written before `emit` returns.

When the step has ended well its records become parquet files, one per kind. An interrupted step keeps its lines; a new
attempt starts with a line of its own, and only losses of earlier attempts count (a resumed training repeats none, and
has none of its own where nothing was left to train).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .interfaces import MambabenchError
from .store import disk_errors

EVENTS = "events.jsonl"
ATTEMPT = "attempt"
"""The event that begins an attempt; written by the recorder only."""

FIELDS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "sample": {"task": (str,), "item": (str,), "metric": (str,), "value": (int, float)},
    "burst": {"arm": (str,), "block": (int,), "row": (int,), "burst": (int,), "at_s": (int, float), "tokens": (int,)},
    "round": {
        "arm": (str,), "block": (int,), "row": (int,), "round": (int,), "drafted": (int,), "accepted": (int,)
    },
    "loss": {"step": (int,), "tokens": (int,), "loss": (int, float)},
    "fact": {"name": (str,)},
    "progress": {"done": (int, float), "total": (int, float)},
}  # fmt: skip
"""What a record of each known kind must have. Kinds that are not listed are kept as they are."""

FILES = {"sample": "samples", "burst": "timings", "round": "rounds", "loss": "losses"}
FACT = {"name": "", "value": None, "unit": "", "arm": ""}


class Recorder:
    """The `Emit` of a step. Appends with single writes, so that threads and forked workers may share it."""

    def __init__(self, folder: Path, key: str, *, attempt: int = 1) -> None:
        self.folder, self.key = folder, key
        self.first: float | None = None
        """When the first record came through `emit`, on the monotonic clock; of suites that is the progress that they
        tell once their models are there."""
        self.last: float | None = None
        self._lost = ""
        """Why a record is not on disk, or not whole; none may follow it then, nor the attempt end well."""
        self._began = time.monotonic()
        self._path = folder / EVENTS
        with disk_errors(self._path):
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            size = os.fstat(self._descriptor).st_size
            if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
                os.write(self._descriptor, b"\n")
        self._write({"kind": ATTEMPT, "t": 0.0, "attempt": attempt})

    def __call__(self, kind: str, /, **fields: Any) -> None:
        now = time.monotonic()
        values = {name: plain(value) for name, value in fields.items()}
        check(kind, values)
        self._write({"kind": kind, "t": round(now - self._began, 6), **values})
        self.first = now if self.first is None else self.first
        self.last = now

    def finish(self) -> list[dict[str, Any]]:
        """Writes the parquet files and returns the facts, those of the same name and arm once, the last one."""
        self._check_whole()
        os.fsync(self._descriptor)
        rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in FILES}
        facts: dict[tuple[str, str], dict[str, Any]] = {}
        for event in counted(self._path):
            kind = event.pop("kind")
            if kind == "sample":
                event = {"weight": 1.0, "cluster": event["item"], "better": "higher", **event}
            if kind in rows:
                rows[kind].append(event)
            elif kind == "fact":
                fact: dict[str, Any] = {name: event.get(name, default) for name, default in FACT.items()}
                facts[fact["name"], fact["arm"]] = fact
        for kind, events in rows.items():
            if events:
                write_parquet(self.folder / f"{FILES[kind]}.parquet", self.key, kind, events)
        return list(facts.values())

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self, event: Mapping[str, Any]) -> None:
        line = json.dumps(event, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        self._check_whole()
        try:
            with disk_errors(self._path):
                while line:
                    line = line[os.write(self._descriptor, line) :]
        except MambabenchError as error:
            self._lost = str(error)
            raise

    def _check_whole(self) -> None:
        if self._lost:
            raise MambabenchError(self._lost)


class Muted:
    """The `Emit` of a process whose records another one writes."""

    first: float | None = None
    last: float | None = None

    def __call__(self, kind: str, /, **fields: Any) -> None:
        """Keeps nothing."""

    def finish(self) -> list[dict[str, Any]]:
        """Has nothing to write."""
        return []


def plain(value: Any) -> Any:
    """A value as JSON has it: scalars of numpy and torch become Python's, infinite and undefined numbers None."""
    if isinstance(value, bool | str | int) or value is None:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise MambabenchError(f"a record cannot hold a {type(value).__name__}: {value!r:.80}")


def check(kind: str, values: Mapping[str, Any]) -> None:
    """Refuses a record that could not be read back as what it says it is."""
    if kind == ATTEMPT:
        raise MambabenchError(f"the record kind {kind!r} is the harness's own")
    if kind == "sample" and "value" in values and values["value"] is None:
        which = f"{values.get('task')}, item {values.get('item')}"
        raise MambabenchError(f"metric {values.get('metric')!r} of {which} is not a finite number")
    if kind == "loss" and values.get("loss", 0.0) is None:
        values = {**values, "loss": 0.0}
    for name, types in FIELDS.get(kind, {}).items():
        if name not in values:
            raise MambabenchError(f"a {kind!r} record lacks {name!r}; it has {', '.join(values) or 'nothing'}")
        value = values[name]
        if not isinstance(value, types) or (isinstance(value, bool) and kind != "sample"):
            wanted = " or ".join(each.__name__ for each in types)
            raise MambabenchError(f"{name!r} of a {kind!r} record is {value!r:.40}, where {wanted} would be right")


def events(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of an events.jsonl. A line that a kill cut short may only end an attempt."""
    cut = ""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                event = json.loads(line)
                kind = event["kind"]
            except (ValueError, TypeError, KeyError):
                cut = cut or f"{path}: line {number} is not a whole record"
                continue
            if cut and kind != ATTEMPT:
                raise MambabenchError(cut)
            cut = ""
            yield event


def counted(path: Path) -> list[dict[str, Any]]:
    """The records of the last attempt, and the losses of earlier ones from before the step where it took over."""
    attempts: list[list[dict[str, Any]]] = [[]]
    for event in events(path):
        if event["kind"] == ATTEMPT:
            attempts.append([])
        else:
            attempts[-1].append(event)
    last = attempts.pop()
    for earlier in reversed(attempts):
        begin = min((event["step"] for event in last if event["kind"] == "loss"), default=math.inf)
        last = [event for event in earlier if event["kind"] == "loss" and event["step"] < begin] + last
    return last


def write_parquet(path: Path, key: str, kind: str, rows: list[dict[str, Any]]) -> None:
    """Writes records of one kind with their step's key; a column of mixed types is kept as JSON text."""
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, Any] = {"key": pyarrow.array([key] * len(rows), pyarrow.string())}
    known = {"t": (int, float), "weight": (int, float), **FIELDS[kind]}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if float in known.get(name, ()):
            columns[name] = pyarrow.array([None if v is None else float(v) for v in values], pyarrow.float64())
            continue
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            columns[name] = pyarrow.array([None if v is None else json.dumps(v) for v in values], pyarrow.string())
    with disk_errors(path):
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
