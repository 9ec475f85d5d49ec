"""The tables of decoding: speed, acceptance of drafts, losslessness."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from ..harness import statistics as st
from ..harness.metrics import REQUEST, acceptance_frame, block_frame
from ..harness.results import Results
from .options import NoOptions
from .rows import by_plan, drop_empty, failures, of_suites, suites_with, table_of

LEVEL = 0.95
MEGA = 1e6


class Speed:
    """One row per model, decoder and kind of request, the teacher and the reference decoder first."""

    title = "Speed"
    note = (
        "TTFT: time to the first token; TPOT: time per further token; both geometric means over blocks. "
        "Speed-up: reference TPOT / TPOT, both of the same process and prompts, with a "
        f"{100 * LEVEL:.0f}\u00a0% interval of the paired blocks; printed only where the text was checked to be "
        "that of the reference decoder. Accepted length: tokens per round, the bonus token included."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        if results.timings.empty:
            return None
        blocks = block_frame(results.timings, by=("store", "model", "decoder", "suite", "key"))
        requests = ["suite", *(column for column in REQUEST if column in blocks)]
        verdicts = verdicts_of_losslessness(results)
        lengths = _accepted_lengths(results, requests)
        rows = []
        for model, decoder, group in by_plan(results, _arms(blocks, results)):
            for request, of in group.groupby(requests, sort=False, dropna=False):
                rows.append(self._row(results, model, decoder, dict(zip(requests, request, strict=True)), of))
                rows[-1] |= {"lossless": verdicts.get((model, decoder), "unchecked")}
                rows[-1] |= lengths.get((model, decoder, *request), {})
                if decoder in results.decoders[:1]:
                    rows[-1]["lossless"] = "reference"
                elif rows[-1]["lossless"] == "yes":
                    rows[-1]["speed-up"] = _speed_up(blocks, model, decoder, rows[-1], requests)
        rows = [{**row, "state": "ok"} for row in rows] + _failed(results)
        places = {name: place for place, name in enumerate(results.models["model"])}
        rows.sort(key=lambda row: places.get(row["model"], len(places)))
        figures = [
            "TTFT ms",
            "TPOT ms",
            "tokens/s",
            "reference TPOT ms",
            "speed-up",
            "lossless",
            "accepted length",
            "k",
        ]
        sizes = ["weights MB", "KV MB", "state MB", "peak MB", "blocks"]
        names = {"prompt_tokens": "prompt", "new_tokens": "new"}
        frame = table_of(rows, ["model", "decoder", "state", *requests, *figures, *sizes]).rename(columns=names)
        hidden = ("suite", "new", "temperature", "content", "state")
        constant = [name for name in hidden if name in frame and frame[name].nunique() <= 1]
        return drop_empty(
            frame.drop(columns=constant), ["speed-up", "reference TPOT ms", "accepted length", "k", *sizes]
        )

    def _row(
        self, results: Results, model: str, decoder: str, request: dict[str, Any], of: pd.DataFrame
    ) -> dict[str, Any]:
        subject = of[of["arm"] == "subject"]
        own = subject if len(subject) else of
        tpot = st.geometric_mean(own["tpot_s"]).value
        row = {
            "model": model,
            "decoder": decoder,
            **request,
            "TTFT ms": 1e3 * st.geometric_mean(own["ttft_s"]).value,
            "TPOT ms": 1e3 * tpot,
            "tokens/s": st.geometric_mean(own["decode_tokens_per_s"]).value,
            "blocks": len(own),
        }
        facts = results.facts[results.facts["key"].isin(own["key"]) & (results.facts["model"] == model)]
        batch = request.get("batch")
        for column, names in (
            ("weights MB", ("weights",)),
            ("KV MB", (f"KV cache, batch {batch}", "KV cache")),
            ("state MB", (f"state, batch {batch}", "state")),
            ("peak MB", ("peak device memory", "peak memory of the process")),
        ):
            known = facts[facts["name"].isin(names) & facts["arm"].isin(["", own["arm"].iloc[0]])]
            row[column] = float(known["value"].astype(float).max()) / MEGA if len(known) else None
        return row


def _failed(results: Results) -> list[dict[str, Any]]:
    """A row with its state for each decoder whose measurement did not end well."""
    cells = of_suites(results.cells, suites_with(results, traits=("alone",)))
    groups = failures(cells[cells["kind"] == "measure"], ("model", "decoder"))
    return [{"model": model, "decoder": decoder, "state": state} for (model, decoder), state in groups.items()]


def _arms(blocks: pd.DataFrame, results: Results) -> pd.DataFrame:
    """Blocks under the decoder that made them: the arm `reference` is the plan's first decoder."""
    first = results.decoders[0] if results.decoders else ""
    return blocks.assign(decoder=blocks["decoder"].where(blocks["arm"] == "subject", first))


def _speed_up(
    blocks: pd.DataFrame, model: str, decoder: str, row: dict[str, Any], requests: list[str]
) -> st.Estimate | None:
    """The quotient of the row's two printed figures; also fills in the reference's."""
    of = blocks[(blocks["model"] == model) & (blocks["decoder"] == decoder)]
    for name in requests:
        of = of[of[name] == row[name]]
    arms = of.pivot_table(index=["key", "block"], columns="arm", values="tpot_s")
    if not {"subject", "reference"} <= set(arms.columns) or arms.isna().any(axis=None):
        return None
    row["reference TPOT ms"] = 1e3 * st.geometric_mean(arms["reference"]).value
    return st.paired_quotient(arms["reference"], arms["subject"], LEVEL)


