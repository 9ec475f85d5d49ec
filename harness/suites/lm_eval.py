"""The LM evaluation harness on our models: its tasks, our stepping contract, one record per item.

lm-eval computes each item's metrics; averages and standard errors are made from the items when a report is made. A task
that was done stays done: a killed step goes on with the next one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from numpy.typing import NDArray

from ..interfaces import MISSING, Bench, Emit, MambabenchError, Unsupported
from ..keys import digest
from ..statistics import SE, bootstrap_se
from ..store import write_text
from .configs import LmEvalConfig
from .lm_eval_model import StepperLM
from .lm_eval_presets import PRESETS, Asked
from .lm_eval_tasks import NoData, load_tasks
from .twins import twin_metrics, twin_requests

log = logging.getLogger("mambabench")

WEIGHTED = {"word_perplexity": "nll_per_word", "byte_perplexity": "nll_per_byte", "bits_per_byte": "nll_per_byte"}
"""lm-eval's metrics whose items are (log-likelihood in nat, weight), and what we call them."""
PASSAGES = ("passage", "article", "paragraph", "story", "context")
"""Fields of an item that hold a text. Items that share it are not independent of each other, and are one cluster."""
DRAWS, MOST_DRAWN = 100, 1_000_000
"""Samples of items that errors of aggregates come from, and items in all of them."""
HASH = 16
"""Hexadecimal digits that are kept of a SHA-256."""
LOWER = ("gap", "no_answer")
"""Metrics of twins of which less is better."""


class LmEval:
    def __init__(self, config: LmEvalConfig) -> None:
        self.config = config

    def run(self, bench: Bench) -> None:
        random.seed(DEFAULT_RANDOM_SEED + bench.seed)
        np.random.seed(DEFAULT_OTHER_SEED + bench.seed)
        # Before the model: data that cannot be had are known at once.
        tasks, missing = self._tasks(bench)
        for name, reason in missing.items():
            log.warning("%s", reason)
            bench.emit("fact", name=MISSING, arm=name, value=reason)
        for _, _, name, task in tasks:
            if getattr(task, "UNSAFE_CODE", False):
                raise MambabenchError(f"lm-eval: task {name!r} executes what models write; this suite does not")
        model = StepperLM(bench.subject.load(), bench.subject.decoder, self.config.batch, bench.seed, bench.emit)
        bench.emit("progress", done=0, total=0, unit="requests")
        done = Path(bench.scratch) / "lm-eval"
        done.mkdir(parents=True, exist_ok=True)
        for asked, label, name, task in tasks:
            records = done / f"{digest(name)}.jsonl"
            if not records.is_file():
                found = self._records(asked, label, name, task, model, bench.seed)
                write_text(records, "".join(json.dumps(record, default=float) + "\n" for record in found))
            for line in records.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                bench.emit(record.pop("kind"), **record)

    def _tasks(self, bench: Bench) -> tuple[list[tuple[Asked, str, str, Any]], dict[str, str]]:
        """Every task once, however often it is named, with the name that its items are counted under; and by name why
        others are missing.

        Raises `Unsupported` where all of them are, and for what another try may find.
        """
        wanted = [Asked(name, (), self.config.shots) for name in self.config.tasks]
        if self.config.preset:
            wanted += PRESETS[self.config.preset]
        folder = bench.data[self.config.data] if self.config.data else None
        local = bench.data[self.config.local] if self.config.local else None
        found: dict[str, tuple[Asked, str, str, Any]] = {}
        missing: dict[str, str] = {}
        for asked in wanted:
            try:
                for label, name, task in load_tasks(asked.task, folder, bench.scratch, local):
                    found.setdefault(name, (asked, label, name, task))
            except NoData as error:
                missing[asked.task] = str(error)
        if not found:
            raise Unsupported("; ".join(missing.values()))
        return list(found.values()), missing

    def _records(
        self, asked: Asked, label: str, name: str, task: Any, model: StepperLM, seed: int
    ) -> list[dict[str, Any]]:
        """Evaluates a task and its twin."""
        shots = task.get_config("num_fewshot") if asked.shots is None else asked.shots
        task.set_config(key="num_fewshot", value=shots or 0)
        # At seed 0 examples are those of lm-eval's command line.
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED + seed)
        # What `simple_evaluate` does with a model that it is handed; it would also list the installed packages in a
        # subprocess for each task.
        results = evaluate(
            model,
            {"tasks": {name: task}},
            limit=self.config.limit or None,
            bootstrap_iters=0,
            system_instruction=self.config.system or None,
            apply_chat_template=self.config.chat,
            fewshot_as_multiturn=self.config.chat,
        )
        samples = results["samples"][name]
        records: list[dict[str, Any]] = []

        def emit(kind: str, /, **fields: Any) -> None:
            if label != name and "item" in fields:
                fields = {**fields, "task": label, "item": f"{name}/{fields['item']}", "part": name}
            records.append({"kind": kind, **fields})

        emit_samples(name, samples, task, emit, asked.metrics)
        emit_aggregates(name, results["results"][name], samples, task, emit, asked.metrics)
        if all(record["kind"] == "response" for record in records):
            given = ", ".join(dict.fromkeys(metric for sample in samples for metric in sample["metrics"])) or "none"
            raise MambabenchError(
                f"lm-eval: task {name!r} gives no figure: no number comes of its metrics ({given})"
                + (f", of which {', '.join(asked.metrics)} would be taken" if asked.metrics else "")
            )
        if self.config.twins:
            self._twin(asked, name, samples, task, model, emit)
        return records

    def _twin(
        self, asked: Asked, name: str, samples: Sequence[Mapping[str, Any]], task: Any, model: StepperLM, emit: Emit
    ) -> None:
        requests = twin_requests(task, lambda text: model.tok_encode(text, add_special_tokens=False))
        if not requests:
            log.info("%s: no generative twin", name)
            return
        answers = dict(zip(requests, model.generate_until(list(requests.values())), strict=True))
        metric = asked.metrics[0] if asked.metrics else "acc"
        for about, sample in _items(samples):
            choices = task.doc_to_choice(sample["doc"])
            answer = answers[sample["doc_id"]]
            emit("response", task=name, item=about["item"], filter="twin", responses=[answer])
            for of, value in twin_metrics(sample, answer, choices, metric).items():
                better = "lower" if of in LOWER else "higher"
                emit("sample", task=name, **about, metric=of, value=value, better=better)


