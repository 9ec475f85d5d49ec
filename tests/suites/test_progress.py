"""What a run shows of its suites; the harness's overhead ends with a suite's first record."""

import json

import pytest
from mambabench.harness.mockmodel import MockStepper
from mambabench.harness.suites.configs import LmEvalConfig, LosslessnessConfig, PerplexityConfig, SpeedConfig
from mambabench.harness.suites.lm_eval import LmEval
from mambabench.harness.suites.losslessness import Losslessness
from mambabench.harness.suites.perplexity import Perplexity
from mambabench.harness.suites.speed import Speed

TEXTS = ["abcabcabc", "gggfgggf", "edcba"]
TASK = """
task: say
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["a"], max_gen_toks: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.parametrize(
    "suite",
    [
        LmEval(LmEvalConfig(tasks=("say",), data="text", batch=2)),
        Perplexity(PerplexityConfig(data="text")),
        Losslessness(LosslessnessConfig(data="text", prompts=3, prompt_tokens=4, new_tokens=5, batch=(1, 2))),
        Speed(SpeedConfig(data="text", prompt_tokens=4, new_tokens=5, pairs=2)),
    ],
    ids=lambda suite: type(suite).__name__,
)
def test_the_first_record_follows_the_loading_and_the_last_progress_is_all(suite, measure, plain, tmp_path):
    loaded = []

    def make():
        loaded.append(True)
        return MockStepper()

    if isinstance(suite, LmEval):
        (tmp_path / "tasks").mkdir()
        (tmp_path / "tasks" / "say.yaml").write_text(TASK)
        (tmp_path / "tasks" / "items.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        records = measure(suite, decoder=plain, make=make, data=tmp_path / "tasks")
    else:
        records = measure(suite, TEXTS, decoder=plain, make=make)
    assert loaded == [True]
    assert (records[0]["kind"], records[0]["done"]) == ("progress", 0)
    progress = [record for record in records if record["kind"] == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] > 0
    assert [record["done"] for record in progress] == sorted(record["done"] for record in progress)


@pytest.mark.parametrize("limit", [0, 20, 50])
def test_documents_are_not_said_to_be_all_before_they_are(measure, limit):
    records = measure(Perplexity(PerplexityConfig(data="text", batch=1, limit=limit)), ["abc"] * 40)
    all_of = min(limit or 40, 40)
    told = [(record["done"], record["total"]) for record in records if record["kind"] == "progress"]
    assert told[-1] == (all_of, all_of)
    assert all(total > done or not total for done, total in told[:-1])
