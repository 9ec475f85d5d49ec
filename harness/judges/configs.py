"""Options of the built-in judges. Those that change when and where a judge is asked, but not what it is asked, are no
part of a step's key."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ..interfaces import FileRef

WHERE = {"decides": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIConfig:
    model: str
    """The judge, as the endpoint calls it. Replies are kept by this name, wherever they came from."""
    base_url: str = field(default="https://api.openai.com/v1", metadata=WHERE)
    key_env: str = field(default="OPENAI_API_KEY", metadata=WHERE)
    """The environment variable that holds the key, which is written nowhere. Empty: the endpoint needs none."""
    options: str = ""
    """Further parameters of each request as a JSON object, such as `{"seed": 1}`. `null` leaves one out:
    `{"max_tokens": null, "max_completion_tokens": 2048}`."""
    asks_again: int = 2
    """How often a request is asked again whose reply cannot be read."""
    concurrency: int = field(default=8, metadata=WHERE)
    requests_per_minute: int = field(default=0, metadata=WHERE)
    """0: no limit. The limits hold for all processes that ask with the same store."""
    tokens_per_minute: int = field(default=0, metadata=WHERE)
    timeout: float = field(default=120.0, metadata=WHERE)
    """Seconds without a word from the endpoint after which a request is given up and tried again."""
    retries: int = field(default=6, metadata=WHERE)
    """How often a request is tried again that was not answered."""
    backoff: float = field(default=1.0, metadata=WHERE)
    """Seconds before the first of them, about; doubled each time, up to a minute. An endpoint that says how long to
    wait (Retry-After) is obeyed instead."""
    longest_wait: float = field(default=600.0, metadata=WHERE)
    """Seconds; a request whose endpoint asks to wait longer fails."""
    allow_failed: float = 0.0
    """The share of requests that may fail before the whole step does. Those that failed have no score."""
    prompt_price: float = 0.0
    """USD per million tokens; 0 for both prices: the cost is not told."""
    completion_price: float = 0.0

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is empty; name the judge")
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f'base_url is "{self.base_url}"; it begins with http:// or https:// and names a host')
        if url.username or url.password or url.query:
            raise ValueError("base_url holds a secret or a query; the key belongs into the variable that key_env names")
        for name, least in (
            *(("asks_again", 0), ("concurrency", 1), ("requests_per_minute", 0), ("tokens_per_minute", 0)),
            *(("retries", 0), ("backoff", 0), ("longest_wait", 0), ("prompt_price", 0), ("completion_price", 0)),
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}; it must be above 0 seconds")
        if not 0 <= self.allow_failed <= 1:
            raise ValueError(f"allow_failed is {self.allow_failed}; it is a share, 0 to 1")
        self.parameters()

    def lacks(self) -> str:
        """The key, where the endpoint needs one and it is not there."""
        if not self.key_env or os.environ.get(self.key_env):
            return ""
        return (
            f"the judge {self.model!r} needs its key in the environment variable {self.key_env} "
            '(key_env = "" for an endpoint without keys)'
        )

    def parameters(self) -> dict[str, Any]:
        """`options`, parsed."""
        return _parameters(self.options)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedConfig:
    path: FileRef
    """A folder of kept replies, or a `.jsonl` file with `judgment` records, such as a step's `events.jsonl`."""
    model: str = ""
    """Whose replies are taken; may be empty where the recording has only one judge's."""
    options: str = ""
    """Those of the judge that was recorded."""
    allow_failed: float = 0.0
    """The share of requests that may have no reply in the recording before the whole step fails."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; name the recording")
        if not 0 <= self.allow_failed <= 1:
            raise ValueError(f"allow_failed is {self.allow_failed}; it is a share, 0 to 1")
        self.parameters()

    def parameters(self) -> dict[str, Any]:
        """`options`, parsed."""
        return _parameters(self.options)


def _parameters(options: str) -> dict[str, Any]:
    try:
        parsed = json.loads(options or "{}")
    except ValueError as error:
        raise ValueError(f"options is not JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise ValueError('options is not a JSON object, such as {"seed": 1}')
    taken = sorted({"model", "messages", "stream", "n", "logprobs", "top_logprobs"} & parsed.keys())
    if taken:
        raise ValueError(f"options sets {taken[0]!r}, which is not its to set")
    return parsed
