"""Estimates with honest errors: every metric is a ratio of sums over items that come in clusters.

Items of one cluster (questions on one passage, tokens of one document) are not independent, so errors are clustered:
residuals are summed within clusters before they are squared, with the correction C / (C - 1) for C clusters (Miller
2024, arXiv 2411.00640, appendix A). Differences and quotients of two ratios over the same items are linearised per item
(delta method), so that what the items share cancels. Latency is multiplicative: it is averaged in logarithms.

Only numpy is imported here; scipy.special (light, unlike scipy.stats) where a quantile is needed, scipy.stats where
clusters are drawn anew.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
SE = "s.e."
"""The arm of a recorded fact that is another one's standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its standard error. Renderers print it as `value ± se`, or with its interval where it has one."""

    value: float
    se: float = math.nan
    df: float = math.inf
    """Degrees of freedom of `se` (clusters - 1, blocks - 1)."""
    n: int = 0
    """Items behind the value."""
    seed_se: float = math.nan
    """Standard error between seeds, where at least two were measured."""
    low: float = math.nan
    high: float = math.nan

    def interval(self, level: float) -> tuple[float, float]:
        """The two-sided t interval; (nan, nan) where the error is unknown."""
        half = t_quantile(level, self.df) * self.se
        return self.value - half, self.value + half

    def with_interval(self, level: float) -> Estimate:
        low, high = self.interval(level)
        return replace(self, low=low, high=high)

    def through(self, function: Callable[[float], float], slope: float) -> Estimate:
        """The estimate of an increasing function of the value, by the delta method with the slope at the value."""
        return replace(
            self,
            value=function(self.value),
            se=self.se * slope,
            seed_se=self.seed_se * slope,
            low=function(self.low) if math.isfinite(self.low) else self.low,
            high=function(self.high) if math.isfinite(self.high) else self.high,
        )

    def scaled(self, factor: float) -> Estimate:
        """The estimate in another unit; `factor` is positive."""
        return self.through(lambda value: value * factor, factor)

    def exp(self) -> Estimate:
        """The exponential, such as the perplexity of a negative log-likelihood per token.

        >>> Estimate(value=0.0, se=0.1).exp()
        Estimate(value=1.0, se=0.1, df=inf, n=0, seed_se=nan, low=nan, high=nan)
        """
        return self.through(math.exp, math.exp(self.value))


def t_quantile(level: float, df: float) -> float:
    """Half-width, in standard errors, of a two-sided interval of Student's t; nan without degrees of freedom.

    >>> round(t_quantile(0.95, 9), 3), round(t_quantile(0.99, math.inf), 3)
    (2.262, 2.576)
    """
    from scipy.special import ndtri, stdtrit

    if not df > 0:
        return math.nan
    p = 0.5 + level / 2
    return float(ndtri(p)) if math.isinf(df) else float(stdtrit(df, p))


def clustered_se(residuals: ArrayLike, clusters: Sequence[object] | NDArray[np.generic]) -> tuple[float, float]:
    """Standard error of a sum of residuals that are independent between clusters, and its degrees of freedom.

    Args:
        residuals: [N], the linearised contribution of each item; they sum to zero.
        clusters: [N], what each item belongs to.

    Returns:
        sqrt(C / (C - 1) Σ_c (Σ_{i in c} r_i)²) and C - 1; nan and 0 for a single cluster.
    """
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(index, weights=np.asarray(residuals, dtype=float))
    count = len(sums)
    if count < 2:
        return math.nan, 0.0
    return math.sqrt(count / (count - 1) * float(np.sum(sums**2))), count - 1.0


def _influence(value: Array, weight: Array) -> tuple[float, Array]:
    """A ratio of sums and each item's linearised contribution to it."""
    total = float(np.sum(weight))
    if not total > 0:
        raise ValueError("a metric needs items of positive weight")
    ratio = float(np.sum(value)) / total
    return ratio, (value - ratio * weight) / total


