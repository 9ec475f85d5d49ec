"""Tasks of a folder of YAML files: their groups, and one clear line for what is wrong in them."""

import json

import pytest

pytest.importorskip("lm_eval")

from mambabench.harness.interfaces import MambabenchError
from mambabench.harness.suites.configs import LmEvalConfig
from mambabench.harness.suites.lm_eval import LmEval
from mambabench.harness.suites.lm_eval_tasks import load_tasks

DATA = "dataset_path: json\ndataset_kwargs: {data_files: {test: items.jsonl}}\n"
CHOICE = (
    DATA
    + """test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["c", "gf"]
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
)
ROLLING = DATA + 'test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q}}"\n'


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "items.jsonl").write_text("".join(json.dumps({"q": "abcdefg"[i:]}) + "\n" for i in range(4)))
    return folder


def write_group(folder, members, rest=""):
    (folder / "all.yaml").write_text("group: all\ntask:\n" + members + rest)


def inline(name, indent="    "):
    return f"  - task: {name}\n" + "".join(f"{indent}{line}\n" for line in CHOICE.splitlines())


def test_a_field_that_items_lack_is_told_with_file_task_and_key(folder, tmp_path):
    (folder / "one.yaml").write_text("task: one\n" + CHOICE.replace("{{q}}", "Q: {{question}}"))
    with pytest.raises(MambabenchError, match=r"tasks/one.yaml: task 'one', `doc_to_text`: 'question' is undefined"):
        list(load_tasks("one", folder, tmp_path))


def test_a_split_that_data_lack_is_told_with_file_task_and_key(folder, tmp_path):
    (folder / "one.yaml").write_text("task: one\n" + CHOICE.replace("test_split: test", "test_split: final"))
    wanted = r"tasks/one.yaml: task 'one', `test_split`: no split 'final'; the data have test$"
    with pytest.raises(MambabenchError, match=wanted):
        list(load_tasks("one", folder, tmp_path))


def test_the_file_of_a_groups_member_is_told_rather_than_the_groups(folder, tmp_path):
    (folder / "one.yaml").write_text("task: one\n" + CHOICE.replace("{{q}}", "{{question}}"))
    write_group(folder, "  - one\n")
    with pytest.raises(MambabenchError, match=r"tasks/one.yaml: task 'one', `doc_to_text`"):
        list(load_tasks("all", folder, tmp_path))


def test_a_group_may_define_tasks_itself(measure, folder):
    (folder / "one.yaml").write_text("task: one\n" + CHOICE)
    mean = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    write_group(folder, "  - one\n" + inline("two"), mean)
    records = measure(LmEval(LmEvalConfig(tasks=("all",), data="text")), data=folder)
    rows = [record for record in records if record["kind"] == "sample"]
    assert {(row["task"], row["part"]) for row in rows} == {("all", "one"), ("all", "all::two")}
    assert len(rows) == 8


def test_a_mistake_in_a_task_that_a_group_defines_names_the_groups_file(folder, tmp_path):
    write_group(folder, inline("two").replace("{{q}}", "{{question}}"))
    with pytest.raises(MambabenchError, match=r"tasks/all.yaml: task 'all', `doc_to_text`: 'question' is undefined"):
        list(load_tasks("all", folder, tmp_path))


def test_a_group_sets_options_of_the_tasks_that_it_names(folder, tmp_path):
    (folder / "one.yaml").write_text("task: one\n" + CHOICE)
    write_group(folder, '  - task: one\n    doc_to_choice: ["a", "b", "d"]\n')
    ((_, _, task),) = load_tasks("all", folder, tmp_path)
    assert task.doc_to_choice(task.eval_docs[0]) == ["a", "b", "d"]


@pytest.mark.parametrize("member", ["other", "{task: other}", "{task: other, num_fewshot: 2}"])
def test_a_member_that_there_is_not_is_refused(folder, tmp_path, member):
    write_group(folder, f"  - {member}\n")
    with pytest.raises(MambabenchError, match=r"'all' names 'other', which is no task beside it"):
        list(load_tasks("all", folder, tmp_path))


def test_a_member_that_is_no_task_is_refused(folder, tmp_path):
    write_group(folder, "  - 3\n")
    with pytest.raises(MambabenchError, match=r"tasks/all.yaml: task 'all': a member of `task` is 3; the name of"):
        list(load_tasks("all", folder, tmp_path))


def test_bits_per_byte_alone_has_the_figure_of_byte_perplexity(measure, folder):
    found = []
    for name, metrics in (("bits", ["bits_per_byte"]), ("both", ["byte_perplexity", "bits_per_byte"])):
        listed = ", ".join(f"{{metric: {metric}}}" for metric in metrics)
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{ROLLING}metric_list: [{listed}]\n")
        records = measure(LmEval(LmEvalConfig(tasks=(name,), data="text")), data=folder)
        for path in (folder.parent / "scratch" / "lm-eval").iterdir():
            path.unlink()
        rows = [record for record in records if record["kind"] == "sample"]
        found.append([(row["metric"], row["item"], row["value"], row["weight"]) for row in rows])
    assert found[0] == found[1]
    assert [metric for metric, *_ in found[0]] == ["nll_per_byte"] * 4


def test_a_task_that_gives_no_figure_is_refused(measure, folder):
    (folder / "extra.py").write_text(
        "def results(doc, said):\n    return {'odd': 'x'}\ndef last(values):\n    return 'x'\n"
    )
    text = CHOICE.replace("{metric: acc, aggregation: mean,", "{metric: odd, aggregation: !function extra.last,")
    (folder / "one.yaml").write_text("task: one\n" + text + "process_results: !function extra.results\n")
    with pytest.raises(MambabenchError, match=r"task 'one' gives no figure: no number comes of its metrics \(odd\)"):
        measure(LmEval(LmEvalConfig(tasks=("one",), data="text")), data=folder)


def test_shots_are_for_tasks():
    with pytest.raises(ValueError, match="shots is for tasks; a preset has its table's numbers"):
        LmEvalConfig(preset="bias", shots=3)
    assert LmEvalConfig(preset="bias", tasks=("one",), shots=3).shots == 3
