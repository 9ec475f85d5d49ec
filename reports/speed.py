"""The table of decoding speed: every figure of a decoder beside that of the reference decoder."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pandas as pd

from ..harness import statistics as st
from ..harness.metrics import REQUEST, acceptance_by_position, block_frame
from ..harness.results import Results
from .acceptance import accepted_length, scripted
from .losslessness import Check
from .options import NoOptions
from .rows import (
    TRAINING,
    WHO,
    called,
    drop_empty,
    failures,
    in_plan_order,
    measuring,
    of_suites,
    only_failures,
    suites_with,
    table_of,
    with_teachers,
)

LEVEL = 0.95
BANDWIDTHS = ("copy bandwidth", "read bandwidth")
SCRIPTED = "scripted"
"""In place of a verdict on text that chance made."""
MEGA = 1e6
FIGURES = (
    *(
        "TPOT ms",
        "speed-up",
        "lossless",
        "predicted",
        "of predicted",
        "tokens/s",
        "scripted %",
        "accepted length",
        "by position %",
        "TTFT ms",
        "reference TPOT ms",
        "k",
    ),
    *(*(f"{name} %" for name in BANDWIDTHS), "distinct 4-grams %"),
    *("weights MB", "KV MB", "state MB", "peak MB", "blocks"),
)
NAMES = {"prompt_tokens": "prompt", "new_tokens": "new"}
REQUESTS = ("suite", *(NAMES.get(name, name) for name in REQUEST))
OF_DRAFTS = ("by position %", "predicted", "of predicted")
"""Figures that only the table of speculation has, to keep this one narrower."""


class Speed:
    """One row per model, decoder and kind of request, the teacher and the reference decoder first."""

    title = "Speed"
    note = (
        "TTFT: time to the first token; TPOT: time per further token; both geometric means over blocks. "
        "Speed-up: reference TPOT / TPOT, both of the same process and prompts, with a "
        f"{100 * LEVEL:.0f}\u00a0% interval of the paired blocks; printed only where text of that "
        "temperature, greedy text at that batch size, was checked to be the reference decoder's, for every seed and "
        "on the same kind of device in the same dtype (on a CPU in float64). "
        "Accepted length: tokens per round, the bonus token included. Scripted: drafts stood by chance at this rate, "
        "whatever the model said, so the speed is that of drafts as good. Distinct 4-grams: of the runs of four tokens "
        "in a text, those that are different; text that loops has few. Copy and read bandwidth: the bytes that a plain "
        "step must move, over TPOT, as a share of what a copy moves beside it on the device, and of what is read where "
        "nothing is written; small weights may lie in caches, which are faster. A draft reads the prompt too: on a "
        "CPU before the first token is told, on a GPU behind it. Weights, KV and state are the model's own: what a "
        "draft has beside them is in the peak alone, which is of all that the process held meanwhile."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        whole = figures(results)
        return None if whole is None else whole.drop(columns=list(OF_DRAFTS), errors="ignore")


def figures(results: Results) -> pd.DataFrame | None:
    """All that is known of a decoder's speed; one row per model, decoder and kind of request."""
    timed = set(zip(results.timings["store"], results.timings["suite"], strict=True))
    training = suites_with(results, use=TRAINING)
    cells = measuring(results, (suites_with(results, traits=("alone",)) | timed) - training)
    if cells.empty:
        return None
    states = failures(cells, WHO)
    blocks = _blocks(results)
    requests = ["suite", *(column for column in REQUEST if column in blocks)]
    groups = dict(iter(blocks.groupby(WHO, sort=False)))
    check, lengths = Check(results), _accepted_lengths(results, requests)
    rows = []
    for who in in_plan_order(results, [*groups, *states]):
        model, decoder, suite = who
        state = states.get(who, "ok")
        if who not in groups:
            rows.append({"model": model, "decoder": decoder, "state": state, "suite": suite})
            continue
        for request, of in groups[who].groupby(requests, sort=False, dropna=False):
            row = _row(results, model, decoder, dict(zip(requests, request, strict=True)), of)
            row |= {"state": state, **lengths.get((model, decoder, *request), {})}
            if row.get("accepted length") is None:
                row |= _bandwidths(results, row, of)
            if decoder in results.decoders[:1]:
                row["lossless"] = "reference"
            elif row.get("scripted %") is not None:
                row["lossless"] = SCRIPTED
            else:
                steps = set(zip(of["store"], of["key"], strict=True))
                row["lossless"] = check.verdict(model, decoder, steps, row.get("temperature"), row.get("batch"))
            if row["lossless"] == "yes":
                row |= _speed_up(blocks, row, requests)
            if row.get("speed-up") and (predicted := _predicted(results, row, of)):
                row |= {"predicted": predicted, "of predicted": row["speed-up"].value / predicted}
            rows.append(row)
    columns = ["model", "decoder", *requests, "state", *FIGURES]
    frame = table_of(with_teachers(results, rows, cells), columns).rename(columns=NAMES)
    constant = [name for name in ("suite", "new", "temperature", "content") if name in frame]
    frame = only_failures(frame).drop(columns=[name for name in constant if frame[name].nunique() <= 1])
    return drop_empty(frame, [*(NAMES.get(name, name) for name in requests), *FIGURES])