def _arrays(*columns: ArrayLike) -> tuple[Array, ...]:
    return tuple(np.asarray(column, dtype=float) for column in columns)


def ratio(value: ArrayLike, weight: ArrayLike, clusters: Sequence[object] | NDArray[np.generic]) -> Estimate:
    """A metric: Σ value / Σ weight, with its clustered standard error. With weight 1 it is the clustered mean.

    >>> estimate = ratio([1, 0, 1, 1], [1, 1, 1, 1], ["a", "b", "c", "d"])
    >>> estimate.value, round(estimate.se, 4)
    (0.75, 0.25)
    """
    value, weight = _arrays(value, weight)
    estimate, influence = _influence(value, weight)
    se, df = clustered_se(influence, clusters)
    return Estimate(value=estimate, se=se, df=df, n=len(value))


def over_seeds(
    value: ArrayLike,
    weight: ArrayLike,
    clusters: Sequence[object] | NDArray[np.generic],
    seeds: Sequence[object] | NDArray[np.generic],
) -> Estimate:
    """The mean over seeds of a metric on the same items.

    `se` is the error from the choice of items (an item's values under all seeds are one cluster); `seed_se` is the
    spread of the seeds' metrics over the root of their number, nan for one seed.
    """
    value, weight = _arrays(value, weight)
    names, index = np.unique(np.asarray(seeds), return_inverse=True)
    influence = np.zeros_like(value)
    ratios = np.zeros(len(names))
    for seed in range(len(names)):
        rows = index == seed
        ratios[seed], influence[rows] = _influence(value[rows], weight[rows])
    se, df = clustered_se(influence / len(names), clusters)
    spread = float(np.std(ratios, ddof=1)) / math.sqrt(len(names)) if len(names) > 1 else math.nan
    return Estimate(value=float(np.mean(ratios)), se=se, df=df, n=len(np.unique(np.asarray(clusters))), seed_se=spread)


def average(parts: Sequence[Estimate]) -> Estimate:
    """The plain average of metrics on different items, whose errors are independent; that between seeds is not."""
    count = len(parts)
    return Estimate(
        value=sum(part.value for part in parts) / count,
        se=math.sqrt(sum(part.se**2 for part in parts)) / count,
        df=min(part.df for part in parts),
        n=sum(part.n for part in parts),
    )


def paired_difference(
    base: tuple[ArrayLike, ArrayLike],
    head: tuple[ArrayLike, ArrayLike],
    clusters: Sequence[object] | NDArray[np.generic],
) -> Estimate:
    """head - base of a metric on the same items in the same order; each side is (value, weight)."""
    before, of_base = _influence(*_arrays(*base))
    after, of_head = _influence(*_arrays(*head))
    se, df = clustered_se(of_head - of_base, clusters)
    return Estimate(value=after - before, se=se, df=df, n=len(of_base))


@dataclass(frozen=True, slots=True)
class PairedTask:
    """One metric of a model and of its teacher on the same items."""

    value: Array
    weight: Array
    teacher_value: Array
    teacher_weight: Array
    clusters: NDArray[np.generic]
    chance: float = 0.0
    """What one who knows nothing reaches; subtracted on both sides."""


