"""Steps and keys: what is shared, what changes a key and what does not."""

import pytest
from mambabench.harness.interfaces import MambabenchError
from mambabench.harness.keys import Fingerprints, digest
from mambabench.harness.steps import expand


def keys_by_label(steps):
    return {cell.label: cell.key for cell in steps.cells}


def changed(planner, plan_text, *overrides):
    """Labels whose keys an override changes."""
    before, after = keys_by_label(planner.steps(plan_text)), keys_by_label(planner.steps(plan_text, *overrides))
    return {label for label in before if before[label] != after.get(label)}


def test_inputs_come_before_what_needs_them(planner):
    seen = set()
    for step in planner.steps():
        assert step.all_inputs <= seen
        seen.add(step.key)


def test_equal_beginnings_are_one_step(planner):
    steps = planner.steps()
    keys = keys_by_label(steps)
    assert keys["half/align@seed0"] == keys["other/align@seed0"]
    assert keys["half/align@seed0"] != keys["half/align@seed1"]
    shared = steps.steps[keys["half/align@seed0"]]
    assert shared.labels == ("half/align@seed0", "other/align@seed0")


def test_the_teacher_is_measured_by_every_suite(planner):
    labels = set(keys_by_label(planner.steps()))
    assert {"teacher/-/score@seed0", "teacher/plain/generate@seed0", "teacher/quick/speed@seed0"} <= labels
    assert "teacher/-/score@seed1" not in labels


def test_suites_run_once_per_model_per_lossy_decoder_or_per_pair(planner):
    labels = {label for label in keys_by_label(planner.steps()) if label.startswith("half/") and "@seed0" in label}
    measured = {label.removesuffix("@seed0") for label in labels if label.count("/") == 2}
    assert measured == {
        "half/-/score",
        "half/plain/generate",
        "half/rough/generate",
        "half/quick/speed",
        "half/rough/speed",
    }


def test_a_single_decoder_is_measured_without_a_reference(planner, plan_text):
    text = plan_text.replace('[decoders.quick]\nuse = "toy-lossless"\nk = 2\n[decoders.rough]\nuse = "toy-lossy"\n', "")
    steps = planner.steps(text.replace("next/quick/*", "next/plain/generate"))
    record = steps.steps[keys_by_label(steps)["half/plain/speed@seed0"]].record
    assert record["decoder"]["plan_name"] == "plain"
    assert record["reference"] is None


def test_a_skipped_cell_keeps_its_reason_and_makes_no_step(planner):
    cell = next(cell for cell in planner.steps().cells if cell.label == "next/quick/speed@seed0")
    assert (cell.key, cell.why) == ("", "too slow")


def test_an_option_of_a_suite_changes_only_that_suite(planner, plan_text):
    labels = changed(planner, plan_text, "suites.score.items=3")
    assert {label.split("/")[2].split("@")[0] for label in labels} == {"score"}


def test_an_option_set_to_its_default_changes_nothing(planner, plan_text):
    assert not changed(planner, plan_text, "suites.score.items=10", "models.half.width=4")


def test_names_of_the_plan_are_not_part_of_a_key(planner, plan_text):
    renamed = plan_text.replace("models.half", "models.semi").replace('"half"', '"semi"').replace("quick", "fast")
    before, after = keys_by_label(planner.steps()), keys_by_label(planner.steps(renamed))
    assert before["half/quick/speed@seed0"] == after["semi/fast/speed@seed0"]


def test_data_and_stages_change_what_comes_after(planner, plan_text):
    assert "half/tune@seed0" in changed(planner, plan_text, "stages.align.lr=0.2")
    assert "teacher/-/score@seed0" not in changed(planner, plan_text, "stages.align.lr=0.2")
    before = keys_by_label(planner.steps())
    (planner.folder / "text.txt").write_text("another text")
    after = keys_by_label(planner.steps())
    assert before["half/tune@seed0"] != after["half/tune@seed0"]
    assert before["half/align@seed0"] == after["half/align@seed0"]


def test_the_teacher_s_files_change_everything(planner):
    before = keys_by_label(planner.steps())
    (planner.folder / "teacher" / "config.json").write_text('{"a": 1}')
    after = keys_by_label(planner.steps())
    assert before["teacher/convert"] != after["teacher/convert"]
    assert before["half/-/score@seed0"] != after["half/-/score@seed0"]


def test_the_machine_is_part_of_speed_only(planner):
    before = keys_by_label(planner.steps())
    planner.machine["gpu"] = "H200"
    after = keys_by_label(planner.steps())
    assert {label.split("/")[2].split("@")[0] for label in before if before[label] != after[label]} == {"speed"}


