"""The judge's server, and requests that ask it for grades."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mambabench.harness.documents import Message
from mambabench.harness.judges import Reply, Request

RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")


def rating(reply: Reply) -> float:
    found = RATING.search(reply.text)
    if found is None:
        raise ValueError("no rating")
    return float(found[1])


@pytest.fixture(scope="session")
def endpoint(loaded: Callable[[Path], ModuleType]) -> ModuleType:
    """The module of the server."""
    return loaded(Path(__file__).with_name("server.py"))


@pytest.fixture
def serve(endpoint: ModuleType) -> Iterator[Callable[..., Any]]:
    """Starts a server with these answers and faults; it is closed when the test ends."""
    servers: list[Any] = []

    def start(**options: Any) -> Any:
        servers.append(endpoint.JudgeServer(**options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def requests() -> Callable[..., list[Request]]:
    def make(count: int, **options: Any) -> list[Request]:
        return [
            Request(id=f"item {i}", messages=(Message("user", f"Grade answer {i}."),), read=rating, **options)
            for i in range(count)
        ]

    return make