def _row(results: Results, model: str, decoder: str, request: dict[str, Any], of: pd.DataFrame) -> dict[str, Any]:
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
    for column, unit, names in (
        ("weights MB", 1 / MEGA, ("weights",)),
        ("KV MB", 1 / MEGA, (*(f"KV cache, {of}" for of in called(request)), "KV cache")),
        ("state MB", 1 / MEGA, (*(f"state, {of}" for of in called(request)), "state")),
        ("peak MB", 1 / MEGA, ("peak device memory", "peak memory of the process")),
        ("distinct 4-grams %", 100, tuple(f"distinct 4-grams, {of}" for of in called(request))),
    ):
        known = facts[facts["name"].isin(names) & facts["arm"].isin(["", own["arm"].iloc[0]])]
        row[column] = unit * float(known["value"].astype(float).max()) if len(known) else None
    return row


def _predicted(results: Results, row: dict[str, Any], of: pd.DataFrame) -> float | None:
    """The speed-up that the accepted length and the costs of rounds let expect; None where they are not known."""
    facts = results.facts[results.facts["key"].isin(of["key"])]
    costs: dict[str, dict[str, float]] = {"subject": {}, "reference": {}}
    for end, (arm, known) in itertools.product([f", {which}" for which in called(row)], costs.items()):
        named = facts[(facts["arm"] == arm) & facts["name"].str.endswith(end)]
        values = named["value"].astype(float).groupby(named["name"].str.removesuffix(end)).mean()
        known |= {str(name): seconds for name, seconds in values.items()}
    plain = costs["reference"].get("cost of a round, K = 0")
    rounds = [seconds for name, seconds in costs["subject"].items() if name.startswith("cost of a round")]
    expected = costs["subject"].get("adaptive K, predicted time per token")
    if expected is None and len(rounds) == 1 and row.get("accepted length") is not None:
        expected = rounds[0] / row["accepted length"].value
    return plain / expected if plain and expected else None


def _bandwidths(results: Results, row: dict[str, Any], of: pd.DataFrame) -> dict[str, float]:
    """What plain steps of TPOT move, as shares of what a copy moves, and reading."""
    steps = [f"bytes of a step, {which}" for which in called(row)]
    facts = results.facts[results.facts["key"].isin(of["key"])]
    facts = facts[facts["name"].isin([*steps, *BANDWIDTHS])]
    known = facts["value"].astype(float).groupby(facts["name"]).max()
    moved = next((known[name] for name in steps if name in known), math.nan) / (row["TPOT ms"] / 1e3)
    return {f"{name} %": float(100 * moved / known[name]) for name in BANDWIDTHS if name in known}


def _blocks(results: Results) -> pd.DataFrame:
    """Blocks under the decoder that made them; `beside` is the decoder that the plan's first one was measured with."""
    training = suites_with(results, use=TRAINING)
    timings = of_suites(
        results.timings, set(zip(results.timings["store"], results.timings["suite"], strict=True)) - training
    )
    if timings.empty:
        return pd.DataFrame(columns=["store", *WHO, "key"])
    blocks = block_frame(timings, by=("store", *WHO, "key"))
    return _as_measured(results, blocks.assign(beside=blocks["decoder"]))


def _as_measured(results: Results, of: pd.DataFrame) -> pd.DataFrame:
    """Rows of either arm under the decoder that made them: the arm `reference` is the plan's first one."""
    first = results.decoders[0] if results.decoders else ""
    return of.assign(decoder=of["decoder"].where(of["arm"] == "subject", first))


def _speed_up(blocks: pd.DataFrame, row: dict[str, Any], requests: list[str]) -> dict[str, Any]:
    """The quotient of the row's two printed figures, and the reference's."""
    of = blocks[(blocks["model"] == row["model"]) & (blocks["beside"] == row["decoder"])]
    for name in requests:
        of = of[of[name] == row[name]]
    arms = of.pivot_table(index=["key", "block"], columns="arm", values="tpot_s")
    if not {"subject", "reference"} <= set(arms.columns) or arms.isna().any(axis=None):
        return {}
    return {
        "reference TPOT ms": 1e3 * st.geometric_mean(arms["reference"]).value,
        "speed-up": st.paired_quotient(arms["reference"], arms["subject"], LEVEL),
    }


def _accepted_lengths(results: Results, requests: list[str]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Mean accepted lengths of the timed requests, with errors clustered by text."""
    rounds = results.rounds
    if rounds.empty:
        return {}
    timed = set(zip(results.timings["store"], results.timings["suite"], strict=True))
    rounds = _as_measured(results, of_suites(rounds, timed))
    if not set(requests) <= set(rounds):
        return {}
    found = {}
    for of, group in rounds.groupby(["model", "decoder", *requests], sort=False, dropna=False):
        k = int(group["drafted"].max())
        places = acceptance_by_position(group["accepted"].tolist(), k)
        lengths = {"accepted length": accepted_length(group), "k": k}
        lengths["by position %"] = " ".join(f"{100 * place:.0f}" for place in places)
        found[of] = {**lengths, "scripted %": scripted(group)}
    return found
