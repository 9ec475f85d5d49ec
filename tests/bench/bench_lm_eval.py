"""Holds the LM evaluation harness on our models against its own `HFLM`, on local tasks: figures of items, and speed.

    python tests/bench/bench_lm_eval.py MODEL DATA [--tasks arc_easy lambada …] [--limit N] [--batch 0 256 …]
        [--peer-batch 1 16 256 …] [--batches N] [--look 8] [--device cpu] [--dtype float32] [--json FILE]

MODEL is a folder with a Llama, DATA one with ARC, PIQA, OpenBookQA, WinoGrande and LAMBADA as .jsonl.xz. Both classes
are handed to `simple_evaluate` as objects, with the same tasks. Time is that within the classes, tokenizing included,
so without what lm-eval does before and after. Of several batch sizes the one with most items a second counts, for
likelihoods and for written texts; a small one is timed on the first items of each task, `--batches` batches of them.
Before it is timed, a class runs all items once, ours at each batch size, which is when it compiles and records.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import lzma
import operator
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from mambabench.backends.hybrid import TeacherBackend
from mambabench.backends.plugin import TeacherConfig
from mambabench.decoders.plugin import StandardConfig
from mambabench.decoders.standard import StandardDecoder
from mambabench.harness.documents import Encoder
from mambabench.harness.interfaces import silent
from mambabench.harness.suites.lm_eval_model import StepperLM

FILES = {
    "arc_easy": "arc_easy",
    "arc_easy_shots": "arc_easy",
    "arc_challenge": "arc_challenge",
    "openbookqa": "openbook_qa",
    "piqa": "piqa",
    "winogrande": "winogrande",
    "lambada": "lambada_openai",
    "lambada_generate": "lambada_openai",
}
KINDS = ("loglikelihood", "generate_until")
LEAST = 16
"""Items of a task that are timed at least."""
LONGEST = 1000
"""Characters of an item of PIQA: HFLM stops at an answer that is longer than the model's context."""
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ],
}
FORMS: dict[str, dict[str, Any]] = {
    "arc_easy_shots": {
        **CHOICE,
        "num_fewshot": 3,
        "fewshot_split": "test",
        "fewshot_config": {"sampler": "first_n"},
    },
    "winogrande": {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
        "metric_list": CHOICE["metric_list"][:1],
    },
    "lambada": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' '+continuation}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "lambada_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' '+continuation}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(data: Path, folder: Path, names: Sequence[str], limit: int = 0) -> None:
    """Writes tasks as YAML with their items beside them."""
    for name in names:
        lines = lzma.decompress((data / f"{FILES[name]}.jsonl.xz").read_bytes()).decode().splitlines(keepends=True)
        items = folder / f"{name}.jsonl"
        fitting = [line for line in lines if len(line) < LONGEST or FILES[name] != "piqa"]
        items.write_text("".join(fitting[: limit or None]), encoding="utf-8")
        options = {"data_files": {"test": str(items)}, "cache_dir": str(folder / "datasets")}
        form = {"task": name, "dataset_path": "json", "dataset_kwargs": options, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({**form, **FORMS.get(name, CHOICE)}), encoding="utf-8")


class Spent(NamedTuple):
    """What one task took of a model class. `+` adds tasks."""

    wall: float
    """Seconds."""
    processor: float
    """Seconds: on a shared machine these tell more."""
    items: int
    tokens: int
    """Of likelihoods: those of contexts and continuations; of written texts: theirs."""

    def __add__(self, other: Any) -> Spent:
        return Spent(*map(operator.add, self, other))

    def __str__(self) -> str:
        speed = f"{self.items / self.wall:8.0f} items/s  {self.tokens / self.wall:9.0f} tokens/s"
        return f"{self.items:6} items in {self.wall:6.2f} s (processor {self.processor:6.2f})  {speed}"


def answer(lm: Any, requests: Sequence[Instance]) -> tuple[Any, Spent]:
    """What the model class says of requests of one kind, and what that took."""
    began = time.perf_counter(), time.process_time()
    found = getattr(type(lm), requests[0].request_type)(lm, requests)
    wall, processor = time.perf_counter() - began[0], time.process_time() - began[1]
    texts = [said if isinstance(said, str) else "".join(of.args) for said, of in zip(found, requests, strict=True)]
    tokens = sum(map(len, Encoder(lm.tokenizer)(texts)))
    return found, Spent(wall, processor, len({request.doc_id for request in requests}), tokens)


def measure(lm: Any, folder: Path, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Spent], dict[str, Any]]:
    """lm-eval's results of each task, what the model class took, and what it was asked."""
    results, spent, asked = {}, {}, {}
    for name in names:
        seen: list[tuple[Any, Spent]] = []

        def ask(requests: Any, seen: list[tuple[Any, Spent]] = seen) -> Any:
            found, took = answer(lm, requests)
            seen.append((requests, took))
            return found

        for kind in KINDS:
            setattr(lm, kind, ask)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        # It asks for the installed packages in a subprocess.
        with mock.patch("lm_eval.evaluator.add_env_info"):
            results[name] = simple_evaluate(lm, tasks=[name], task_manager=manager, bootstrap_iters=0)
        ((asked[name], spent[name]),) = seen
    return results, spent, asked


