"""Turns TOML into frozen dataclasses, strictly, and every mistake into one line that names the key.

Scalars keep their type (`true` is no number, `"300"` no int), lists are lists, unknown keys are errors with the nearest
known name. A component's options are checked against its own config dataclass in the same way.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, IterableValidationError
from cattrs.gen import make_dict_structure_fn, override

from .interfaces import Choice, ChoiceOf, Component, MambabenchError, Reference, Unsupported
from .plugins import Registry, suggest


class ConfigError(MambabenchError):
    """A mistake at a key of a plan. `path` is relative to where the structuring began."""

    def __init__(self, path: str, message: str) -> None:
        self.path, self.message = path, message
        super().__init__(f"{path}: {message}" if path else message)

    def under(self, prefix: str) -> ConfigError:
        """The same mistake, seen from further out."""
        return ConfigError(f"{prefix}.{self.path}" if self.path else prefix, self.message)


class Structurer:
    """Structures plain data onto dataclasses; components are looked up in a registry."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.converter = cattrs.Converter(forbid_extra_keys=True)
        for wanted, accepted, words in (
            (bool, (bool,), "true or false"),
            (int, (int,), "a whole number"),
            (float, (int, float), "a number"),
            (str, (str,), "a text in quotes"),
        ):
            self.converter.register_structure_hook(wanted, _strict(wanted, accepted, words))
        self.converter.register_structure_hook_factory(_is_tuple, self._tuple_hook)
        self.converter.register_structure_hook_factory(_is_literal, _literal_hook)
        self.converter.register_structure_hook_factory(dataclasses.is_dataclass, self._dataclass_hook)

    def structure(self, value: Any, cls: type) -> Any:
        """Structures a table. Raises ConfigError with the path inside the table."""
        if not isinstance(value, Mapping):
            raise ConfigError("", f"expected a table, got {show(value)}")
        try:
            return self.converter.structure(value, cls)
        except (ClassValidationError, IterableValidationError, ConfigError, ValueError, TypeError) as error:
            raise _first(error) from None

    def choice(self, kind: str, value: Any, options: Mapping[str, Any] | None = None) -> Choice:
        """Structures `"name"` or `{ use = "name", option = … }` into a Choice of a kind."""
        if isinstance(value, str):
            value = {"use": value}
        if not isinstance(value, Mapping):
            raise ConfigError("", f'expected the name of a {kind} or {{ use = "…" }}, got {show(value)}')
        table = {**value, **(options or {})}
        if "use" not in table:
            raise ConfigError("", f"`use` is missing: it names the {kind}{suggest('', self.registry.components(kind))}")
        name = table.pop("use")
        if not isinstance(name, str):
            raise ConfigError("use", f"expected the name of a {kind} in quotes, got {show(name)}")
        try:
            component = self.registry.find(kind, name)
        except MambabenchError as error:
            raise ConfigError("use", str(error)) from None
        return Choice(kind, name, self.structure(table, component.config))

    def _tuple_hook(self, cls: Any) -> Any:
        inner = get_args(cls)[0]

        def hook(value: Any, _: Any) -> tuple[Any, ...]:
            if not isinstance(value, list | tuple):
                raise ConfigError("", f"expected a list, got {show(value)}")
            items = []
            for index, item in enumerate(value):
                try:
                    items.append(self.converter.structure(item, inner))
                except (ClassValidationError, IterableValidationError, ConfigError, ValueError, TypeError) as error:
                    raise _first(error).under(str(index)) from None
            return tuple(items)

        return hook

    def _dataclass_hook(self, cls: type) -> Any:
        """cattrs drops annotations that it does not know, so fields that choose a component get their hook by name."""
        hints = typing.get_type_hints(cls, include_extras=True)
        chosen = {item.name: (_kind_chosen(hints[item.name]), item.default) for item in dataclasses.fields(cls)}
        overrides: Any = {
            name: override(struct_hook=self._choice_hook(kind, default))
            for name, (kind, default) in chosen.items()
            if kind
        }
        return make_dict_structure_fn(cls, self.converter, _cattrs_forbid_extra_keys=True, **overrides)

    def _choice_hook(self, kind: str, default: Any) -> Any:
        def hook(value: Any, _: Any) -> Choice | None:
            if isinstance(value, Choice) or (value is None and default is None):
                return value
            if isinstance(value, Mapping) and isinstance(default, Choice):
                value = {"use": default.name, **value}
            return self.choice(kind, value)

        return hook


