"""GSM8K and CRUXEval output prediction as tasks of lm-eval that score as ZeroEval does.

lm-eval's own ask otherwise, and its CRUXEval executes what the model wrote. The suite `reasoning` is the same without
lm-eval, and scores recorded answers too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .reasoning import WORDINGS, Problem, problem_of, score

METRICS = {
    "gsm8k": ("exact_match", "no_answer", "malformed"),
    "crux": ("exact_match", "exact_match_revised", "no_answer", "malformed"),
}
DATA = {"gsm8k": ("openai/gsm8k", "main"), "crux": ("cruxeval-org/cruxeval", None)}
NEW_TOKENS = 2048


def config(task: str) -> dict[str, Any]:
    """lm-eval's configuration of a task, zero-shot and greedy."""
    path, name = DATA[task]
    return {
        "task": f"{task}_zeroeval",
        "dataset_path": path,
        "dataset_name": name,
        "test_split": "test",
        "output_type": "generate_until",
        "num_fewshot": 0,
        "doc_to_text": _read(task, lambda problem: problem.prompt),
        "doc_to_target": _read(task, lambda problem: problem.gold),
        "process_results": lambda doc, results: _score(task, doc, results),
        "generation_kwargs": {"until": [], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": metric.startswith("exact_match")}
            for metric in METRICS[task]
        ],
        "metadata": {"version": 1.0},
    }


CONFIGS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "gsm8k_zeroeval": lambda: config("gsm8k"),
    "crux_zeroeval": lambda: config("crux"),
}


def _read(task: str, of: Callable[[Problem], str]) -> Callable[[Mapping[str, Any]], str]:
    return lambda doc: of(problem_of(doc, task, 0, WORDINGS[task]))


def _score(task: str, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    found = score(task, results[0], problem_of(doc, task, 0, WORDINGS[task]).gold)
    return {metric: float(found[metric]) for metric in METRICS[task]}
