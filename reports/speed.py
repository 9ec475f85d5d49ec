"""The table of decoding speed: every figure of a decoder beside that of the reference decoder."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..harness import statistics as st
from ..harness.metrics import REQUEST, block_frame
from ..harness.results import Results
from .acceptance import accepted_length, scripted
from .losslessness import Check
from .options import NoOptions
from .rows import (
    TRAINING,
    WHO,
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
MEGA = 1e6
FIGURES = (
    *(
        "TPOT ms",
        "speed-up",
        "lossless",
        "tokens/s",
        "scripted %",
        "accepted length",
        "TTFT ms",
        "reference TPOT ms",
        "k",
    ),
    *("of predicted", "bandwidth %", "distinct 4-grams %"),
    *("weights MB", "KV MB", "state MB", "peak MB", "blocks"),
)
NAMES = {"prompt_tokens": "prompt", "new_tokens": "new"}


class Speed:
    """One row per model, decoder and kind of request, the teacher and the reference decoder first."""

    title = "Speed"
    note = (
        "TTFT: time to the first token; TPOT: time per further token; both geometric means over blocks. "
        "Speed-up: reference TPOT / TPOT, both of the same process and prompts, with a "
        f"{100 * LEVEL:.0f}\u00a0% interval of the paired blocks; printed only where text of that "
        "temperature was checked to be the reference decoder's, for every seed and on the same kind of device. "
        "Accepted length: tokens per round, the bonus token included. Scripted: drafts stood by chance at this rate, "
        "whatever the model said, so the speed is that of drafts as good. Distinct 4-grams: of the runs of four tokens "
        "in a text, those that are different; text that loops has few. Bandwidth: the bytes that a plain step must "
        "move, over TPOT and the bandwidth of a copy measured beside it. Of predicted: the speed of adaptive rounds "
        "over that which their acceptance and costs predicted."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
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
                row = self._row(results, model, decoder, dict(zip(requests, request, strict=True)), of)
                row |= {"state": state, **lengths.get((model, decoder, *request), {})}
                if row.get("accepted length") is None:
                    row["bandwidth %"] = _bandwidth(results, row, of)
                elif "batch" in blocks and groups[who]["batch"].nunique() == 1:
                    row["of predicted"] = _of_predicted(results, of)
                if decoder in results.decoders[:1]:
                    row["lossless"] = "reference"
                else:
                    steps = set(zip(of["store"], of["key"], strict=True))
                    row["lossless"] = check.verdict(model, decoder, steps, row.get("temperature"))
                if row["lossless"] == "yes":
                    row |= _speed_up(blocks, row, requests)
                rows.append(row)
        columns = ["model", "decoder", *requests, "state", *FIGURES]
        frame = table_of(with_teachers(results, rows, cells), columns).rename(columns=NAMES)
        constant = [name for name in ("suite", "new", "temperature", "content") if name in frame]
        frame = only_failures(frame).drop(columns=[name for name in constant if frame[name].nunique() <= 1])
        return drop_empty(frame, [*(NAMES.get(name, name) for name in requests), *FIGURES])

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
        for column, unit, names in (
            ("weights MB", 1 / MEGA, ("weights",)),
            ("KV MB", 1 / MEGA, (f"KV cache, batch {batch}", "KV cache")),
            ("state MB", 1 / MEGA, (f"state, batch {batch}", "state")),
            ("peak MB", 1 / MEGA, ("peak device memory", "peak memory of the process")),
            ("distinct 4-grams %", 100, (f"distinct 4-grams, batch {batch}",)),
        ):
            known = facts[facts["name"].isin(names) & facts["arm"].isin(["", own["arm"].iloc[0]])]
            row[column] = unit * float(known["value"].astype(float).max()) if len(known) else None
        return row


def _of_predicted(results: Results, of: pd.DataFrame) -> float | None:
    """How fast adaptive rounds were, over how fast they should have been; of a step's last block."""
    facts = results.facts[results.facts["key"].isin(of["key"]) & (results.facts["arm"] == "subject")]
    predicted, measured = (
        facts.loc[facts["name"] == f"adaptive K, {name} time per token", "value"].astype(float)
        for name in ("predicted", "measured")
    )
    return float(predicted.mean() / measured.mean()) if len(predicted) and len(measured) else None


def _bandwidth(results: Results, row: dict[str, Any], of: pd.DataFrame) -> float | None:
    """What plain steps of TPOT move, as a share of what a copy does."""
    facts = results.facts[results.facts["key"].isin(of["key"])]
    moved, copied = (
        facts.loc[facts["name"] == name, "value"].astype(float)
        for name in (f"bytes of a step, batch {row.get('batch')}", "copy bandwidth")
    )
    if moved.empty or copied.empty:
        return None
    return float(100 * moved.max() / (row["TPOT ms"] / 1e3) / copied.max())


def _blocks(results: Results) -> pd.DataFrame:
    """Blocks under the decoder that made them: the arm `reference` is the plan's first decoder, and `beside` is the
    decoder that it was measured with."""
    training = suites_with(results, use=TRAINING)
    timings = of_suites(
        results.timings, set(zip(results.timings["store"], results.timings["suite"], strict=True)) - training
    )
    if timings.empty:
        return pd.DataFrame(columns=["store", *WHO, "key"])
    blocks = block_frame(timings, by=("store", *WHO, "key"))
    first = results.decoders[0] if results.decoders else ""
    return blocks.assign(beside=blocks["decoder"], decoder=blocks["decoder"].where(blocks["arm"] == "subject", first))


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
    rounds = of_suites(rounds[rounds["arm"] == "subject"], timed)
    if not set(requests) <= set(rounds):
        return {}
    found = {}
    for of, group in rounds.groupby(["model", "decoder", *requests], sort=False, dropna=False):
        lengths = {"accepted length": accepted_length(group), "k": int(group["drafted"].max())}
        found[of] = {**lengths, "scripted %": scripted(group)}
    return found
