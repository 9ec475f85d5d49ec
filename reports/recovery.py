"""A model set against its teacher, paired by item; what seeds add to the error is added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from ..harness import statistics as st

LEVEL = 0.95


class OtherItems(Exception):
    """The model and its teacher were not measured on the same items."""


def estimate(part: pd.DataFrame) -> st.Estimate:
    """One metric of one task from its samples, over all seeds."""
    value, weight, clusters, keys = (part[name].to_numpy() for name in ("value", "weight", "cluster", "key"))
    return st.over_seeds(value, weight, clusters, keys)


def with_interval(part: pd.DataFrame) -> st.Estimate:
    """The same with its interval, in which what seeds add counts."""
    own = estimate(part)
    return _with_seeds(own, own.seed_se, part).with_interval(LEVEL)


def average(parts: Sequence[pd.DataFrame]) -> st.Estimate:
    """The average of tasks; its error between seeds is the spread of the seeds' averages."""
    ratios = [part.groupby("seed")[["value", "weight"]].sum() for part in parts]
    of_seeds = pd.concat([of["value"] / of["weight"] for of in ratios], axis=1).dropna().mean(axis=1)
    return replace(st.average([estimate(part) for part in parts]), seed_se=st.mean(of_seeds).se)


def recovery(parts: Sequence[pd.DataFrame], taught: Sequence[pd.DataFrame]) -> st.Estimate:
    """A model's average over tasks as a share of its teacher's. Raises OtherItems."""
    share = st.recovery([st.PairedTask(*_paired(own, of)) for own, of in zip(parts, taught, strict=True)])
    own = average(parts)
    between = own.seed_se * share.value / own.value if own.value else math.nan
    return _with_seeds(share, between, parts[0]).with_interval(LEVEL)


def difference(part: pd.DataFrame, taught: pd.DataFrame) -> st.Estimate:
    """Model - teacher of one metric, with its interval. Raises OtherItems."""
    value, weight, teacher_value, teacher_weight, clusters = _paired(part, taught)
    found = st.paired_difference((teacher_value, teacher_weight), (value, weight), clusters)
    return _with_seeds(found, estimate(part).seed_se, part).with_interval(LEVEL)


def above_chance(part: pd.DataFrame, taught: pd.DataFrame, chance: float) -> st.Estimate:
    """What a model reaches above chance as a share of what its teacher does, with Fieller's interval; where seeds add
    to the error, with the delta method's. Infinite where the teacher cannot be told from chance. Raises OtherItems."""
    share = st.recovery([st.PairedTask(*_paired(part, taught), chance)], LEVEL)
    own = estimate(part)
    if not math.isfinite(own.seed_se) or not math.isfinite(share.low):
        return share
    between = own.seed_se * abs(share.value / (own.value - chance)) if own.value != chance else math.nan
    return _with_seeds(share, between, part).with_interval(LEVEL)


def perplexity_ratio(part: pd.DataFrame, taught: pd.DataFrame) -> st.Estimate:
    """A model's perplexity over its teacher's: exp of the paired difference per token. Raises OtherItems."""
    return difference(part, taught).exp()


def inverse(ratio: st.Estimate) -> st.Estimate:
    """1 / ratio, with its interval."""
    return replace(ratio, value=1 / ratio.value, se=ratio.se / ratio.value**2, low=1 / ratio.high, high=1 / ratio.low)


def _with_seeds(of_items: st.Estimate, between: float, part: pd.DataFrame) -> st.Estimate:
    if not math.isfinite(between):
        return of_items
    freedom = float(part["key"].nunique() - 1)
    return st.combine(of_items.value, [(of_items.se**2, of_items.df), (between**2, freedom)], of_items.n)


def _paired(part: pd.DataFrame, taught: pd.DataFrame) -> tuple[st.Array, st.Array, st.Array, st.Array, st.Array]:
    """Values and weights of both in one order of items, seeds averaged, and the clusters."""
    own, reference = of_items(part), of_items(taught)
    if not own.index.equals(reference.index):
        raise OtherItems
    arrays = [side[name].to_numpy(dtype=float) for side in (own, reference) for name in ("value", "weight")]
    return arrays[0], arrays[1], arrays[2], arrays[3], own["cluster"].to_numpy()


def of_items(part: pd.DataFrame) -> pd.DataFrame:
    """One row per item, in their order: values and weights, means over seeds, and what else is told of it."""
    keyed = part.assign(again=part.groupby(["key", "item"]).cumcount()).groupby(["item", "again"], sort=True)
    others = [name for name in ("cluster", "distance") if name in part]
    return keyed[["value", "weight"]].mean().join(keyed[others].first())