def test_the_kind_of_device_is_part_of_every_measurement_and_of_nothing_else(planner):
    plan = planner.read()
    marks = Fingerprints(planner.folder / "cache.json")
    on_cpu, on_gpu = (keys_by_label(expand(plan, planner.registry, marks, {}, gpus=gpus)) for gpus in (0, 1))
    changed = {label for label in on_cpu if on_cpu[label] != on_gpu[label]}
    assert changed == {label for label in on_cpu if label.count("/") == 2 and on_cpu[label]}


def test_code_of_every_component_and_of_reading_documents_is_part_of_a_measurement(planner, monkeypatch):
    asked = []
    monkeypatch.setattr(Fingerprints, "code", lambda self, modules: asked.append(set(modules)) or "")
    planner.steps()
    package = "mambabench"
    assert all({f"{package}.kernels", f"{package}.harness.documents"} <= modules for modules in asked)
    assert len(asked) == len([cell for cell in planner.steps().cells if cell.kind == "measure" and cell.key])


def test_a_nested_model_becomes_an_input(planner, plan_text):
    text = plan_text.replace("k = 2", 'draft = { use = "toy-draft", model = "other" }')
    steps = planner.steps(text)
    step = steps.steps[keys_by_label(steps)["half/quick/speed@seed1"]]
    assert step.record["models"]["other"]["step"] == keys_by_label(steps)["other/align@seed1"]
    assert keys_by_label(steps)["other/align@seed1"] in step.all_inputs


def test_each_model_may_have_a_draft_of_its_own(planner, plan_text):
    text = plan_text.replace("k = 2", 'draft = { use = "toy-draft", model = "{model}" }')
    steps = planner.steps(text)
    keys = keys_by_label(steps)
    for model in ("half", "other"):
        step = steps.steps[keys[f"{model}/quick/speed@seed1"]]
        assert {name: of["step"] for name, of in step.record["models"].items()} == {model: step.inputs["subject"]}
        assert step.record["decoder"]["config"]["draft"]["model"] == model
    with pytest.raises(MambabenchError, match=r"decoders\.quick\.draft\.model: unknown model 'of-teacher'"):
        planner.steps(text.replace("{model}", "of-{model}"))


def test_missing_requirements_are_told_by_name(planner, plan_text):
    steps = planner.steps(plan_text.replace('use = "toy-score"', 'use = "toy-needy"'))
    step = steps.steps[keys_by_label(steps)["half/-/score@seed0"]]
    assert step.lacking == ("no-such-package>=1 (not installed)",)


def test_only_keeps_what_the_wanted_steps_need(planner):
    steps = planner.steps()
    few = steps.only("other/-/score")
    labels = {label for step in few for label in step.labels}
    assert "other/-/score@seed0" in labels
    assert "half/tune@seed0" not in labels
    assert "data/labels" in labels


def test_several_patterns_are_wanted_together_and_each_must_fit_something(planner):
    steps = planner.steps()
    labels = {label for step in steps.only("other/-/score", "half/tune") for label in step.labels}
    assert {"other/-/score@seed0", "half/tune@seed0"} <= labels
    with pytest.raises(MambabenchError, match="--only half/tuna: no step has such a label"):
        steps.only("other/-/score", "half/tuna")


def test_docstrings_and_comments_do_not_change_a_code_fingerprint(tmp_path, monkeypatch):
    import sys

    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "codeprint_toy.py"

    def fingerprint(text):
        file.write_text(text)
        sys.modules.pop("codeprint_toy", None)
        return Fingerprints(tmp_path / "none" / "cache.json").code(["codeprint_toy"])

    plain = fingerprint("def f():\n    return 1\n")
    assert fingerprint('"""Why."""\n\n\ndef f():\n    """What."""\n    # how\n    return 1\n') == plain
    assert fingerprint("def f():\n    return 2\n") != plain


def test_a_fingerprint_follows_the_content_and_is_remembered(tmp_path):
    file, cache = tmp_path / "a.bin", tmp_path / "cache.json"
    file.write_bytes(b"one")
    first = Fingerprints(cache)
    one = first.path(file)
    first.save()
    assert Fingerprints(cache).path(file) == one
    file.write_bytes(b"two!")
    assert Fingerprints(cache).path(file) != one
    cache.write_text("{broken")
    assert Fingerprints(cache).path(file) != one


def test_a_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})


