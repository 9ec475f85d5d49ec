"""Did two stores measure the same thing? What `compare` must know before it subtracts two numbers.

A step's key does not include the code that trained a model, so equal keys are not equal weights: a model is the same
artifact where its files are equal, or where one store holds a copy of the other's step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .interfaces import MambabenchError
from .keys import Fingerprints
from .store import Store, read_json

if TYPE_CHECKING:
    from pandas import DataFrame

    from .results import Results


@dataclass(frozen=True)
class Side:
    """One label of one store."""

    results: Results
    cell: Any
    """A row of `results.cells`."""

    @property
    def step(self) -> Mapping[str, Any]:
        return self.results.step(self.cell["store"], self.cell["key"])

    @property
    def folder(self) -> Path:
        """The store's folder."""
        return self.results.folder(self.cell["store"])

    @property
    def subject(self) -> str | None:
        """The step that made what was measured; None where answers are recorded ones."""
        return self.results.subject(self.cell["store"], self.cell["key"])

    def has_artifact(self) -> bool:
        """Whether the files of what was measured are still there."""
        return self.subject is None or Store(self.folder).artifact(self.subject).is_dir()

    def frame(self, name: str) -> DataFrame:
        """The records of this label: a step that serves several seeds or models has its own rows for each model."""
        frame: DataFrame = getattr(self.results, name)
        return frame[
            (frame["key"] == self.cell["key"])
            & (frame["model"] == self.cell["model"])
            & (frame["decoder"] == self.cell["decoder"])
            & (frame["suite"] == self.cell["suite"])
        ]

    def is_exact(self) -> bool:
        """Whether the suite holds a decoder against its reference: what it counts has no error of sampling."""
        suites = self.results.suites
        of = suites[(suites["store"] == self.cell["store"]) & (suites["suite"] == self.cell["suite"])]
        return any("pair" in traits for traits in of["traits"])

    def decoding(self) -> list[dict[str, Any]]:
        """The decoder and the reference as configured, whatever the plan calls them."""
        step = self.step
        return [
            {name: value for name, value in (step.get(role) or {}).items() if name != "plan_name"}
            for role in ("decoder", "reference")
        ]

    def machine(self) -> dict[str, Any]:
        """What ran the step: the kind of device and its name (`cpu`, or `gpu`, `gpu0`, … of an environment).

        The step's own environment says it; that of the last run, which may have had another machine, only if it must.
        """
        # Of stored answers, what wrote them.
        ran = self.step.get("inputs", {}).get("answers", self.cell["key"])
        record = self.results.outcome(self.cell["store"], ran)
        device = str(record.get("detail", {}).get("device", "")).partition(":")[0]
        prefix = "gpu" if device.startswith("cuda") else "cpu"
        own, run = (
            sorted({value for name, value in environment.items() if name.startswith(prefix)})
            for environment in (record.get("environment", {}), self.results.environment)
        )
        return {"device": device, prefix: ", ".join(own or run)}

    def threads(self) -> int | None:
        """How many a CPU ran the step with; None of a GPU's steps, whose speed is not theirs."""
        detail = self.results.outcome(self.cell["store"], self.cell["key"]).get("detail", {})
        return detail.get("threads") if detail.get("device") == "cpu" else None

    def is_same(self, other: Side) -> bool:
        """Whether both are one and the same measurement: the same step, begun at the same moment."""
        return bool(self.cell["key"] == other.cell["key"] and self.cell["started"] == other.cell["started"])


def differs(base: Side, head: Side) -> str:
    """Why two finished cells cannot be compared; empty if they can."""
    before, after = base.step, head.step
    for part in ("name", "revision", "config"):
        old, new = before["component"].get(part), after["component"].get(part)
        if part == "config" and isinstance(old, Mapping) and isinstance(new, Mapping):
            old, new = _both_know(old, new), _both_know(new, old)
        if old != new:
            return f"the suites differ ({_difference(part, old, new)})"
    data = [
        {name: entry.get("step") or entry.get("fingerprint") for name, entry in step.get("data", {}).items()}
        for step in (before, after)
    ]
    if data[0] != data[1]:
        names = [name for name in {**data[0], **data[1]} if data[0].get(name) != data[1].get(name)]
        return f"the data differ ({', '.join(names)})"
    machines = base.machine(), head.machine()
    if machines[0] != machines[1]:
        name = next(name for name in {**machines[0], **machines[1]} if machines[0].get(name) != machines[1].get(name))
        return f"the devices differ ({machines[0].get(name)} and {machines[1].get(name)})"
    return ""


def _both_know(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Without the options that are off here and that the other side's code did not have: they changed nothing."""
    return {name: value for name, value in config.items() if value or name in other}


def _difference(part: str, old: Any, new: Any) -> str:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        return f"{key}: {old.get(key)} and {new.get(key)}"
    return f"{part}: {old} and {new}"


def same_artifact(base: Side, head: Side) -> bool:
    """Whether both sides measured the same weights, or the same recorded answers."""
    if base.is_same(head):
        return True
    key = base.subject
    if key != head.subject:
        return False
    if key is None:
        # Recorded answers are data, which do not differ, and no weights are behind them.
        return True
    stores = [Store(side.folder) for side in (base, head)]
    if stores[0].path.resolve() == stores[1].path.resolve():
        return True
    records = [_outcome(store, key) for store in stores]
    if (
        all(records)
        and records[0].get("started") is not None
        and records[0].get("started") == records[1].get("started")
    ):
        return True
    folders = [store.artifact(key) for store in stores]
    return all(folder.is_dir() for folder in folders) and _contents(folders[0]) == _contents(folders[1])


def _outcome(store: Store, key: str) -> Mapping[str, Any]:
    try:
        return read_json(store.finished(key) / "outcome.json")
    except MambabenchError:
        return {}


def _contents(folder: Path) -> dict[str, str]:
    """The files of an artifact by content; the harness's own note of who made it does not count."""
    known = Fingerprints()
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / "artifact.json")
    contents = {file.relative_to(folder).as_posix(): known.path(file) for file in files}
    known.save()
    return contents
