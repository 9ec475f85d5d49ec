"""The command `report`: tables on the terminal, files beside the store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..harness.interfaces import MambabenchError
from ..harness.plugins import make, registry, suggest

if TYPE_CHECKING:
    from .build import Report

RENDERERS = "md,csv,html"
WIDE = 400
"""Columns where there is no terminal: longer lines than a reader wants, but in one piece."""


@click.command()
@click.argument("stores", nargs=-1, required=True, metavar="STORE…", type=click.Path(path_type=Path))
@click.option("--to", default=RENDERERS, show_default=True, help="Formats, separated by commas.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the files.  [default: report/ in the first store]"
)
@click.option("--tables", "names", default="", help="Only these tables, separated by commas.")
def report(stores: Sequence[Path], to: str, out: Path | None, names: str) -> None:
    """Print the tables of one or more stores, and write them as files."""
    from ..harness.results import Results
    from .build import build

    renderers = registry().components("renderer")
    chosen = _chosen(to, renderers, "--to", "renderer")
    tables = registry().components("table")
    wanted = _chosen(names, tables, "--tables", "table") if names else list(tables)
    results = Results.read(stores)
    makers = {name: partial(make, tables[name]) for name in wanted}
    made = build(results, makers, with_plots=bool({"md", "html"} & set(chosen)))
    print_report(made)
    folder = out or stores[0] / "report"
    for name in sorted(chosen, key=lambda name: name == "html"):
        click.echo(make(renderers[name]).render(made, folder))


def _chosen(text: str, known: Iterable[str], option: str, kind: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise MambabenchError(f"{option} {text}: unknown {kind} {name!r}{suggest(name, known)}")
    return names


def print_report(report: Report) -> None:
    """The tables on the terminal, in blocks where it is narrow; in one piece and plain where there is no terminal."""
    from rich.console import Console

    from .terminal import terminal_tables

    # A log has no width to fit in.
    live = Console().is_terminal
    width = Console().width if live else WIDE
    console = Console(width=width, highlight=False, soft_wrap=not live)
    console.print(f"\n{report.title}", style="bold", markup=False)
    for sentence in report.summary:
        console.print(sentence, markup=False)
    for section in report.sections:
        for table in terminal_tables(section, width):
            console.print()
            console.print(table)
    for broken in report.broken:
        line = f"\nThe table {broken.name} could not be made: {broken.error}"
        console.print(line, style="red", markup=False, soft_wrap=True)
    console.print()
