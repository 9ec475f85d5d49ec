"""The command `report`: tables on the terminal, files beside the store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..harness.interfaces import MambabenchError
from ..harness.plugins import make, registry, suggest

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from .build import Report, Section

RENDERERS = "md,csv,html"


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
    made = build(results, {name: make(tables[name]) for name in wanted}, with_plots=bool({"md", "html"} & set(chosen)))
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
    """The tables on the terminal, as wide as they are; plain text where there is no terminal."""
    from rich.console import Console

    console = Console()
    wide = Console(width=max(console.width, 400), soft_wrap=True) if not console.is_terminal else console
    console.print(f"\n[bold]{report.title}[/]", highlight=False)
    for sentence in report.summary:
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)
    for section in report.sections:
        console.print()
        wide.print(terminal_table(section))
    for broken in report.broken:
        console.print(f"\nThe table {broken.name} could not be made: {broken.error}", style="red", markup=False)
    console.print()


def terminal_table(section: Section) -> RichTable:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from .cells import CHECK, alignments, text

    table = Table(title=section.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name, side in alignments(section.frame).items():
        table.add_column(Text(name), justify=side, overflow="fold")  # type: ignore[arg-type]
    for record in section.frame.to_dict("records"):
        table.add_row(
            *(Text(text(cell, str(name))) for name, cell in record.items()), style="red" if record.get(CHECK) else None
        )
    return table