def test_a_model_of_a_folder_is_one_step_for_all_seeds_and_reads_nothing_of_the_teacher(planner, plan_text):
    (planner.folder / "baseline").mkdir()
    (planner.folder / "baseline" / "config.json").write_text('{"other": 1}')
    text = plan_text.replace(
        "[decoders.plain]", '[models.baseline]\nuse = "toy"\npath = "baseline"\ntrain = ["tune"]\n[decoders.plain]'
    )
    steps = planner.steps(text)
    keys = keys_by_label(steps)
    made = steps.steps[keys["baseline/convert@seed0"]]
    assert made.labels == ("baseline/convert@seed0", "baseline/convert@seed1")
    assert made.inputs == {}
    assert made.record["path"] == str(planner.folder / "baseline")
    assert "baseline/select@seed0" not in keys
    assert steps.steps[keys["baseline/tune@seed1"]].inputs["parent"] == made.key
    assert "baseline/quick/speed@seed1" in keys
    (planner.folder / "baseline" / "config.json").write_text('{"other": 22}')
    assert keys_by_label(planner.steps(text))["baseline/convert@seed0"] != made.key


TRIED = ("keep = 0\nstart", 'keep = { use = "toy-trial", model = "other" }\nstart')


def test_a_selector_may_try_another_model_and_takes_a_gpu_if_it_says_so(planner, plan_text):
    plan = planner.read(plan_text.replace(*TRIED))
    steps = expand(plan, planner.registry, Fingerprints(planner.folder / "cache.json"), {}, gpus=1)
    keys = keys_by_label(steps)
    tried, plain = steps.steps[keys["next/select@seed1"]], steps.steps[keys["half/select@seed1"]]
    assert tried.record["models"]["other"]["step"] == keys["other/align@seed1"]
    assert (tried.needs.gpus, plain.needs.gpus) == (1, 0)


def test_a_selector_that_tries_the_model_it_selects_for_is_a_circle(planner, plan_text):
    text = plan_text.replace(TRIED[0], TRIED[1].replace("other", "next"))
    with pytest.raises(MambabenchError, match=r"models\.next: a circle of models: next -> next"):
        planner.steps(text)


def test_several_gpus_train_a_stage_that_can_use_them_under_the_same_key(planner, plan_text):
    text = plan_text.replace('[stages.tune]\nuse = "toy-stage"', '[stages.tune]\nuse = "toy-together"')
    plan = planner.read(text, "limits.train_gpus=2")
    fingerprints = Fingerprints(planner.folder / "cache.json")
    needs = [
        {
            step.labels[0].partition("@")[0]: step.needs
            for step in expand(plan, planner.registry, fingerprints, {}, gpus)
        }
        for gpus in (0, 1)
    ]
    assert [(each["half/tune"].gpus, each["half/tune"].ranks) for each in needs] == [(0, 2), (2, 2)]
    assert [(each["half/align"].gpus, each["half/align"].ranks) for each in needs] == [(0, 1), (1, 1)]
    assert [each["half/-/score"].gpus for each in needs] == [0, 1]
    assert not changed(planner, text, "limits.train_gpus=2")


CHAT = """
[suites.chat]
use = "toy-answered"
data = "text.txt"
judge = { use = "toy-judge", name = "one" }
"""


def chat_steps(planner, plan_text, *overrides, gpus=0):
    plan = planner.read(plan_text.replace("[[skip]]", f"{CHAT}[[skip]]"), *overrides)
    steps = expand(plan, planner.registry, Fingerprints(planner.folder / "cache.json"), planner.machine, gpus=gpus)
    keys = keys_by_label(steps)
    return [steps.steps[keys[f"half/plain/chat{part}@seed0"]] for part in ("/answer", "")]


def test_judging_is_a_step_over_answers_that_needs_neither_the_model_nor_a_gpu(planner, plan_text):
    answer, judge = chat_steps(planner, plan_text, gpus=1)
    assert (answer.kind, judge.kind) == ("answer", "judge")
    assert judge.all_inputs == {answer.key}
    assert answer.inputs.keys() == {"subject"}
    assert (answer.needs.gpus, answer.needs.light, judge.needs.gpus, judge.needs.light) == (1, False, 0, True)
    assert judge.record["subject"] == answer.inputs["subject"]
    assert judge.record["backend"] is None


@pytest.mark.parametrize(
    ("override", "answered_anew"),
    [('suites.chat.judge={ use = "toy-judge", name = "two" }', False), ("suites.chat.limit=3", True)],
)
def test_another_judge_has_only_the_judging_done_anew(planner, plan_text, override, answered_anew):
    before, after = chat_steps(planner, plan_text), chat_steps(planner, plan_text, override)
    assert (before[0].key != after[0].key) is answered_anew
    assert before[1].key != after[1].key


