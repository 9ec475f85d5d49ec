"""What is installed: `plugins`, `list`, `env`."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Annotated, Any, Literal, get_args, get_origin

import click

from .. import plugins
from ..interfaces import KINDS, Choice, ChoiceOf, Reference
from .output import echo_columns, echo_json, json_option

_ENTRIES = {"data": "entry of [data]", "models": "entry of [models]", "files": "file"}
_TYPES = {str: "text", bool: "true or false", int: "whole number", float: "number"}


@click.command("plugins", short_help="The plug-ins that loaded and those that did not.")
@click.option("--traceback", is_flag=True, help="Print the tracebacks of broken plug-ins.")
@json_option
def show_plugins(traceback: bool, as_json: bool) -> None:
    """The plug-ins that loaded and those that did not, with load times."""
    loaded = plugins.registry()
    if as_json:
        echo_json(
            {
                "plugins": [
                    {
                        **{name: getattr(plugin, name) for name in ("distribution", "version", "entry_point")},
                        "seconds": plugin.seconds,
                        "components": len(plugin.components),
                        "imported_torch": plugin.imported_torch,
                    }
                    for plugin in loaded.plugins
                ],
                "broken": [dataclasses.asdict(broken) for broken in loaded.broken],
            }
        )
        return
    rows = [
        (
            f"{plugin.distribution} {plugin.version}",
            plugin.entry_point,
            "ok",
            f"{plugin.seconds * 1000:.0f} ms",
            f"{len(plugin.components)} components" + ("; imports torch" if plugin.imported_torch else ""),
        )
        for plugin in loaded.plugins
    ]
    rows += [
        (f"{broken.distribution} {broken.version}", broken.entry_point, f"broken ({broken.phase})", "", broken.error)
        for broken in loaded.broken
    ]
    echo_columns(("plug-in", "entry point", "state", "load", ""), rows)
    if traceback:
        for broken in loaded.broken:
            click.echo(f"\n{broken.distribution} {broken.version}, {broken.entry_point}:\n{broken.traceback.rstrip()}")


@click.command("list", short_help="The components that plans may use.")
@click.argument("kind", required=False, metavar="[KIND]", type=click.Choice(KINDS))
@click.option("--options", is_flag=True, help="Show each component's options with their defaults.")
@json_option
def list_components(kind: str | None, options: bool, as_json: bool) -> None:
    """The components that plans may use, all or of one KIND, such as suite."""
    loaded = plugins.registry()
    found: list[dict[str, Any]] = [
        {
            "kind": of,
            "name": name,
            "from": loaded.owner(component),
            "summary": component.summary,
            "missing": plugins.missing(component.requires),
            **({"options": dict(_options(component.config))} if options else {}),
        }
        for of in ([kind] if kind else KINDS)
        for name, component in loaded.components(of).items()
    ]
    if as_json:
        echo_json({"components": found})
        return
    rows: list[tuple[str, ...]] = []
    for each in found:
        notes = each["summary"] + (f"  [needs {', '.join(each['missing'])}]" if each["missing"] else "")
        rows.append((each["kind"], each["name"], each["from"], notes))
        rows += [("", f"  {name}", "", text) for name, text in each.get("options", {}).items()]
    echo_columns(("kind", "name", "from", ""), rows)


@click.command("env", short_help="What is recorded of this machine with every run.")
@json_option
def show_environment(as_json: bool) -> None:
    """What is recorded of this machine and its packages with every run."""
    from ..environment import capture

    facts = capture(plugins.registry().environment())
    if as_json:
        echo_json(facts)
    else:
        echo_columns(("fact", "value"), [(name, str(value)) for name, value in facts.items()])


def _options(config: type) -> list[tuple[str, str]]:
    """Each option with what it takes and its default, as a plan has them."""
    try:
        hints = typing.get_type_hints(config, include_extras=True)
    except NameError:
        # What only type checkers import has no meaning here.
        hints = {}
    return [(item.name, _option(item, hints.get(item.name, item.type))) for item in dataclasses.fields(config)]


def _option(item: dataclasses.Field[Any], hint: Any) -> str:
    default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    if default is dataclasses.MISSING:
        return f"{_kind(hint)} (must be given)"
    return _kind(hint) + (" (may be left out)" if default is None else f" = {_value(default)}")


def _kind(hint: Any) -> str:
    arguments = get_args(hint)
    if get_origin(hint) is Annotated:
        marks = [mark for mark in arguments[1:] if isinstance(mark, ChoiceOf | Reference)]
        return next((_ENTRIES[m.section] if isinstance(m, Reference) else m.kind for m in marks), _kind(arguments[0]))
    if get_origin(hint) is Literal:
        return " | ".join(map(_value, arguments))
    if get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(_kind(each) for each in arguments if each is not type(None))
    if get_origin(hint) is tuple:
        return f"list of {_kind(arguments[0])}"
    return _TYPES.get(hint) or str(getattr(hint, "__name__", hint))


def _value(value: Any) -> str:
    return json.dumps(value.name if isinstance(value, Choice) else value, ensure_ascii=False, default=str)
