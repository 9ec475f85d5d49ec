"""Turns at an endpoint: never more in a minute than allowed, whoever asks."""

import doctest
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mambabench.harness.judges import limits
from mambabench.harness.judges.limits import Pace


@dataclass
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_the_examples_hold() -> None:
    assert doctest.testmod(limits).failed == 0


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 400)), min_size=1, max_size=60))
def test_no_minute_has_more_requests_or_tokens_than_allowed(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[float, int]]
) -> None:
    clock = Clock()
    file = tmp_path_factory.mktemp("pace") / "pace.json"
    # Two who share the file, as two processes do.
    paces = [Pace(file, 30, 3000, clock) for _ in range(2)]
    turns = []
    for number, (passed, tokens) in enumerate(asked):
        clock.now += passed
        turns.append((clock.now + paces[number % 2].turn(tokens), tokens))
    for begin, _ in turns:
        minute = [tokens for at, tokens in turns if begin <= at < begin + 60 - 1e-6]
        assert len(minute) <= 30
        # The last one's tokens are spent when it is asked, and paid for by the wait behind it.
        assert sum(minute[:-1]) <= 3000


def test_a_turn_is_corrected_by_what_it_took(tmp_path: Path) -> None:
    clock = Clock()
    pace = Pace(tmp_path / "pace.json", tokens_per_minute=60, clock=clock)
    assert pace.turn(100) == 0
    pace.settle(100, 10)
    assert pace.turn(1) == pytest.approx(10)


def test_a_hold_keeps_everybody_back_and_ends(tmp_path: Path) -> None:
    clock = Clock()
    one, other = (Pace(tmp_path / "pace.json", clock=clock) for _ in range(2))
    one.hold(5)
    one.hold(2)
    assert other.turn(1) == pytest.approx(5)
    assert other.held() == pytest.approx(5)
    clock.now += 6
    assert other.turn(1) == 0


def test_without_limits_nobody_waits_and_nothing_is_written(tmp_path: Path) -> None:
    pace = Pace(tmp_path / "pace.json")
    assert [pace.turn(1000) for _ in range(5)] == [0.0] * 5
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_no_hold(tmp_path: Path) -> None:
    (tmp_path / "pace.json").write_text("{")
    assert Pace(tmp_path / "pace.json", 60).turn(1) == 0
