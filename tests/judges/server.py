"""A real HTTP server that speaks OpenAI's protocol, answers by rule, and misbehaves on purpose.

It writes down every request and what became of it, so that a test can tell what was asked twice.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("429", "500", "silence", "dropped", "cut", "page")
SILENCE_S = 5.0
"""Longer than anybody waits here."""
Answer = Callable[[str, int], str]
"""The text for a prompt, and how often the same was answered before."""


def grade(prompt: str) -> int:
    """What this judge thinks of a prompt: 1 to 10, by its hash."""
    return 1 + hashlib.sha256(prompt.encode()).digest()[0] % 10


def graded(prompt: str, before: int) -> str:
    return f"Not bad. Rating: [[{grade(prompt)}]]"


class Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of the server's."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@dataclass(frozen=True)
class Seen:
    """One request: the id that its sender gave it, a hash of its body, and what became of it."""

    id: str
    body: str
    outcome: str
    at: float
    key: str


@dataclass
class JudgeServer:
    """`faults(prompt)` lists what the first tries of a prompt meet; `answer` makes the text after that."""

    answer: Answer = graded
    faults: Callable[[str], Sequence[str]] = lambda prompt: ()
    retry_after: str = "0.2"
    hold_after: int | None = None
    """So many requests are answered, and further ones get no answer until `release`."""
    seen: list[Seen] = field(default_factory=list)
    waiting: int = 0
    bodies: list[Mapping[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.released, self.closed = threading.Event(), threading.Event()
        self._tries: Counter[str] = Counter()
        self._begun = 0
        self._answers: Counter[str] = Counter()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server.serve(self)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing is printed: `seen` has it all."""

        self._http = Http(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def close(self) -> None:
        self.release()
        self.closed.set()
        self._http.shutdown()
        self._http.server_close()

    def release(self) -> None:
        self.hold_after = None
        self.released.set()

    def outcomes(self) -> Counter[str]:
        return Counter(seen.outcome for seen in self.seen)

    def answered(self) -> Counter[str]:
        """How often each request, by its id, was answered in full."""
        return Counter(seen.id for seen in self.seen if seen.outcome == "answered")

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers["Content-Length"]))
        body = json.loads(raw)
        prompt = body["messages"][-1]["content"]
        name = handler.headers["Idempotency-Key"]
        key = handler.headers["Authorization"]

        def saw(outcome: str) -> None:
            with self.lock:
                self.seen.append(Seen(name, hashlib.sha256(raw).hexdigest(), outcome, time.time(), key))

        with self.lock:
            self.bodies.append(body)
            faults = self.faults(prompt)
            turn = self._tries[prompt]
            self._tries[prompt] += 1
            fault = faults[turn] if turn < len(faults) else ""
            held = not fault and self.hold_after is not None and self._begun >= self.hold_after
            if not fault and not held:
                self._begun += 1
        if fault:
            saw(fault)
            self.misbehave(handler, fault)
            return
        if held:
            with self.lock:
                self.waiting += 1
            self.released.wait()
            saw("held")
            self.drop(handler)
            return
        with self.lock:
            before = self._answers[prompt]
            self._answers[prompt] += 1
        text = self.answer(prompt, before)
        reply = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": f"{body['model']}-0613",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": text},
                    "logprobs": logprobs(text, body.get("top_logprobs", 0)),
                }
            ],
            "usage": {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split()), "total_tokens": 0},
        }
        try:
            self.send(handler, 200, json.dumps(reply).encode())
        except OSError:
            saw("lost")
        else:
            saw("answered")

    def misbehave(self, handler: BaseHTTPRequestHandler, fault: str) -> None:
        if fault == "silence":
            self.closed.wait(SILENCE_S)
            self.drop(handler)
        elif fault == "dropped":
            self.drop(handler)
        elif fault == "cut":
            handler.send_response(200)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"id": "chatcmpl-1", "choices": [{"index": 0, "mess')
            self.drop(handler)
        elif fault == "page":
            self.send(handler, 200, b"<html>Please log in</html>", {"Content-Type": "text/html"})
        else:
            headers = {"Retry-After": self.retry_after} if fault == "429" else {}
            status, _, code = fault.partition(" ")
            error = {"error": {"message": f"no, {handler.headers['Authorization']}", "code": code or None}}
            self.send(handler, int(status), json.dumps(error).encode(), headers)

    def send(
        self, handler: BaseHTTPRequestHandler, status: int, text: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)
        handler.wfile.flush()

    def drop(self, handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        try:
            handler.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


def logprobs(text: str, top: int) -> dict[str, Any] | None:
    if not top:
        return None
    tops = [{"token": f"t{i}", "logprob": -float(i), "bytes": None} for i in range(top)]
    return {"content": [{"token": word, "logprob": 0.0, "bytes": None, "top_logprobs": tops} for word in text.split()]}
