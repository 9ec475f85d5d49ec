"""Which models were made by other code than that of the run: training keys leave the code out, so a report must say."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..harness.interfaces import MambabenchError
from ..harness.store import read_json

if TYPE_CHECKING:
    from pandas import DataFrame

    from ..harness.results import Results

DAGGER = "†"
NOTE = f"{DAGGER} Made by other code than this run's."


def other_code(results: Results) -> dict[str, str]:
    """Measured models that other code made, as a whole or in an earlier stage of their own; with that code."""
    found: dict[str, str] = {}
    ended, measured = (cells[cells["state"] == "ok"] for cells in (results.cells, results.measured))
    for store, cells in ended.groupby("store", sort=False):
        steps, ran = results.folder(str(store)) / "steps", results.plan[str(store)]["code"]
        taught = set(cells.loc[cells["model"].isin(results.teachers), "key"])
        for model, of in measured[measured["store"] == store].groupby("model", sort=False):
            for subject in dict.fromkeys(results.subject(str(store), key) or "" for key in of["key"]):
                codes = _codes(steps, subject, () if subject in taught else taught)
                told = [_named(code) for code in codes if _differs(code, ran)]
                if told:
                    found.setdefault(str(model), told[0])
    return found


def marked(frame: DataFrame, models: Collection[str]) -> DataFrame:
    """The frame with a dagger on the names of these models."""
    if "model" not in frame or not frame["model"].isin(list(models)).any():
        return frame
    return frame.assign(model=[f"{name} {DAGGER}" if name in models else name for name in frame["model"]])


def is_marked(name: object) -> bool:
    return isinstance(name, str) and name.endswith(f" {DAGGER}")


def unmarked(name: Any) -> Any:
    """A model's name as the plan has it."""
    return name.removesuffix(f" {DAGGER}") if is_marked(name) else name


def _codes(steps: Path, key: str, stop: Collection[str]) -> Iterator[Mapping[str, Any]]:
    """The code of an artifact and of those that it was made from, the last first; {} where it is not known."""
    while key and key not in stop:
        folder = steps / key
        if (folder / "artifact").is_dir():
            yield _read(folder / "artifact" / "artifact.json", "code") or _read(folder / "outcome.json", "code")
        key = _input(folder, "parent")


def _input(folder: Path, role: str) -> str:
    return str(_read(folder / "step.json", "inputs").get(role, ""))


def _read(file: Path, name: str) -> Mapping[str, Any]:
    """A table of a file, empty where there is none: what is not known must not keep the report from being made."""
    try:
        return dict(read_json(file).get(name) or {})
    except MambabenchError:
        return {}


def _differs(code: Mapping[str, Any], ran: Mapping[str, Any]) -> bool:
    known = [name for name in ("version", "revision", "dirty") if name in ran and name in code]
    return bool(ran) and (not known or any(code[name] != ran[name] for name in known))


def _named(code: Mapping[str, Any]) -> str:
    """A revision, or a version where there was no checkout."""
    if not code:
        return "unknown code"
    name = str(code["revision"])[:10] if code.get("revision") else f"version {code.get('version')}"
    return f"{name} with changes" if code.get("dirty") else name
