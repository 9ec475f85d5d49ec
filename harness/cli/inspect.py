"""What is installed: `plugins`, `list`, `env`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import click

from .. import plugins
from ..interfaces import KINDS


@click.command("plugins")
@click.option("--traceback", is_flag=True, help="Print the tracebacks of broken plug-ins.")
def show_plugins(traceback: bool) -> None:
    """The plug-ins that loaded and those that did not, with load times."""
    loaded = plugins.registry()
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


@click.command("list")
@click.argument("kind", required=False, type=click.Choice(KINDS))
@click.option("--options", is_flag=True, help="Show each component's options with their defaults.")
def list_components(kind: str | None, options: bool) -> None:
    """The components that plans may use."""
    loaded = plugins.registry()
    rows: list[tuple[str, ...]] = []
    for of in [kind] if kind else KINDS:
        for name, component in loaded.components(of).items():
            lacking = plugins.missing(component.requires)
            notes = component.summary + (f"  [needs {', '.join(lacking)}]" if lacking else "")
            rows.append((of, name, loaded.owner(component), notes))
            if options:
                rows += [("", f"  {item.name}", "", _option(item)) for item in dataclasses.fields(component.config)]
    echo_columns(("kind", "name", "from", ""), rows)


@click.command("env")
def show_environment() -> None:
    """What is recorded of this machine and its packages with every run."""
    from ..environment import capture

    facts = capture(plugins.registry().environment())
    echo_columns(("fact", "value"), [(name, str(value)) for name, value in facts.items()])


def echo_columns(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Prints left-aligned columns; the last one is as long as it is."""
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles) - 1)]
    for row in [titles, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]).rstrip())


def _option(item: dataclasses.Field) -> str:
    kind = item.type if isinstance(item.type, str) else getattr(item.type, "__name__", str(item.type))
    if item.default is not dataclasses.MISSING:
        default = getattr(item.default, "name", item.default)
        return f"{kind} = {default!r}"
    if item.default_factory is not dataclasses.MISSING:
        return f"{kind} = {item.default_factory()!r}"
    return f"{kind} (must be given)"
