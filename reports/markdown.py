"""The renderer `md`: one Markdown file, its plots as SVG files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .build import Report
from .cells import alignments, text
from .options import NoOptions

if TYPE_CHECKING:
    from pandas import DataFrame

STYLE = "<style>svg{color:#24292f}@media(prefers-color-scheme:dark){svg{color:#d0d7de}}</style>"
"""What a picture that stands alone makes of `currentColor`."""


class Markdown:
    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def render(self, report: Report, out: Path) -> Path:
        """Writes `report.md` and a picture per plot into `out`."""
        out.mkdir(parents=True, exist_ok=True)
        parts = [f"# {report.title}", *report.summary]
        for section in report.sections:
            parts += [f"## {section.title}", section.note, table(section.frame)]
        for broken in report.broken:
            parts += [f"## {broken.name}", f"This table could not be made: {_escaped(broken.error)}"]
        for plot in report.plots:
            picture = out / f"{plot.name}.svg"
            head, tag, rest = plot.svg.partition(">")
            picture.write_text(f"{head}{tag}{STYLE}{rest}", encoding="utf-8")
            parts += [f"## {plot.title}", f"![{plot.title}]({picture.name})", plot.note]
        parts += ["## Environment", _environment(report.environment)]
        target = out / "report.md"
        target.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        return target


def table(frame: DataFrame) -> str:
    """A frame as a Markdown table."""
    sides = alignments(frame)
    lines = [
        [_escaped(name) for name in frame.columns],
        ["--:" if sides[str(name)] == "right" else ":--" for name in frame.columns],
        *([_escaped(text(cell, str(name))) for name, cell in row.items()] for row in frame.to_dict("records")),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _environment(facts: Mapping[str, str]) -> str:
    return "\n".join(f"* {_escaped(name)}: {_escaped(value)}" for name, value in facts.items())


def _escaped(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
