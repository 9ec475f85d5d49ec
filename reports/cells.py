"""How a value of a table is printed: one text for every renderer, so that they cannot disagree.

A cell holds a number, a text, nothing, or an `Estimate`, which is printed with its error or interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from ..harness.statistics import Estimate
from .provenance import is_marked, unmarked

if TYPE_CHECKING:
    from pandas import DataFrame

EMPTY = "–"
CHECK = "check"
"""The column that says which rows break an invariant."""
OTHER = "other code"
"""The column of machine-readable tables that says which models other code made."""


def number(cell: Any) -> float:
    """The value of a cell; nan for texts and nothing."""
    if isinstance(cell, Estimate):
        return cell.value
    return float(cell) if isinstance(cell, Real) and not isinstance(cell, bool) else math.nan


def is_numeric(cell: Any) -> bool:
    return isinstance(cell, Estimate) or (isinstance(cell, Real) and not isinstance(cell, bool))


def absent(cell: Any) -> bool:
    """None, NaN, or an estimate of nothing."""
    return cell is None or (is_numeric(cell) and math.isnan(number(cell))) or cell == ""


def text(cell: Any, column: str = "") -> str:
    """A cell as it is printed; the unit at the end of the column's name decides how finely a number is.

    >>> text(Estimate(value=51.234, se=1.26)), text(Estimate(value=2.0, low=1.9, high=2.11))
    ('51.2 ± 1.3', '2.00 [1.90, 2.11]')
    >>> text(12345), text(0.000123456), text(None), text(True), text(49.2593, "share %"), text(3.0, "wall s")
    ('12,345', '0.0001235', '–', 'yes', '49.3', '3.00')
    >>> text(0.7, "temperature")
    '0.7'
    """
    if absent(cell):
        return EMPTY
    if isinstance(cell, Estimate):
        return _estimate(cell)
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, Integral):
        return f"{int(cell):,}"
    if isinstance(cell, Real):
        return _in_unit(float(cell), column.rpartition(" ")[2])
    return str(cell)


def significant(value: float, digits: int = 4) -> str:
    """Four significant digits, without an exponent where that is readable.

    >>> significant(1234567.0), significant(0.5), significant(99.999), significant(1.5e-9)
    ('1,234,567', '0.5000', '100.0', '1.500e-09')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}" if value == 0 else str(value)
    value = float(f"{value:.{digits - 1}e}") if abs(value) < 10**digits else value
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def _in_unit(value: float, unit: str) -> str:
    if unit == "%" and abs(value) >= 0.1:
        return f"{value:.1f}"
    if unit == "temperature":
        return f"{value:g}"
    if unit == "s" and abs(value) >= 0.005:
        return f"{value:,.2f}"
    return significant(value, 3 if unit == "MB" else 4)


def _estimate(cell: Estimate) -> str:
    if math.isfinite(cell.low) and math.isfinite(cell.high):
        least = 1 if abs(cell.value) >= 20 else 2
        places = _places(min(cell.high - cell.value, cell.value - cell.low), cell.value, least)
        return f"{cell.value:,.{places}f} [{cell.low:,.{places}f}, {cell.high:,.{places}f}]"
    if not math.isfinite(cell.se):
        return significant(cell.value)
    places = _places(cell.se, cell.value, least=1)
    between = f" ± {cell.seed_se:,.{places}f}" if math.isfinite(cell.seed_se) else ""
    return f"{cell.value:,.{places}f} ± {cell.se:,.{places}f}{between}"


def _places(error: float, value: float, least: int) -> int:
    """Decimal places that show an error's first digit (two digits of an error that begins with 1)."""
    if not error > 1e-9 * abs(value):  # what rounding leaves of nothing
        return least if abs(value) >= 1 or value == 0 else 3
    exponent = math.floor(math.log10(error))
    first = int(error / 10**exponent)
    return min(6, max(0 if abs(value) >= 1000 else least, -exponent + (1 if first == 1 else 0)))


def alignments(frame: DataFrame) -> dict[str, str]:
    """`right` for columns of numbers (with gaps and states among them), else `left`."""
    return {
        str(name): "right" if any(is_numeric(cell) for cell in frame[name]) and name != CHECK else "left"
        for name in frame.columns
    }


def flat(frame: DataFrame) -> list[dict[str, Any]]:
    """Rows for machines: full precision; errors, intervals and the mark of other code in columns of their own."""
    parts: Mapping[str, str] = {"se": "s.e.", "seed_se": "s.e. between seeds", "low": "low", "high": "high"}
    shown = {
        name: [
            part
            for part in parts
            if any(isinstance(c, Estimate) and math.isfinite(getattr(c, part)) for c in frame[name])
        ]
        for name in frame.columns
    }
    rows = []
    for record in frame.to_dict("records"):
        row: dict[str, Any] = {}
        for name, cell in record.items():
            row[str(name)] = cell.value if isinstance(cell, Estimate) else cell
            for part in shown[name]:
                row[f"{name} {parts[part]}"] = getattr(cell, part) if isinstance(cell, Estimate) else None
        rows.append({name: None if absent(cell) else cell for name, cell in row.items()})
    if any(is_marked(row.get("model")) for row in rows):
        rows = [{**row, "model": unmarked(row["model"]), OTHER: is_marked(row["model"])} for row in rows]
    return rows
