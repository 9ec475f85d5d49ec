"""The source `tiny`: texts, preferences, tasks and chat questions of the tiny world."""

from __future__ import annotations

from ...harness.interfaces import Job
from ..plugin import TinyConfig
from .chat import write_chat
from .language import tokenizer
from .tasks import write_lines, write_tasks
from .writer import Writer


class Tiny:
    def __init__(self, config: TinyConfig) -> None:
        self.config = config

    def write(self, job: Job) -> None:
        """Writes `data.jsonl`, of texts with `tokenizer/` beside it; `tasks` as lm-eval's YAML with their items; `chat`
        as the files of MT-Bench and AlpacaEval."""
        part, seed = self.config.part, self.config.seed
        if part == "tasks":
            write_tasks(job.out, self.config.items, seed)
            return
        if part == "chat":
            write_chat(job.out, seed)
            return
        writers = (Writer(part, index, seed) for index in range(self.config.documents))
        if part in ("preferences", "unseen-preferences"):
            write_lines(job.out / "data.jsonl", (writer.preference() for writer in writers))
            return
        texts = (writer.prompt() if part == "prompts" else writer.document() for writer in writers)
        write_lines(job.out / "data.jsonl", ({"text": text} for text in texts))
        tokenizer().save_pretrained(job.out / "tokenizer")
