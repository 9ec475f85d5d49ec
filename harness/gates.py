"""Gates: what change of which metric of which label is too much. Declared before the run, in a small TOML file.

[default]
level = 0.99            # of the intervals
quality = 0.01          # margins by class of metric: absolute for quality,
latency = 0.03          # relative for latency
counts = 0.0            # and counts

[[gate]]                # the last gate that matches decides
labels = "half/*"       # a glob over model/decoder/suite
metric = "acc"          # a glob over `task/metric`, its last part, or the first word of a latency or count
margin = 0.02
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .config import show
from .interfaces import MambabenchError
from .plugins import suggest

LEVEL = 0.99
MARGINS: Mapping[str, float] = {"quality": 0.01, "latency": 0.03, "counts": 0.0}
"""Default margins by class of metric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What holds for the labels and metrics that match; None leaves what held before."""

    labels: str = "*"
    metric: str = "*"
    margin: float | None = None
    level: float | None = None
    noise: float | None = None
    """Standard deviation between processes of a logarithm of latency; without it, the stores' own, or 0.02 of
    `tpot` and 0.15 of `ttft`."""
    ignore: bool | None = None
    """Leave these out of the comparison."""

    def matches(self, label: str, metric: str) -> bool:
        """Whether the globs fit a label (with or without its seed) and a metric."""
        names = {label, label.partition("@")[0]}
        metrics = {metric, metric.rpartition("/")[2], metric.partition(" ")[0]}
        return any(fnmatchcase(name, self.labels) for name in names) and any(
            fnmatchcase(name, self.metric) for name in metrics
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What holds for one label and metric."""

    margin: float
    level: float
    noise: float | None
    ignore: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    margins: Mapping[str, float] = field(default_factory=lambda: MARGINS)
    default: Gate = Gate(level=LEVEL, ignore=False)
    gates: tuple[Gate, ...] = ()
    fitted: set[int] = field(default_factory=set, compare=False)
    """Which of `gates` any rule came from."""

    def rule(self, label: str, metric: str, of: str) -> Rule:
        """The rule for a metric of class `of` (`quality`, `latency`, `counts`)."""
        held = replace(self.default, margin=self.margins[of])
        for index, gate in enumerate(self.gates):
            if gate.matches(label, metric):
                self.fitted.add(index)
                held = replace(
                    held, **{f.name: value for f in fields(gate) if (value := getattr(gate, f.name)) is not None}
                )
        assert held.margin is not None
        return Rule(margin=held.margin, level=held.level or LEVEL, noise=held.noise, ignore=bool(held.ignore))

    @property
    def idle(self) -> list[int]:
        """Which of `gates` fitted no label and metric so far: a slip of the pen there changes nothing in silence."""
        return [index for index in range(len(self.gates)) if index not in self.fitted]


_TEXTS = ("labels", "metric")
_NUMBERS = ("margin", "level", "noise")


def read_gates(file: Path) -> Gates:
    """Reads gates. Raises MambabenchError in one line that names the file and the key."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MambabenchError(f"{file}: no such file of gates") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MambabenchError(f"{file}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise MambabenchError(f"{file}: not valid TOML: {error}") from None
    try:
        return _gates(table)
    except ValueError as error:
        raise MambabenchError(f"{file}: {error}") from None


def _gates(table: Mapping[str, Any]) -> Gates:
    _known(table, ("default", "gate"), "")
    default = _table(table.get("default", {}), "default")
    _known(default, (*MARGINS, "level", "noise", "ignore"), "default.")
    listed = table.get("gate", [])
    if not isinstance(listed, list):
        raise ValueError(f"gate: expected tables written [[gate]], got {show(listed)}")
    gates = []
    for index, one in enumerate(listed):
        where = f"gate.{index}"
        _known(_table(one, where), (*_TEXTS, *_NUMBERS, "ignore"), f"{where}.")
        gates.append(Gate(**{key: _value(key, value, f"{where}.{key}") for key, value in one.items()}))
    checked = {key: _value(key, value, f"default.{key}") for key, value in default.items()}
    margins = {name: checked.pop(name, margin) for name, margin in MARGINS.items()}
    return Gates(margins=margins, default=replace(Gates().default, **checked), gates=tuple(gates))


def _known(table: Mapping[str, Any], names: tuple[str, ...], prefix: str) -> None:
    for key in table:
        if key not in names:
            raise ValueError(f"{prefix}{key}: unknown key{suggest(key, names)}")


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a table, got {show(value)}")
    return value


def _value(key: str, value: Any, where: str) -> Any:
    if key == "ignore":
        if not isinstance(value, bool):
            raise ValueError(f"{where}: expected true or false, got {show(value)}")
        return value
    if key in _TEXTS:
        if not isinstance(value, str):
            raise ValueError(f"{where}: expected a text in quotes, got {show(value)}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: expected a number, got {show(value)}")
    if key == "level" and not 0.5 <= value < 1:
        raise ValueError(f"{where}: expected a level from 0.5 to below 1, got {show(value)}")
    if value < 0:
        raise ValueError(f"{where}: expected a number that is not negative, got {show(value)}")
    return float(value)
