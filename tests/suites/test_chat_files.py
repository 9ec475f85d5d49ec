"""What is checked of a plan's chats before models answer: files and names that only the judging step reads."""

import csv
import io
import json

import pytest

pytest.importorskip("alpaca_eval")

from mambabench.harness.config import ConfigError, Structurer, unfit
from mambabench.harness.interfaces import MambabenchError
from mambabench.harness.plugins import registry
from mambabench.harness.suites.alpaca_fit import COLUMNS, check_gamed
from mambabench.harness.suites.mt_bench import PROMPTS

ITEMS = 3
PLAN = """
schema = 1
name = "chats"
[teacher]
path = "{model}"
[decoders.plain]
use = "standard"
[suites.chat]
use = "alpaca-eval"
data = "rows.json"
gamed = "gamed.csv"
judge = "tiny"
"""


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"instruction": f"Say {n}.", "output": str(n)} for n in range(ITEMS)]))
    return file


@pytest.fixture
def write_gamed(tmp_path):
    """Writes df_gamed.csv of two systems; `changed` has figures of one line, `without` a column."""

    def write(changed=None, without="", items=ITEMS):
        lines = [
            {**dict.fromkeys(COLUMNS, "0.5"), "index": str(item), "model": system, "not_gamed_baseline": "False"}
            for system in ("verbose", "concise")
            for item in range(items)
        ]
        lines[1] |= changed or {}
        text = io.StringIO()
        names = [name for name in COLUMNS if name != without]
        table = csv.DictWriter(text, names, extrasaction="ignore")
        table.writeheader()
        table.writerows(lines)
        file = tmp_path / "gamed.csv"
        file.write_text(text.getvalue())
        return file

    return write


def checked(files, suite="alpaca-eval", **options):
    judge = {} if suite == "reasoning" else {"judge": "tiny"}
    choice = Structurer(registry()).choice("suite", {"use": suite, "data": "data", **judge, **options})
    return unfit({"component": ("suites.chat", choice)}, {name: {"file": str(file)} for name, file in files.items()})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"without": "index"}, "lacks the column 'index'; df_gamed.csv has index, instruction_difficulty, model"),
        ({"without": "not_gamed_baseline"}, "lacks the column 'not_gamed_baseline'"),
        ({"changed": {"std_delta_len": "long"}}, "line 3 has 'long' for `std_delta_len`, which is a number"),
        ({"changed": {"instruction_difficulty": ""}}, "line 3 has '' for `instruction_difficulty`"),
        ({"changed": {"not_gamed_baseline": "no"}}, "line 3 has 'no' for `not_gamed_baseline`: True or False"),
        ({"items": 2}, "begins with 2 items, and there are 3 to score"),
        ({"changed": {"index": "0"}}, "begins with 2 items, and there are 3 to score"),
    ],
)
def test_figures_that_do_not_fit_are_refused_beforehand(rows, write_gamed, options, said):
    file = write_gamed(**options)
    with pytest.raises(ConfigError) as error:
        checked({"data": rows, "gamed": file}, gamed="gamed")
    assert f"suites.chat: {file}: {said}" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(MambabenchError, match=r"gamed\.csv: "):
        check_gamed(file, None, ITEMS)


def test_figures_that_fit_are_taken(rows, write_gamed, tmp_path):
    write_gamed({"preference": ""})
    files = {"data": rows, "gamed": tmp_path / "gamed.csv"}
    assert checked(files, gamed="gamed") == []
    write_gamed(items=2)
    assert checked(files, gamed="gamed", limit=2) == checked(files, gamed="gamed", length_controlled=False) == []
    difficulty = tmp_path / "difficulty.csv"
    difficulty.write_text(",figure\n0,0.1\n1,0.2\n2,0.3\n")
    write_gamed({"instruction_difficulty": ""})
    assert checked({**files, "hard": difficulty}, gamed="gamed", difficulty="hard") == []
    difficulty.write_text(",figure\n0,0.1\n1,\n2,0.3\n")
    with pytest.raises(ConfigError, match=f"{difficulty}: .* has one figure for each row"):
        checked({**files, "hard": difficulty}, gamed="gamed", difficulty="hard")


def test_files_that_are_not_there_yet_are_not_checked():
    assert checked({}, gamed="gamed") == checked({}, suite="mt-bench") == []


def test_what_models_are_asked_is_read_beforehand(tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text('{"instruction": "Say a."}')
    with pytest.raises(ConfigError, match=r"suites\.chat: .*asked.jsonl: item 0 lacks 'output'"):
        checked({"data": file})
    file.write_text('{"question": "1 + 1?", "answer": "two"}')
    with pytest.raises(ConfigError, match=r"suites\.chat: .*asked.jsonl: `answer` of item 0 must end with ####"):
        checked({"data": file}, suite="reasoning", task="gsm8k")
    file.write_text('{"question": "1 + 1?", "answer": "#### 2"}')
    words = tmp_path / "words.txt"
    words.write_text("Think.")
    with pytest.raises(ConfigError, match=r"suites\.chat: .*words.txt: has no \{question\}"):
        checked({"data": file, "words": words}, suite="reasoning", task="gsm8k", prompt="words")
    words.write_text("Think: {question}")
    assert checked({"data": file, "words": words}, suite="reasoning", task="gsm8k", prompt="words") == []


def test_an_annotator_that_alpaca_eval_does_not_have_is_refused_beforehand():
    with pytest.raises(ConfigError, match=r"suites\.chat: annotator 'alpaca_eval_gpt5' is none of .* did you mean"):
        checked({}, annotator="alpaca_eval_gpt5")
    with pytest.raises(ConfigError, match="needs more than one prompt"):
        checked({}, annotator="alpaca_eval_gpt4_turbo_fn")


def test_what_a_judge_needs_of_a_folder_is_read_beforehand(tmp_path):
    (tmp_path / "question.jsonl").write_text('{"question_id": 1, "category": "math", "turns": ["1 + 1?"]}')
    (missing,) = checked({"data": tmp_path}, suite="mt-bench")
    assert "suites.chat: " in missing
    assert "has no judge_prompts.jsonl" in missing
    prompts = [{"name": name, "system_prompt": "", "prompt_template": "Rate it."} for name in PROMPTS]
    (tmp_path / "judge_prompts.jsonl").write_text(json.dumps(prompts))
    (missing,) = checked({"data": tmp_path}, suite="mt-bench")
    assert "gpt-4.jsonl: no such file" in missing
    prompts[0]["prompt_template"] = "{oops}"
    (tmp_path / "judge_prompts.jsonl").write_text(json.dumps(prompts))
    with pytest.raises(ConfigError, match=r"judge_prompts.jsonl: the prompt 'single-v1': it has \{oops\}"):
        checked({"data": tmp_path}, suite="mt-bench")


def test_a_plan_with_a_file_that_does_not_fit_is_refused(mambabench, shared, rows, write_gamed, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.format(model=shared / "models" / "stories-260k"))
    write_gamed(without="preference")
    told = mambabench("plan", plan)
    assert told.returncode != 0
    assert f"{plan}: suites.chat: {tmp_path / 'gamed.csv'}: lacks the column 'preference'" in told.stderr
    write_gamed()
    assert mambabench("plan", plan).returncode == 0
