"""What the suite adds to lm-eval: presets, hashes, resuming at the task, chats, generative twins."""

import json

import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from mambabench.harness.interfaces import MambabenchError, Unsupported, silent
from mambabench.harness.mockmodel import MockStepper
from mambabench.harness.suites import lm_eval as suite_module
from mambabench.harness.suites import lm_eval_tasks
from mambabench.harness.suites.configs import LmEvalConfig
from mambabench.harness.suites.lm_eval import LmEval
from mambabench.harness.suites.lm_eval_generation import CONFIGS
from mambabench.harness.suites.lm_eval_model import StepperLM
from mambabench.harness.suites.lm_eval_presets import PRESETS, Asked
from mambabench.harness.suites.lm_eval_tasks import NoData
from mambabench.harness.suites.reasoning import read_problems
from mambabench.harness.suites.twins import match, right_choices

TASK = """
task: {name}
dataset_path: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}},
              {{metric: acc_norm, aggregation: mean, higher_is_better: true}},
              {{metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}}]
"""
ITEMS = [{"q": "abcdefg"[i % 5 :] + "ab" * (i % 3), "options": ["c", "gf", "d"], "answer": i % 3} for i in range(8)]


def write_items(folder):
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_items(folder / "items")
    near = TASK.replace("test_split", "dataset_kwargs: {{data_files: {{test: items/test.jsonl}}}}\ntest_split")
    for name in ("one", "two", "three"):
        (folder / f"{name}.yaml").write_text(near.format(name=name, path="json"))
    (folder / "all.yaml").write_text(
        "group: all\ntask: [one, two]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return folder


def samples(records, **wanted):
    return [r for r in records if r["kind"] == "sample" and all(r[name] == value for name, value in wanted.items())]


def test_items_have_hashes_and_what_the_model_said(measure, folder):
    records = measure(LmEval(LmEvalConfig(tasks=("one",), data="text")), data=folder)
    rows = samples(records, metric="acc")
    assert len(rows) == len(ITEMS)
    assert all(len(row["prompt_hash"]) == len(row["target_hash"]) == 16 for row in rows)
    assert len({row["prompt_hash"] for row in rows}) == len({item["q"] for item in ITEMS})
    said = {r["item"]: r["responses"] for r in records if r["kind"] == "response"}
    assert said.keys() == {row["item"] for row in rows}
    for row in rows:
        logprobs = [logprob for logprob, _ in said[row["item"]]]
        assert len(logprobs) == 3
        assert max(logprobs) < 0


def test_metrics_that_are_no_means_are_facts_as_lm_eval_makes_them(measure, folder):
    records = measure(LmEval(LmEvalConfig(tasks=("one",), data="text")), data=folder)
    fact, error = [record for record in records if record["kind"] == "fact"]
    assert fact["name"] == error["name"] == "one: mcc"
    assert -1 <= fact["value"] <= 1
    assert error["arm"] == suite_module.SE
    assert 0 < error["value"] < 1
    assert not samples(records, metric="mcc")


def test_what_such_metrics_make_of_each_item_is_kept_with_its_hashes(measure, folder):
    records = measure(LmEval(LmEvalConfig(tasks=("one",), data="text")), data=folder)
    said = [record for record in records if record["kind"] == "response"]
    assert [row["parts"].keys() for row in said] == [{"mcc"}] * len(ITEMS)
    golds, chosen = zip(*(row["parts"]["mcc"] for row in said), strict=True)
    assert list(golds) == [item["answer"] for item in ITEMS]
    rows = samples(records, metric="acc")
    assert [float(gold == choice) for gold, choice in zip(golds, chosen, strict=True)] == [row["value"] for row in rows]
    hashes = ("prompt_hash", "target_hash")
    assert [[row[name] for name in hashes] for row in said] == [[row[name] for name in hashes] for row in rows]


def test_a_metric_without_an_aggregation_is_a_mean_as_lm_eval_takes_it(measure, folder):
    (folder / "extra.py").write_text(
        "def results(doc, said):\n    return {'acc': 1.0, 'sure': max(value for value, _ in said)}\n"
    )
    with (folder / "one.yaml").open("a") as file:
        file.write("process_results: !function extra.results\n")
    records = measure(LmEval(LmEvalConfig(tasks=("one",), data="text")), data=folder)
    assert len(samples(records, metric="sure")) == len(ITEMS)
    assert not [record for record in records if record["kind"] == "fact"]


def test_items_that_share_a_text_are_one_cluster(measure, folder):
    items = [{**item, "passage": f"On {place // 3}."} for place, item in enumerate(ITEMS[:7])]
    (folder / "items" / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    records = measure(LmEval(LmEvalConfig(tasks=("one",), data="text", twins=True)), data=folder)
    for metric in ("acc", "generated"):
        clusters = [row.get("cluster", row["item"]) for row in samples(records, metric=metric)]
        assert [clusters.count(cluster) for cluster in clusters] == [3] * 6 + [1]


def test_the_tasks_of_a_group_with_one_mean_are_counted_as_the_group(measure, folder):
    records = measure(LmEval(LmEvalConfig(tasks=("all",), data="text")), data=folder)
    rows = samples(records, metric="acc")
    assert {row["task"] for row in rows} == {"all"}
    assert {row["part"] for row in rows} == {"one", "two"}
    assert len({row["item"] for row in rows}) == 2 * len(ITEMS)


def test_a_task_named_twice_is_counted_once(measure, folder):
    records = measure(LmEval(LmEvalConfig(tasks=("one", "one"), data="text")), data=folder)
    assert len(samples(records, metric="acc")) == len(ITEMS)


def test_a_killed_step_goes_on_with_the_task_that_it_was_at(measure, folder, monkeypatch):
    evaluated = []
    evaluate = suite_module.evaluate

    def counting(model, tasks, **options):
        (name,) = tasks["tasks"]
        if name == "three" and "three" not in evaluated:
            evaluated.append(name)
            raise KeyboardInterrupt
        evaluated.append(name)
        return evaluate(model, tasks, **options)

    suite = LmEval(LmEvalConfig(tasks=("one", "two", "three"), data="text"))
    whole = samples(measure(suite, data=folder))
    for path in (folder.parent / "scratch" / "lm-eval").iterdir():
        path.unlink()
    monkeypatch.setattr(suite_module, "evaluate", counting)
    with pytest.raises(KeyboardInterrupt):
        measure(suite, data=folder)
    resumed = measure(suite, data=folder)
    assert evaluated == ["one", "two", "three", "three"]
    assert samples(resumed) == whole


def test_what_was_kept_of_a_task_is_its_own_where_another_was_missing(measure, folder, monkeypatch):
    load = suite_module.load_tasks

    def without_one(name, *places):
        if name == "one":
            raise NoData("no data")
        return load(name, *places)

    suite = LmEval(LmEvalConfig(tasks=("one", "two"), data="text"))
    monkeypatch.setattr(suite_module, "load_tasks", without_one)
    assert {row["task"] for row in samples(measure(suite, data=folder))} == {"two"}
    monkeypatch.setattr(suite_module, "load_tasks", load)
    rows = samples(measure(suite, data=folder), metric="acc")
    assert [row["task"] for row in rows] == ["one"] * len(ITEMS) + ["two"] * len(ITEMS)


def test_a_task_that_would_run_what_models_write_is_refused(measure, folder):
    text = (folder / "one.yaml").read_text().replace("task: one", "task: one\nunsafe_code: true")
    (folder / "one.yaml").write_text(text)
    with pytest.raises(MambabenchError, match="'one' executes what models write"):
        measure(LmEval(LmEvalConfig(tasks=("one",), data="text")), data=folder)


def test_presets_name_tasks_that_there_are():
    for preset, asked in PRESETS.items():
        for each in asked:
            assert each.task in CONFIGS or each.task in lm_eval_tasks.builtin(each.task).all_tasks, preset


def test_a_preset_keeps_its_metrics_and_numbers_of_examples(measure, folder, monkeypatch):
    text = (
        (folder / "two.yaml").read_text().replace("task: two", 'task: two\nfewshot_split: test\nfewshot_delimiter: ""')
    )
    (folder / "two.yaml").write_text(text)
    monkeypatch.setitem(PRESETS, "bias", (Asked("one", ("acc_norm",)), Asked("two", ("acc",), 2)))
    records = measure(LmEval(LmEvalConfig(preset="bias", data="text")), data=folder)
    assert {(row["task"], row["metric"]) for row in samples(records)} == {("one", "acc_norm"), ("two", "acc")}
    zero, two = (samples(records, task=name) for name in ("one", "two"))
    assert [row["target_hash"] for row in zero] == [row["target_hash"] for row in two]
    assert all(left["prompt_hash"] != right["prompt_hash"] for left, right in zip(zero, two, strict=True))


def test_examples_in_front_are_those_that_lm_eval_draws_itself(measure, folder, tmp_path):
    text = (
        (folder / "one.yaml").read_text().replace("task: one", 'task: one\nfewshot_split: test\nfewshot_delimiter: ""')
    )
    (folder / "one.yaml").write_text(text)
    records = measure(LmEval(LmEvalConfig(tasks=("one",), data="text", shots=3)), data=folder)
    ours = [row["prompt_hash"] for row in samples(records, metric="acc")]
    (task,) = (task for _, _, task in lm_eval_tasks.load_tasks("one", folder, tmp_path))
    model = StepperLM(MockStepper(seed=3), None, 4, 0, silent)
    theirs = simple_evaluate(model, tasks=[task], num_fewshot=3, bootstrap_iters=0)["samples"]["one"]
    assert ours == [sample["prompt_hash"][: suite_module.HASH] for sample in theirs]


class Chatting:
    """A tokenizer with a chat template that takes no system message."""

    chat_template = "…"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, continue_final_message):
        from jinja2.exceptions import TemplateError

        assert not tokenize
        assert add_generation_prompt != continue_final_message
        if messages[0]["role"] == "system":
            raise TemplateError("no system role")
        return "".join(("g" if of["role"] == "user" else "f") + of["content"] for of in messages) + "f"


def chatting():
    model = MockStepper(seed=3)
    model.tokenizer = Chatting(model.tokenizer)
    return model


def test_chats_are_written_by_the_tokenizers_template(measure, folder, monkeypatch):
    asked = []
    score = StepperLM.loglikelihood
    monkeypatch.setattr(
        StepperLM, "loglikelihood", lambda lm, requests: asked.extend(r.args for r in requests) or score(lm, requests)
    )
    config = LmEvalConfig(tasks=("one",), data="text", chat=True, system="be kind")
    measure(LmEval(config), data=folder, make=chatting)
    assert asked[0] == ("g" + ITEMS[0]["q"] + "f", "c")
    (kept,) = (folder.parent / "scratch" / "lm-eval").iterdir()
    kept.unlink()
    with pytest.raises(Unsupported, match="no chat template"):
        measure(LmEval(config), data=folder)


def test_twins_stand_beside_the_likelihoods_with_the_gap(measure, folder):
    records = measure(LmEval(LmEvalConfig(tasks=("one",), data="text", twins=True)), data=folder)
    columns = {name: [row["value"] for row in samples(records, metric=name)] for name in ("acc", "generated", "gap")}
    assert all(len(column) == len(ITEMS) for column in columns.values())
    assert columns["gap"] == [a - b for a, b in zip(columns["acc"], columns["generated"], strict=True)]
    texts = [r["responses"][0] for r in records if r["kind"] == "response" and r["filter"] == "twin"]
    chosen = [match(text, ITEMS[0]["options"]) for text in texts]
    right = [float(at == item["answer"]) for at, item in zip(chosen, ITEMS, strict=True)]
    assert columns["generated"] == right
    assert [row["value"] for row in samples(records, metric="no_answer")] == [float(at is None) for at in chosen]


def test_a_task_whose_choices_are_prompts_has_no_twin(measure, folder):
    text = (folder / "one.yaml").read_text().replace('"{{q}}"', "answer").replace('"{{answer}}"', "q")
    (folder / "one.yaml").write_text(text)
    records = measure(LmEval(LmEvalConfig(tasks=("one",), data="text", twins=True)), data=folder)
    assert samples(records, metric="acc")
    assert not samples(records, metric="generated")


def test_targets_may_be_places_or_choices_or_several():
    choices = ["a", "b", "7"]
    assert right_choices(1, choices) == {1}
    assert right_choices("b", choices) == {1}
    assert right_choices("7", choices) == {2}
    assert right_choices("0", choices) == {0}
    assert right_choices([0, "b"], choices) == {0, 1}


@pytest.mark.parametrize(
    ("task", "path", "record", "answers"),
    [
        (
            "gsm8k",
            "openai/gsm8k/main",
            {"question": "How many?", "answer": "6 * 7 = 42\n#### 42"},
            {'{"reasoning": "", "answer": "42 apples"}': (1, 0), "answer: 41": (0, 0), "I pass": (0, 1)},
        ),
        (
            "crux",
            "cruxeval-org/cruxeval",
            {"code": "def f(x):\n    return x", "input": "'a'", "output": "'a'"},
            {'{"reasoning": "", "answer": "a"}': (1, 0), '{"answer": "__import__(1)"}': (0, 0), "": (0, 1)},
        ),
    ],
)
def test_generation_of_the_paper_is_scored_as_by_zeroeval(tmp_path, task, path, record, answers):
    place = tmp_path / "hub" / path
    place.mkdir(parents=True)
    (place / "test.jsonl").write_text(json.dumps(record) + "\n")
    ((label, name, loaded),) = lm_eval_tasks.load_tasks(f"{task}_zeroeval", None, tmp_path, tmp_path / "hub")
    assert label == name == f"{task}_zeroeval"
    (doc,) = loaded.eval_docs
    (problem,) = read_problems(place / "test.jsonl", task)
    assert loaded.doc_to_text(doc) == problem.prompt
    assert not getattr(loaded, "UNSAFE_CODE", False)
    for text, (right, without) in answers.items():
        found = loaded.process_results(doc, [text])
        assert (found["exact_match"], found["no_answer"]) == (right, without)
        assert found.keys() == loaded.aggregation().keys()
