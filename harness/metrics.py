"""The definitions of every figure of speed and speculation, in one place.

A *burst* is a group of new tokens of one row that became known at once; `at_s` is its time in seconds since the request
began. The first burst is the token that the prompt's run yields. A *round* is one verification: `drafted` tokens were
proposed, `accepted` of them stand, and one more token follows them (the correction, or the bonus token). Rounds are
counted before the text is cut at a limit, and the first burst belongs to no round.

The scalar functions take plain sequences. Those below them take the frames of a store (`timings.parquet`,
`rounds.parquet`), which must come with the columns that tell steps apart (`key`, the step's).
Importing this module imports no pandas.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame

REQUEST = ("batch", "prompt_tokens", "new_tokens", "temperature", "content")
"""Columns that describe a request; figures are comparable only where these are equal."""


def ttft(at_s: Sequence[float]) -> float:
    """Time to first token, s: first burst - start.

    >>> ttft([0.5, 0.75, 1.5])
    0.5
    """
    return at_s[0]


def tpot(at_s: Sequence[float], tokens: Sequence[int]) -> float:
    """Time per output token, s: (last burst - first burst) / (tokens - first burst's tokens). NaN with one burst.

    >>> tpot([0.5, 0.75, 1.5], [1, 2, 2])
    0.25
    >>> tpot([0.5], [1])
    nan
    """
    later = sum(tokens[1:])
    return (at_s[-1] - at_s[0]) / later if later else math.nan


def gaps(at_s: Sequence[float]) -> list[float]:
    """Times between a row's bursts, s: what a reader of the stream waits for.

    >>> gaps([0.5, 0.75, 1.5])
    [0.25, 0.75]
    """
    return [after - before for before, after in itertools.pairwise(at_s)]


def percentile(values: Iterable[float], percent: float) -> float:
    """The percentile with linear interpolation between order statistics (numpy's default). NaN of nothing.

    >>> percentile([4.0, 1.0, 2.0, 3.0], 50)
    2.5
    >>> percentile([1.0, 2.0, 3.0], 100)
    3.0
    """
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log)). Quotients of geometric means are geometric means of paired quotients. NaN of nothing.

    >>> round(geometric_mean([1.0, 4.0, 16.0]), 12)
    4.0
    """
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else math.nan


def speedup(reference_s: float, subject_s: float) -> float:
    """Quotient of two printed figures: above 1, the subject is faster.

    >>> speedup(0.5, 0.25)
    2.0
    """
    return reference_s / subject_s


def prefill_throughput(batch: int, prompt_tokens: int, ttft_s: float) -> float:
    """Prompt tokens per second of a whole batch, up to its first burst.

    >>> prefill_throughput(4, 32, 0.5)
    256.0
    """
    return batch * prompt_tokens / ttft_s


def decode_throughput(first_s: Sequence[float], last_s: Sequence[float], later_tokens: int) -> float:
    """New tokens per second of a whole batch: the tokens after the rows' first bursts, over the time from the first
    row's first burst to the last row's last. NaN where every row has but one burst.

    >>> decode_throughput([0.5, 0.5], [1.5, 2.5], 3 + 5)
    4.0
    """
    return later_tokens / (max(last_s) - min(first_s)) if later_tokens else math.nan


def mean_accepted_length(accepted: Sequence[int]) -> float:
    """Tokens per round, the correction or bonus token included: between 1 and K + 1. NaN without rounds.

    >>> mean_accepted_length([0, 4, 2])
    3.0
    """
    return 1 + sum(accepted) / len(accepted) if accepted else math.nan


def acceptance_by_position(accepted: Sequence[int], k: int) -> list[float]:
    """Share of all rounds, those with short drafts included, that accept the draft's token j = 1 … k.

    Mean accepted length = 1 + the sum of these.

    >>> acceptance_by_position([0, 4, 2, 1], 4)
    [0.75, 0.5, 0.25, 0.25]
    """
    return [sum(a > j for a in accepted) / len(accepted) if accepted else math.nan for j in range(k)]


def acceptance_rate(drafted: Sequence[int], accepted: Sequence[int]) -> float:
    """Accepted drafts / drafts. NaN where nothing was drafted.

    >>> acceptance_rate([4, 4, 0], [3, 1, 0])
    0.5
    """
    return sum(accepted) / sum(drafted) if sum(drafted) else math.nan


def share_accepting(accepted: Sequence[int]) -> float:
    """Share of rounds that accept at least one drafted token.

    >>> share_accepting([0, 4, 2, 0])
    0.5
    """
    return sum(a > 0 for a in accepted) / len(accepted) if accepted else math.nan


def share_rejecting(drafted: Sequence[int], accepted: Sequence[int]) -> float:
    """Share of rounds that reject at least one drafted token; a round without drafts does neither.

    >>> share_rejecting([4, 4, 2, 0], [0, 4, 1, 0])
    0.5
    """
    return sum(a < d for d, a in zip(drafted, accepted, strict=True)) / len(accepted) if accepted else math.nan


def distinct_ngrams(ids: Sequence[int], n: int = 4) -> tuple[int, int]:
    """How many different runs of n tokens a text has, and how many runs in all. Text that loops has few different ones.

    >>> distinct_ngrams([1, 2, 1, 2, 1, 2, 1, 2])
    (2, 5)
    """
    runs = [tuple(ids[first : first + n]) for first in range(len(ids) - n + 1)]
    return len(set(runs)), len(runs)


def request_frame(timings: DataFrame, by: Sequence[str] = ("key",)) -> DataFrame:
    """One row per request: the columns `by`, `arm`, `block`, `row`, those of `REQUEST` that there are, and
    `ttft_s`, `tpot_s`, `tokens`, `bursts`, `last_s`, `later_tokens` (those after the first burst), `gaps_s` (a list).

    `by` are the columns of `timings` (one row per burst) that tell its steps apart.
    """
    import pandas

    described = [column for column in REQUEST if column in timings.columns]
    keys = [*by, *described, "arm", "block", "row"]
    rows = []
    for key, bursts in timings.sort_values("burst", kind="stable").groupby(keys, sort=True, dropna=False):
        at_s, tokens = bursts["at_s"].tolist(), bursts["tokens"].tolist()
        whole = sum(tokens)
        rows.append([*key, ttft(at_s), tpot(at_s, tokens), whole, len(tokens), at_s[-1], whole - tokens[0], gaps(at_s)])
    figures = ["ttft_s", "tpot_s", "tokens", "bursts", "last_s", "later_tokens", "gaps_s"]
    return pandas.DataFrame(rows, columns=[*keys, *figures])


def block_frame(timings: DataFrame, by: Sequence[str] = ("key",)) -> DataFrame:
    """One row per block and arm, the unit in which latency is paired.

    Columns: `by`, those of `REQUEST`, `arm`, `block`; `ttft_s` and `tpot_s` (geometric means over the block's rows),
    `prefill_tokens_per_s`, `decode_tokens_per_s` (of the whole batch), `tokens`, `rows`, `gaps_s` (a list).
    """
    import pandas

    requests = request_frame(timings, by)
    keys = [column for column in requests.columns[: requests.columns.get_loc("ttft_s")] if column != "row"]
    rows = []
    for key, of in requests.groupby(keys, sort=True, dropna=False):
        first_token = geometric_mean(of["ttft_s"])
        rows.append(
            [
                *key,
                first_token,
                geometric_mean(of["tpot_s"]),
                prefill_throughput(len(of), int(of["prompt_tokens"].iloc[0]), first_token)
                if "prompt_tokens" in of
                else math.nan,
                decode_throughput(of["ttft_s"].tolist(), of["last_s"].tolist(), int(of["later_tokens"].sum())),
                int(of["tokens"].sum()),
                len(of),
                list(itertools.chain.from_iterable(of["gaps_s"])),
            ]
        )
    figures = ["ttft_s", "tpot_s", "prefill_tokens_per_s", "decode_tokens_per_s", "tokens", "rows", "gaps_s"]
    return pandas.DataFrame(rows, columns=[*keys, *figures])


def speed_frame(timings: DataFrame, by: Sequence[str] = ("key",)) -> DataFrame:
    """One row per step, request and arm: the printed figures.

    Columns: `by`, those of `REQUEST`, `arm`; `blocks`, `ttft_s`, `tpot_s`, `prefill_tokens_per_s`,
    `decode_tokens_per_s` (geometric means over blocks), `gap_p50_s`, `gap_p90_s`, `gap_p99_s` (of all gaps between
    bursts). A speed-up is `speedup` of two of its figures, the arm `reference` over the arm `subject`.
    """
    import pandas

    blocks = block_frame(timings, by)
    keys = [column for column in blocks.columns[: blocks.columns.get_loc("ttft_s")] if column != "block"]
    rows = []
    for key, of in blocks.groupby(keys, sort=True, dropna=False):
        means = [
            geometric_mean(of[name]) for name in ("ttft_s", "tpot_s", "prefill_tokens_per_s", "decode_tokens_per_s")
        ]
        waits = list(itertools.chain.from_iterable(of["gaps_s"]))
        rows.append([*key, len(of), *means, *(percentile(waits, percent) for percent in (50, 90, 99))])
    figures = ["blocks", "ttft_s", "tpot_s", "prefill_tokens_per_s", "decode_tokens_per_s"]
    return pandas.DataFrame(rows, columns=[*keys, *figures, "gap_p50_s", "gap_p90_s", "gap_p99_s"])


def acceptance_frame(rounds: DataFrame, by: Sequence[str] = ("key", "arm")) -> DataFrame:
    """One row per group `by` of rounds: `rounds`, `mean_accepted_length`, `acceptance_rate`, `share_accepting`,
    `share_rejecting`, `k` (the most tokens drafted) and `by_position` (a list of k shares)."""
    import pandas

    rows = []
    for key, of in rounds.groupby(list(by), sort=True, dropna=False):
        drafted, accepted = of["drafted"].tolist(), of["accepted"].tolist()
        k = max(drafted)
        rows.append(
            [
                *key,
                len(of),
                mean_accepted_length(accepted),
                acceptance_rate(drafted, accepted),
                share_accepting(accepted),
                share_rejecting(drafted, accepted),
                k,
                acceptance_by_position(accepted, k),
            ]
        )
    figures = ["rounds", "mean_accepted_length", "acceptance_rate", "share_accepting", "share_rejecting", "k"]
    return pandas.DataFrame(rows, columns=[*by, *figures, "by_position"])
