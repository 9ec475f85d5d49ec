"""The judge `openai`: any endpoint that speaks OpenAI's protocol of chat completions.

The library's own retries are off: a wait that the endpoint asks for must hold all threads and processes back, tries
count against the limits, and each is on record.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit

import openai

from ..interfaces import Emit, Unsupported
from ..keys import digest
from . import Desk, Reply, Request, Verdict
from .configs import OpenAIConfig
from .kept import Kept, cleaned
from .limits import Pace, retry_after
from .reading import Failure, resolve

PASSING = (408, 409, 425, 429)
"""Statuses below 500 of requests that may be tried again."""
HOPELESS = (401, 403, 404)
"""Statuses that every request would meet."""
SPENT = "insufficient_quota"
LONGEST_BACKOFF_S = 60.0
GIVE_UP = 3
"""So many requests in a row, or as many as are asked side by side, that were never answered mean that none will be."""
CHARACTERS_A_TOKEN = 4


class OpenAIJudge:
    def __init__(self, config: OpenAIConfig) -> None:
        self.config = config

    def judge(self, requests: Sequence[Request], desk: Desk) -> list[Verdict]:
        """Reads what is on disk and asks for the rest. Neither key nor endpoint is needed where nothing is missing."""
        session = _Session(self.config, desk)
        verdicts: dict[int, Verdict] = {}
        pool = ThreadPoolExecutor(self.config.concurrency, thread_name_prefix="judge")
        try:
            running = {pool.submit(session.verdict, request): place for place, request in enumerate(requests)}
            for future in as_completed(running):
                verdicts[running[future]] = future.result()
                desk.emit("progress", done=len(verdicts), total=len(requests), unit="judgments")
        finally:
            session.stop.set()
            pool.shutdown(cancel_futures=True)
            session.close()
        session.tell([verdicts[place] for place in range(len(requests))])
        return [verdicts[place] for place in range(len(requests))]


class _Session:
    """One call of a judge: the client, the limits, and what was counted."""

    def __init__(self, config: OpenAIConfig, desk: Desk) -> None:
        self.config, self.emit = config, desk.emit
        self.kept = Kept(desk.folder)
        self.options = config.parameters()
        self.stop = threading.Event()
        self._pace = Pace(
            desk.folder / f".pace-{digest([config.base_url, config.model])}.json",
            config.requests_per_minute,
            config.tokens_per_minute,
        )
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._unanswered = 0
        self._client: openai.OpenAI | None = None
        self._key = ""

    def verdict(self, request: Request) -> Verdict:
        return resolve(request, self.config.model, self.options, self.config.asks_again, self._answer)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def tell(self, verdicts: Sequence[Verdict]) -> None:
        """What the judgments took in all, and what of it this run did."""
        replies = [reply for verdict in verdicts for _, reply in verdict.heard]
        prompt, completion = (
            sum(getattr(reply, f"{kind}_tokens") for reply in replies) for kind in ("prompt", "completion")
        )
        fact(self.emit, "judge: prompt tokens", prompt, "tokens")
        fact(self.emit, "judge: completion tokens", completion, "tokens")
        if self.config.prompt_price or self.config.completion_price:
            cost = (prompt * self.config.prompt_price + completion * self.config.completion_price) / 1e6
            fact(self.emit, "judge: cost", cost, "USD")
        fact(self.emit, "judge: replies", len(replies), "requests")
        fact(self.emit, "judge: replies of this run", sum(verdict.asked for verdict in verdicts), "requests")
        fact(self.emit, "judge: tries of this run without a reply", self._counts["failures"], "requests")

    def _answer(self, asked: Mapping[str, Any]) -> tuple[Reply, bool]:
        reply = self.kept.find(asked)
        if reply is not None:
            return reply, False
        lock = self.kept.lock(asked)
        try:
            reply = self.kept.find(asked)
            if reply is not None:
                return reply, False
            reply = self._ask(asked)
            self.kept.keep(asked, reply)
        finally:
            lock.release()
        return reply, True

    def _ask(self, asked: Mapping[str, Any]) -> Reply:
        """Asks until there is a reply. Raises `Failure` when the tries are used up."""
        body = asked["body"]
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or 0
        expected = len(json.dumps(body["messages"])) // CHARACTERS_A_TOKEN + limit
        for attempt in range(self.config.retries + 1):
            if self._unanswered >= max(GIVE_UP, self.config.concurrency):
                raise Failure(f"not asked: {self._unanswered} requests in a row were not answered")
            self._wait(self._pace.turn(expected))
            while held := self._pace.held():
                self._wait(held)
            try:
                reply = self._request(asked)
            except (openai.APIError, ValueError) as error:
                reason = self._reason(error)
                wait = self._after(error, reason, attempt)
                self.emit(
                    "unanswered",
                    question=digest(asked),
                    attempt=attempt + 1,
                    cause=cause(error),
                    reason=reason,
                    wait_s=round(wait, 3),
                )
                with self._lock:
                    self._counts["failures"] += 1
                if attempt < self.config.retries:
                    self._wait(wait)
                continue
            self._pace.settle(expected, reply.prompt_tokens + reply.completion_tokens)
            self._unanswered = 0
            return reply
        with self._lock:
            self._unanswered += 1
        raise Failure(f"{reason} ({self.config.retries + 1} tries)")

    def _after(self, error: Exception, reason: str, attempt: int) -> float:
        """Seconds until the next try. Raises where there should be none."""
        status = getattr(error, "status_code", None)
        if status in HOPELESS or getattr(error, "code", None) == SPENT:
            key = (
                f"; its key is taken from {self.config.key_env}" if self.config.key_env and status in (401, 403) else ""
            )
            raise Unsupported(
                f"the judge {self.config.model!r} at {self.config.base_url} cannot be asked: {reason}{key}"
            )
        if status is not None and status < 500 and status not in PASSING:
            raise Failure(reason)
        response = getattr(error, "response", None)
        told = retry_after(dict(response.headers), time.time()) if response is not None else None
        if told is None:
            backoff = min(self.config.backoff * 2.0**attempt, LONGEST_BACKOFF_S)
            return backoff * random.uniform(0.5, 1.0)
        if told > self.config.longest_wait:
            raise Failure(f"{reason}; the endpoint asks to wait {told:.0f} s")
        self._pace.hold(told)
        return told

    def _request(self, asked: Mapping[str, Any]) -> Reply:
        """Asks once. Raises ValueError for an answer that is no chat completion."""
        body = asked["body"]
        others = {name: value for name, value in body.items() if name not in ("model", "messages")}
        answer: Any = self._connect().chat.completions.create(
            model=body["model"],
            messages=body["messages"],
            extra_body=others,
            extra_headers={"Idempotency-Key": digest(asked)},
        )
        try:
            choice, usage = answer.choices[0], answer.usage
            content = (choice.logprobs.content if choice.logprobs else None) or ()
            return Reply(
                text=(choice.message.content or "").encode("utf-8", "replace").decode(),
                top_logprobs=cleaned([{top.token: top.logprob for top in token.top_logprobs} for token in content]),
                finish=str(choice.finish_reason or ""),
                model=str(answer.model or ""),
                prompt_tokens=int(usage.prompt_tokens) if usage else 0,
                completion_tokens=int(usage.completion_tokens) if usage else 0,
            )
        except (AttributeError, TypeError, IndexError) as error:
            raise ValueError(f"the answer is no chat completion ({error})") from None

    def _connect(self) -> openai.OpenAI:
        with self._lock:
            if self._client is None:
                config = self.config
                self._key = key = key_of(config)
                self._client = openai.OpenAI(
                    api_key=key or "none", base_url=config.base_url, timeout=config.timeout, max_retries=0
                )
            return self._client

    def _reason(self, error: Exception) -> str:
        """What went wrong, in one line, without the key: endpoints like to repeat it."""
        status = getattr(error, "status_code", None)
        if isinstance(error, openai.APITimeoutError):
            text = f"no answer within {self.config.timeout:g} s"
        elif isinstance(error, openai.APIConnectionError):
            cause = error.__cause__
            text = f"the connection to {urlsplit(self.config.base_url).netloc} failed ({cause or error})"
        elif status is not None:
            text = f"status {status}: {str(error).removeprefix(f'Error code: {status} - ')}"
        else:
            text = f"{type(error).__name__}: {error}"
        if self._key:
            text = text.replace(self._key, "…")
        return " ".join(text.split())[:300]

    def _wait(self, seconds: float) -> None:
        """Waits, unless the whole call is over."""
        if self.stop.wait(seconds):
            raise Failure("not asked: the judge was given up")


def cause(error: Exception) -> str:
    """What kind of failure it was: `429` and other statuses, `timeout`, `connection`, or `no completion` for an answer
    that is something else."""
    if isinstance(error, openai.APITimeoutError):
        return "timeout"
    if isinstance(error, openai.APIConnectionError):
        return "connection"
    return str(getattr(error, "status_code", "no completion"))


def key_of(config: OpenAIConfig) -> str:
    """The endpoint's key; empty for one without. Raises `Unsupported` where there should be one and is none."""
    if reason := config.lacks():
        raise Unsupported(reason)
    return os.environ[config.key_env] if config.key_env else ""


def fact(emit: Emit, name: str, value: float, unit: str) -> None:
    emit("fact", name=name, value=value, unit=unit)
