"""The suite on local tasks, against figures computed here from the toy model's own logits."""

import json
import os

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from mambabench.decoders.standard import StandardDecoder
from mambabench.harness.conformance_decoders import greedy_ids
from mambabench.harness.interfaces import Limits, MambabenchError, Prompt, Unsupported
from mambabench.harness.mockmodel import MockStepper
from mambabench.harness.suites.configs import LmEvalConfig
from mambabench.harness.suites.lm_eval import LmEval
from mambabench.harness.suites.lm_eval_model import StepperLM, generation_limits

COMMON = """
dataset_path: json
test_split: test
doc_to_text: "{{q}}"
target_delimiter: ""
"""
TASKS = {
    "choose": """
tag: both
dataset_kwargs: {data_files: {test: items/items.jsonl}}
output_type: multiple_choice
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: acc_norm, aggregation: mean, higher_is_better: true},
              {metric: f1, aggregation: f1, higher_is_better: true}]
""",
    "say": """
tag: both
dataset_kwargs: {data_files: {test: [items/items.jsonl]}}
output_type: generate_until
doc_to_target: "{{options[0]}}"
generation_kwargs: {until: ["a", "gf"], max_gen_toks: 7}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "read": """
dataset_kwargs: {data_files: {test: items/items.jsonl}}
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false},
              {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false},
              {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
    "lost": "dataset_kwargs: {data_files: {test: absent.jsonl}}\noutput_type: generate_until\ndoc_to_target: a\n",
}
ITEMS = [
    {
        "q": "abcabc"[: 2 + i % 4] + "cdefg"[i % 5 :],
        "options": [["cd", "fga"], ["b", "gab"]][i % 2],
        "answer": i % 3 % 2,
    }
    for i in range(9)
]
ITEMS.append(ITEMS[0])


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tasks"
    (folder / "items").mkdir(parents=True)
    (folder / "items" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{COMMON}{text}")
    (folder / "all.yaml").write_text("group: everything\ntask: [choose, read]\n")
    return folder


def make(max_context=4096):
    model = MockStepper(seed=3)
    model.max_context = max_context
    return model


def loglikelihood(context: str, continuation: str) -> float:
    model = make()
    ids = model.tokenizer.encode(context) or [0]
    total = 0.0
    for token in model.tokenizer.encode(continuation):
        logits = model.logits(ids)
        total += logits[token] - np.log(np.exp(logits).sum())
        ids.append(token)
    return float(total)


def values(records, task, metric):
    return [r["value"] for r in records if r["kind"] == "sample" and (r["task"], r["metric"]) == (task, metric)]


@pytest.mark.parametrize("batch", [1, 4])
def test_choices_are_scored_as_defined(measure, folder, batch):
    records = measure(LmEval(LmEvalConfig(tasks=("choose",), data="text", batch=batch)), data=folder, make=make)
    acc, acc_norm = [], []
    for item in ITEMS:
        scores = np.array([loglikelihood(item["q"], option) for option in item["options"]])
        lengths = np.array([len(option) for option in item["options"]])
        acc.append(float(scores.argmax() == item["answer"]))
        acc_norm.append(float((scores / lengths).argmax() == item["answer"]))
    assert values(records, "choose", "acc") == acc
    assert values(records, "choose", "acc_norm") == acc_norm
    assert 0 < sum(acc) < len(acc)
    assert values(records, "choose", "f1") == []


def test_every_item_has_its_own_name(measure, folder):
    records = measure(LmEval(LmEvalConfig(tasks=("choose",), data="text")), data=folder, make=make)
    items = [r["item"] for r in records if r["kind"] == "sample" and r["metric"] == "acc"]
    assert len(set(items)) == len(ITEMS)
    assert items[-1] == items[0] + "#1"


def test_texts_are_those_of_greedy_decoding(measure, folder):
    model = make()
    limits = Limits(new_tokens=7, stop_tokens=(0,), stop_strings=("a", "gf"))
    wanted = []
    for item in ITEMS:
        text = model.tokenizer.decode(greedy_ids(model, Prompt(tuple(model.tokenizer.encode(item["q"]))), limits))
        for stop in limits.stop_strings:
            text = text.split(stop)[0]
        wanted.append(text)
    lm = StepperLM(model, StandardDecoder(), 3, 0, lambda kind, /, **fields: None)
    options = {"until": ["a", "gf"], "max_gen_toks": 7}
    requests = [type("Request", (), {"args": (item["q"], options)}) for item in ITEMS]
    assert lm.generate_until(requests) == wanted
    for decoder in (StandardDecoder(), None):
        records = measure(LmEval(LmEvalConfig(tasks=("say",), data="text")), data=folder, make=make, decoder=decoder)
        matches = [float(text == item["options"][0]) for text, item in zip(wanted, ITEMS, strict=True)]
        assert values(records, "say", "exact_match") == matches


def test_rolling_likelihood_is_per_word_and_byte(measure, folder):
    records = measure(LmEval(LmEvalConfig(tasks=("read",), data="text")), data=folder, make=make)
    wanted = [-loglikelihood("", item["q"]) for item in ITEMS]
    assert values(records, "read", "nll_per_byte") == pytest.approx(wanted, rel=1e-12)
    assert values(records, "read", "nll_per_word") == pytest.approx(wanted, rel=1e-12)
    weights = [r["weight"] for r in records if r["kind"] == "sample" and r["metric"] == "nll_per_byte"]
    assert weights == [len(item["q"]) for item in ITEMS]


def test_rolling_likelihood_keeps_to_the_models_positions():
    model = make(max_context=5)
    lm = StepperLM(model, None, 2, 0, lambda kind, /, **fields: None)
    request = type("Request", (), {"args": ("abcdefgabc",)})
    ids = [0, *model.tokenizer.encode("abcdefgabc")]
    total = 0.0
    for begin, context, end in ((0, 1, 6), (5, 1, 11)):
        for place in range(begin + context, end):
            logits = model.logits(ids[begin:place])
            total += logits[ids[place]] - np.log(np.exp(logits).sum())
    assert lm.loglikelihood_rolling([request]) == pytest.approx([total], rel=1e-12)


def test_a_context_that_is_too_long_loses_its_beginning_but_no_position_is_wasted():
    model = make(max_context=5)
    lm = StepperLM(model, None, 2, 0, lambda kind, /, **fields: None)
    context, continuation = model.tokenizer.encode("abcdefga"), model.tokenizer.encode("bc")
    ((logprob, greedy),) = lm._loglikelihood_tokens([(("", ""), context, continuation)])
    ids = (context + continuation)[-6:]
    wanted = 0.0
    for place in (4, 5):
        logits = model.logits(ids[:place])
        wanted += logits[ids[place]] - np.log(np.exp(logits).sum())
    assert logprob == pytest.approx(wanted, rel=1e-12)
    assert isinstance(greedy, bool)


def test_groups_and_tags_run_their_tasks_and_limits_hold(measure, folder):
    config = LmEvalConfig(tasks=("everything", "both"), data="text", limit=2)
    records = measure(LmEval(config), data=folder, make=make)
    assert {r["task"] for r in records if r["kind"] == "sample"} == {"choose", "read", "say"}
    assert len(values(records, "read", "nll_per_byte")) == 2


def test_unknown_tasks_are_refused_with_the_known_ones(measure, folder):
    with pytest.raises(MambabenchError, match=r"unknown task 'chose'.*choose"):
        measure(LmEval(LmEvalConfig(tasks=("chose",), data="text")), data=folder, make=make)


def test_a_task_without_its_data_is_unsupported(measure, folder):
    with pytest.raises(Unsupported, match=r"data of task 'lost' cannot be had: .*absent"):
        measure(LmEval(LmEvalConfig(tasks=("lost",), data="text")), data=folder, make=make)


def test_local_data_are_cached_in_the_steps_own_folder(measure, folder, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "users"))
    (folder / "more").mkdir()
    (folder / "more" / "test.jsonl").write_text(json.dumps(ITEMS[0]) + "\n")
    (folder / "more.yaml").write_text(
        TASKS["say"].replace("data_files: {test: [items/items.jsonl]}", "data_dir: more") + f"task: more\n{COMMON}"
    )
    records = measure(LmEval(LmEvalConfig(tasks=("choose", "more"), data="text")), data=folder, make=make)
    assert {r["task"] for r in records if r["kind"] == "sample"} == {"choose", "more"}
    assert list((tmp_path / "scratch" / "datasets").rglob("*.arrow"))
    assert not (tmp_path / "users").exists()


