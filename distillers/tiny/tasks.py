"""The tiny world's tasks for lm-eval: each as a choice among four answers and as its generative twin, which writes the
answer to the same held-out items."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .writer import TASKS, Item, Writer

CHOOSE = """task: tiny_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""

GENERATE = """task: tiny_{name}_generate
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
generation_kwargs:
  until: [" ."]
  max_gen_toks: 20
  do_sample: false
filter_list:
  - name: trimmed
    filter:
      - function: regex
        regex_pattern: '^\\s*(.*?)\\s*$'
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def write_tasks(out: Path, items: int, seed: int) -> None:
    """Writes YAML and items of all tasks; an item depends on its task, number and seed alone."""
    for name, make in TASKS.items():
        writers = (Writer(f"tasks/{name}", index, seed) for index in range(items))
        write_lines(out / f"{name}.jsonl", (_row(make(writer), writer.random) for writer in writers))
        (out / f"tiny_{name}.yaml").write_text(CHOOSE.format(name=name))
        (out / f"tiny_{name}_generate.yaml").write_text(GENERATE.format(name=name))


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _row(item: Item, dice: random.Random) -> dict[str, Any]:
    choices = [item.answer, *item.wrong]
    dice.shuffle(choices)
    return {"context": item.context, "choices": choices, "label": choices.index(item.answer), "answer": item.answer}
