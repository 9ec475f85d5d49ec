"""Reads a plan: TOML in, checked specifications out. Every mistake is one line: file, key, what would be right."""

from __future__ import annotations

import copy
import hashlib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .config import ConfigError, Structurer, show
from .interfaces import CHECKPOINT_S, Choice, MambabenchError
from .plugins import BUILTIN, Registry, shipped_teacher, suggest

SCHEMA = 1
_SECTIONS = ("schema", "name", "seeds", "teacher", "data", "stages", "models", "decoders", "suites", "skip", "limits")
_CHOSEN = {"data": "source", "stages": "distiller", "models": "backend", "decoders": "decoder", "suites": "suite"}
"""The kind of component that each table of a section chooses with `use`."""
_MODEL_KEYS = ("keep", "train", "start", "path")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    backend: Choice
    path: str | None
    """An absolute folder; None for a teacher that the plan trains."""
    train: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """One entry of `[data]`: a file or folder, or a source."""

    name: str
    file: Path | None = None
    source: Choice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    name: str
    backend: Choice
    selector: Choice | None
    """None for a model that is taken from `path` as it is, or that its first stage makes from nothing."""
    train: tuple[str, ...]
    start: str | None
    path: str | None = None
    """An absolute folder of weights, in place of a parent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    steps: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    timeout: float = 3600.0
    """Seconds a step."""
    train_gpus: int = 1
    """GPUs that train a stage together; on the CPU, processes. The batch stays as it is and is split among them."""
    checkpoint: float = CHECKPOINT_S
    """Seconds between checkpoints of a training; more where writing one takes long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    name: str
    file: Path
    text: str
    seeds: tuple[int, ...]
    teacher: Teacher
    data: Mapping[str, Data]
    stages: Mapping[str, Choice]
    models: Mapping[str, Model]
    decoders: Mapping[str, Choice]
    suites: Mapping[str, Choice]
    skip: tuple[Skip, ...]
    limits: Limits

    @property
    def sha256(self) -> str:
        """Of the plan's text with what `--set` changed."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_plan(file: Path, registry: Registry, overrides: Sequence[str] = ()) -> Plan:
    """Reads and checks a plan. `overrides` are `key.path=value`, the value in TOML or a bare text; `stages.*.tokens`
    means every stage of the plan that has `tokens`, or, where none has, every stage that takes it.

    Raises MambabenchError in one line that names the file and the key.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MambabenchError(f"{file}: no such plan") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MambabenchError(f"{file}: cannot be read: {error}") from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MambabenchError(f"{file}: not valid TOML: {error}") from None
    for override in overrides:
        _override(table, override, registry)
        text += f"\n# --set {override}"
    try:
        return _Reader(file, text, Structurer(registry)).plan(table)
    except ConfigError as error:
        raise MambabenchError(f"{file}: {error}") from None


def _override(table: dict[str, Any], override: str, registry: Registry) -> None:
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise MambabenchError(f"--set {override}: expected KEY.PATH=VALUE, such as models.half.keep=0.25")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    if _put(table, parts, parsed, override):
        return
    options, name = _options(table, parts, registry), parts[-1]
    if not any(name in names for _, names in options):
        hint = suggest(name, {each for _, names in options for each in names})
        raise MambabenchError(f"--set {override}: the plan has nothing of that name{hint}")
    for each, names in options:
        if name in names:
            each[name] = parsed


def _options(
    table: Mapping[str, Any], parts: Sequence[str], registry: Registry
) -> list[tuple[dict[str, Any], list[str]]]:
    """The tables that SECTION.PATTERN.NAME stands for, each with the names of what its component takes."""
    if len(parts) != 3 or parts[0] not in _CHOSEN or not isinstance(section := table.get(parts[0]), dict):
        return []
    known = registry.components(_CHOSEN[parts[0]])
    fitting = [each for key, each in section.items() if fnmatchcase(key, parts[1]) and isinstance(each, dict)]
    chosen = [(each, known.get(str(each.get("use")))) for each in fitting]
    return [(each, [item.name for item in fields(of.config)]) for each, of in chosen if of]


