"""The table of losslessness, and the check without which no speed-up is printed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..harness import statistics as st
from ..harness.interfaces import DTYPES
from ..harness.metrics import acceptance_frame
from ..harness.results import Results
from .acceptance import scripted
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

PLAIN, EXCUSED, BEYOND = "plain", "excused", "beyond_noise"
"""The task of samples of the reference's own text; the metrics of tokens that are not the likeliest."""
BATCH = re.compile(r"batch (\d+)")
"""The task of samples of text that was made in batches of this size."""
DRAWN = ("chi_square_tokens", "chi_square_likelihood")
"""The metrics of text that was drawn."""
EXCESS = 1.5
"""So many times the excused tokens of the reference's text a decoder's may have."""
CHANCE = 0.01
"""Probability below which chance is no explanation of that."""
UNLIKELY = 1e-3
"""The same of drawn text that is unlike the reference's."""


class Losslessness:
    """One row per model, decoder and suite that holds the decoder against the reference."""

    title = "Losslessness"
    note = (
        "In float64: greedy texts that are the reference decoder's token for token, at every batch size. Below it two "
        "right runs differ where two tokens are about as likely, so each token is held against the plain model's "
        "logits for the text: none may be farther from the likeliest than the noise between two plain runs of unlike "
        f"shape, and those that are excused are at most {EXCESS:g} times as many as in the reference's own text. "
        "Sampled text: the probability that two samples of one distribution are as unlike (chi-square of tokens and "
        f"of how likely texts are), at least {UNLIKELY:g}. Beside that: tokens that one parallel run over the text "
        "would choose as well, distinct runs of four tokens, and the shares of rounds that accept, or reject, a "
        "drafted token; scripted where that was chance at this rate."
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
        played = dict(iter(rounds.groupby(WHO, sort=False)))
        shares = acceptance_frame(rounds, by=WHO).set_index(WHO).to_dict("index") if len(rounds) else {}
        rows: list[dict[str, Any]] = []
        for who in in_plan_order(results, [*groups, *states]):
            row: dict[str, Any] = {**dict(zip(WHO, who, strict=True)), "state": states.get(who, "ok")}
            if who in groups:
                own = groups[who]
                verdict, of = of_texts(own), shares.get(who, {})
                mine = own[own["task"] != PLAIN]
                equal, parallel = (mine[mine["metric"] == metric] for metric in ("equal", "parallel_argmax"))
                noise = _noise(results, own)
                row |= {
                    "texts": len(equal) or None,
                    "equal": int(equal["value"].sum()) if len(equal) else None,
                    "lossless": "partly" if verdict == "yes" and row["state"] != "ok" else verdict,
                    "tokens": int(parallel["weight"].sum()) or None,
                    "noise": noise,
                    "beyond noise": int(mine.loc[mine["metric"] == BEYOND, "value"].sum()) if noise else None,
                    "excused %": _share(mine, EXCUSED),
                    "reference's %": _share(own[own["task"] == PLAIN], EXCUSED),
                    "drawn p": drawn_p(mine),
                    "parallel argmax %": _share(mine, "parallel_argmax"),
                    "distinct 4-grams %": _share(mine, "distinct_4grams"),
                    "scripted %": scripted(played[who]) if who in played else None,
                    "accepted length": of.get("mean_accepted_length"),
                    "k": of.get("k"),
                    "accepting %": percent(of.get("share_accepting")),
                    "rejecting %": percent(of.get("share_rejecting")),
                }
            rows.append(row)
        texts = ["lossless", "texts", "equal", "tokens", "noise", "beyond noise", "excused %", "reference's %"]
        texts += ["drawn p", "parallel argmax %", "distinct 4-grams %"]
        drafts = ["scripted %", "accepted length", "k", "accepting %", "rejecting %"]
        frame = table_of(with_teachers(results, rows, cells), [*WHO, "state", *texts, *drafts])
        if frame["suite"].nunique() <= 1:
            frame = frame.drop(columns="suite")
        return drop_empty(only_failures(frame), [*texts, *drafts])


def of_texts(samples: pd.DataFrame) -> str:
    """`yes` where every text of a decoder's checks is as it must be, else what is not.

    Steps that excuse near ties are judged by those, those that drew by what they drew, all others by equal texts.
    """
    p = drawn_p(samples)
    if p is not None and p < UNLIKELY:
        return f"no: sampled text is unlike the reference's (p = {p:.1g})"
    steps = pd.Series(list(zip(samples["store"], samples["key"], strict=True)), index=samples.index, dtype=object)
    near = steps.isin(set(steps[samples["metric"] == BEYOND]))
    equal = samples[~near & (samples["metric"] == "equal")]
    if wrong := int((equal["value"] < 1).sum()):
        return f"no: {wrong} of {len(equal)} texts differ"
    if near.any():
        return _of_near_ties(samples[near])
    return "yes" if len(equal) or p is not None else "unchecked"


def drawn_p(samples: pd.DataFrame) -> float | None:
    """The probability of a statistic as large as the sum over all prompts, the least of the tests times their number;
    None where nothing was drawn."""
    from scipy.special import gammaincc

    drawn = samples[samples["metric"].isin(DRAWN)].groupby("metric")[["value", "weight"]].sum()
    tests = [float(gammaincc(weight / 2, value / 2)) for value, weight in drawn.itertuples(index=False)]
    return min(1.0, len(tests) * min(tests)) if tests else None


def _of_near_ties(samples: pd.DataFrame) -> str:
    """The rule below float64, for each batch size by itself, since their texts are nearly the same: counts of several
    are not so many tokens checked. More excused tokens than the reference's text lets expect are a `no` only where
    chance does not explain them, at one of the sizes: else too few tokens were checked to tell."""
    plain = samples["task"] == PLAIN
    sizes = list(samples[~plain].groupby(["suite", "task"], sort=False))
    told = []
    for (suite, task), own in sizes:
        usual, of = _counts(samples[plain & (samples["suite"] == suite)], EXCUSED)
        (excused, tokens), (beyond, _) = (_counts(own, metric) for metric in (EXCUSED, BEYOND))
        at = f" at {task}" if len(sizes) > 1 else ""
        if not tokens or not of:
            told.append("unchecked")
        elif beyond:
            told.append(f"no: {beyond} of {tokens} tokens are beyond the noise{at}")
        elif excused * of <= EXCESS * usual * tokens:
            told.append("yes")
        elif st.poisson_excess(excused, tokens, usual, of, EXCESS) < CHANCE / len(sizes):
            told.append(f"no: {excused} of {tokens} tokens excused{at}, in the reference's text {usual} of {of}")
        else:
            told.append(f"unchecked: too few near ties to tell ({excused} of {tokens}{at}, {usual} of {of})")
    return min(
        told, key=lambda verdict: ("no", "unchecked", "yes").index(verdict.partition(":")[0]), default="unchecked"
    )


def _counts(samples: pd.DataFrame, metric: str) -> tuple[int, int]:
    """Tokens that a metric counts, and all tokens."""
    of = samples[samples["metric"] == metric]
    return int(of["value"].sum()), int(of["weight"].sum())


def _share(samples: pd.DataFrame, metric: str) -> float | None:
    of = samples[samples["metric"] == metric]
    whole = float(of["weight"].sum())
    return 100 * float(of["value"].sum()) / whole if whole else None


def _noise(results: Results, samples: pd.DataFrame) -> float | None:
    """The largest that a row's steps measured, in logits."""
    facts = results.facts
    known = facts[(facts["name"] == "noise") & facts["key"].isin(samples["key"])]["value"]
    return float(known.astype(float).max()) if len(known) else None


@dataclass(frozen=True, slots=True)
class Vouched:
    """One check: what it ran on and how."""

    device: str
    """`kind_of` it."""
    measured: bool
    """Whether it was in what models are measured in there. On a CPU float64 vouches for that as well: one code serves
    both, and only in float64 can texts be equal."""
    batches: frozenset[int]
    """Rows of its greedy texts' batches. Empty of sampled text, which is drawn in batches of any size: hundreds of
    draws one by one would take too long."""


class Check:
    """What the losslessness suites of a report vouch for: a decoder of a model of one seed on one kind of device in one
    dtype, at one temperature; of greedy text at certain batch sizes, for which a GPU may have kernels of their own."""

    def __init__(self, results: Results) -> None:
        suites = suites_with(results, use="losslessness")
        samples = of_suites(results.samples, suites)
        drawn = samples["metric"].isin(DRAWN)
        at = samples["task"].str.removeprefix("temperature ").where(drawn, "0").astype(float)
        counts = samples[drawn | samples["metric"].isin(["equal", EXCUSED, BEYOND])].assign(at=at)
        self._texts = dict(iter(counts.groupby(["model", "decoder", "at"], sort=False)))
        judged = counts[counts["metric"].isin(["equal", *DRAWN])]
        known = {of: _batches(group) for of, group in judged.groupby(["store", "key", "at"], sort=False)}
        temperatures = {at for _, _, at in known}
        cells = measuring(results, suites)
        self._checked: dict[tuple[str, str, str, float], list[Vouched]] = {}
        for cell in cells[cells["state"] == "ok"].to_dict("records"):
            config = results.step(cell["store"], cell["key"]).get("component", {}).get("config", {})
            device = kind_of(cell["device"])
            measured = config.get("dtype", "") in ("", DTYPES.get(device), *(["float64"] if device == "cpu" else []))
            for temperature in temperatures:
                if (batches := known.get((cell["store"], cell["key"], temperature))) is not None:
                    of = cell["model"], cell["decoder"], str(cell["seed"]), temperature
                    self._checked.setdefault(of, []).append(Vouched(device, measured, batches))
        finished = results.cells[results.cells["state"] == "ok"]
        self._finished = dict(iter(finished.groupby(["store", "key"], sort=False)))

    def verdict(
        self, model: str, decoder: str, steps: Iterable[tuple[str, str]], temperature: object, batch: object = None
    ) -> str:
        """What is known of the text whose speed the steps (store, key) measured.

        `yes` only where each of their seeds was checked on their kind of device and in their dtype, at their
        temperature and batch size, and every text of every such check is right (`of_texts`).
        """
        # As the checks' tasks write it.
        at = float(f"{temperature:g}") if isinstance(temperature, int | float) else math.nan
        texts = self._texts.get((model, decoder, at))
        if texts is None:
            return "unchecked: sampled" if at and (model, decoder, 0.0) in self._texts else "unchecked"
        if (verdict := of_texts(texts)) != "yes":
            return verdict
        missing: dict[str, None] = {}
        for step in steps:
            for cell in self._finished[step].to_dict("records"):
                if (cell["model"], cell["decoder"]) != (model, decoder):
                    continue
                checks = self._checked.get((model, decoder, str(cell["seed"]), at), [])
                if lacks := _lacking(checks, cell["seed"], kind_of(cell["device"]), None if at else batch):
                    missing[lacks] = None
        return f"unchecked: {', '.join(missing)}" if missing else "yes"


def _lacking(checks: Sequence[Vouched], seed: object, device: str, batch: object) -> str:
    """What no check is like, empty where one is like all of it. A batch size counts where one is given."""
    if not checks:
        return f"seed {seed}"
    if not (checks := [check for check in checks if check.device == device]):
        return f"on {device or 'an unknown device'}"
    if not (checks := [check for check in checks if check.measured]):
        return f"in {DTYPES.get(device)}"
    if batch is not None and not any(batch in check.batches for check in checks):
        return f"batch {batch}"
    return ""


def _batches(samples: pd.DataFrame) -> frozenset[int]:
    """The rows of a step's batches, which may be larger than there were texts for."""
    texts = samples[samples["metric"] == "equal"].groupby("task").size()
    sizes = {BATCH.fullmatch(str(task)): int(count) for task, count in texts.items()}
    return frozenset(min(int(found[1]), count) for found, count in sizes.items() if found)


def kind_of(device: object) -> str:
    """`cpu` or `cuda`."""
    return str(device or "").partition(":")[0]