def compare(own: dict[str, Any], peer: dict[str, Any], name: str) -> dict[str, Any]:
    """How far per-item figures of one task are apart, and the metrics of both."""
    pairs = list(zip(own["samples"][name], peer["samples"][name], strict=True))
    metrics = {
        metric: (value, peer["results"][name][metric])
        for metric, value in own["results"][name].items()
        if isinstance(value, float) and "_stderr" not in metric
    }
    if own["configs"][name]["output_type"] == "generate_until":
        different = sum(ours["filtered_resps"] != theirs["filtered_resps"] for ours, theirs in pairs)
        return {"items": len(pairs), "other texts": different, "metrics": metrics}
    scores = [
        (left, right)
        for ours, theirs in pairs
        for left, right in zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True)
    ]
    return {
        "items": len(pairs),
        "requests": len(scores),
        "largest difference": max(abs(left[0] - right[0]) for left, right in scores),
        "other greedy": sum(left[1] != right[1] for left, right in scores),
        "metrics": metrics,
    }


def stepper_lm(model: Path, device: str, dtype: str, batch: int, look: int = 1) -> StepperLM:
    decoder = StandardDecoder(StandardConfig(look=look))
    return StepperLM(TeacherBackend(TeacherConfig()).load(model, device, dtype), decoder, batch, 0, silent)


def kind_of(name: str) -> str:
    return FORMS.get(name, CHOICE)["output_type"].replace("multiple_choice", "loglikelihood")


def fastest(spent: Mapping[int, Mapping[str, Spent]], names: Sequence[str]) -> tuple[int, Spent]:
    """The batch size with most items a second, and what these tasks took with it."""
    sums = {batch: functools.reduce(operator.add, (of[name] for name in names)) for batch, of in spent.items()}
    best = max(sums, key=lambda batch: sums[batch].items / sums[batch].wall)
    return best, sums[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(FILES), choices=list(FILES))
    parser.add_argument("--limit", type=int, default=0, help="items of each task")
    parser.add_argument("--batch", type=int, nargs="+", default=[0], help="ours; 0: as many as it takes")
    parser.add_argument("--peer-batch", type=int, nargs="+", default=[16], help="of HFLM")
    parser.add_argument("--batches", type=int, default=0, help="time so many batches of each size; 0: all items")
    parser.add_argument("--look", type=int, default=8, help="rounds after which our host looks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)
    classes: dict[str, dict[int, dict[str, Spent]]] = {"own": {}, "HFLM": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tasks(given.data, folder, given.tasks, given.limit)
        own, begun, asked = measure(stepper_lm(given.model, given.device, given.dtype, 0), folder, given.tasks)
        sizes = {"device": given.device, "dtype": given.dtype, "batch_size": max(given.peer_batch)}
        peer = HFLM(pretrained=str(given.model), **sizes)
        peers, _, _ = measure(peer, folder, given.tasks)
    found: dict[str, Any] = {"spent": classes, "begun": begun, "tasks": {}}
    for name in given.tasks:
        compared = found["tasks"][name] = compare(own[name], peers[name], name)
        apart = f"{compared.get('largest difference', compared.get('other texts')):.2g}"
        figures = "  ".join(f"{metric} {left:.4f} {right:.4f}" for metric, (left, right) in compared["metrics"].items())
        print(f"{name:17} {compared['items']:5} items  apart {apart:8} own, HFLM: {figures}", flush=True)

    def time_class(label: str, lm: Any, batch: int) -> None:
        least = max(LEAST, given.batches * batch) if given.batches and batch else 0
        for name, requests in asked.items():
            few = [request for request in requests if not least or request.doc_id < least]
            spent = classes[label].setdefault(batch, {})[name] = answer(lm, few)[1]
            print(f"{label:4} batch {batch or 'auto':>4} {name:17} {spent}", flush=True)

    for batch in given.batch:
        lm = stepper_lm(given.model, given.device, given.dtype, batch, given.look)
        for requests in asked.values():
            answer(lm, requests)
        time_class("own", lm, batch)
    for peer.batch_size_per_gpu in sorted(given.peer_batch, reverse=True):
        time_class("HFLM", peer, peer.batch_size_per_gpu)
    for kind in KINDS:
        if names := [name for name in given.tasks if kind_of(name) == kind]:
            best_of = {label: fastest(of, names) for label, of in classes.items()}
            for label, (batch, spent) in best_of.items():
                print(f"{kind:14} {label:4} best batch {batch or 'auto':>4}  {spent}")
            own_speed, peer_speed = (spent.items / spent.wall for _, spent in best_of.values())
            found[kind] = {"ratio": own_speed / peer_speed, **{label: of[0] for label, of in best_of.items()}}
            print(f"{kind:14} own / HFLM {own_speed / peer_speed:.2f}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
