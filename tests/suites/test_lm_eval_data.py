"""Where lm-eval's tasks read their data: folders in place of the hub, hubs out of reach, data that are missing."""

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest

pytest.importorskip("lm_eval")

import datasets
from mambabench.harness.interfaces import MambabenchError, Unsupported
from mambabench.harness.mockmodel import MockStepper
from mambabench.harness.suites import lm_eval_data
from mambabench.harness.suites.configs import LmEvalConfig
from mambabench.harness.suites.lm_eval import LmEval
from mambabench.harness.suites.lm_eval_presets import PRESETS, Asked
from mambabench.harness.suites.lm_eval_tasks import load_tasks

TASK = """
task: {name}
dataset_path: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["c", "gf", "d"]
doc_to_target: 0
target_delimiter: ""
"""
ITEMS = [{"q": "abcdefg"[i:]} for i in range(4)]
SCIENCE = {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]}, "answerKey": "B"}
ABSTRACT = {"CONTEXTS": ["Cells die.", "Leaves live."], "QUESTION": "Do they?", "final_decision": "no"}


def write(folder, item, *splits):
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        (folder / f"{split}.jsonl").write_text(json.dumps(item) + "\n")


def write_items(folder):
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))


@pytest.fixture
def folder(tmp_path):
    """Tasks whose data lie on the hub; those of `far` in a configuration."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "far.yaml").write_text(TASK.format(name="far", path="org/letters") + "dataset_name: small\n")
    (folder / "bare.yaml").write_text(TASK.format(name="bare", path="org/bare"))
    return folder


@pytest.fixture
def online(monkeypatch):
    """Has a hub asked that may be set as ENDPOINT, and gives it little time."""
    for owner in (lm_eval_data.constants, datasets.config):
        monkeypatch.setattr(owner, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(lm_eval_data, "ASK_S", 0.3)
    lm_eval_data.hub_answers.cache_clear()
    yield lambda endpoint: monkeypatch.setattr(lm_eval_data.constants, "ENDPOINT", endpoint)
    lm_eval_data.hub_answers.cache_clear()


class AnyText:
    """The toy tokenizer, to which every letter that it does not know is the first one."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode(self, text, add_special_tokens=True):
        known = "".join(letter if letter in self.letters else self.letters[0] for letter in text)
        return self.tokenizer.encode(known, add_special_tokens)


def reader():
    model = MockStepper()
    model.tokenizer = AnyText(model.tokenizer)
    return model


def never():
    raise AssertionError("the model was loaded")


def accuracies(records):
    return [record for record in records if record["kind"] == "sample" and record["metric"] == "acc"]


@pytest.mark.parametrize("form", ["sub-folder", "short name", "card"])
def test_a_folder_can_stand_for_the_hub(measure, folder, tmp_path, form):
    local = tmp_path / "hub"
    place = local / ("letters" if form == "short name" else "org/letters")
    write_items(place / "small")
    if form == "card":
        card = 'configs:\n- config_name: small\n  data_files: [{split: test, path: "small/*.jsonl"}]\n'
        (place / "README.md").write_text(f"---\n{card}---\n")
    config = LmEvalConfig(tasks=("far",), data="text", local="hub")
    assert len(accuracies(measure(LmEval(config), data=folder, files={"hub": local}))) == len(ITEMS)
    assert datasets.load_dataset.__module__.startswith("datasets")


def test_a_data_set_without_configurations_lies_in_its_own_folder(measure, folder, tmp_path):
    write_items(tmp_path / "hub" / "org" / "bare")
    config = LmEvalConfig(tasks=("bare",), data="text", local="hub")
    records = measure(LmEval(config), data=folder, files={"hub": tmp_path / "hub"})
    assert len(accuracies(records)) == len(ITEMS)


def test_tasks_of_lm_eval_itself_read_the_folder_in_place_of_the_hub(tmp_path):
    write(tmp_path / "hub" / "allenai" / "ai2_arc" / "ARC-Easy", SCIENCE, "train", "validation", "test")
    ((_, name, task),) = load_tasks("arc_easy", None, tmp_path, tmp_path / "hub")
    (doc,) = task.eval_docs
    assert (name, task.doc_to_text(doc), task.doc_to_target(doc)) == ("arc_easy", "Question: Why?\nAnswer:", 1)


def test_another_configuration_is_not_read_in_place_of_one_that_is_missing(tmp_path):
    write(tmp_path / "hub" / "allenai" / "ai2_arc" / "ARC-Challenge", SCIENCE, "train", "validation", "test")
    with pytest.raises(Unsupported, match=r"allenai/ai2_arc has no folder 'ARC-Easy' with files named after splits"):
        list(load_tasks("arc_easy", None, tmp_path, tmp_path / "hub"))


@pytest.mark.parametrize("files", [["{split}.jsonl"], ["{split}-00000-of-00002.jsonl", "{split}-00001-of-00002.jsonl"]])
def test_splits_are_what_files_are_named_after(tmp_path, files):
    folder = tmp_path / "hub" / "org" / "letters" / "small"
    for split in ("dev", "gender", "validation"):
        for name in files:
            write(folder, {"q": split}, name.format(split=split).removesuffix(".jsonl"))
    (folder / "README.txt").write_text("not data")
    with lm_eval_data.data_from(tmp_path / "hub", tmp_path):
        found = datasets.load_dataset("org/letters", "small")
    assert {split: set(rows["q"]) for split, rows in found.items()} == {
        split: {split} for split in ("dev", "gender", "validation")
    }
    assert all(len(rows) == len(files) for rows in found.values())


