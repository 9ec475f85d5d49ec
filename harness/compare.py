"""Compares two runs by one rule: a failure needs both certainty and size.

The difference (head - base) of a metric has an interval (99 % by default). **Fail** if it excludes 0 and the estimate
is worse than the margin; **pass** if the interval's end on the side for the worse is no worse than the margin, however
far the other end reaches (a test of non-inferiority: an improvement of any size passes); else **inconclusive**. Labels
whose suites, data or devices (of latency, a CPU's threads) differ, that are missing, or that failed on one side are
**not comparable**: nothing is dropped in silence. What no run of either store was asked for is left out, and counted.

* Quality is paired by item with clustered errors where both sides measured one artifact. Where training was rerun the
  items no longer carry the error (item-paired tests then raise false alarms in 13-25 % of comparisons): the seed is the
  unit, and below three seeds the verdict is inconclusive.
* Latency is paired by block, as a log ratio. Blocks of one process share its luck, so the spread between processes is
  added: as the gate declares it, else as the stores show it where they measured the reference decoder in several
  processes, else 2 % of the time per token and 15 % of the time to the first one.
* Counts, and checks of a decoder against its reference, compare exactly where artifact and decoder are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import statistics as st
from .gates import Gates, Rule
from .interfaces import VERDICTS, Comparison, Verdict
from .metrics import REQUEST, block_frame
from .results import Results
from .sameness import Side, differs, same_artifact

if TYPE_CHECKING:
    from rich.table import Table

EXIT_CODES = {"pass": 0, "fail": 10, "inconclusive": 11, "not comparable": 12}
STRICTNESS = ("pass", "inconclusive", "not comparable", "fail")
"""From mild to strict; the worst decides the exit code."""

PROCESS_SD: Mapping[str, float] = {"tpot_s": 0.02, "ttft_s": 0.15}
"""Standard deviation of log latency between processes on a shared host, where nothing better is known. Short prompts of
small models are bound by the host: 0.05 to 0.08 between the processes of a run on an H200, 0.2 between two runs."""
MIN_PROCESS_DF = 4
"""Fewer degrees of freedom say less of a machine than `PROCESS_SD` does."""
MIN_SEEDS = 3

assert set(STRICTNESS) == set(VERDICTS)


def compare(
    base: Results,
    head: Results,
    gates: Gates | None = None,
    verdicts: Callable[[Comparison], Iterable[Verdict]] | None = None,
) -> list[Comparison]:
    """Compares every measured label of two stores, in plan order. `verdicts` may only make a verdict stricter."""
    run = _Run(base, head, gates or Gates())
    return [_stricter(comparison, verdicts) for comparison in run.comparisons()]


def exit_code(comparisons: Sequence[Comparison]) -> int:
    """0 pass, 10 fail, 11 inconclusive, 12 not comparable: that of the strictest verdict; 12 for nothing at all."""
    return EXIT_CODES[strictest(comparisons)]


def strictest(comparisons: Sequence[Comparison]) -> str:
    """The strictest verdict; nothing at all is not comparable."""
    return max((c.verdict for c in comparisons), key=STRICTNESS.index, default="not comparable")


def unasked(base: Results, head: Results) -> list[str]:
    """The labels of both plans that no run of either store was asked for, and of which neither has anything."""
    before, after = (of.measured.groupby("label", sort=False)["asked"].any() for of in (base, head))
    return [label for label, asked in before.items() if not asked and not after.get(label, True)]


def decide(low: float, high: float, estimate: float, margin: float, better: str = "higher") -> str:
    """The rule, for a difference whose direction for the worse `better` implies.

    >>> decide(-0.04, -0.01, -0.025, margin=0.01), decide(-0.04, 0.01, -0.025, margin=0.01)
    ('fail', 'inconclusive')
    >>> decide(-0.005, 0.03, 0.01, margin=0.01), decide(0.05, 0.2, 0.1, margin=0.03, better="lower")
    ('pass', 'fail')
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return "inconclusive"
    if better == "equal":
        low, high, estimate = -max(abs(low), abs(high)), -min(abs(low), abs(high)), -abs(estimate)
    elif better == "lower":
        low, high, estimate = -high, -low, -estimate
    if high < 0 and estimate < -margin:
        return "fail"
    return "pass" if low >= -margin else "inconclusive"


