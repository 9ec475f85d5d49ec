"""The map of scripted acceptance: how fast decoding would be if drafts were as good as a set rate says, by K, batch and
length of prompts. Chance accepts, so no losslessness is asked for, and every figure is labelled as scripted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..harness import statistics as st
from ..harness.metrics import REQUEST, geometric_mean, request_frame
from ..harness.results import Results
from .options import NoOptions
from .rows import WHO, called, in_plan_order, keep_of, table_of
from .speed import LEVEL

PLACE = ("batch", "prompt_tokens")
"""What of a request the map's columns are."""
OTHERS = tuple(column for column in REQUEST if column not in PLACE)
NAMES = {"new_tokens": "new"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One decoder of one kind of request."""

    who: tuple[str, str, str]
    """Model, decoder, suite."""
    draft: str
    """The component that drafts, with its options."""
    request: Mapping[str, Any]
    k: int
    rate: float
    """The chance at which a draft stood where those before it did."""
    speed_up: st.Estimate
    """With an interval of the paired blocks."""
    predicted: float | None
    """By what rounds cost where the host only starts them."""

    @property
    def tokens(self) -> float:
        """Of a round at this rate."""
        return tokens_of(self.rate, self.k)

    @property
    def place(self) -> tuple[int, int]:
        return int(self.request["batch"]), int(self.request["prompt_tokens"])


def tokens_of(rate: float, k: int) -> float:
    """Tokens that a round of k drafts has on average, 1 + a + … + a^k.

    >>> tokens_of(0.5, 2), tokens_of(1.0, 4)
    (1.75, 5.0)
    """
    return sum(rate**place for place in range(k + 1))


class AcceptanceMap:
    """One row per model and decoder with scripted acceptance, one column per batch size and length of prompts."""

    title = "Speed-up at scripted acceptance"
    note = (
        "Not the speed of real drafts: chance lets a draft stand at this rate, scripted, if those before it did, and "
        "the text means nothing. Tokens: of a round at this rate, the bonus token included. Cells: speed-up over the "
        "reference decoder, the time of its step over that of a round divided by its tokens, so that the luck of the "
        f"draw is left out; with a {100 * LEVEL:.0f}\u00a0% interval of the paired blocks. In neither arm the first "
        "burst behind the prompt's counts: a draft reads the prompt before it, which weighs the less the longer the "
        "answer is. Of predicted: mean, least and greatest of the row's speed-ups over tokens \u00d7 cost of a plain "
        "step / cost of a round, costs measured where the host only starts rounds."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        cells = cells_of(results)
        if not cells:
            return None
        groups: dict[tuple[Any, ...], list[Cell]] = {}
        for cell in cells:
            model, decoder, _ = cell.who
            groups.setdefault((model, decoder, *(cell.request.get(name) for name in OTHERS)), []).append(cell)
        places = {place: _column(place) for place in sorted({cell.place for cell in cells})}
        rows = []
        for (model, decoder, *others), of in groups.items():
            row = {"model": model, "decoder": decoder, **dict(zip(OTHERS, others, strict=True))}
            row |= {"k": of[0].k, "scripted %": 100 * of[0].rate, "tokens": of[0].tokens}
            rows.append(row | {places[cell.place]: cell.speed_up for cell in of} | {"of predicted": _kept(of)})
        columns = ["model", "decoder", *OTHERS, "k", "scripted %", "tokens", *places.values(), "of predicted"]
        frame = table_of(rows, columns).rename(columns=NAMES)
        same = [NAMES.get(name, name) for name in OTHERS if frame[NAMES.get(name, name)].nunique() <= 1]
        if frame["of predicted"].isna().all():
            same.append("of predicted")
        return frame.drop(columns=same)


def _column(place: tuple[int, int]) -> str:
    return "batch {}, prompt {}".format(*place)


def _kept(cells: list[Cell]) -> st.Estimate | None:
    """How much of what was predicted came true, over all cells for which something was."""
    shares = [cell.speed_up.value / cell.predicted for cell in cells if cell.predicted]
    if not shares:
        return None
    return st.Estimate(value=geometric_mean(shares), low=min(shares), high=max(shares), n=len(shares))


def cells_of(results: Results) -> list[Cell]:
    """What was measured with scripted acceptance, in the plan's order."""
    rounds, by = results.rounds, ["store", *WHO, "key"]
    if "scripted" not in rounds or not set(PLACE) <= set(results.timings):
        return []
    rounds = rounds[(rounds["arm"] == "subject") & rounds["scripted"].notna()]
    timings = results.timings[results.timings["key"].isin(rounds["key"])]
    if timings.empty:
        return []
    played = rounds.groupby([*by, "block", "row"], sort=False).agg(
        rounds=("round", "size"), rate=("scripted", "mean"), k=("drafted", "max")
    )
    asked = request_frame(timings, by).merge(played.reset_index(), on=[*by, "block", "row"], how="inner")
    requests = [column for column in REQUEST if column in asked]
    found: dict[tuple[str, str, str], list[Cell]] = {}
    for (*who, k), own in asked.groupby([*WHO, "k"], sort=False):
        for request, of in own.groupby(requests, sort=True, dropna=False):
            cell = _cell(results, (*who,), dict(zip(requests, request, strict=True)), int(k), of)
            if cell is not None:
                found.setdefault(cell.who, []).append(cell)
    return [cell for who in in_plan_order(results, list(found)) for cell in found[who]]


def _cell(
    results: Results, who: tuple[str, str, str], request: dict[str, Any], k: int, of: pd.DataFrame
) -> Cell | None:
    """Of requests of both arms, with the subject's rate and rounds beside each."""
    rate = float(of["rate"].mean())
    tokens = tokens_of(rate, k)
    steps = of["later_tokens"].where(of["arm"] == "reference", of["rounds"]).to_numpy(dtype=float)
    seconds = of["gaps_s"].map(_round).to_numpy(dtype=float) * (of["bursts"] - 1).to_numpy(dtype=float) / steps
    each = pd.Series(seconds, of.index).where(of["arm"] == "reference", seconds / tokens)
    blocks = of.assign(each=each).groupby(["key", "block", "arm"])["each"].agg(geometric_mean).unstack("arm")
    if not {"subject", "reference"} <= set(blocks) or blocks.isna().any(axis=None):
        return None
    speed_up = st.paired_quotient(blocks["reference"], blocks["subject"], LEVEL)
    costs = [_cost(results, of, request, arm, drafts) for arm, drafts in (("reference", 0), ("subject", k))]
    predicted = tokens * costs[0] / costs[1] if costs[0] and costs[1] else None
    decoder = results.step(str(of["store"].iloc[0]), str(of["key"].iloc[0])).get("decoder") or {}
    draft = keep_of(decoder.get("config", {}).get("draft"))
    return Cell(who, draft, request, k, rate, speed_up, predicted)


def _round(gaps: list[float]) -> float:
    """Mean seconds between looks of the host, without the first."""
    return sum(gaps[1:]) / (len(gaps) - 1) if len(gaps) > 1 else math.nan


def _cost(results: Results, of: pd.DataFrame, request: Mapping[str, Any], arm: str, k: int) -> float | None:
    """Seconds of a round of k drafts, as the steps told."""
    names = [f"cost of a round, K = {k}, {which}" for which in called(request)]
    facts = results.facts[results.facts["key"].isin(of["key"]) & (results.facts["arm"] == arm)]
    known = facts[facts["name"].isin(names)]["value"].astype(float)
    return float(known.mean()) if len(known) else None
