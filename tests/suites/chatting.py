"""A toy model that reads chats, and a bench that knows files: for the suites that ask and are judged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mambabench.harness.interfaces import Artifact, Bench, Decoder, Review, Subject
from mambabench.harness.mockmodel import MockStepper, MockTokenizer
from mambabench.harness.plugins import build


class ChatTokenizer(MockTokenizer):
    """Reads any text, a character a token, and writes the toy model's letters."""

    chat_template = "<role>content<end>"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) % len(self.letters) + 1 for letter in text]

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], tokenize: bool, add_generation_prompt: bool = False
    ) -> str:
        text = "".join(f"<{message['role']}>{message['content']}<end>" for message in messages)
        return text + "<assistant>" * add_generation_prompt


class ChatStepper(MockStepper):
    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = ChatTokenizer("abcdefg")


class ChatBackend:
    def __init__(self, make: Any = ChatStepper) -> None:
        self.make, self.loaded = make, 0

    def load(self, artifact: Path, device: str, dtype: str) -> MockStepper:
        self.loaded += 1
        return self.make()


class Chats:
    """Runs suites; keeps their records, and the folder that survives a kill."""

    def __init__(self, folder: Path, decoder: Decoder | None = None, make: Any = ChatStepper) -> None:
        self.folder, self.decoder = folder, decoder
        self.backend = ChatBackend(make)
        self.records: list[dict[str, Any]] = []

    def emit(self, kind: str, /, **fields: Any) -> None:
        self.records.append({"kind": kind, **fields})

    def bench(self, kept_as: str = "", **data: Path) -> Bench:
        """`data` by what stands in the suite's config; `kept_as` names what is kept for other steps."""
        artifact: Any = Artifact("mock", self.folder, self.backend)
        return Bench(
            subject=Subject(artifact, "plain", self.decoder, "cpu", "float32"),
            reference=None,
            data=data,
            seed=0,
            scratch=self.folder / "scratch",
            emit=self.emit,
            cache=self.folder / "cache",
            answers=kept_as,
        )

    def review(self, **data: Path) -> Review:
        """Of the answers that are on record."""
        file = self.folder / "answered" / "events.jsonl"
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text("".join(json.dumps(record) + "\n" for record in self.of("answer")))
        return Review(
            model="mock",
            answers=file,
            data=data,
            seed=0,
            scratch=self.folder / "scratch",
            emit=self.emit,
            cache=self.folder / "cache",
        )

    def play(self, suite: Any, kept_as: str = "", **data: Path) -> None:
        """Both steps of a suite: the model answers, unless answers are recorded, and they are judged."""
        asked = suite.config.questions()
        if asked is not None:
            inside = (
                {asked.config.data: data["data"] / Path(asked.config.data).name} if "/" in asked.config.data else {}
            )
            build(asked).answer(self.bench(kept_as, **data, **inside))
        suite.judge(self.review(**data))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    def mean(self, metric: str) -> float:
        values = [record["value"] for record in self.of("sample") if record["metric"] == metric]
        return sum(values) / len(values)