@dataclass(frozen=True, slots=True)
class _Run:
    base: Results
    head: Results
    gates: Gates

    def comparisons(self) -> Iterator[Comparison]:
        rows = [
            results.measured.drop_duplicates("label").set_index("label", drop=False)
            for results in (self.base, self.head)
        ]
        retrained: dict[tuple[str, str, str], list[tuple[Side, Side]]] = {}
        left_out = set(unasked(self.base, self.head))
        for label in dict.fromkeys([*rows[0].index, *rows[1].index]):
            if label in left_out:
                continue
            cells = [frame.loc[label] if label in frame.index else None for frame in rows]
            reason = self._unmeasured(*cells)
            if reason is None:
                continue
            if not reason:
                pair = (Side(self.base, cells[0]), Side(self.head, cells[1]))
                reason = differs(*pair)
            if reason:
                if not self.gates.rule(label, "*", "quality").ignore:
                    yield _incomparable(label, "*", reason)
                continue
            if same_artifact(*pair):
                yield from self._quality(label, *pair)
                yield from self._counts(label, *pair)
            else:
                retrained.setdefault(
                    (pair[0].cell["model"], pair[0].cell["decoder"], pair[0].cell["suite"]), []
                ).append(pair)
            yield from self._latency(label, *pair)
        for (model, decoder, suite), pairs in retrained.items():
            yield from self._by_seed(f"{model}/{decoder or '-'}/{suite}", pairs)

    def _unmeasured(self, base: Any, head: Any) -> str | None:
        """Why a label cannot be compared; empty if both sides are done, None if neither was meant to be."""
        sides = {"base": base, "head": head}
        missing = [name for name, cell in sides.items() if cell is None]
        if missing:
            return f"missing in {missing[0]}"
        if all(of.is_excused(cell["store"], cell["key"]) for of, cell in ((self.base, base), (self.head, head))):
            return None
        failed = [f"{name}: {_state(cell)}" for name, cell in sides.items() if cell["state"] != "ok"]
        return "; ".join(failed)

    def _quality(self, label: str, base: Side, head: Side) -> Iterator[Comparison]:
        for (task, metric), before, after in _tasks(base.frame("samples"), head.frame("samples")):
            name, exact = f"{task}/{metric}", base.is_exact()
            rule = self.gates.rule(label, name, "counts" if exact else "quality")
            if rule.ignore:
                continue
            joined = _join_items(before, after)
            if joined is None:
                yield _incomparable(label, name, "the items differ")
                continue
            left, right = joined
            of = [(side["value"].to_numpy(float), side["weight"].to_numpy(float)) for side in (left, right)]
            difference = st.paired_difference(of[0], of[1], left["cluster"].to_numpy())
            values = [value.sum() / weight.sum() for value, weight in of]
            if exact:
                difference = replace(difference, se=0.0)
            reason = f"{difference.n} items" if difference.df > 0 or exact else "a single cluster has no error"
            yield _verdict(label, name, values, difference, rule, str(left["better"].iloc[0]), reason)

    def _by_seed(self, label: str, pairs: Sequence[tuple[Side, Side]]) -> Iterator[Comparison]:
        """Quality where training was rerun: a metric of each seed is one value."""
        sides = zip(("base", "head"), zip(*pairs, strict=True), strict=True)
        lost = [name for name, of in sides if not all(side.has_artifact() for side in of)]
        anew = "trained anew" + (f", perhaps: no artifact left in {' and '.join(lost)}" if lost else "")
        ratios: dict[str, tuple[str, list[float], list[float]]] = {}
        for base, head in pairs:
            for (task, metric), before, after in _tasks(base.frame("samples"), head.frame("samples")):
                name = f"{task}/{metric}"
                if _join_items(before, after) is None:
                    if not self.gates.rule(label, name, "quality").ignore:
                        yield _incomparable(f"{label}@seed{base.cell['seed']}", name, "the items differ")
                    continue
                entry = ratios.setdefault(name, (str(before["better"].iloc[0]), [], []))
                for side, of in zip(entry[1:], (before, after), strict=True):
                    side.append(float(of["value"].sum() / of["weight"].sum()))
        for name, (better, before_, after_) in ratios.items():
            rule = self.gates.rule(label, name, "quality")
            if rule.ignore:
                continue
            values = (float(np.mean(before_)), float(np.mean(after_)))
            difference = st.welch(before_, after_)
            reason = f"{anew}, {len(before_)} seeds"
            if len(before_) < MIN_SEEDS:
                difference = replace(difference, se=math.nan)
                reason = f"{anew}; {MIN_SEEDS} seeds would decide, there are {len(before_)}"
            yield _verdict(label, name, values, difference, rule, better, reason)

    def _latency(self, label: str, base: Side, head: Side) -> Iterator[Comparison]:
        frames = [side.frame("timings") for side in (base, head)]
        if any(frame.empty for frame in frames):
            return
        threads = [side.threads() for side in (base, head)]
        if None not in threads and threads[0] != threads[1]:
            yield _incomparable(label, "latency", f"the threads differ ({threads[0]} and {threads[1]})")
            return
        keys = [column for column in REQUEST if column in frames[0] and column in frames[1]]
        blocks = [block_frame(frame, by=("label",)).set_index([*keys, "arm", "block"]) for frame in frames]
        if not blocks[0].index.equals(blocks[1].index):
            yield _incomparable(label, "latency", "the requests or blocks differ")
            return
        varying = [key for key in keys if key in ("batch", "prompt_tokens") or frames[0][key].nunique() > 1]
        for figure in ("tpot", "ttft"):
            pair = [frame[f"{figure}_s"] for frame in blocks]
            noise = self._process_noise(f"{figure}_s")
            for group, before in pair[0].groupby(level=[*keys, "arm"], sort=False):
                after = pair[1].loc[before.index]
                described = dict(zip([*keys, "arm"], group, strict=True))
                prefix = "reference " if described["arm"] == "reference" else ""
                name = f"{prefix}{figure} " + ", ".join(f"{_WORDS.get(key, key)} {described[key]}" for key in varying)
                rule = self.gates.rule(label, name, "latency")
                if rule.ignore or before.isna().all():
                    continue
                # The reference does the same work in every block, so only its scatter is noise.
                steady = pair[0].get((*group[:-1], "reference"), before) if base.is_same(head) else None
                yield latency(label, name, before.to_numpy(float), after.to_numpy(float), rule, noise, steady)

    def _process_noise(self, figure: str) -> tuple[float, float]:
        """Spread of log latency between processes that did the same with the reference decoder, and its freedom."""
        counted: set[str] = set()
        groups = [group for results in (self.base, self.head) for group in _replicates(results, figure, counted)]
        sd, df = st.pooled_sd(groups)
        return (sd, float(df)) if df >= MIN_PROCESS_DF else (PROCESS_SD[figure], math.inf)

    def _counts(self, label: str, base: Side, head: Side) -> Iterator[Comparison]:
        counted = (("rounds", "rounds", "lower"), ("tokens", "timings", "equal"))
        for metric, source, better in counted:
            frames = [side.frame(source) for side in (base, head)]
            rule = self.gates.rule(label, metric, "counts")
            if all(frame.empty for frame in frames) or rule.ignore:
                continue
            if base.decoding() != head.decoding():
                yield _incomparable(label, metric, "the decoders' options differ")
                continue
            subjects = [frame[frame["arm"] == "subject"] for frame in frames]
            totals = [float(len(of) if metric == "rounds" else of["tokens"].sum()) for of in subjects]
            relative = totals[1] / totals[0] - 1 if totals[0] else math.nan
            change = st.Estimate(value=relative, se=0.0)
            yield _verdict(label, metric, totals, change, rule, better, "exact", unit="", relative=True)