def emit_samples(
    name: str, samples: Sequence[Mapping[str, Any]], task: Any, emit: Emit, only: Sequence[str] = ()
) -> None:
    """Emits what the model said of each item, with what metrics that are no mean over items make of it, and a sample
    for each metric that is; of those in `only` if there are any."""
    filters = {sample["filter"] for sample in samples}
    higher = task.higher_is_better()
    for of_item, sample in _items(samples):
        about = {"task": name, **of_item}
        suffix = f" ({sample['filter']})" if len(filters) > 1 else ""
        metrics = [metric for metric in sample["metrics"] if not only or metric in only]
        parts = {metric: _plain(sample[metric]) for metric in metrics if _is_aggregate(metric, task)}
        responses = _plain(sample["filtered_resps"])
        emit("response", **about, filter=sample["filter"], responses=responses, **({"parts": parts} if parts else {}))
        # Two of lm-eval's metrics are made of the same items.
        for metric, (nats, weight) in {WEIGHTED[each]: sample[each] for each in metrics if each in WEIGHTED}.items():
            emit("sample", **about, metric=metric + suffix, value=-nats, weight=weight, better="lower")
        for metric in metrics:
            if metric == "perplexity":
                emit("sample", **about, metric="nll_per_item" + suffix, value=-sample[metric], better="lower")
            elif metric not in WEIGHTED and not _is_aggregate(metric, task):
                better = "higher" if higher.get(metric, True) else "lower"
                emit("sample", **about, metric=metric + suffix, value=float(sample[metric]), better=better)


def emit_aggregates(
    name: str,
    result: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    task: Any,
    emit: Emit,
    only: Sequence[str] = (),
) -> None:
    """Emits the metrics that are no mean over items as facts with standard errors, as lm-eval aggregates them."""
    for key, value in result.items():
        metric, _, of = key.partition(",")
        if not of or metric.endswith("_stderr") or not _is_aggregate(metric, task):
            continue
        if (not only or metric in only) and isinstance(value, float | int | np.number) and math.isfinite(value):
            called = f"{name}: {metric}" + ("" if of == "none" else f" ({of})")
            emit("fact", name=called, value=float(value))
            mine = [sample for sample in samples if sample["filter"] == of and metric in sample["metrics"]]
            if math.isfinite(error := _error(metric, mine, task)):
                emit("fact", name=called, value=error, arm=SE)


def _error(metric: str, samples: Sequence[Mapping[str, Any]], task: Any) -> float:
    """By bootstrap over clusters; nan for fewer than two of them."""
    aggregate, values = task.aggregation()[metric], [sample[metric] for sample in samples]
    clusters = [about.get("cluster", about["item"]) for about, _ in _items(samples)]
    draws = max(2, min(DRAWS, MOST_DRAWN // max(len(values), 1)))

    def statistic(places: NDArray[np.intp]) -> float:
        try:
            return float(aggregate([values[place] for place in places]))
        except (ArithmeticError, ValueError):
            # Of these items it is not defined.
            return math.nan

    return bootstrap_se(statistic, clusters, draws)


def _items(samples: Sequence[Mapping[str, Any]]) -> Iterator[tuple[dict[str, str], Mapping[str, Any]]]:
    """Samples with what is told of their items: a name, which is the hash of the content, numbered where it is there
    more than once, the hashes of prompt and target, and the cluster of those that share a text with others."""
    seen: Counter[tuple[str, str]] = Counter()
    texts = Counter(text for text, of in {(_text(sample["doc"]), sample["doc_hash"]) for sample in samples} if text)
    for sample in samples:
        occurrence = seen[sample["filter"], sample["doc_hash"]]
        seen[sample["filter"], sample["doc_hash"]] += 1
        about = {"item": sample["doc_hash"][:HASH] + (f"#{occurrence}" if occurrence else "")}
        about |= {name: sample[name][:HASH] for name in ("prompt_hash", "target_hash")}
        if texts[text := _text(sample["doc"])] > 1:
            about["cluster"] = hashlib.sha256(text.encode()).hexdigest()[:HASH]
        yield about, sample


def _text(doc: Any) -> str:
    """The text that an item is about; empty where it has none of its own."""
    fields = (doc.get(name) for name in PASSAGES) if isinstance(doc, Mapping) else ()
    return next((text for text in fields if isinstance(text, str) and text), "")


def _is_aggregate(metric: str, task: Any) -> bool:
    """Whether a metric is no mean over items, weighted or not. Of what a task does not say how to aggregate, lm-eval
    takes the mean."""
    of = task.aggregation().get(metric)
    is_mean = of is None or getattr(of, "__name__", "") in ("mean", "nanmean")
    return not is_mean and metric not in (*WEIGHTED, "perplexity")


def _plain(value: Any) -> Any:
    """What lm-eval says of an item as JSON has it: texts, numbers, pairs of a log-likelihood in nat and whether it is
    greedy."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | bool | int | float) or value is None else str(value)
