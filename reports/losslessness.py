"""The table of losslessness, and the check without which no speed-up is printed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from ..harness.metrics import acceptance_frame
from ..harness.results import Results
from .options import NoOptions
from .rows import (
    WHO,
    drop_empty,
    failures,
    in_plan_order,
    measuring,
    of_suites,
    only_failures,
    percent,
    suites_with,
    table_of,
    with_teachers,
)


class Losslessness:
    """One row per model, decoder and suite that holds the decoder against the reference."""

    title = "Losslessness"
    note = (
        "Greedy texts that are the reference decoder's token for token, at every batch size; tokens that one parallel "
        "run over the text would choose as well; and the shares of rounds that accept, or reject, a drafted token."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        suites = suites_with(results, use="losslessness")
        cells = measuring(results, suites)
        if cells.empty:
            return None
        states = failures(cells, WHO)
        samples, rounds = (of_suites(frame, suites) for frame in (results.samples, results.rounds))
        groups = dict(iter(samples.groupby(WHO, sort=False)))
        shares = acceptance_frame(rounds, by=WHO).set_index(WHO).to_dict("index") if len(rounds) else {}
        rows: list[dict[str, Any]] = []
        for who in in_plan_order(results, [*groups, *states]):
            row: dict[str, Any] = {**dict(zip(WHO, who, strict=True)), "state": states.get(who, "ok")}
            if who in groups:
                equal, parallel = (
                    groups[who][groups[who]["metric"] == metric] for metric in ("equal", "parallel_argmax")
                )
                verdict, of = of_texts(equal), shares.get(who, {})
                tokens = int(parallel["weight"].sum())
                row |= {
                    "texts": len(equal),
                    "equal": int(equal["value"].sum()),
                    "lossless": "partly" if verdict == "yes" and row["state"] != "ok" else verdict,
                    "tokens": tokens,
                    "parallel argmax %": 100 * parallel["value"].sum() / tokens if tokens else None,
                    "accepted length": of.get("mean_accepted_length"),
                    "k": of.get("k"),
                    "accepting %": percent(of.get("share_accepting")),
                    "rejecting %": percent(of.get("share_rejecting")),
                }
            rows.append(row)
        texts = ["lossless", "texts", "equal", "tokens", "parallel argmax %"]
        drafts = ["accepted length", "k", "accepting %", "rejecting %"]
        frame = table_of(with_teachers(results, rows, cells), [*WHO, "state", *texts, *drafts])
        if frame["suite"].nunique() <= 1:
            frame = frame.drop(columns="suite")
        return drop_empty(only_failures(frame), [*texts, *drafts])


def of_texts(equal: pd.DataFrame) -> str:
    """`yes` where every checked text is the reference's, else how many differ."""
    wrong = int((equal["value"] < 1).sum())
    return f"no: {wrong} of {len(equal)} texts differ" if wrong else "yes" if len(equal) else "unchecked"


class Check:
    """What the losslessness suites of a report vouch for: a decoder of a model of one seed on one kind of device."""

    def __init__(self, results: Results) -> None:
        suites = suites_with(results, use="losslessness")
        samples = of_suites(results.samples, suites)
        equal = samples[samples["metric"] == "equal"]
        self._texts = dict(iter(equal.groupby(["model", "decoder"], sort=False)))
        known = set(zip(equal["store"], equal["key"], strict=True))
        cells = measuring(results, suites)
        self._checked: dict[tuple[str, str, str], set[str]] = {}
        for cell in cells[cells["state"] == "ok"].to_dict("records"):
            if (cell["store"], cell["key"]) in known:
                of = cell["model"], cell["decoder"], str(cell["seed"])
                self._checked.setdefault(of, set()).add(kind_of(cell["device"]))
        finished = results.cells[results.cells["state"] == "ok"]
        self._finished = dict(iter(finished.groupby(["store", "key"], sort=False)))

    def verdict(self, model: str, decoder: str, steps: Iterable[tuple[str, str]], temperature: object) -> str:
        """What is known of the text whose speed the steps (store, key) measured.

        `yes` only where each of their seeds was checked on their kind of device, every text of every check is the
        reference's, and the timed text is greedy: sampled text was not checked.
        """
        texts = self._texts.get((model, decoder))
        if texts is None:
            return "unchecked"
        if (verdict := of_texts(texts)) != "yes":
            return verdict
        if temperature != 0:
            return "unchecked: sampled"
        missing: dict[str, None] = {}
        for step in steps:
            for cell in self._finished[step].to_dict("records"):
                if (cell["model"], cell["decoder"]) != (model, decoder):
                    continue
                on, kind = self._checked.get((model, decoder, str(cell["seed"])), set()), kind_of(cell["device"])
                if not on:
                    missing[f"seed {cell['seed']}"] = None
                elif kind not in on:
                    missing[f"on {kind or 'an unknown device'}"] = None
        return f"unchecked: {', '.join(missing)}" if missing else "yes"


def kind_of(device: object) -> str:
    """`cpu` or `cuda`."""
    return str(device or "").partition(":")[0]