_WORDS = {"prompt_tokens": "prompt", "new_tokens": "new", "batch": "batch"}


def _tasks(base: pd.DataFrame, head: pd.DataFrame) -> Iterator[tuple[tuple[str, str], pd.DataFrame, pd.DataFrame]]:
    """Tasks and metrics of both sides, in the order of their first record."""
    sides = [dict(iter(frame.groupby(["task", "metric"], sort=False))) for frame in (base, head)]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        yield name, sides[0].get(name, base.iloc[:0]), sides[1].get(name, head.iloc[:0])


def _join_items(base: pd.DataFrame, head: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Both sides in one order of items; None where an item stands on one side only."""
    sides = []
    for frame in (base, head):
        keyed = frame.assign(again=frame.groupby("item").cumcount())
        sides.append(keyed.sort_values(["item", "again"], kind="stable", ignore_index=True))
    if len(base) == 0 or not sides[0][["item", "again"]].equals(sides[1][["item", "again"]]):
        return None
    return sides[0], sides[1]


def _replicates(results: Results, figure: str, counted: set[str]) -> Iterator[list[float]]:
    """Mean log latencies of the same work in different processes. A process counts once, wherever its step was copied
    to and however many models share it: what is in `counted` is left out, and what is given is added."""
    timings = results.timings
    if timings.empty or not results.decoders:
        return
    reference = (timings["arm"] == "reference") | (timings["decoder"] == results.decoders[0])
    if not reference.any():
        return
    by = ("store", "model", "suite", "key")
    blocks = block_frame(timings[reference], by=by)
    blocks["log"] = np.log(blocks[figure])
    keys = [column for column in REQUEST if column in blocks]
    means = blocks.groupby([*by, *keys], dropna=False)["log"].mean().dropna().reset_index()
    steps = results.cells.drop_duplicates(["store", "key"])[["store", "key", "started"]]
    means = means.merge(steps, on=["store", "key"], how="left")
    for _, group in means.groupby(["store", "model", "suite", *keys], dropna=False):
        processes = {
            repr(process): log for log, *process in group[["log", "key", "started", *keys]].to_numpy().tolist()
        }
        yield [log for process, log in processes.items() if process not in counted]
        counted |= set(processes)


def latency(
    label: str,
    name: str,
    before: np.ndarray,
    after: np.ndarray,
    rule: Rule,
    noise: tuple[float, float],
    steady: Sequence[float] | None = None,
) -> Comparison:
    """Compares seconds per block. `noise` is the spread of log latency between processes and its freedom.

    `steady` is given where both sides are one and the same measurement: blocks whose scatter tells what a second run
    could have seen.
    """
    if rule.noise is not None:
        noise = (rule.noise, math.inf)
    logs = np.log(after) - np.log(before)
    blocks = st.mean(logs)
    values = [1e3 * float(np.exp(np.mean(np.log(side)))) for side in (before, after)]
    spread = (2 * noise[0] ** 2, noise[1])
    if steady is not None:
        own = st.mean(np.log(np.asarray(steady, dtype=float)))
        seen = st.combine(0.0, [(2 * own.se**2, own.df), spread], own.n)
        none = st.Estimate(value=0.0, se=0.0)
        made = _verdict(label, name, values, none, rule, "lower", "one and the same measurement", "ms", relative=True)
        of = math.log1p(rule.margin)
        return replace(made, detectable=math.expm1(st.detectable(seen.se, seen.df, rule.level, of)))
    total = st.combine(blocks.value, [(blocks.se**2, blocks.df), spread], blocks.n)
    low, high = total.interval(rule.level)
    return Comparison(
        label=label,
        metric=name,
        base=values[0],
        head=values[1],
        difference=math.expm1(total.value),
        low=math.expm1(low),
        high=math.expm1(high),
        margin=rule.margin,
        unit="ms",
        verdict=decide(math.expm1(low), math.expm1(high), math.expm1(total.value), rule.margin, "lower"),
        reason=f"{blocks.n} blocks, {100 * noise[0]:.1f} % between processes",
        better="lower",
        relative=True,
        detectable=math.expm1(st.detectable(total.se, total.df, rule.level, math.log1p(rule.margin))),
    )


def _verdict(
    label: str,
    name: str,
    values: Sequence[float],
    difference: st.Estimate,
    rule: Rule,
    better: str,
    reason: str,
    unit: str = "",
    relative: bool = False,
) -> Comparison:
    low, high = (difference.value, difference.value) if difference.se == 0 else difference.interval(rule.level)
    return Comparison(
        label=label,
        metric=name,
        base=values[0],
        head=values[1],
        difference=difference.value,
        low=low,
        high=high,
        margin=rule.margin,
        unit=unit,
        verdict=decide(low, high, difference.value, rule.margin, better),
        reason=reason,
        better=better,
        relative=relative,
        detectable=rule.margin
        if difference.se == 0
        else st.detectable(difference.se, difference.df, rule.level, rule.margin),
    )


def _incomparable(label: str, metric: str, reason: str) -> Comparison:
    nan = math.nan
    return Comparison(
        label=label, metric=metric, base=nan, head=nan, difference=nan, low=nan, high=nan, margin=nan, unit="",
        verdict="not comparable", reason=reason,
    )  # fmt: skip


def _state(cell: Any) -> str:
    return f"{cell['state']} ({cell['reason'].splitlines()[0]})" if cell["reason"] else str(cell["state"])


def _stricter(comparison: Comparison, verdicts: Callable[[Comparison], Iterable[Verdict]] | None) -> Comparison:
    for other in verdicts(comparison) if verdicts else ():
        if STRICTNESS.index(other.verdict) > STRICTNESS.index(comparison.verdict):
            comparison = replace(comparison, verdict=other.verdict, reason=other.reason)
    return comparison


_STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow", "not comparable": "magenta"}


def render_comparisons(comparisons: Sequence[Comparison]) -> Table:
    """A table for the terminal: the difference with its interval, and the smallest change that would have been seen."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title="head against base", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading, justify in (
        *(("label", "left"), ("metric", "left"), ("verdict", "left"), ("difference", "right"), ("margin", "right")),
        *(("base", "right"), ("head", "right"), ("sees", "right"), ("why", "left")),
    ):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for c in comparisons:
        table.add_row(
            Text(c.label),
            Text(c.metric),
            Text(c.verdict, style=_STYLES[c.verdict]),
            _change(c),
            _size(c.margin, c.relative),
            _number(c.base, c.unit),
            _number(c.head, c.unit),
            _size(c.detectable, c.relative),
            Text(c.reason),
        )
    return table


def _number(value: float, unit: str) -> str:
    return "" if math.isnan(value) else f"{value:.4g}{' ' + unit if unit else ''}"


def _size(value: float, relative: bool) -> str:
    if not math.isfinite(value):
        return ""
    if not relative:
        return f"{value:.3g}"
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.2g} %"


def _change(c: Comparison) -> str:
    if math.isnan(c.difference):
        return ""
    form = (lambda value: f"{100 * value:+.2f} %") if c.relative else (lambda value: f"{value:+.4f}")
    if c.low == c.high or not math.isfinite(c.low):
        return form(c.difference)
    return f"{form(c.difference)} [{form(c.low)}, {form(c.high)}]"