def _put(table: dict[str, Any], parts: Sequence[str], value: Any, override: str, above: str = "") -> bool:
    """Sets a key, whose tables are made where there are none. A part with `*` stands for each table that fits, of which
    only those are changed that have the key. Returns whether there was one."""
    name, *rest = parts
    if not rest:
        if above.count("*") and name not in table:
            return False
        table[name] = value
        return True
    if "*" in name:
        inner = [each for key, each in table.items() if fnmatchcase(key, name) and isinstance(each, dict)]
        return sum(_put(each, rest, value, override, f"{above}{name}.") for each in inner) > 0
    inside = table.get(name, {}) if above.count("*") else table.setdefault(name, {})
    if not isinstance(inside, dict):
        raise MambabenchError(f"--set {override}: {above}{name} is no table of the plan")
    return _put(inside, rest, value, override, f"{above}{name}.")


class _Reader:
    def __init__(self, file: Path, text: str, structurer: Structurer) -> None:
        self.file, self.text, self.structurer = file, text, structurer

    def plan(self, table: dict[str, Any]) -> Plan:
        _known(table, _SECTIONS)
        schema = table.get("schema", SCHEMA)
        if schema != SCHEMA or isinstance(schema, bool):
            raise ConfigError("schema", f"this version reads plans of schema {SCHEMA}, got {show(schema)}")
        stages = self._choices(table, "stages", "distiller")
        decoders = self._choices(table, "decoders", "decoder")
        suites = self._choices(table, "suites", "suite")
        data = {
            name: _at("data", name, lambda v=v, n=name: self._data(n, v))
            for name, v in _tables(table, "data", any_value=True)
        }
        teacher = _at("teacher", "", lambda: self._teacher(table.get("teacher"), stages))
        models = self._models(table, stages)
        if "teacher" in models:
            raise ConfigError("models.teacher", "this name is taken by the teacher, which is always a row")
        seeds = table.get("seeds", [0])
        if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
            raise ConfigError("seeds", f"expected a list of whole numbers, got {show(seeds)}")
        if len(set(seeds)) != len(seeds):
            raise ConfigError("seeds", f"a seed stands there twice: {show(seeds)}")
        limits = _at("limits", "", lambda: _limits(table.get("limits", {})))
        for name, stage in stages.items():
            self._check_shared(name, stage, limits.train_gpus)
        return Plan(
            name=_name("name", table.get("name", self.file.stem)),
            file=self.file,
            text=self.text,
            seeds=tuple(seeds),
            teacher=teacher,
            data=data,
            stages=stages,
            models=models,
            decoders=decoders,
            suites=suites,
            skip=tuple(_at("skip", str(i), lambda e=e: _skip(e)) for i, e in enumerate(_list(table, "skip"))),
            limits=limits,
        )

    def _choices(self, table: Mapping[str, Any], section: str, kind: str) -> dict[str, Choice]:
        return {
            name: _at(section, name, lambda v=value: self.structurer.choice(kind, v))
            for name, value in _tables(table, section)
        }

    def _check_shared(self, name: str, stage: Choice, ranks: int) -> None:
        batch = getattr(stage.config, "batch", 0)
        if "ranks" in self.structurer.registry.find("distiller", stage.name).traits and batch % ranks:
            raise ConfigError(
                f"stages.{name}.batch", f"expected a multiple of limits.train_gpus = {ranks}, got {batch}"
            )

    def _teacher(self, value: Any, stages: Mapping[str, Choice]) -> Teacher:
        if value is None:
            raise ConfigError(
                "", "this section is missing: the teacher's folder as `path`, or `train` with stages that make one"
            )
        if not isinstance(value, Mapping):
            raise ConfigError("", f"expected a table, got {show(value)}")
        options = dict(value)
        path, train = options.pop("path", None), _train(options.pop("train", []), stages)
        backend = self.structurer.choice("backend", {"use": "teacher", **options})
        if (path is None) == (not train):
            raise ConfigError("", "give either `path`, the teacher's folder, or `train`, the stages that make one")
        return Teacher(backend=backend, path=None if path is None else self._folder(path), train=train)

    def _folder(self, path: Any) -> str:
        if not isinstance(path, str):
            raise ConfigError("path", f"expected a folder in quotes, got {show(path)}")
        folder = self._shipped(path.removeprefix(BUILTIN)) if path.startswith(BUILTIN) else Path(path).expanduser()
        folder = (self.file.parent / folder).resolve()
        if not folder.is_dir():
            raise ConfigError("path", f"there is no folder {folder} (and nothing is fetched from a hub)")
        if not (folder / "config.json").is_file():
            raise ConfigError("path", f"{folder} is no transformers folder: it has no config.json")
        return str(folder)

    def _shipped(self, name: str) -> Path:
        try:
            return shipped_teacher(name, self.structurer.registry)
        except MambabenchError as error:
            raise ConfigError("path", str(error)) from None

    def _data(self, name: str, value: Any) -> Data:
        if isinstance(value, Mapping):
            return Data(name=name, source=self.structurer.choice("source", value))
        if not isinstance(value, str):
            raise ConfigError("", f'expected a file, "builtin:NAME/PART" or {{ use = "…" }}, got {show(value)}')
        if value.startswith(BUILTIN):
            source, _, part = value.removeprefix(BUILTIN).partition("/")
            return Data(
                name=name, source=self.structurer.choice("source", {"use": source} | ({"part": part} if part else {}))
            )
        if value.startswith("hf:"):
            return Data(
                name=name,
                source=self.structurer.choice("source", {"use": "dataset", "name": value.removeprefix("hf:")}),
            )
        file = (self.file.parent / Path(value).expanduser()).resolve()
        if not file.exists():
            raise ConfigError("", f"there is no file {file}")
        if file.suffix == ".parquet" or file.name.endswith((".json", ".json.xz")):
            return Data(name=name, source=self.structurer.choice("source", {"use": "dataset", "path": value}))
        return Data(name=name, file=file)

    def _models(self, table: Mapping[str, Any], stages: Mapping[str, Choice]) -> dict[str, Model]:
        raw: dict[str, Any] = dict(_tables(table, "models"))
        models = {name: _at("models", name, lambda n=name: self._model(n, raw, stages)) for name in raw}
        for name, model in models.items():
            _check_start(name, models)
            if model.start is not None and model.start not in models:
                raise ConfigError(
                    f"models.{name}.start", f"unknown model {show(model.start)}{suggest(model.start, models)}"
                )
        return models

    def _model(self, name: str, raw: Mapping[str, Any], stages: Mapping[str, Choice]) -> Model:
        options = copy.deepcopy(raw[name])
        if "like" in options:
            like = options.pop("like")
            if not isinstance(like, str) or like not in raw:
                raise ConfigError("like", f"unknown model {show(like)}{suggest(str(like), raw)}")
            if "like" in raw[like]:
                raise ConfigError("like", f"{like!r} is itself like another model; name the original")
            options = {**copy.deepcopy(raw[like]), **options}
        path = options.pop("path", None)
        for key in ("keep", "start"):
            if path is not None and key in options:
                raise ConfigError(key, "this key cannot stand beside `path`, whose folder is taken as it is")
        new = path is None and "keep" not in options and self._from_scratch(options.get("train"), stages)
        if new and "start" in options:
            raise ConfigError("start", f"{options['train'][0]!r} makes a new model, which starts from none")
        if path is None and "keep" not in options and not new:
            raise ConfigError("keep", "this key is missing: the share of attention to keep, or a list of layers")
        keep, train, start = options.pop("keep", None), options.pop("train", []), options.pop("start", None)
        if start is not None and not isinstance(start, str):
            raise ConfigError("start", f"expected the name of a model, got {show(start)}")
        try:
            backend = self.structurer.choice("backend", options)
        except ConfigError as error:
            unknown = error.message.startswith("unknown key") and error.path in options
            if unknown and (hint := suggest(error.path, ("use", "like", *_MODEL_KEYS))).startswith("; did"):
                raise ConfigError(error.path, f"unknown key{hint}") from None
            raise
        return Model(
            name=_name("", name),
            backend=backend,
            selector=None if new or path is not None else _at("keep", "", lambda: self._keep(keep)),
            train=_train(train, stages),
            start=start,
            path=None if path is None else self._folder(path),
        )

    def _from_scratch(self, train: Any, stages: Mapping[str, Choice]) -> bool:
        """Whether the first stage needs no model to train."""
        first = stages.get(train[0]) if isinstance(train, list) and train and isinstance(train[0], str) else None
        traits = self.structurer.registry.find("distiller", first.name).traits if first else frozenset()
        return "from-scratch" in traits

    def _keep(self, keep: Any) -> Choice:
        if isinstance(keep, Mapping):
            return self.structurer.choice("selector", keep)
        if isinstance(keep, list):
            return self.structurer.choice("selector", {"use": "list", "layers": keep})
        if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 <= keep <= 1:
            raise ConfigError(
                "", f'expected a share of attention from 0 to 1, a list of layers, or {{ use = "…" }}, got {show(keep)}'
            )
        return self.structurer.choice("selector", {"use": "uniform", "share": float(keep)})


