"""Holds the LM evaluation harness on our models against its own `HFLM`, on local tasks: likelihoods, accuracies, time.

    python tests/bench/bench_lm_eval.py MODEL DATA [--tasks arc_easy lambada …] [--limit N] [--batch 16]
        [--peer-batch 16 …] [--device cpu] [--dtype float32] [--json FILE]

MODEL is a folder with a Llama, DATA one with ARC, PIQA, OpenBookQA, WinoGrande and LAMBADA as .jsonl.xz. Both classes
are handed to `simple_evaluate` as objects, with the same tasks. Time is that within the classes, so without what
lm-eval does before and after; of several batch sizes of `HFLM` the fastest counts.
"""

from __future__ import annotations

import argparse
import json
import logging
import lzma
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from mambabench.backends.hybrid import TeacherBackend
from mambabench.backends.plugin import TeacherConfig
from mambabench.decoders.standard import StandardDecoder
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
    """Seconds within a model class, on the clock and of the processor: on a shared machine these tell more."""

    wall: float
    processor: float


def measure(lm: Any, folder: Path, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Spent]]:
    """lm-eval's results of each task, and what the model class took."""
    spent = Spent(0.0, 0.0)

    def timed(call: Any) -> Any:
        def run(requests: Any, **options: Any) -> Any:
            nonlocal spent
            began = time.perf_counter(), time.process_time()
            found = call(requests, **options)
            spent = Spent(time.perf_counter() - began[0], time.process_time() - began[1])
            return found

        return run

    for method in ("loglikelihood", "generate_until"):
        setattr(lm, method, timed(getattr(type(lm), method).__get__(lm)))
    results, seconds = {}, {}
    for name in names:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        results[name] = simple_evaluate(lm, tasks=[name], task_manager=manager, bootstrap_iters=0)
        seconds[name] = spent
    return results, seconds


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


def stepper_lm(model: Path, device: str, dtype: str, batch: int) -> StepperLM:
    return StepperLM(TeacherBackend(TeacherConfig()).load(model, device, dtype), StandardDecoder(), batch, 0, silent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(FILES), choices=list(FILES))
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--peer-batch", type=int, nargs="+", default=[16])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tasks(given.data, folder, given.tasks, given.limit)
        lm = stepper_lm(given.model, given.device, given.dtype, given.batch)
        peer = HFLM(pretrained=str(given.model), batch_size=16, device=given.device, dtype=given.dtype)
        for name in given.tasks:
            own, own_s = measure(lm, folder, [name])
            peers = {}
            for peer.batch_size_per_gpu in given.peer_batch:
                peers[peer.batch_size] = measure(peer, folder, [name])
            batch = min(peers, key=lambda of: peers[of][1][name].wall)
            result = compare(own[name], peers[batch][0][name], name)
            spent = {"own": own_s[name]._asdict(), "HFLM": peers[batch][1][name]._asdict(), "HFLM batch": batch}
            found[name] = {**result, **spent}
            figures = "  ".join(
                f"{metric} {left:.4f} {right:.4f}" for metric, (left, right) in result["metrics"].items()
            )
            apart = f"{result.get('largest difference', result.get('other texts')):.2g}"
            times = "  ".join(
                f"{of.wall:.1f} s (processor {of.processor:.1f})" for of in (own_s[name], peers[batch][1][name])
            )
            times += f" at batch {batch}"
            print(f"{name:17} {result['items']:5} items  apart {apart:8} {times}  own, HFLM: {figures}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