def _accepted_lengths(results: Results, requests: list[str]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Mean accepted lengths of the timed requests, with errors clustered by text."""
    rounds = results.rounds
    if rounds.empty:
        return {}
    timed = set(zip(results.timings["store"], results.timings["suite"], strict=True))
    rounds = of_suites(rounds[rounds["arm"] == "subject"], timed)
    if not set(requests) <= set(rounds):
        return {}
    found = {}
    for of, group in rounds.groupby(["model", "decoder", *requests], sort=False, dropna=False):
        found[of] = {"accepted length": accepted_length(group), "k": int(group["drafted"].max())}
    return found


def accepted_length(rounds: pd.DataFrame) -> st.Estimate:
    """Tokens per round; the rounds of one text are a cluster."""
    texts = rounds["key"].astype(str) + ":" + rounds["block"].astype(str) + ":" + rounds["row"].astype(str)
    return st.ratio(rounds["accepted"] + 1, [1.0] * len(rounds), texts.to_numpy(dtype=str))


def verdicts_of_losslessness(results: Results) -> dict[tuple[str, str], str]:
    """By model and decoder: `yes` where every checked text is the reference's, else how many differ."""
    samples = of_suites(results.samples, suites_with(results, use="losslessness"))
    equal = samples[samples["metric"] == "equal"]
    verdicts = {}
    for of, group in equal.groupby(["model", "decoder"], sort=False):
        wrong = int((group["value"] < 1).sum())
        verdicts[of] = "yes" if not wrong else f"no: {wrong} of {len(group)} texts differ"
    return verdicts


class Losslessness:
    """One row per model and decoder that was held against the reference decoder."""

    title = "Losslessness"
    note = (
        "Greedy texts that are the reference decoder's token for token, at every batch size; tokens that one parallel "
        "run over the text would choose as well; and the shares of rounds that accept, or reject, a drafted token."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        suites = suites_with(results, use="losslessness")
        samples = of_suites(results.samples, suites)
        if samples.empty:
            return None
        rounds = of_suites(results.rounds, suites)
        verdicts = verdicts_of_losslessness(results)
        shares = {}
        if len(rounds):
            drafted = acceptance_frame(rounds, by=("model", "decoder")).set_index(["model", "decoder"])
            shares = drafted.to_dict("index")
        rows = []
        for model, decoder, group in by_plan(results, samples):
            equal = group[group["metric"] == "equal"]
            parallel = group[group["metric"] == "parallel_argmax"]
            of = shares.get((model, decoder), {})
            rows.append(
                {
                    "model": model,
                    "decoder": decoder or "–",
                    "texts": len(equal),
                    "equal": int(equal["value"].sum()),
                    "lossless": verdicts.get((model, decoder), "unchecked"),
                    "tokens": int(parallel["weight"].sum()),
                    "parallel argmax %": 100 * parallel["value"].sum() / parallel["weight"].sum()
                    if len(parallel)
                    else None,
                    "accepted length": of.get("mean_accepted_length"),
                    "k": of.get("k"),
                    "accepting %": _percent(of.get("share_accepting")),
                    "rejecting %": _percent(of.get("share_rejecting")),
                }
            )
        frame = table_of(rows)
        return drop_empty(frame, ["accepted length", "k", "accepting %", "rejecting %"])


class Acceptance:
    """One row per model, decoder and suite that drafts."""

    title = "Acceptance of drafts"
    note = (
        "Over all rounds, short drafts included: the mean accepted length is 1 + the sum of the acceptance per "
        "position. Accepting and rejecting: shares of rounds in which at least one drafted token is accepted, or "
        "rejected; a round that drafts nothing does neither."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        rounds = results.rounds[results.rounds["arm"] == "subject"]
        if rounds.empty:
            return None
        rows = []
        for model, decoder, group in by_plan(results, rounds):
            for figures in acceptance_frame(group, by=("suite",)).to_dict("records"):
                of = group[group["suite"] == figures["suite"]]
                rows.append(
                    {
                        "model": model,
                        "decoder": decoder,
                        "suite": figures["suite"],
                        "k": int(figures["k"]),
                        "rounds": int(figures["rounds"]),
                        "accepted length": accepted_length(of),
                        **dict(_positions(figures["by_position"])),
                        "accepting %": _percent(figures["share_accepting"]),
                        "rejecting %": _percent(figures["share_rejecting"]),
                    }
                )
        frame = table_of(rows)
        positions = sorted((name for name in frame if name[0].isdigit()), key=lambda name: int(name[:-4]))
        others = [name for name in frame if name not in positions]
        at = others.index("accepted length") + 1
        return frame[[*others[:at], *positions, *others[at:]]]


def _positions(shares: list[float]) -> Iterator[tuple[str, float]]:
    for place, share in enumerate(shares, 1):
        ending = {1: "st", 2: "nd", 3: "rd"}.get(place % 10 if place % 100 not in (11, 12, 13) else 0, "th")
        yield f"{place}{ending} %", 100 * share


def _percent(share: float | None) -> float | None:
    return None if share is None or math.isnan(share) else 100 * share