@pytest.mark.skipif(os.environ.get("HF_HUB_OFFLINE") != "1", reason="asks a hub unless HF_HUB_OFFLINE=1")
def test_a_task_whose_data_lie_on_a_hub_is_unsupported_offline(measure, folder):
    (folder / "far.yaml").write_text("task: far\ndataset_path: nobody/nothing\noutput_type: generate_until\n")
    with pytest.raises(Unsupported, match="data of task 'far' cannot be had"):
        measure(LmEval(LmEvalConfig(tasks=("far",), data="text")), data=folder, make=make)


def test_generation_that_cannot_fit_is_unsupported(measure, folder):
    with pytest.raises(Unsupported, match="7 new tokens do not fit a model of 7 positions"):
        measure(LmEval(LmEvalConfig(tasks=("say",), data="text")), data=folder, make=lambda: make(7))


@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"temperature": 0.0}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": None, "temperature": 0.7}, 0.7),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.0}, 0.0),
    ],
)
def test_sampling_is_asked_for_as_in_lm_eval(options, temperature):
    limits = generation_limits({**options, "top_p": 0.9, "top_k": 3}, 0, 1)
    assert (limits.temperature, limits.seed) == (temperature, 1)
    assert (limits.top_p, limits.top_k) == ((0.9, 3) if temperature else (1.0, 0))


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_every_name_of_the_number_of_new_tokens_counts(name):
    options = {"until": "x", name: 5}
    limits = generation_limits(options, 0, 1)
    assert (limits.new_tokens, limits.stop_strings, limits.stop_tokens) == (5, ("x",), (0,))
    assert options == {"until": "x", name: 5}
    assert generation_limits({"until": ["x", "", "y"]}, 0, 1).stop_strings == ("x", "y")
    assert generation_limits({"until": None}, 0, 1).stop_strings == ()
    assert generation_limits({}, 0, 1).new_tokens == 256
