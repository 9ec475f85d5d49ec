"""How commands print what they tell: columns for readers, or with `--json` one document for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")


def echo_json(document: Mapping[str, Any]) -> None:
    """Prints a document; what is no finite number is null."""
    click.echo(json.dumps(_finite(document), indent=1, allow_nan=False))


def echo_columns(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Prints left-aligned columns; the last one is as long as it is."""
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles) - 1)]
    for row in [titles, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]).rstrip())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(of) for name, of in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
