"""The table of speculation: how much of what is drafted stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from ..harness import statistics as st
from ..harness.metrics import acceptance_frame
from ..harness.results import Results
from .options import NoOptions
from .rows import (
    WHO,
    drop_empty,
    failures,
    in_plan_order,
    measuring,
    only_failures,
    percent,
    suites_with,
    table_of,
    with_teachers,
)


class Acceptance:
    """One row per model, decoder that drafts, suite and temperature."""

    title = "Acceptance of drafts"
    note = (
        "Over all rounds, short drafts included: the mean accepted length is 1 + the sum of the acceptance per "
        "position. K: the most tokens that a round drafted; drafted: their mean. Accepting and rejecting: shares of "
        "rounds in which at least one drafted token is accepted, or rejected; one that drafts nothing does neither. "
        "Scripted: drafts stood by chance at this rate, whatever the model said."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        rounds = results.rounds[results.rounds["arm"] == "subject"]
        recorded = set(zip(rounds["store"], rounds["suite"], strict=True))
        cells = measuring(results, suites_with(results, traits=("pair",)) | recorded)
        groups = dict(iter(rounds.groupby(WHO, sort=False)))
        states = failures(cells, WHO)
        drafts = _Drafts(results, cells, rounds)
        rows: list[dict[str, Any]] = []
        for who in in_plan_order(results, [*groups, *(of for of in states if drafts.expected(*of[1:]))]):
            row: dict[str, Any] = {**dict(zip(WHO, who, strict=True)), "state": states.get(who, "ok")}
            if who not in groups:
                rows.append(row)
            elif "temperature" in rounds:
                for at, of in groups[who].groupby("temperature", dropna=False):
                    rows.append({**row, "temperature": at, **_figures(of)})
            else:
                rows.append(row | _figures(groups[who]))
        if not rows:
            return None
        longest = max((int(row.get("k", 0)) for row in rows), default=0)
        positions = [name for name, _ in _positions([0.0] * longest)]
        figures = ["scripted %", "accepted length", "k", "drafted", *positions, "rounds", "accepting %", "rejecting %"]
        frame = table_of(with_teachers(results, rows, cells), [*WHO, "temperature", "state", *figures])
        if frame["temperature"].nunique() <= 1:
            frame = frame.drop(columns="temperature")
        return drop_empty(only_failures(frame), figures)


def _figures(rounds: pd.DataFrame) -> dict[str, Any]:
    (figures,) = acceptance_frame(rounds, by=("suite",)).to_dict("records")
    return {
        "k": int(figures["k"]),
        "drafted": float(rounds["drafted"].mean()),
        "rounds": int(figures["rounds"]),
        "accepted length": accepted_length(rounds),
        "scripted %": scripted(rounds),
        **dict(_positions(figures["by_position"])),
        "accepting %": percent(figures["share_accepting"]),
        "rejecting %": percent(figures["share_rejecting"]),
    }


class _Drafts:
    """Which decoders draft, as far as their records tell."""

    def __init__(self, results: Results, cells: pd.DataFrame, rounds: pd.DataFrame) -> None:
        finished = cells[cells["state"] == "ok"]
        self._finished = set(zip(finished["decoder"], finished["suite"], strict=True))
        self._drafting = set(zip(rounds["decoder"], rounds["suite"], strict=True))
        self._reference = results.decoders[:1]

    def expected(self, decoder: str, suite: str) -> bool:
        """Whether a step that failed would have had rounds: as elsewhere; where nothing ended well, unless the decoder
        is the reference."""
        if (decoder, suite) in self._finished:
            return (decoder, suite) in self._drafting
        if any(decoder == known for known, _ in self._finished):
            return any(decoder == known for known, _ in self._drafting)
        return decoder not in self._reference


def accepted_length(rounds: pd.DataFrame) -> st.Estimate:
    """Tokens per round; the rounds of one text are a cluster."""
    texts = rounds["key"].astype(str) + ":" + rounds["block"].astype(str) + ":" + rounds["row"].astype(str)
    return st.ratio(rounds["accepted"] + 1, [1.0] * len(rounds), texts.to_numpy(dtype=str))


def scripted(rounds: pd.DataFrame) -> float | None:
    """The chance at which drafts stood, in percent; None where the model judged them."""
    if "scripted" not in rounds or rounds["scripted"].isna().all():
        return None
    return 100 * float(rounds["scripted"].mean())


def _positions(shares: list[float]) -> Iterator[tuple[str, float]]:
    for place, share in enumerate(shares, 1):
        ending = {1: "st", 2: "nd", 3: "rd"}.get(place % 10 if place % 100 not in (11, 12, 13) else 0, "th")
        yield f"{place}{ending} %", 100 * share
