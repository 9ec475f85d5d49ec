"""The whole way of a chat benchmark: a model answers, a judge behind HTTP grades, everything that can fail does, and
the run is killed with `kill -9` on the way; then what was recorded is scored again without judge and model, and another
judge is asked about the same answers."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from mambabench.harness.interfaces import Choice, Review
from mambabench.harness.judges.configs import RecordedConfig
from mambabench.harness.judges.kept import recorded
from mambabench.harness.suites.chat_configs import MtBenchConfig
from mambabench.harness.suites.mt_bench import MtBench
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CATEGORIES = ("writing", "math", "extraction", "coding")
QUESTIONS = 12
KEPT_BACK = 9
SECRET = "sk-of-a-judge-0123456789"
PLAN = """
schema = 1
name = "chat"
[teacher]
path = "teacher"
[decoders.plain]
use = "standard"
[suites.chat]
use = "mt-bench"
data = "bench"
template = "zero_shot"
new_tokens = 12
judge = {judge}
"""
ENDPOINT = (
    '{{ use = "openai", model = "{model}", base_url = "{url}", key_env = "A_JUDGES_KEY", backoff = 0.01, '
    "timeout = 2.0, concurrency = 4, retries = 8, asks_again = 1, requests_per_minute = 6000 }}"
)
PROMPTS = {
    "single-v1": "Q: {question}\nA: {answer}",
    "single-math-v1": "Q: {question}\nR: {ref_answer_1}\nA: {answer}",
    "single-v1-multi-turn": "Q: {question_1}\nA: {answer_1}\nQ: {question_2}\nA: {answer_2}",
    "single-math-v1-multi-turn": "Q: {question_1}\nR: {ref_answer_1}\nA: {answer_1}\nQ: {question_2}\n"
    "R: {ref_answer_2}\nA: {answer_2}",
}


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher whose tokens are bytes, and a benchmark in FastChat's format."""
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<s>", "</s>", *letters])}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes, vocab_size=len(vocabulary), max_position_embeddings=1024, bos_token_id=0, eos_token_id=1
    )
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    words = Tokenizer(models.BPE(vocabulary, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder / "teacher"
    )
    asked = [
        {"question_id": 81 + i, "category": CATEGORIES[i % 4], "turns": [f"What is {i}?", "And then?"]}
        for i in range(QUESTIONS)
    ]
    write_lines(folder / "bench" / "question.jsonl", asked)
    write_lines(
        folder / "bench" / "judge_prompts.jsonl",
        [
            {"name": name, "system_prompt": "Be fair.", "prompt_template": template, "output_format": "[[rating]]"}
            for name, template in PROMPTS.items()
        ],
    )
    write_lines(
        folder / "bench" / "reference_answer" / "gpt-4.jsonl",
        [{"question_id": each["question_id"], "choices": [{"turns": ["It is.", "So it is."]}]} for each in asked],
    )
    return folder


def command(plan: Path, store: Path) -> list[str]:
    return [sys.executable, "-m", "mambabench", "run", str(plan), "--store", str(store)]


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def scores(store: Path) -> dict[tuple[str, str], float]:
    """Values by item and metric."""
    (file,) = (store / "steps").glob("*/samples.parquet")
    return {(row["item"], row["metric"]): row["value"] for row in pyarrow.parquet.read_table(file).to_pylist()}


def events(store: Path, kind: str) -> list[dict[str, Any]]:
    lines = [line for file in (store / "steps").glob("*/events.jsonl") for line in file.read_text().splitlines()]
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.mark.slow
def test_a_killed_run_against_a_failing_judge_loses_nothing_and_asks_nothing_twice(
    folder: Path, serve: Any, endpoint: Any, tmp_path: Path
) -> None:
    kinds = endpoint.FAULTS

    def number(prompt: str) -> int:
        return hashlib.sha256(prompt.encode()).digest()[1]

    def faults(prompt: str) -> tuple[str, ...]:
        return (kinds[number(prompt) % len(kinds)],) * (number(prompt) // len(kinds) % 3)

    def answer(prompt: str, before: int) -> str:
        malformed = number(prompt) % 8 == 0 or (number(prompt) % 8 == 1 and before == 0)
        return "I would rather not say." if malformed else endpoint.graded(prompt, before)

    server = serve(faults=faults, answer=answer, retry_after="0.1", hold_after=KEPT_BACK)
    plan, store = tmp_path / "plan.toml", tmp_path / "store"
    text = PLAN.replace('"teacher"', f'"{folder / "teacher"}"').replace('"bench"', f'"{folder / "bench"}"')
    plan.write_text(text.replace("{judge}", ENDPOINT.format(url=server.url, model="rule")))
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "A_JUDGES_KEY": SECRET}

    run = subprocess.Popen(command(plan, store), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: server.waiting > 0 and server.outcomes()["answered"] >= KEPT_BACK)
    until(lambda: len(list(recorded(store / "cache" / "judgments"))) == server.outcomes()["answered"])
    assert run.poll() is None
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    first = server.outcomes()["answered"]
    server.release()
    done = subprocess.run(command(plan, store), env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

    judgments = events(store, "judgment")
    prompts = {one["question"]["body"]["messages"][-1]["content"] for each in judgments for one in each["replies"]}
    assert len(judgments) == 2 * QUESTIONS
    # Nothing was lost: each judgment is what the judge says of that prompt, and what it does not say is no score.
    for each in judgments:
        said = each["replies"][-1]["question"]["body"]["messages"][-1]["content"]
        assert each["state"] == ("malformed" if number(said) % 8 == 0 else "ok")
    values = scores(store)
    rated = {key: value for key, value in values.items() if key[1] == "score"}
    assert len(rated) == sum(each["state"] == "ok" for each in judgments)
    assert sum(value for key, value in values.items() if key[1] == "no_verdict") == len(judgments) - len(rated) > 0
    # Nothing was asked twice: each request was answered once, and once more where nothing could be read.
    assert set(server.answered().values()) == {1}
    assert len(server.answered()) == len(prompts) + sum(number(prompt) % 8 in (0, 1) for prompt in prompts)
    assert 0 < first < len(server.answered())
    assert {*kinds, "answered", "held"} == set(server.outcomes())
    # The key reached the endpoint, and no file.
    assert {seen.key for seen in server.seen} == {f"Bearer {SECRET}"}
    assert not any(SECRET in file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file())

    # Scored again from the records alone: the endpoint is gone, and there is no model.
    server.close()
    files = list((store / "steps").glob("*/events.jsonl"))
    data = {"bench": folder / "bench"}
    for kind in ("answer", "judgment"):
        (data[kind],) = (file for file in files if f'"kind":"{kind}"' in file.read_text())
    judge = Choice("judge", "recorded", RecordedConfig(path="judgment"))
    assert rescored(MtBenchConfig(data="bench", answers="answer", judge=judge), data, tmp_path) == values


def rescored(config: MtBenchConfig, data: Mapping[str, Path], scratch: Path) -> dict[tuple[str, str], float]:
    """Values by item and metric."""
    found = {}

    def emit(kind: str, /, **fields: Any) -> None:
        if kind == "sample":
            found[fields["item"], fields["metric"]] = fields["value"]

    MtBench(config).judge(Review(model="teacher", answers=None, data=data, seed=0, scratch=scratch, emit=emit))
    return found


@pytest.mark.slow
def test_another_judge_is_asked_about_the_answers_that_are_stored(
    folder: Path, serve: Any, endpoint: Any, tmp_path: Path
) -> None:
    server, plan, store = serve(answer=endpoint.graded), tmp_path / "plan.toml", tmp_path / "store"
    text = PLAN.replace('"teacher"', f'"{folder / "teacher"}"').replace('"bench"', f'"{tmp_path / "bench"}"')
    shutil.copytree(folder / "bench", tmp_path / "bench")
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "A_JUDGES_KEY": SECRET}

    def run(model: str) -> str:
        plan.write_text(text.replace("{judge}", ENDPOINT.format(url=server.url, model=model)))
        done = subprocess.run(command(plan, store), env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "3 ok; 3 ran now" in run("rule")
    answers = events(store, "answer")
    # What steps keep for each other may be deleted, and models may.
    shutil.rmtree(store / "cache")
    (artifact,) = (store / "steps").glob("*/artifact")
    shutil.rmtree(artifact)
    assert "3 ok; 1 ran now" in run("another")
    # Other words for the judge are another judging, too.
    prompts = tmp_path / "bench" / "judge_prompts.jsonl"
    prompts.write_text(prompts.read_text().replace("Be fair.", "Be strict."))
    assert "3 ok; 1 ran now" in run("another")
    assert not artifact.exists()
    assert events(store, "answer") == answers
    assert len(server.seen) == 3 * 2 * QUESTIONS
    steps = [json.loads(file.read_text()) for file in (store / "steps").glob("*/step.json")]
    assert sorted(step["kind"] for step in steps) == ["answer", "convert", "judge", "judge", "judge"]
    assert {step["needs"]["gpus"] for step in steps if step["kind"] == "judge"} == {0}