def test_mmlu_of_a_preset_reads_files_named_after_its_splits(measure, tmp_path, monkeypatch):
    (asked,) = (asked for asked in PRESETS["paper-few-shot"] if asked.task == "mmlu")
    # One subject stands for all: each is read the same way.
    monkeypatch.setitem(PRESETS, "paper-few-shot", (asked._replace(task="mmlu_anatomy"),))
    rows = [{"question": f"a{n}", "subject": "anatomy", "choices": list("bcde"), "answer": n % 4} for n in range(6)]
    place = tmp_path / "hub" / "cais" / "mmlu" / "anatomy"
    place.mkdir(parents=True)
    for split in ("dev", "test"):
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = LmEvalConfig(preset="paper-few-shot", local="hub", limit=1)
    records = measure(LmEval(config), files={"hub": tmp_path / "hub"}, make=reader)
    (row,) = accuracies(records)
    assert row["task"] == "mmlu_anatomy"


def test_data_that_are_a_script_are_unsupported_with_what_to_do(tmp_path):
    place = tmp_path / "hub" / "bigbio" / "pubmed_qa"
    place.mkdir(parents=True)
    (place / "pubmed_qa.py").write_text("import datasets\n")
    (place / "README.md").write_text("---\nlanguage: en\n---\n")
    wanted = r"no folder 'pubmed_qa_labeled_fold0_source' with files named .* no longer runs scripts such as its pubmed"
    with pytest.raises(Unsupported, match=wanted):
        list(load_tasks("pubmedqa", None, tmp_path, tmp_path / "hub"))
    write(place / "pubmed_qa_labeled_fold0_source", ABSTRACT, "train", "test")
    ((_, _, task),) = load_tasks("pubmedqa", None, tmp_path, tmp_path / "hub")
    (doc,) = task.eval_docs
    assert task.doc_to_text(doc) == "Abstract: Cells die.\nLeaves live.\nQuestion: Do they?\nAnswer:"
    assert task.doc_to_target(doc) == "no"


def test_a_script_of_the_hub_is_unsupported_with_what_to_do(folder, tmp_path, monkeypatch):
    def scripted(path, *arguments, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found letters.py")

    monkeypatch.setattr(datasets, "load_dataset", scripted)
    with pytest.raises(Unsupported, match=r"org/letters is a script, .* a folder that has org/letters/small with"):
        list(load_tasks("far", folder, tmp_path))


def test_what_the_folder_in_place_of_the_hub_lacks_is_unsupported(measure, folder, tmp_path):
    (tmp_path / "hub").mkdir()
    config = LmEvalConfig(tasks=("far",), data="text", local="hub")
    with pytest.raises(Unsupported, match=r"data of task 'far' cannot be had: .* no folder 'org/letters'"):
        measure(LmEval(config), data=folder, files={"hub": tmp_path / "hub"})


def test_a_card_without_the_configuration_is_unsupported(folder, tmp_path):
    place = tmp_path / "hub" / "org" / "letters"
    write_items(place / "large")
    card = 'configs:\n- config_name: large\n  data_files: [{split: test, path: "large/*.jsonl"}]\n'
    (place / "README.md").write_text(f"---\n{card}---\n")
    with pytest.raises(Unsupported, match=r"org/letters: BuilderConfig 'small' not found"):
        list(load_tasks("far", folder, tmp_path, tmp_path / "hub"))


def test_a_task_whose_data_are_missing_is_told_of_and_takes_no_other_down(measure, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "bias", (Asked("far", ()), Asked("bare", ())))
    write_items(tmp_path / "hub" / "org" / "bare")
    config = LmEvalConfig(preset="bias", data="text", local="hub")
    records = measure(LmEval(config), data=folder, files={"hub": tmp_path / "hub"})
    assert {row["task"] for row in accuracies(records)} == {"bare"}
    (fact,) = (record for record in records if record["kind"] == "fact")
    assert (fact["name"], fact["arm"]) == ("missing", "far")
    assert "no folder 'org/letters'" in fact["value"]


def test_the_working_directory_shadows_no_data_set(measure, folder, tmp_path, monkeypatch):
    write_items(tmp_path / "hub" / "org" / "bare")
    write_items(tmp_path / "cwd" / "org" / "bare")
    (tmp_path / "cwd" / "org" / "bare" / "test.jsonl").write_text('{"q": "another"}\n')
    monkeypatch.chdir(tmp_path / "cwd")
    ((_, _, task),) = load_tasks("bare", folder, tmp_path, tmp_path / "hub")
    assert len(task.eval_docs) == len(ITEMS)
    with pytest.raises(MambabenchError, match=r"folder 'org/bare' of the working directory would be read .* `local`"):
        list(load_tasks("bare", folder, tmp_path))


def test_a_hub_out_of_reach_is_given_up_in_seconds_and_before_the_model_is_loaded(measure, folder, online):
    # An address that no network routes: connecting waits for its own end.
    online("http://192.0.2.1")
    began = time.monotonic()
    with pytest.raises(Unsupported, match="data of task 'far' cannot be had"):
        measure(LmEval(LmEvalConfig(tasks=("far",), data="text")), data=folder, make=never)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("told", ["", "/datasets"], ids=["greets", "has files"])
@pytest.mark.parametrize("status", [503, None], ids=["fails", "hangs"])
def test_so_is_a_hub_that_greets_but_tells_of_no_data_set(measure, folder, online, status, told):
    over = Event()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            fine = self.path == "/" or (told and self.path.startswith(told))
            if not fine and status is None:
                over.wait()
                return
            self.send_response(200 if fine else status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    online(f"http://127.0.0.1:{server.server_port}")
    began = time.monotonic()
    try:
        with pytest.raises(Unsupported, match="data of task 'far' cannot be had"):
            measure(LmEval(LmEvalConfig(tasks=("far",), data="text")), data=folder, make=never)
        assert time.monotonic() - began < 5
    finally:
        over.set()
        server.shutdown()
        server.server_close()