def recovery(tasks: Sequence[PairedTask], level: float | None = None) -> Estimate:
    """The average of a model's metrics above chance divided by that of its teacher's (1 = as good), paired by item.

    With A = mean_k (r_k - chance_k): d(A / A') = (dA - (A / A') dA') / A'. Tasks are independent, items within one are
    paired. With `level` the interval is Fieller's, which stays honest where the teacher is near chance; where the
    teacher is not clearly above chance it is infinite.
    """
    count = len(tasks)
    model, teacher, parts = 0.0, 0.0, []
    for task in tasks:
        own, influence = _influence(*_arrays(task.value, task.weight))
        reference, of_teacher = _influence(*_arrays(task.teacher_value, task.teacher_weight))
        model, teacher = model + (own - task.chance) / count, teacher + (reference - task.chance) / count
        parts.append((influence / count, of_teacher / count, task.clusters))
    if teacher == 0:
        unbounded = (math.nan, math.nan) if level is None else (-math.inf, math.inf)
        return Estimate(value=math.nan, low=unbounded[0], high=unbounded[1])
    quotient = model / teacher
    errors = [clustered_se((own - quotient * reference) / teacher, clusters) for own, reference, clusters in parts]
    estimate = Estimate(
        value=quotient,
        se=math.sqrt(sum(se**2 for se, _ in errors)),
        df=min(df for _, df in errors),
        n=sum(len(clusters) for _, _, clusters in parts),
    )
    if level is None:
        return estimate
    own_variance, of_reference, of_difference = (
        sum(clustered_se(pick(own, reference), clusters)[0] ** 2 for own, reference, clusters in parts)
        for pick in (lambda own, _: own, lambda _, reference: reference, lambda own, reference: own - reference)
    )
    shared = (own_variance + of_reference - of_difference) / 2
    if teacher < 0:
        return replace(estimate, low=-math.inf, high=math.inf)
    low, high = fieller((model, own_variance), (teacher, of_reference), shared, t_quantile(level, estimate.df))
    return replace(estimate, low=low, high=high)


def fieller(above: tuple[float, float], below: tuple[float, float], covariance: float, t: float) -> tuple[float, float]:
    """Interval of a quotient of two normal estimates, each (value, variance): all q for which above - q * below is
    within `t` standard errors of 0 (Fieller 1954). Infinite where the denominator is within `t` of 0 itself.

    >>> fieller((2.0, 0.0), (4.0, 0.0), 0.0, 2.0), fieller((1.0, 1.0), (1.0, 1.0), 0.0, 2.0)
    ((0.5, 0.5), (-inf, inf))
    """
    (a, of_a), (b, of_b) = above, below
    square = b**2 - t**2 * of_b
    if not square > 0:
        return -math.inf, math.inf
    middle = a * b - t**2 * covariance
    root = math.sqrt(max(middle**2 - square * (a**2 - t**2 * of_a), 0.0))
    return (middle - root) / square, (middle + root) / square


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], float],
    clusters: Sequence[object] | NDArray[np.generic],
    level: float,
    times: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A statistic without a closed form of its error, with its interval when clusters are drawn anew.

    Args:
        statistic: of items, given as their places [M], of which some come several times.
        clusters: [N], what each item belongs to.

    Returns:
        The statistic of all items, its standard deviation and its bias-corrected and accelerated interval (Efron 1987),
        which is a point where drawing changes nothing; nan for a single cluster.
    """
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    members = [np.flatnonzero(index == of) for of in range(int(index.max()) + 1)]
    value = float(statistic(np.arange(len(index))))
    if len(members) < 2:
        return Estimate(value=value, df=0.0, n=len(index))
    from scipy import stats

    with warnings.catch_warnings():
        # Where all draws agree there is no distribution, and no interval but the value.
        warnings.simplefilter("ignore", (stats.DegenerateDataWarning, RuntimeWarning))
        found = stats.bootstrap(
            (np.arange(len(members)),),
            lambda drawn: statistic(np.concatenate([members[of] for of in drawn])),
            vectorized=False,
            n_resamples=times,
            confidence_level=level,
            method="BCa",
            random_state=np.random.default_rng(seed),
        )
    low, high = (float(end) for end in found.confidence_interval)
    if not math.isfinite(low + high):
        low, high = (
            float(end) for end in np.quantile(found.bootstrap_distribution, (0.5 - level / 2, 0.5 + level / 2))
        )
    return Estimate(
        value=value, se=float(found.standard_error), df=len(members) - 1.0, n=len(index), low=low, high=high
    )


def bootstrap_se(
    statistic: Callable[[NDArray[np.intp]], float],
    clusters: Sequence[object] | NDArray[np.generic],
    times: int = 100,
    seed: int = 0,
) -> float:
    """The standard error alone, of a statistic that is slow: its standard deviation over `times` samples of as many
    clusters. Samples for which it is not finite are left out; nan for a single cluster.

    >>> values = np.arange(400) % 20
    >>> of_mean = bootstrap_se(lambda places: float(values[places].mean()), range(400), times=400)
    >>> abs(of_mean / (values.std() / 20) - 1) < 0.1
    True
    """
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    order = np.argsort(index, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(index))[:-1])
    if len(members) < 2:
        return math.nan
    drawn = np.random.default_rng(seed).integers(len(members), size=(times, len(members)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [statistic(np.concatenate([members[of] for of in row])) for row in drawn]
    finite = [value for value in found if math.isfinite(value)]
    return float(np.std(finite, ddof=1)) if len(finite) > 1 else math.nan


def mean(values: ArrayLike) -> Estimate:
    """The mean of independent values, such as one per block or per seed."""
    (values,) = _arrays(values)
    count = len(values)
    if count == 0:
        return Estimate(value=math.nan, df=0.0)
    se = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(value=float(np.mean(values)), se=se, df=count - 1.0, n=count)


def geometric_mean(values: ArrayLike) -> Estimate:
    """The geometric mean of positive values with its standard error by the delta method.

    >>> round(geometric_mean([1.0, 4.0]).value, 12)
    2.0
    """
    return mean(np.log(np.asarray(values, dtype=float))).exp()


def paired_quotient(numerator: ArrayLike, denominator: ArrayLike, level: float) -> Estimate:
    """Quotient of two geometric means over the same blocks, with a t interval of the paired log ratios."""
    logs = np.log(np.asarray(numerator, dtype=float)) - np.log(np.asarray(denominator, dtype=float))
    return mean(logs).with_interval(level).exp()


def poisson_excess(count: int, exposure: float, other: int, other_exposure: float, factor: float = 1.0) -> float:
    """How probable it is, given the sum of two counts, that the first is at least as large as it is, if its rate
    (count / exposure) is `factor` times the other's: the one-sided exact test of two Poisson rates. Counts may be
    correlated, which makes differences rarer than it says.

    >>> round(poisson_excess(4, 10, 0, 10), 4), poisson_excess(0, 10, 3, 10)
    (0.0625, 1.0)
    """
    from scipy.special import betainc

    if not count:
        return 1.0
    share = factor * exposure / (factor * exposure + other_exposure)
    return float(betainc(count, other + 1, share))


def welch(base: ArrayLike, head: ArrayLike) -> Estimate:
    """head - base of two independent groups of values, with Welch's degrees of freedom."""
    before, after = mean(base), mean(head)
    return combine(after.value - before.value, ((before.se**2, before.df), (after.se**2, after.df)), before.n + after.n)


