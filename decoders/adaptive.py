"""How many tokens to draft: K is chosen for a window of rounds from what was accepted, and from what rounds cost.

A round of K drafts takes time cost(K), measured once for a kind of request, and yields 1 + a_1 + a_1 a_2 + … tokens,
where a_j is the chance that draft j stands if those before it do. The best K has the least time per token. What was
predicted of each window is kept beside what came.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from ..harness.interfaces import Emit, Limits, Stepper

UNTIMED, TIMED = 2, 5
"""Rounds of each K that get kernels tuned and graphs recorded, and samples whose median is the cost."""
SAMPLE_S, MOST = 0.02, 64
"""Seconds and rounds of a sample, at most, on a GPU, where in an answer too the next round waits while one runs. Of ten
short ones in a row each took 0.01 ms more than in answers, 7 % of the shortest."""
FORGET = 0.8
"""What older rounds still weigh after another window: acceptance follows the text."""
PRIOR = 2.0
"""Rounds' worth of belief that a draft stands as often as all others do; of all, that it stands every other time."""


Seconds = Callable[[int, int], float]
"""What each of so many rounds of K drafts takes: of K and how many."""


class CostTable:
    """Seconds of a round with K = 1, 2, … drafts, by batch size, length of the texts and kind of sampling, of the model
    last asked for. Lengths between two powers of 2 count as alike."""

    def __init__(self) -> None:
        self._model: Stepper | None = None
        self._known: dict[tuple[int, ...], list[float]] = {}

    def of(self, model: Stepper, batch: int, length: int, limits: Limits, k: int, seconds: Seconds) -> list[float]:
        """Looks costs up, or measures them by rounds that change no text."""
        if self._model is not model:
            self._model, self._known = model, {}
        sampling = limits.temperature > 0, limits.top_k > 0, limits.top_p < 1
        key = batch, length.bit_length(), *sampling, k
        if key not in self._known:
            self._known[key] = [cost(model, drafts, seconds) for drafts in range(1, k + 1)]
        return self._known[key]


def cost(model: Stepper, k: int, seconds: Seconds) -> float:
    """Seconds of a round of k drafts, where the host does nothing but start rounds."""
    seconds(k, UNTIMED)
    in_a_row = 1
    if model.device.startswith("cuda"):
        in_a_row = max(1, min(round(SAMPLE_S / seconds(k, UNTIMED)), MOST))
    return statistics.median(seconds(k, in_a_row) for _ in range(TIMED))


class Chooser:
    """Chooses K for one request. Starts with the largest."""

    def __init__(self, costs: Sequence[float], window: int) -> None:
        self.costs = list(costs)
        """Seconds of a round, of K = 1, 2, …"""
        self.k = len(self.costs)
        self._window = window
        self._tried = [0.0] * self.k
        self._stood = [0.0] * self.k
        self._seen: list[tuple[int, int]] = []
        """Rounds of this window by row: K and how many drafts stood."""
        self._rounds = 0
        self._began = time.perf_counter()
        self._foreseen: tuple[float, float] | None = None
        """Seconds and tokens of a round of this window."""
        self._kept: list[tuple[int, int, float, float, float, float]] = []

    def next(self, accepted: Sequence[Sequence[int]], k: int | None = None) -> int:
        """K for the next round, after rounds with this K that accepted so many drafts of each running row. Rounds with
        another `k`, which were on their way when it changed, do not count."""
        if k not in (None, self.k):
            self._began = time.perf_counter()
            return self.k
        self._seen += [(self.k, count) for each in accepted for count in each]
        self._rounds += len(accepted)
        if self._rounds >= self._window:
            self._close()
        return self.k

    def tokens(self, k: int) -> float:
        """Expected tokens of a round of k drafts. A short draft counts as one that fails."""
        tried, stood = sum(self._tried), sum(self._stood)
        mean = (stood + PRIOR / 2) / (tried + PRIOR)
        expected = chance = 1.0
        for place in range(k):
            chance *= (self._stood[place] + PRIOR * mean) / (self._tried[place] + PRIOR)
            expected += chance
        return expected

    def report(self, emit: Emit) -> None:
        """Emits the costs, and of all windows whose K was chosen the prediction beside the measurement."""
        for k, cost in enumerate(self.costs, 1):
            emit("fact", name=f"cost of a round, K = {k}", value=cost, unit="s")
        if self._seen:
            self._keep()
        rounds = sum(window[1] for window in self._kept)
        if not rounds:
            return

        def mean(field: int) -> float:
            return sum(window[1] * window[field] for window in self._kept) / rounds

        emit("fact", name="adaptive K, mean", value=mean(0), unit="tokens")
        for name, seconds, tokens in (("predicted", mean(2), mean(3)), ("measured", mean(4), mean(5))):
            emit("fact", name=f"adaptive K, {name} time of a round", value=seconds, unit="s")
            emit("fact", name=f"adaptive K, {name} tokens of a round", value=tokens, unit="tokens/round")
            emit("fact", name=f"adaptive K, {name} time per token", value=seconds / tokens, unit="s")

    def _close(self) -> None:
        self._keep()
        self._tried = [FORGET * count for count in self._tried]
        self._stood = [FORGET * count for count in self._stood]
        for k, count in self._seen:
            for place in range(min(count + 1, k)):
                self._tried[place] += 1
                self._stood[place] += count > place
        self.k = min(range(1, len(self.costs) + 1), key=lambda k: self.costs[k - 1] / self.tokens(k))
        self._foreseen = self.costs[self.k - 1], self.tokens(self.k)
        self._seen, self._rounds, self._began = [], 0, time.perf_counter()

    def _keep(self) -> None:
        if self._foreseen is not None:
            seconds = (time.perf_counter() - self._began) / self._rounds
            tokens = 1 + sum(count for _, count in self._seen) / len(self._seen)
            self._kept.append((self.k, self._rounds, *self._foreseen, seconds, tokens))
