"""The judge behind an endpoint: whatever goes wrong, every request ends as a verdict, and none is answered twice."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mambabench.harness.interfaces import Unsupported
from mambabench.harness.judges import Desk, Request
from mambabench.harness.judges.configs import OpenAIConfig

pytest.importorskip("openai")
from mambabench.harness.judges.client import OpenAIJudge

SECRET = "sk-very-secret-0123456789"
Requests = Callable[..., list[Request]]


def judge(server: Any, **options: Any) -> OpenAIJudge:
    settings = {"model": "rule", "key_env": "", "backoff": 0.01, "timeout": 9.0, "concurrency": 4, **options}
    return OpenAIJudge(OpenAIConfig(base_url=server.url, **settings))


class Records(list):
    def __call__(self, kind: str, /, **fields: Any) -> None:
        self.append({"kind": kind, **fields})

    def facts(self) -> dict[str, float]:
        return {record["name"]: record["value"] for record in self if record["kind"] == "fact"}


def test_verdicts_come_in_the_order_of_their_requests_and_from_disk_the_second_time(
    serve: Any, endpoint: Any, requests: Requests, tmp_path: Path
) -> None:
    server, asked, records = serve(), requests(12), Records()
    first = judge(server).judge(asked, Desk(folder=tmp_path))
    assert [verdict.id for verdict in first] == [request.id for request in asked]
    assert [verdict.value for verdict in first] == [endpoint.grade(request.messages[0].content) for request in asked]
    assert first[0].reply is not None
    assert first[0].reply.model == "rule-0613"
    server.close()
    second = judge(server, key_env="NOT_SET_ANYWHERE").judge(asked, Desk(folder=tmp_path, emit=records))
    assert [verdict.value for verdict in second] == [verdict.value for verdict in first]
    assert {verdict.asked for verdict in second} == {0}
    assert records.facts()["judge: replies of this run"] == 0
    assert records.facts()["judge: prompt tokens"] == 12 * 3
    assert len(server.seen) == 12


@pytest.mark.parametrize("fault", ["429", "500", "silence", "dropped", "cut", "page", "503", "408"])
def test_a_request_that_meets_a_passing_fault_is_tried_again(
    fault: str, serve: Any, requests: Requests, tmp_path: Path
) -> None:
    server, records = serve(faults=lambda prompt: (fault, fault), retry_after="0.05"), Records()
    verdicts = judge(server, timeout=1.0 if fault == "silence" else 9.0).judge(
        requests(2), Desk(folder=tmp_path, emit=records)
    )
    assert [verdict.state for verdict in verdicts] == ["ok", "ok"]
    assert server.outcomes() == {fault: 4, "answered": 2}
    assert len([record for record in records if record["kind"] == "unanswered"]) == 4
    assert records.facts()["judge: tries of this run without a reply"] == 4


def test_a_wait_that_the_endpoint_asks_for_holds_all_threads_back(
    serve: Any, requests: Requests, tmp_path: Path
) -> None:
    wait, thinks = 1.0, 0.5
    server = serve(
        faults=lambda prompt: ("429",) if "answer 0." in prompt else (),
        answer=lambda prompt, before: time.sleep(thinks) or "[[5]]",
        retry_after=f"{wait}",
    )
    verdicts = judge(server, concurrency=4).judge(requests(8), Desk(folder=tmp_path))
    assert {verdict.state for verdict in verdicts} == {"ok"}
    refused, *answered = sorted(server.seen, key=lambda seen: seen.at)
    assert refused.outcome == "429"
    # Three were under way; all others came when the wait was over.
    assert all(seen.at >= refused.at + wait + thinks for seen in answered[3:])


def test_a_request_that_is_never_answered_fails_with_its_reason_and_the_others_do_not(
    serve: Any, requests: Requests, tmp_path: Path
) -> None:
    server = serve(faults=lambda prompt: ("500",) * 99 if "answer 1." in prompt else ())
    verdicts = judge(server, retries=2).judge(requests(4), Desk(folder=tmp_path))
    assert [verdict.state for verdict in verdicts] == ["ok", "failed", "ok", "ok"]
    assert verdicts[1].value is None
    assert verdicts[1].reason.startswith("status 500")
    assert verdicts[1].reason.endswith("(3 tries)")
    assert server.outcomes() == {"500": 3, "answered": 3}


def test_a_request_that_the_endpoint_refuses_is_not_tried_again(serve: Any, requests: Requests, tmp_path: Path) -> None:
    server = serve(faults=lambda prompt: ("400",) * 99 if "answer 1." in prompt else ())
    verdicts = judge(server).judge(requests(3), Desk(folder=tmp_path))
    assert [verdict.state for verdict in verdicts] == ["ok", "failed", "ok"]
    assert server.outcomes() == {"400": 1, "answered": 2}


def test_a_longer_wait_than_allowed_fails_at_once(serve: Any, requests: Requests, tmp_path: Path) -> None:
    server = serve(faults=lambda prompt: ("429",) * 9, retry_after="3600")
    began = time.monotonic()
    (verdict,) = judge(server, longest_wait=60.0).judge(requests(1), Desk(folder=tmp_path))
    assert verdict.state == "failed"
    assert verdict.reason.endswith("the endpoint asks to wait 3600 s")
    assert time.monotonic() - began < 5


def test_an_endpoint_that_answers_nobody_is_given_up(serve: Any, requests: Requests, tmp_path: Path) -> None:
    server = serve(faults=lambda prompt: ("500",) * 99)
    verdicts = judge(server, retries=1, concurrency=2).judge(requests(40), Desk(folder=tmp_path))
    assert {verdict.state for verdict in verdicts} == {"failed"}
    assert len(server.seen) <= 2 * (3 + 2)
    assert verdicts[-1].reason.startswith("not asked: ")
    assert verdicts[-1].reason.endswith("requests in a row were not answered")


@pytest.mark.parametrize("fault", ["401", "403", "404", "429 insufficient_quota"])
def test_an_endpoint_that_cannot_be_asked_ends_it_at_once(
    fault: str, serve: Any, requests: Requests, tmp_path: Path
) -> None:
    server = serve(faults=lambda prompt: (fault,) * 99)
    with pytest.raises(Unsupported, match=f"status {fault[:3]}"):
        judge(server, concurrency=2).judge(requests(40), Desk(folder=tmp_path))
    assert len(server.seen) <= 4


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    serve: Any, requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, records = serve(faults=lambda prompt: ("500",) if "0." in prompt else ("400",)), Records()
    asking = judge(server, key_env="A_JUDGES_KEY")
    assert "A_JUDGES_KEY" in asking.config.lacks()
    with pytest.raises(Unsupported, match="A_JUDGES_KEY"):
        asking.judge(requests(1), Desk(folder=tmp_path))
    assert not server.seen
    monkeypatch.setenv("A_JUDGES_KEY", SECRET)
    verdicts = asking.judge(requests(2), Desk(folder=tmp_path, emit=records))
    assert [verdict.state for verdict in verdicts] == ["ok", "failed"]
    assert {seen.key for seen in server.seen} == {f"Bearer {SECRET}"}
    written = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(SECRET in text for text in [*written, repr(records), repr(verdicts)])


def test_a_malformed_reply_is_asked_again_and_then_shown_as_such(
    serve: Any, requests: Requests, tmp_path: Path
) -> None:
    def answer(prompt: str, before: int) -> str:
        return "I cannot say." if "answer 1." in prompt or ("answer 0." in prompt and before < 2) else "[[7]]"

    server, asked = serve(answer=answer), requests(3)
    verdicts = judge(server, asks_again=2).judge(asked, Desk(folder=tmp_path))
    assert [verdict.state for verdict in verdicts] == ["ok", "malformed", "ok"]
    assert [verdict.asked for verdict in verdicts] == [3, 3, 1]
    assert verdicts[1].value is None
    assert verdicts[1].reason == "no rating (3 replies)"
    assert len(server.seen) == 7
    # Once more: malformed replies are on disk as well.
    again = judge(server, asks_again=2).judge(asked, Desk(folder=tmp_path))
    assert [verdict.state for verdict in again] == ["ok", "malformed", "ok"]
    assert len(server.seen) == 7


def test_requests_of_other_judges_parameters_or_draws_are_asked_for_themselves(
    serve: Any, requests: Requests, tmp_path: Path
) -> None:
    server, desk = serve(), Desk(folder=tmp_path)
    for asking, options in (
        (judge(server), {}),
        (judge(server, model="other"), {}),
        (judge(server, options='{"seed": 1}'), {}),
        (judge(server), {"temperature": 0.7}),
        (judge(server), {"draw": 1}),
        (judge(server), {"top_logprobs": 2}),
        (judge(server, timeout=8.0, concurrency=1), {}),
    ):
        asking.judge(requests(1, **options), desk)
    assert len(server.seen) == 6
    assert set(server.answered().values()) == {1}


def test_options_add_parameters_and_take_others_out(serve: Any, requests: Requests, tmp_path: Path) -> None:
    server = serve()
    options = '{"max_tokens": null, "max_completion_tokens": 99, "temperature": null, "seed": 3}'
    (verdict,) = judge(server, options=options).judge(requests(1, top_logprobs=2), Desk(folder=tmp_path))
    body = server.bodies[0]
    assert {"max_completion_tokens": 99, "seed": 3, "logprobs": True, "top_logprobs": 2}.items() <= body.items()
    assert not {"max_tokens", "temperature"} & body.keys()
    assert verdict.reply is not None
    assert verdict.reply.top_logprobs[0] == {"t0": 0.0, "t1": -1.0}


def test_two_who_ask_the_same_at_once_ask_once(serve: Any, requests: Requests, tmp_path: Path) -> None:
    server = serve(answer=lambda prompt, before: time.sleep(0.05) or "[[3]]")
    threads = [
        threading.Thread(target=lambda: judge(server).judge(requests(10), Desk(folder=tmp_path))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.seen) == 10


def test_requests_keep_to_the_limit(serve: Any, requests: Requests, tmp_path: Path) -> None:
    server = serve()
    began = time.time()
    judge(server, requests_per_minute=600).judge(requests(10), Desk(folder=tmp_path))
    for turn, seen in enumerate(sorted(server.seen, key=lambda seen: seen.at)):
        assert seen.at >= began + 0.1 * turn


def test_costs_are_told_where_prices_are_known(serve: Any, requests: Requests, tmp_path: Path) -> None:
    server, records = serve(), Records()
    judge(server, prompt_price=10.0, completion_price=30.0).judge(requests(5), Desk(folder=tmp_path, emit=records))
    facts = records.facts()
    assert (facts["judge: prompt tokens"], facts["judge: completion tokens"]) == (15, 20)
    assert facts["judge: cost"] == pytest.approx((15 * 10 + 20 * 30) / 1e6)
