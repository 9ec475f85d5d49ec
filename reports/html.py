"""The renderer `html`: one page that needs nothing else, light or dark as its reader likes it, without scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .build import Report, Section
from .cells import CHECK, absent, alignments, is_numeric, text
from .options import NoOptions

HERE = Path(__file__).parent


class Html:
    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def render(self, report: Report, out: Path) -> Path:
        """Writes `report.html` into `out`."""
        out.mkdir(parents=True, exist_ok=True)
        target = out / "report.html"
        target.write_text(page(report), encoding="utf-8")
        return target


def page(report: Report) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja").render(
        report=report,
        style=(HERE / "report.css").read_text(encoding="utf-8"),
        sections=[_section(section) for section in report.sections],
    )


def _section(section: Section) -> dict[str, Any]:
    sides = alignments(section.frame)
    rows = []
    for record in section.frame.to_dict("records"):
        cells = [
            {"text": text(cell, str(name)), "side": sides[str(name)], "class": _class(str(name), cell)}
            for name, cell in record.items()
        ]
        rows.append({"cells": cells, "broken": bool(record.get(CHECK))})
    return {
        "name": section.name,
        "title": section.title,
        "note": section.note,
        "columns": [{"name": str(name), "side": sides[str(name)]} for name in section.frame.columns],
        "rows": rows,
    }


GOOD, BAD = ("ok", "yes"), ("error", "crashed", "timeout", "out-of-memory", "interrupted", "blocked", "no")


def _class(column: str, cell: Any) -> str:
    """Marks gaps, and states whose meaning a colour makes quicker to see."""
    if absent(cell):
        return "absent"
    if is_numeric(cell):
        return ""
    word = str(cell).partition(":")[0].partition(",")[0]
    if column in ("state", "lossless") or word in BAD:
        return "good" if word in GOOD else "bad" if word in BAD else "muted"
    return ""
