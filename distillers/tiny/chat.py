"""Ten questions of two turns in the tiny world, in the files of MT-Bench and of AlpacaEval, over held-out names.

The answers to beat, AlpacaEval's reference, are right for every other question.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .instructions import LISTS, Instruction, solve
from .tasks import write_lines
from .writer import Writer

QUESTIONS = 10
CATEGORY = "extraction"
"""One of MT-Bench's that is answered greedily and judged without a reference."""
ASKED = "[Question]\n{question}\n\n[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"
ASKED_TWICE = (
    "<|The Start of Assistant A's Conversation with User|>\n\n"
    "### User:\n{question_1}\n\n### Assistant A:\n{answer_1}\n\n"
    "### User:\n{question_2}\n\n### Assistant A:\n{answer_2}\n\n"
    "<|The End of Assistant A's Conversation with User|>"
)
"""FastChat's layout of what a judge sees."""


def write_chat(out: Path, seed: int) -> None:
    """Writes MT-Bench's question.jsonl and judge_prompts.jsonl, and AlpacaEval's rows as data.jsonl."""
    questions, rows = [], []
    for number in range(QUESTIONS):
        writer = Writer("chat", number, seed)
        first = Instruction(LISTS[number % len(LISTS)], tuple(writer.span(3)))
        text = " ".join(first.words)
        turns = [text, " ".join(first.again(writer.random).words)]
        questions.append({"question_id": number + 1, "category": CATEGORY, "turns": turns})
        output = " ".join(solve(first)) if number % 2 else next(first.wrong(writer.random, writer.names))
        rows.append({"instruction": text, "output": output})
    write_lines(out / "question.jsonl", questions)
    write_lines(out / "data.jsonl", rows)
    prompts = [_prompt(math, *of) for math in ("", "-math") for of in (("", ASKED), ("-multi-turn", ASKED_TWICE))]
    write_lines(out / "judge_prompts.jsonl", prompts)


def _prompt(math: str, turn: str, text: str) -> dict[str, Any]:
    system = "Rate the last answer from 1 to 10, as [[rating]]."
    return {"name": f"single{math}-v1{turn}", "system_prompt": system, "prompt_template": text}