def combine(value: float, variances: Sequence[tuple[float, float]], n: int) -> Estimate:
    """An estimate whose variance is a sum of independent ones, each (variance, freedom), after Satterthwaite."""
    total = sum(variance for variance, _ in variances)
    below = sum(variance**2 / df for variance, df in variances if df > 0 and variance > 0)
    df = total**2 / below if below > 0 else min((df for _, df in variances), default=0.0)
    return Estimate(value=value, se=math.sqrt(total), df=df, n=n)


def pooled_sd(groups: Sequence[ArrayLike]) -> tuple[float, int]:
    """Standard deviation within groups, pooled, and its degrees of freedom; nan and 0 if no group has two values."""
    squares, df = 0.0, 0
    for (group,) in (_arrays(group) for group in groups):
        if len(group) > 1:
            squares += float(np.sum((group - np.mean(group)) ** 2))
            df += len(group) - 1
    return (math.sqrt(squares / df), df) if df else (math.nan, 0)


def detectable(se: float, df: float, level: float, margin: float, power: float = 0.8) -> float:
    """The smallest true change that the rule of a comparison would call a failure with probability `power`.

    The rule fails when the estimate is beyond both the margin and the interval's half-width.
    """
    if not math.isfinite(se):
        return math.inf
    return max(t_quantile(level, df) * se, margin) + t_quantile(2 * power - 1, math.inf) * se