def test_recorded_answers_are_judged_without_a_model_and_for_each_model_of_that_name(planner, plan_text):
    text = plan_text.replace("[[skip]]", f"{CHAT}recorded = true\n[[skip]]")
    steps = planner.steps(text)
    keys = keys_by_label(steps)
    half, other = (keys[f"{model}/plain/chat@seed0"] for model in ("half", "other"))
    assert half != other
    assert not steps.steps[half].all_inputs
    assert not any(step.kind == "answer" for step in steps)
    # They are no seed's: nothing says that the weights of one gave them.
    assert keys["half/plain/chat@seed1"] == half
    assert "subject" not in steps.steps[half].record


def test_the_code_that_reads_recorded_answers_decides_what_they_score(planner, plan_text, monkeypatch):
    text = plan_text.replace("[[skip]]", f"{CHAT}recorded = true\n[[skip]]")
    edited = ""

    def key():
        monkeypatch.setattr(
            Fingerprints, "code", lambda self, modules: str([each for each in modules if each == edited])
        )
        return keys_by_label(planner.steps(text))["half/plain/chat@seed0"]

    before = key()
    edited = "mambabench.kernels"
    assert key() == before
    edited = "mambabench.harness.answering"
    assert key() != before


def test_options_that_are_called_like_methods_of_configs_are_options(planner, plan_text):
    steps = planner.steps(plan_text.replace("[[skip]]", '[suites.quiz]\nuse = "toy-quiz"\n[[skip]]'))
    step = steps.steps[keys_by_label(steps)["half/-/quiz@seed0"]]
    assert (step.kind, step.wants) == ("measure", ())


def test_a_file_that_a_suite_needs_and_is_missing_stops_that_suite_alone(planner, plan_text):
    answer, judge = chat_steps(planner, plan_text, "suites.chat.data=gone.txt")
    for step in (answer, judge):
        assert step.obstacle == f"suites.chat.data: there is no file {planner.folder / 'gone.txt'}"
    answer, _ = chat_steps(planner, plan_text, "suites.chat.data=gone")
    assert answer.obstacle == f"suites.chat.data: there is no file {planner.folder / 'gone'}, and no data 'gone'"
    answer, judge = chat_steps(planner, plan_text, 'suites.chat.judge={ use = "toy-judge", name = "away" }')
    assert (answer.obstacle, judge.obstacle, answer.wants) == ("", "", ())
    assert judge.wants == ("the judge is not at home",)


def test_suites_that_miss_different_files_are_told_apart(planner, plan_text):
    text = plan_text.replace("[[skip]]", f"{CHAT}{CHAT.replace('chat', 'talk')}[[skip]]")
    steps = planner.steps(text, "suites.chat.data=one.txt", "suites.talk.data=two.txt")
    for name, suite in (("one", "chat"), ("two", "talk")):
        step = steps.steps[keys_by_label(steps)[f"half/plain/{suite}@seed0"]]
        assert step.obstacle == f"suites.{suite}.data: there is no file {planner.folder / name}.txt"


def test_a_suite_takes_what_is_inside_of_data_that_is_made_or_given(planner, plan_text):
    def read(data):
        answer, _ = chat_steps(planner, plan_text, f"suites.chat.data={data}", "data.chat=chats")
        return answer.key, answer.record["data"][data], answer.obstacle

    (planner.folder / "chats").mkdir()
    (planner.folder / "chats" / "asked.txt").write_text("how?")
    made = planner.steps(plan_text)
    source = keys_by_label(made)["data/text"]
    assert read("text")[1:] == ({"step": source}, "")
    assert read("text/asked.txt")[1:] == ({"step": source, "inside": "asked.txt"}, "")
    keys = {read(data)[0] for data in ("text", "text/asked.txt", "text/others.txt", "chat/asked.txt")}
    assert len(keys) == 4
    assert read("text//asked.txt")[0] == read("text/asked.txt")[0]
    _, given, obstacle = read("chat/asked.txt")
    assert (given["file"], obstacle) == (str(planner.folder / "chats" / "asked.txt"), "")
    assert given["fingerprint"] == read("chats/asked.txt")[1]["fingerprint"]
    missing = f"suites.chat.data: there is no file {planner.folder / 'chats' / 'gone.txt'}"
    assert read("chat/gone.txt")[2] == missing
