"""The example of a local task with local data: by our class and by lm-eval's own the same figures."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from mambabench.backends.hybrid import TeacherBackend
from mambabench.backends.plugin import TeacherConfig
from mambabench.harness.interfaces import silent
from mambabench.harness.suites.lm_eval_model import StepperLM
from mambabench.harness.suites.lm_eval_tasks import load_tasks

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tasks" / "minimal_pairs"


def test_the_pairs_are_what_their_program_writes_and_differ_in_one_word():
    spec = importlib.util.spec_from_file_location("write_pairs", FOLDER / "write_pairs.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    for name in program.PHENOMENA:
        text = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")
        assert text == program.lines(name)
        pairs = [json.loads(line) for line in text.splitlines()]
        assert len({pair["sentence_good"] for pair in pairs}) == len(pairs) == program.PAIRS
        for pair in pairs:
            words = zip(pair["sentence_good"].split(), pair["sentence_bad"].split(), strict=True)
            assert sum(good != bad for good, bad in words) == 1


def test_our_class_and_lm_evals_own_agree_on_every_item(shared, tmp_path):
    model = shared / "models" / "stories-260k"
    ours = StepperLM(TeacherBackend(TeacherConfig()).load(model, "cpu", "float32"), None, 16, 0, silent)
    theirs = HFLM(pretrained=str(model), batch_size=16, device="cpu", dtype="float32")
    tasks = [task for _, _, task in load_tasks("minimal_pairs", FOLDER, tmp_path)]
    assert len(tasks) == 4
    found = [simple_evaluate(each, tasks=list(tasks), bootstrap_iters=0, verbosity="ERROR") for each in (ours, theirs)]
    for name in found[1]["samples"]:
        mine, other = ({sample["doc_id"]: sample for sample in each["samples"][name]} for each in found)
        assert mine.keys() == other.keys()
        for item, sample in other.items():
            for (value, _), (expected, _) in zip(mine[item]["filtered_resps"], sample["filtered_resps"], strict=True):
                assert value == pytest.approx(expected, abs=1e-3)
        assert found[0]["results"][name]["acc,none"] == found[1]["results"][name]["acc,none"]
    # Better than chance, as a whole: it has read such stories.
    assert sum(each["acc,none"] for each in found[0]["results"].values()) / 4 > 0.6
