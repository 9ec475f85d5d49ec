"""A judging process that is killed: no reply that was had is lost, and none of them is asked for again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mambabench.harness.judges.kept import recorded

PROGRAM = """
import json, re, sys
from pathlib import Path
from mambabench.harness.documents import Message
from mambabench.harness.judges import Desk, Request
from mambabench.harness.judges.client import OpenAIJudge
from mambabench.harness.judges.configs import OpenAIConfig

def read(reply):
    found = re.search(r"\\[\\[(\\d+)\\]\\]", reply.text)
    if found is None:
        raise ValueError("no rating")
    return int(found[1])

url, folder, count = sys.argv[1:]
judge = OpenAIJudge(
    OpenAIConfig(model="rule", base_url=url, key_env="", backoff=0.01, timeout=1.5, concurrency=4, retries=8)
)
requests = [
    Request(id=f"item {i}", messages=(Message("user", f"Grade answer {i}."),), read=read) for i in range(int(count))
]
verdicts = judge.judge(requests, Desk(folder=Path(folder)))
print(json.dumps([[verdict.state, verdict.value, verdict.asked] for verdict in verdicts]))
"""


def start(server: Any, folder: Path, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, server.url, str(folder), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_nothing_is_asked_twice_after_a_kill(serve: Any, endpoint: Any, tmp_path: Path) -> None:
    count = 60
    kinds = endpoint.FAULTS

    def faults(prompt: str) -> tuple[str, ...]:
        number = int(re.findall(r"\d+", prompt)[0])
        return (kinds[number % len(kinds)],) * (number // len(kinds) % 3)

    def answer(prompt: str, before: int) -> str:
        hopeless, first_only = "answer 7." in prompt, "answer 3." in prompt
        return "No idea." if hopeless or (first_only and before == 0) else endpoint.graded(prompt, before)

    server = serve(faults=faults, answer=answer, retry_after="0.1", hold_after=25)
    folder = tmp_path / "judgments"
    child = start(server, folder, count)
    # Killed while requests are on their way, when all replies that left the server are on disk.
    until(lambda: server.waiting > 0 and server.outcomes()["answered"] >= 25)
    until(lambda: len(list(recorded(folder))) == server.outcomes()["answered"])
    assert child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert child.stdout is not None
    child.stdout.close()
    kept = server.outcomes()["answered"]
    server.release()

    resumed = start(server, folder, count)
    out, _ = resumed.communicate(timeout=60)
    verdicts = json.loads(out)
    assert [state for state, _, _ in verdicts] == ["malformed" if i == 7 else "ok" for i in range(count)]
    for i, (_, value, _) in enumerate(verdicts):
        assert value == (None if i == 7 else endpoint.grade(f"Grade answer {i}."))
    # Answered: each request once, three times where nothing could be read, twice where only the first was malformed.
    assert set(server.answered().values()) == {1}
    assert len(server.answered()) == count + 2 + 1
    assert sum(asked for _, _, asked in verdicts) == count + 3 - kept
    assert set(server.outcomes()) == {*kinds, "answered", "held"}


def test_whenever_it_is_killed_replies_are_whole_and_only_those_on_their_way_are_asked_again(
    serve: Any, endpoint: Any, tmp_path: Path
) -> None:
    count, kills = 80, 3
    server = serve(answer=lambda prompt, before: time.sleep(0.01) or endpoint.graded(prompt, before))
    folder = tmp_path / "judgments"
    for kill in range(kills):
        child = start(server, folder, count)
        target = 12 * (kill + 1)
        until(lambda target=target: len(server.answered()) >= target)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
        assert all(reply.text for _, reply in recorded(folder))
    out, _ = start(server, folder, count).communicate(timeout=60)
    assert [value for _, value, _ in json.loads(out)] == [endpoint.grade(f"Grade answer {i}.") for i in range(count)]
    answered = server.answered()
    assert len(answered) == count
    assert sum(answered.values()) - count <= kills * 4
