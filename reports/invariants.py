"""What must hold in any table, whoever made it. A row that breaks one is printed as such, never dropped.

Columns are known by their names: `model`, `accepted length`, `k`, `1st %` … (acceptance per position), `TPOT ms`,
`reference TPOT ms`, `speed-up`, `lossless`; a frame's `attrs["averages"]` maps a column to those that it averages.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from ..harness.results import Results
from .cells import is_numeric, number

if TYPE_CHECKING:
    from pandas import DataFrame

ROUNDING = 2e-3
"""Relative difference that rounding to four significant digits may leave in a quotient."""
_POSITION = re.compile(r"\d+(st|nd|rd|th) %")


def problems(frame: DataFrame, results: Results) -> list[list[str]]:
    """For every row, what is wrong with it."""
    mixed = _mixed_checkpoints(results)
    averages = frame.attrs.get("averages", {})
    return [
        [
            *_accepted(row),
            *_speed_up(row),
            *_averages(row, averages),
            *([mixed[str(row["model"])]] if str(row.get("model")) in mixed else []),
        ]
        for row in frame.to_dict("records")
    ]


def _accepted(row: dict[Any, Any]) -> list[str]:
    length, k = number(row.get("accepted length")), number(row.get("k"))
    if math.isnan(length):
        return []
    found = []
    if length < 1 - 1e-9 or length > k + 1 + 1e-9:
        found.append(
            f"accepted length {length:.4g} is not between 1 and " + ("K + 1" if math.isnan(k) else f"{k + 1:g}")
        )
    positions = [number(cell) for name, cell in row.items() if _POSITION.fullmatch(str(name))]
    positions = [share for share in positions if not math.isnan(share)]
    if positions and abs(1 + sum(positions) / 100 - length) > ROUNDING * length:
        found.append("accepted length is not 1 + the sum of the acceptance per position")
    return found


def _speed_up(row: dict[Any, Any]) -> list[str]:
    quotient = number(row.get("speed-up"))
    if math.isnan(quotient):
        return []
    found = []
    own, reference = number(row.get("TPOT ms")), number(row.get("reference TPOT ms"))
    if not (own > 0 and abs(reference / own - quotient) <= ROUNDING * quotient):
        found.append("speed-up is not the quotient of the printed figures")
    if "lossless" in row and str(row["lossless"]) != "yes":
        found.append("a speed-up without a green check of losslessness")
    return found


def _averages(row: dict[Any, Any], averages: dict[str, list[str]]) -> list[str]:
    found = []
    for name, parts in averages.items():
        if not is_numeric(row.get(name)) or math.isnan(number(row[name])):
            continue
        values = [number(row.get(part)) for part in parts]
        mean = sum(values) / len(values)
        if not abs(mean - number(row[name])) <= ROUNDING * abs(mean):
            found.append(f"{name} is not the average of {', '.join(parts)}")
    return found


def _mixed_checkpoints(results: Results) -> dict[str, str]:
    """Models whose cells of one seed measured several checkpoints."""
    seen: dict[tuple[str, Any], set[str]] = {}
    finished = results.measured[results.measured["state"] == "ok"]
    for cell in finished.to_dict("records"):
        subject = results.subject(cell["store"], cell["key"])
        if subject is not None:
            seen.setdefault((cell["model"], cell["seed"]), set()).add(subject)
    return {
        model: f"seed {seed}: several checkpoints in one row" for (model, seed), keys in seen.items() if len(keys) > 1
    }