def _at(section: str, name: str, make: Any) -> Any:
    try:
        return make()
    except ConfigError as error:
        raise error.under(f"{section}.{name}" if name else section) from None


def _known(table: Mapping[str, Any], names: Sequence[str]) -> None:
    for key in table:
        if key not in names:
            raise ConfigError(key, f"unknown key{suggest(key, names)}")


def _tables(table: Mapping[str, Any], section: str, any_value: bool = False) -> list[tuple[str, Any]]:
    value = table.get(section, {})
    if not isinstance(value, Mapping):
        raise ConfigError(section, f"expected a table, got {show(value)}")
    for name, item in value.items():
        _name(f"{section}.{name}", name)
        if not any_value and not isinstance(item, Mapping):
            raise ConfigError(f"{section}.{name}", f"expected a table, got {show(item)}")
    return list(value.items())


def _list(table: Mapping[str, Any], section: str) -> list[Any]:
    value = table.get(section, [])
    if not isinstance(value, list):
        raise ConfigError(section, f"expected [[{section}]] tables, got {show(value)}")
    return value


def _name(path: str, name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(path, f"expected a name of letters, digits, '.', '_' and '-', got {show(name)}")
    return name


def _train(value: Any, stages: Mapping[str, Choice]) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError("train", f"expected a list of stages, got {show(value)}")
    for item in value:
        if item not in stages:
            raise ConfigError("train", f"unknown stage {show(item)}{suggest(item, stages)}")
    return tuple(value)


def _check_start(name: str, models: Mapping[str, Model]) -> None:
    seen, at = [name], models[name].start
    while at is not None and at in models:
        if at in seen:
            raise ConfigError(f"models.{name}.start", f"a circle of models: {' -> '.join([*seen, at])}")
        seen.append(at)
        at = models[at].start


def _skip(entry: Any) -> Skip:
    if not isinstance(entry, Mapping):
        raise ConfigError("", f"expected a table, got {show(entry)}")
    _known(entry, ("steps", "why"))
    for key in ("steps", "why"):
        if not isinstance(entry.get(key), str):
            raise ConfigError(
                key, f"expected a text in quotes, got {show(entry.get(key))}" if key in entry else "this key is missing"
            )
    return Skip(steps=entry["steps"], why=entry["why"])


def _limits(value: Any) -> Limits:
    if not isinstance(value, Mapping):
        raise ConfigError("", f"expected a table, got {show(value)}")
    _known(value, ("timeout", "train_gpus", "checkpoint"))
    limits = Limits()
    if "timeout" in value:
        limits = replace(limits, timeout=_seconds(value["timeout"], "timeout"))
    if "checkpoint" in value:
        limits = replace(limits, checkpoint=_seconds(value["checkpoint"], "checkpoint"))
    if "train_gpus" in value:
        gpus = value["train_gpus"]
        if type(gpus) is not int or gpus < 1:
            raise ConfigError("train_gpus", f"expected how many GPUs train a stage together, got {show(gpus)}")
        limits = replace(limits, train_gpus=gpus)
    return limits


def _seconds(value: Any, name: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", value) if isinstance(value, str) else None
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise ConfigError(name, f'expected a time such as "3 min", "90 s" or "2 h", got {show(value)}')
    return float(match[1]) * _UNITS[match[2]]
