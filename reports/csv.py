"""The renderer `csv`: one file per table, in full precision, errors and intervals in columns of their own."""

from __future__ import annotations

import csv
from pathlib import Path

from .build import Report
from .cells import flat
from .options import NoOptions


class Csv:
    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def render(self, report: Report, out: Path) -> Path:
        """Writes `csv/TABLE.csv` for every table; returns the folder."""
        folder = out / "csv"
        folder.mkdir(parents=True, exist_ok=True)
        for section in report.sections:
            rows = flat(section.frame)
            with (folder / f"{section.name}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        return folder
