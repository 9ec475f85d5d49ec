"""The tables of chats: what models answered, and what judges took to grade it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..harness.results import Results
from .options import NoOptions
from .rows import WHO, drop_empty, failures, table_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FACTS = {
    "judgments, ok": "judged",
    "judgments, malformed": "malformed",
    "judgments, failed": "failed",
    "judge: replies": "replies",
    "judge: prompt tokens": "tokens in",
    "judge: completion tokens": "tokens out",
    "judge: cost": "cost USD",
}
"""Facts of a judging step, and the columns that add them up."""


class Answers:
    """One row per model, decoder and suite that asked; those that did not end well say why."""

    title = "Answers"
    note = (
        "Written by the models for suites that score or judge them. Cut short: by the limit of new tokens, or by the "
        "end of the model's context; such answers are scored as they are. Tokens: of the model's tokenizer, per answer."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        cells = results.cells[(results.cells["kind"] == "answer") & (results.cells["state"] != "skipped")]
        if cells.empty:
            return None
        facts = results.facts[results.facts["kind"] == "answer"]
        failed = failures(cells, WHO)
        rows: list[dict[str, Any]] = []
        for (model, decoder, suite), _ in cells.groupby(WHO, sort=False):
            of = facts[(facts["suite"] == suite) & (facts["model"] == model) & (facts["decoder"] == decoder)]
            sums = {str(name): int(values.sum()) for name, values in of.groupby("name")["value"]}
            row = {"model": model, "decoder": decoder, "suite": suite, "state": failed.get((model, decoder, suite))}
            if answers := sums.get("answers"):
                cut = sums.get("answers cut short", 0)
                row |= {"answers": answers, "cut short": cut, "cut short %": 100 * cut / answers}
                row["tokens"] = sums.get("tokens of answers", 0) / answers
            rows.append(row)
        columns = [*WHO, "answers", "cut short", "cut short %", "tokens", "state"]
        return drop_empty(table_of(rows, columns), ["state", *columns[3:7]])


class Judging:
    """One row per suite and judge, over all models; rows of models whose judging did not end well say why."""

    title = "Judges"
    note = (
        "Requests: one for each answer that is judged. Replies: those that were read, again after a malformed one. "
        "Tokens and cost are those of all replies, whenever they were paid for. Malformed: no verdict in any reply to "
        "a request; failed: no reply. Unanswered: tries without an answer, which were repeated, over all attempts at "
        "the steps. Wall: of the steps' last attempts, added up; models are judged side by side."
    )

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def frame(self, results: Results) -> pd.DataFrame | None:
        cells = results.cells[results.cells["kind"] == "judge"]
        judges = {
            (cell["store"], cell["key"]): judge
            for cell in cells.to_dict("records")
            if cell["state"] not in ("skipped", "not run")
            and (judge := _judge(results.step(cell["store"], cell["key"])))
        }
        if not judges:
            return None
        cells = cells.assign(judge=[judges.get(pair) for pair in zip(cells["store"], cells["key"], strict=True)])
        cells = cells[cells["judge"].notna()]
        facts = results.facts[results.facts["name"].isin(FACTS)]
        rows: list[dict[str, Any]] = []
        for (suite, judge), of in cells.groupby(["suite", "judge"], sort=False):
            finished = of[of["state"] == "ok"].drop_duplicates(["store", "key"])
            if len(finished):
                rows.append(_row(results, suite, judge, finished, facts))
        for (suite, judge, model), state in failures(cells, ("suite", "judge", "model")).items():
            rows.append({"suite": suite, "judge": judge, "models": model, "state": state})
        columns = ["suite", "judge", "models", "requests", *FACTS.values(), "unanswered", "wall s", "state"]
        return drop_empty(table_of(rows, columns), [*FACTS.values(), "requests", "unanswered", "wall s", "state"])


def _row(results: Results, suite: object, judge: object, finished: pd.DataFrame, facts: pd.DataFrame) -> dict[str, Any]:
    pairs = list(zip(finished["store"], finished["key"], strict=True))
    of = facts[[pair in pairs for pair in zip(facts["store"], facts["key"], strict=True)]]
    of = of.drop_duplicates(["store", "key", "name"])
    sums = {
        column: float(values.sum()) if column == "cost USD" else int(values.sum())
        for name, column in FACTS.items()
        if len(values := of.loc[of["name"] == name, "value"])
    }
    tries = Counter(cause for store, key in pairs for cause in _unanswered(results, store, key))
    return {
        "suite": suite,
        "judge": judge,
        "models": finished["model"].nunique(),
        "requests": sum(sums.get(column, 0) for column in ("judged", "malformed", "failed")),
        **sums,
        "unanswered": _told(tries),
        "wall s": float(finished["wall_s"].sum()),
    }


def _judge(step: Mapping[str, Any]) -> str:
    """Who judges; empty where nobody is asked."""
    judge = step.get("component", {}).get("config", {}).get("judge") or {}
    model, use = judge.get("model", ""), judge.get("use", "")
    return str(model) if model and use == "openai" else f"{model} ({use})".strip() if model else str(use)


def _unanswered(results: Results, store: str, key: str) -> Iterable[str]:
    """Why tries had no answer, in all attempts at a step."""
    return (str(event.get("cause", "other")) for event in results.events(store, key) if event["kind"] == "unanswered")


def _told(tries: Counter[str]) -> str:
    """How often tries failed in all, and why."""
    causes = ", ".join(f"{cause}: {count}" for cause, count in tries.most_common())
    return f"{tries.total():,} ({causes})" if tries else "0"
