"""Tables on a terminal: as they are where they fit, else in blocks of columns that repeat what names a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from .cells import CHECK, alignments, text

if TYPE_CHECKING:
    from rich.table import Table

    from .build import Section

KEYS = ("store", "label", "model", "decoder", "stage", "suite", "batch", "prompt", "new", "temperature", "content")
"""Columns that tell rows apart; they stand in every block."""
LONG = 24
"""A text of more characters than this may be wrapped; keys and figures never are."""
GAP = 2
"""Between two columns."""


def terminal_tables(section: Section, width: int) -> list[Table]:
    """A section's table in as few blocks as fit into `width` characters, the first columns first."""
    shown = {str(name): [text(cell, str(name)) for cell in section.frame[name]] for name in section.frame.columns}
    whole = {name: max(len(name), _longest(cells)) for name, cells in shown.items()}
    least = {}
    for name, side in alignments(section.frame).items():
        cells = _longest(shown[name])
        least[name] = max(_longest(name.split()), cells if side == "right" or name in KEYS else min(LONG, cells))
    blocks = [list(shown)] if _total(whole.values()) <= width else list(_blocks(least, width))
    tables = []
    for number, names in enumerate(blocks):
        widths = {name: least[name] for name in names}
        for name in names:
            widths[name] += max(0, min(whole[name] - least[name], width - _total(widths.values())))
        title = section.title if number == 0 else f"{section.title}, continued"
        tables.append(_table(section, title, shown, widths))
    return tables


def _blocks(least: Mapping[str, int], width: int) -> Iterator[list[str]]:
    """The columns in order, as many in a block as there is room for, each block with the keys."""
    keys = [name for name in least if name in KEYS] or list(least)[:1]
    block = list(keys)
    for name in (name for name in least if name not in keys):
        if len(block) > len(keys) and _total(least[each] for each in [*block, name]) > width:
            yield block
            block = list(keys)
        block.append(name)
    yield block


def _table(section: Section, title: str, shown: Mapping[str, Sequence[str]], widths: Mapping[str, int]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title, title_justify="left", title_style="bold",
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0),
    )  # fmt: skip
    sides = alignments(section.frame)
    for name, room in widths.items():
        table.add_column(Text(name), justify=sides[name], width=room, overflow="fold")  # type: ignore[arg-type]
    broken = [bool(cell) for cell in section.frame[CHECK]] if CHECK in section.frame else [False] * len(section.frame)
    for place, bad in enumerate(broken):
        table.add_row(*(Text(shown[name][place]) for name in widths), style="red" if bad else None)
    return table


def _longest(texts: Iterable[str]) -> int:
    return max(map(len, texts), default=0)


def _total(widths: Iterable[int]) -> int:
    widths = list(widths)
    return sum(widths) + GAP * (len(widths) - 1)