def show(value: Any) -> str:
    """A value as it stands in TOML, shortened."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _strict(wanted: type, accepted: tuple[type, ...], words: str) -> Any:
    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
            raise ConfigError("", f"expected {words}, got {show(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError("", f"expected a finite number, got {show(value)}")
        return wanted(value)

    return hook


def _is_tuple(cls: Any) -> bool:
    return get_origin(cls) is tuple and len(get_args(cls)) == 2 and get_args(cls)[1] is Ellipsis


def _is_literal(cls: Any) -> bool:
    return get_origin(cls) is Literal


def _literal_hook(cls: Any) -> Any:
    allowed = get_args(cls)

    def hook(value: Any, _: Any) -> Any:
        if value not in allowed or any(type(value) is not type(a) for a in allowed if a == value):
            hint = suggest(value, allowed) if isinstance(value, str) else ""
            raise ConfigError("", f"expected one of {', '.join(show(a) for a in allowed)}, got {show(value)}{hint}")
        return value

    return hook


def _kind_chosen(hint: Any) -> str | None:
    if get_origin(hint) in (typing.Union, types.UnionType):
        return next((found for arg in get_args(hint) if (found := _kind_chosen(arg))), None)
    marks = hint.__metadata__ if get_origin(hint) is Annotated else ()
    return next((mark.kind for mark in marks if isinstance(mark, ChoiceOf)), None)


def _first(error: BaseException) -> ConfigError:
    """The first mistake in cattrs' tree of errors, with its path."""
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, ForbiddenExtraKeysError):
        key = sorted(error.extra_fields)[0]
        names = [f.name for f in dataclasses.fields(error.cl)]
        return ConfigError(key, f"unknown key{suggest(key, names)}")
    if isinstance(error, ClassValidationError | IterableValidationError):
        attributes, others = error.group_exceptions()
        # An unknown key often explains a missing one, so it is told first.
        for other in others:
            if isinstance(other, ForbiddenExtraKeysError):
                return _first(other)
        for inner, note in attributes:
            if isinstance(inner, KeyError):
                return ConfigError(str(inner.args[0]), "this key is missing")
            name = getattr(note, "name", None)
            return _first(inner).under(str(note.index if name is None else name))
        return _first(others[0])
    if isinstance(error, KeyError):
        return ConfigError(str(error.args[0]), "this key is missing")
    return ConfigError("", str(error))


def references(config: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """The names of `[data]` and `[models]` entries and of files in a config: (path of the field, section, name)."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for item in dataclasses.fields(config):
        value, path = getattr(config, item.name), f"{prefix}{item.name}"
        if isinstance(value, Choice):
            yield from references(value.config, f"{path}.")
            continue
        section = _section(hints[item.name])
        if section:
            names = value if isinstance(value, tuple) else (value,)
            yield from ((path, section, name) for name in names if isinstance(name, str) and name)


def unfit(roles: Mapping[str, tuple[str, Choice]], data: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What components miss in the files that they name: `roles` has their places in the plan. Raises ConfigError for a
    file that is not what it should be."""
    files = {name: Path(found["file"]) for name, found in data.items() if "file" in found and "absent" not in found}
    missing = []
    for where, choice in roles.values():
        check = getattr(choice.config, "check_files", None)
        try:
            if callable(check):
                check(files)
        except Unsupported as error:
            missing.append(f"{where}: {error}")
        except MambabenchError as error:
            raise ConfigError(where, str(error)) from None
    return missing


def nested(choices: Iterable[Choice]) -> list[Choice]:
    """The components chosen inside of components' configs, at any depth."""
    found: list[Choice] = []
    for choice in choices:
        for value in (getattr(choice.config, item.name) for item in dataclasses.fields(choice.config)):
            if isinstance(value, Choice):
                found += [value, *nested([value])]
    return found


def filled(choice: Choice, names: Mapping[str, str]) -> Choice:
    """A component in whose names of models `{key}` stands for `names[key]`: one draft for each model, and the like."""

    def fill(config: Any) -> Any:
        models = {path for path, section, name in references(config) if section == "models" and "{" in name}
        changed: dict[str, Any] = {}
        for item in dataclasses.fields(config):
            value = getattr(config, item.name)
            if isinstance(value, Choice):
                changed[item.name] = filled(value, names)
            elif item.name in models and isinstance(value, str):
                for key, name in names.items():
                    value = value.replace(f"{{{key}}}", name)
                changed[item.name] = value
        return dataclasses.replace(config, **changed)

    return dataclasses.replace(choice, config=fill(choice.config))


def _section(hint: Any) -> str | None:
    if get_origin(hint) is Annotated:
        return next((mark.section for mark in hint.__metadata__ if isinstance(mark, Reference)), None)
    if get_origin(hint) in (typing.Union, types.UnionType, tuple):
        return next((found for arg in get_args(hint) if (found := _section(arg))), None)
    return None


def plain(
    config: Any, defaults: bool = True, replace: Mapping[str, Any] | None = None, prefix: str = ""
) -> dict[str, Any]:
    """A config as JSON data. Without `defaults`, fields at their default are left out, and those whose metadata says
    that they do not decide a result (`decides` is False); `replace` overrides by path."""
    table: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value, path = getattr(config, item.name), f"{prefix}{item.name}"
        if replace and path in replace:
            table[item.name] = replace[path]
            continue
        if not defaults and (_is_default(item, value) or not item.metadata.get("decides", True)):
            continue
        if isinstance(value, Choice):
            table[item.name] = {"use": value.name, **plain(value.config, defaults, replace, f"{path}.")}
        else:
            table[item.name] = list(value) if isinstance(value, tuple) else value
    return table


def _is_default(item: dataclasses.Field[Any], value: Any) -> bool:
    if item.default is not dataclasses.MISSING:
        return bool(value == item.default)
    if item.default_factory is not dataclasses.MISSING:
        return bool(value == item.default_factory())
    return False


def restore(structurer: Structurer, kind: str, record: Mapping[str, Any]) -> tuple[Component, Any]:
    """The component and config of a stored record `{"kind", "name", "config"}`."""
    choice = structurer.choice(kind, {"use": record["name"], **record.get("config", {})})
    return structurer.registry.find(kind, choice.name), choice.config
