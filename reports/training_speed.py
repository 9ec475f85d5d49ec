"""The table of the suite `train-speed`: what an optimiser step of a model takes beside one of its teacher."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..harness import statistics as st
from ..harness.metrics import request_frame
from ..harness.results import Results
from .options import NoOptions
from .rows import TRAINING, WHO, drop_empty, failures, measuring, of_suites, only_failures, suites_with, table_of
from .speed import LEVEL

GIGA, TERA = 1e9, 1e12
PEAK = "peak memory"
FLOPS, DEVICE = "FLOPs a step", "FLOP/s of the device"
FIGURES = (
    *("step ms", "tokens/s", "teacher's tokens/s", "of teacher's", "peak GB", "teacher's peak GB"),
    *("TFLOP a step", "TFLOP/s", "MFU %", "trained M", "blocks"),
)


class TrainingSpeed:
    """One row per model and length of window, the teacher first."""

    title = "Training speed"
    note = (
        "Step: an optimiser step with its forward and backward passes, geometric mean over blocks. "
        "Of teacher's: the model's tokens/s / the teacher's, both of the same process and alternated, with a "
        f"{100 * LEVEL:.0f}\u00a0% interval of the paired blocks. Peak: most device memory of the model's steps, "
        "frozen teacher included. MFU: the FLOPs that a step needs (what is run again to save memory counts once) over "
        "those that the device could have done in bf16."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        suites = suites_with(results, use=TRAINING)
        cells = measuring(results, suites)
        if cells.empty:
            return None
        states = failures(cells, ("model", "suite"))
        timings = of_suites(results.timings, suites)
        blocks = _blocks(timings)
        order = {name: place for place, name in enumerate(results.models["model"])}
        rows: list[dict[str, Any]] = []
        for (model, suite), _ in sorted(cells.groupby(["model", "suite"], sort=False), key=lambda of: order[of[0][0]]):
            state = states.get((model, suite), "ok")
            own = blocks[(blocks["model"] == model) & (blocks["suite"] == suite)]
            if own.empty:
                rows.append({"model": model, "suite": suite, "state": state})
            for (context, batch), of in own.groupby(["prompt_tokens", "batch"]):
                row = {"model": model, "suite": suite, "state": state, "window tokens": int(context)}
                rows.append(row | {"windows": int(batch)} | _figures(of) | _facts(results, of, int(context)))
        frame = table_of(rows, ["model", "suite", "window tokens", "windows", "state", *FIGURES])
        if frame["suite"].nunique() <= 1:
            frame = frame.drop(columns="suite")
        return drop_empty(only_failures(frame), ["window tokens", "windows", *FIGURES])


def _blocks(timings: pd.DataFrame) -> pd.DataFrame:
    """One row per block and model that was trained in it: its steps, tokens and seconds."""
    if timings.empty:
        return pd.DataFrame(columns=[*WHO, "key", "prompt_tokens", "batch", "arm", "block"])
    return request_frame(timings, by=("store", *WHO, "key"))


def _figures(of: pd.DataFrame) -> dict[str, Any]:
    """From the blocks of a model and of its teacher."""
    own = of[of["arm"] == "subject"]
    rate = st.geometric_mean(own["tokens"] / own["last_s"]).value
    row: dict[str, Any] = {
        "step ms": 1e3 * st.geometric_mean(own["last_s"] / own["bursts"]).value,
        "tokens/s": rate,
        "blocks": len(own),
    }
    arms = of.pivot_table(index=["key", "block"], columns="arm", values="last_s")
    if {"subject", "reference"} <= set(arms.columns) and not arms.isna().any(axis=None):
        beside = of[of["arm"] == "reference"]
        row["teacher's tokens/s"] = st.geometric_mean(beside["tokens"] / beside["last_s"]).value
        row["of teacher's"] = st.paired_quotient(arms["reference"], arms["subject"], LEVEL)
    return row


def _facts(results: Results, of: pd.DataFrame, context: int) -> dict[str, Any]:
    """What the suite says beside the times."""
    facts = results.facts[results.facts["key"].isin(of["key"]) & (results.facts["model"] == of["model"].iloc[0])]

    def mean(name: str, arm: str, factor: float) -> float | None:
        known = facts[(facts["name"] == name) & (facts["arm"] == arm)]
        return float(known["value"].astype(float).mean()) / factor if len(known) else None

    own = of[of["arm"] == "subject"]
    step = st.geometric_mean(own["last_s"] / own["bursts"]).value
    flops, most = mean(f"{FLOPS}, {context} tokens", "subject", 1.0), mean(DEVICE, "", 1.0)
    return {
        "peak GB": mean(f"{PEAK}, {context} tokens", "subject", GIGA),
        "teacher's peak GB": mean(f"{PEAK}, {context} tokens", "reference", GIGA),
        "TFLOP a step": None if flops is None else flops / TERA,
        "TFLOP/s": None if flops is None else flops / step / TERA,
        "MFU %": None if flops is None or most is None else 100 * flops / step / most,
        "trained M": mean("trained parameters", "subject", 1e6),
    }
