"""A bench for suites: the toy model behind a backend, and every record kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mambabench.decoders.ngram import NgramDraft
from mambabench.decoders.speculative import SpeculativeDecoder
from mambabench.decoders.standard import StandardDecoder
from mambabench.harness.interfaces import Artifact, Bench, Decoder, Subject
from mambabench.harness.mockmodel import MockStepper

Records = list[dict[str, Any]]


class MockBackend:
    """Loads the toy model, or a kind of it."""

    def __init__(self, make: Callable[[], MockStepper]) -> None:
        self.make = make
        self.dtypes: list[str] = []

    def load(self, artifact: Path, device: str, dtype: str) -> MockStepper:
        self.dtypes.append(dtype)
        return self.make()


@pytest.fixture
def measure(tmp_path: Path) -> Callable[..., Records]:
    """measure(suite, texts, …) runs a suite on documents (the data entry "text") and returns its records."""

    def run(
        suite: Any,
        texts: Sequence[str | dict[str, Any]] = (),
        decoder: Decoder | None = None,
        reference: Decoder | None = None,
        make: Callable[[], MockStepper] = MockStepper,
        data: Path | None = None,
        files: Mapping[str, Path] | None = None,
    ) -> Records:
        if data is None:
            data = tmp_path / "text.jsonl"
            lines = [{"text": text} if isinstance(text, str) else text for text in texts]
            data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        artifact = Artifact("mock", tmp_path, MockBackend(make))
        records: Records = []

        def emit(kind: str, /, **fields: Any) -> None:
            records.append({"kind": kind, **fields})

        suite.run(
            Bench(
                subject=Subject(artifact, "subject", decoder, "cpu", "float32"),
                reference=Subject(artifact, "plain", reference, "cpu", "float32") if reference else None,
                data={"text": data, **(files or {})},
                seed=0,
                scratch=tmp_path / "scratch",
                emit=emit,
            )
        )
        return records

    return run


@pytest.fixture
def plain() -> StandardDecoder:
    return StandardDecoder()


@pytest.fixture
def lookup() -> SpeculativeDecoder:
    return SpeculativeDecoder(NgramDraft(), 3)


@pytest.fixture(scope="session")
def chatting(loaded: Callable[[Path], ModuleType]) -> ModuleType:
    """The module of a toy model that chats."""
    return loaded(Path(__file__).with_name("chatting.py"))


@pytest.fixture
def chats(chatting: ModuleType, tmp_path: Path) -> Any:
    """Runs suites that have a model answer: `chats.play(suite, data=file)`, then `chats.of("sample")`."""
    return chatting.Chats(tmp_path)
