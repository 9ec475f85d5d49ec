"""The LM evaluation harness on our models: its tasks, our stepping contract, one record per item.

lm-eval computes each item's metrics; averages and standard errors are made from the items when a report is made.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..documents import leading_token
from ..interfaces import Bench, Choice, Decoder, Emit, Limits, MambabenchError, Prompt, Stepper, Unsupported, silent
from ..plugins import build
from .configs import LmEvalConfig
from .texts import pad

log = logging.getLogger("mambabench")

WEIGHTED = {"word_perplexity": "nll_per_word", "byte_perplexity": "nll_per_byte"}
"""lm-eval's metrics whose items are (log-likelihood in nat, weight), and what we call them. Its `bits_per_byte` is made
of the same items as `byte_perplexity`."""


class LmEval:
    def __init__(self, config: LmEvalConfig) -> None:
        self.config = config

    def run(self, bench: Bench) -> None:
        random.seed(bench.seed)
        np.random.seed(bench.seed)
        model = StepperLM(bench.subject.load(), bench.subject.decoder, self.config.batch, bench.seed, bench.emit)
        bench.emit("progress", done=0, total=0, unit="requests")
        folder = bench.data[self.config.data] if self.config.data else None
        for name, task in load_tasks(self.config.tasks, folder, bench.scratch):
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=bench.seed)
            # One task at a time, so that its items are on disk before the next begins; `simple_evaluate` would also
            # list the installed packages in a subprocess each time.
            results = evaluate(model, {"tasks": {name: task}}, limit=self.config.limit or None, bootstrap_iters=0)
            emit_samples(name, results["samples"][name], task, bench.emit)


def load_tasks(names: Sequence[str], folder: Path | None, scratch: Path) -> Iterator[tuple[str, Any]]:
    """Yields lm-eval's task objects by name: those of the YAML files in `folder`, or lm-eval's own without one.

    Raises `MambabenchError` for an unknown name and `Unsupported` for a task whose data cannot be had.
    """
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    for name in names:
        if name not in manager.all_tasks:
            known = (
                f"{folder} has {', '.join(manager.all_tasks) or 'none'}" if folder else "lm-eval has none of this name"
            )
            raise MambabenchError(f"lm-eval: unknown task {name!r}; {known}")
        try:
            loaded = manager.load(name if folder is None else list(_local_configs(name, manager, scratch)))
        except OSError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Unsupported(f"lm-eval: the data of task {name!r} cannot be had: {reason}") from error
        yield from loaded["tasks"].items()


def emit_samples(name: str, samples: Sequence[Mapping[str, Any]], task: Any, emit: Emit) -> None:
    """Emits one record per item and metric. Metrics that are no mean over items are left out, and logged."""
    filters = {sample["filter"] for sample in samples}
    means = {metric for metric, of in task.aggregation().items() if getattr(of, "__name__", "") in ("mean", "nanmean")}
    higher = task.higher_is_better()
    seen: Counter[tuple[str, str]] = Counter()
    left_out = set()
    for sample in samples:
        occurrence = seen[sample["filter"], sample["doc_hash"]]
        seen[sample["filter"], sample["doc_hash"]] += 1
        item = sample["doc_hash"][:16] + (f"#{occurrence}" if occurrence else "")
        suffix = f" ({sample['filter']})" if len(filters) > 1 else ""
        for metric in sample["metrics"]:
            if metric in WEIGHTED:
                nats, weight = sample[metric]
                emit(
                    "sample",
                    task=name,
                    item=item,
                    metric=WEIGHTED[metric] + suffix,
                    value=-nats,
                    weight=weight,
                    better="lower",
                )
            elif metric == "perplexity":
                emit(
                    "sample",
                    task=name,
                    item=item,
                    metric="nll_per_item" + suffix,
                    value=-sample[metric],
                    better="lower",
                )
            elif metric in means:
                better = "higher" if higher.get(metric, True) else "lower"
                emit("sample", task=name, item=item, metric=metric + suffix, value=float(sample[metric]), better=better)
            elif metric != "bits_per_byte":
                left_out.add(metric)
    if left_out:
        log.warning("%s: left out %s: no mean over items", name, ", ".join(sorted(left_out)))


class StepperLM(TemplateLM):
    """lm-eval's view of a `Stepper`: likelihoods by `score`, texts by a decoder."""

    def __init__(self, model: Stepper, decoder: Decoder | None, batch: int, seed: int, emit: Emit) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = model.tokenizer
        self.batch = batch
        self.seed = seed
        self.emit = emit
        self._decoder = decoder
        self._device = torch.device(model.device)

    @property
    def eot_token_id(self) -> int:
        end = self.tokenizer.eos_token_id
        if end is None:
            raise Unsupported("lm-eval needs a tokenizer with an end-of-text token")
        return end

    @property
    def prefix_token_id(self) -> int:
        lead = leading_token(self.tokenizer)
        return self.eot_token_id if lead is None else lead

    @property
    def tokenizer_name(self) -> str:
        return type(self.tokenizer).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)
        begin = self.tokenizer.bos_token_id
        return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Sums the log-probability of each text in windows that run at most `max_context` tokens. A text stands behind
        one leading token; lm-eval's HFLM puts the tokenizer's beginning-of-text behind that token and scores it too."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.model.max_context, 1):
                context, continuation = make_disjoint_window(window)
                windows.append((("", text), context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Sums the log-probability of each continuation; contexts that are too long lose their beginning."""
        longest = self.model.max_context + 1
        texts = [(context + continuation)[-longest:] for _, context, continuation in requests]
        results: dict[int, tuple[float, bool]] = {}
        for chosen in self._batches(range(len(requests)), lambda i: len(texts[i])):
            ids, lengths = pad([texts[i] for i in chosen], self.model.device)
            scores = self.model.score(ids, lengths)
            for row, i in enumerate(chosen):
                end = len(texts[i]) - 1
                part = slice(max(end - len(requests[i][2]), 0), end)
                logprob = scores.logprob[row, part].double().sum()
                results[i] = (float(logprob), bool(scores.greedy[row, part].all()))
            self.emit("progress", done=len(results), total=len(requests), unit="requests")
        return [results[i] for i in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context with the subject's decoder, or plainly where the subject has none."""
        decoder: Decoder = self._decoder or build(Choice("decoder", "standard", None))
        options = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        results: dict[int, str] = {}
        for option in sorted(set(options)):
            limits = generation_limits(json.loads(option), self.eot_token_id, self.seed)
            room = self.model.max_context - limits.new_tokens
            if room < 1:
                raise Unsupported(
                    f"lm-eval: {limits.new_tokens} new tokens do not fit a model of {self.model.max_context} positions"
                )
            members = [i for i, other in enumerate(options) if other == option]
            contexts = {i: self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in members}
            for chosen in self._batches(members, lambda i, of=contexts: len(of[i])):
                prompts = [Prompt(tuple(contexts[i]), i) for i in chosen]
                answers = decoder.generate(self.model, prompts, limits, silent)
                results.update(zip(chosen, (answer.text for answer in answers), strict=True))
                self.emit("progress", done=len(results), total=len(requests), unit="requests")
        return [results[i] for i in range(len(requests))]

    def _batches(self, members: Iterable[int], length: Any) -> Iterator[list[int]]:
        """Batches of similar length, the longest first, so that memory runs out at once or never."""
        ordered = sorted(members, key=lambda i: (-length(i), i))
        for first in range(0, len(ordered), self.batch):
            yield ordered[first : first + self.batch]


def generation_limits(options: Mapping[str, Any], eos: int, seed: int) -> Limits:
    """A task's `generation_kwargs` as limits, read by lm-eval's own rules: a temperature above 0 samples unless
    `do_sample` is false, and `do_sample` without a temperature samples at 1. Top-k is off unless the task sets it;
    transformers would use 50."""
    read = normalize_gen_kwargs(dict(options))
    temperature = float(read.get("temperature", 1.0)) if read["do_sample"] else 0.0
    filters: Mapping[str, Any] = read if temperature > 0 else {}
    return Limits(
        new_tokens=read["max_gen_toks"],
        stop_tokens=(eos,),
        stop_strings=tuple(string for string in read["until"] if string),
        temperature=temperature,
        top_k=int(filters.get("top_k") or 0),
        top_p=float(filters.get("top_p") or 1.0),
        seed=seed,
    )


def _local_configs(name: str, manager: TaskManager, scratch: Path) -> Iterator[dict[str, Any]]:
    """The configurations of a task, or of all tasks of a group or tag, with data files found beside their YAML and
    cached in `scratch`.

    lm-eval itself would look for them in the working directory, and copy them into the user's cache.
    """
    entry = manager.task_index[name]
    config = load_yaml(entry.yaml_path) if entry.yaml_path else {}
    members = sorted(entry.tags) if entry.kind is Kind.TAG else config["task"]
    if entry.kind in (Kind.TAG, Kind.GROUP):
        for member in members:
            if member not in manager.all_tasks:
                raise MambabenchError(f"lm-eval: {name!r} names {member!r}, which is no task beside it")
            yield from _local_configs(member, manager, scratch)
        return
    options = dict(config.get("dataset_kwargs") or {})
    local = {key: _beside(options[key], entry.yaml_path.parent) for key in ("data_files", "data_dir") if key in options}
    if local:
        config["dataset_kwargs"] = {"cache_dir": str(scratch / "datasets"), **options, **local}
    yield config


def _beside(files: Any, folder: Path) -> Any:
    if isinstance(files, Mapping):
        return {split: _beside(of, folder) for split, of in files.items()}
    if isinstance(files, list):
        return [_beside(file, folder) for file in files]
    return files if "://" in files else str(folder / files)
