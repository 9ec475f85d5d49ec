"""Closed forms against known values, against resampling, and against repeated experiments."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs
from mambabench.harness import statistics as st


def test_a_mean_has_the_standard_error_of_the_textbook():
    values = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    estimate = st.ratio(values, np.ones(6), range(6))
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.se == pytest.approx(values.std(ddof=1) / math.sqrt(6))
    assert estimate.df == 5


def test_whole_clusters_count_as_their_mean():
    """Copying every item into its own cluster again changes no error; counting the copies as independent would."""
    values = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    once = st.ratio(values, np.ones(6), range(6))
    copied = st.ratio(np.repeat(values, 5), np.ones(30), np.repeat(np.arange(6), 5))
    assert copied.se == pytest.approx(once.se)
    assert copied.se > 2 * st.ratio(np.repeat(values, 5), np.ones(30), range(30)).se


def test_a_single_cluster_has_no_error():
    assert math.isnan(st.ratio([1, 0], [1, 1], ["a", "a"]).se)
    assert math.isnan(st.ratio([1, 0], [1, 1], ["a", "a"]).interval(0.95)[0])


def test_a_metric_without_weight_is_refused():
    with pytest.raises(ValueError, match="positive weight"):
        st.ratio([], [], [])


@given(hs.floats(0.1, 10), hs.integers(0, 1000))
def test_a_ratio_does_not_depend_on_the_unit_of_its_weights(factor, seed):
    rng = np.random.default_rng(seed)
    value, weight = rng.normal(2, 1, 20), rng.uniform(1, 5, 20)
    one, other = st.ratio(value, weight, range(20)), st.ratio(value * factor, weight * factor, range(20))
    assert other.value == pytest.approx(one.value)
    assert other.se == pytest.approx(one.se)


def clustered_ratio(rng, clusters=60):
    """Documents of several windows with a shared effect; the true ratio is 2."""
    effect = np.repeat(rng.normal(0, 0.3, clusters), 4)
    weight = rng.uniform(20, 60, 4 * clusters)
    value = weight * (2 + effect + rng.normal(0, 0.2, 4 * clusters))
    return value, weight, np.repeat(np.arange(clusters), 4)


def test_clustered_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        low, high = st.ratio(*clustered_ratio(rng)).interval(0.95)
        covered += low <= 2 <= high
    assert 0.93 <= covered / 1000 <= 0.97


def resampled(rng, statistic, clusters, times=2000):
    """The standard deviation of a statistic when clusters are drawn anew."""
    members = [np.flatnonzero(clusters == name) for name in np.unique(clusters)]
    draws = rng.integers(0, len(members), (times, len(members)))
    return np.std([statistic(np.concatenate([members[i] for i in draw])) for draw in draws], ddof=1)


def test_the_delta_method_agrees_with_resampled_clusters():
    rng = np.random.default_rng(1)
    value, weight, clusters = clustered_ratio(rng)
    teacher = value * rng.uniform(0.8, 1.0, len(value))
    task = st.PairedTask(value, weight, teacher, weight, clusters)
    difference = st.paired_difference((teacher, weight), (value, weight), clusters)
    perplexity = st.ratio(value, weight, clusters).exp()
    for closed, statistic in (
        (difference, lambda i: (value[i].sum() - teacher[i].sum()) / weight[i].sum()),
        (st.recovery([task]), lambda i: value[i].sum() / teacher[i].sum()),
        (perplexity, lambda i: math.exp(value[i].sum() / weight[i].sum())),
    ):
        assert closed.value == pytest.approx(statistic(np.arange(len(value))))
        assert closed.se == pytest.approx(resampled(rng, statistic, clusters), rel=0.08)


def test_pairing_by_item_removes_what_the_items_share():
    rng = np.random.default_rng(2)
    hardness = rng.normal(0, 1, 300)
    base, head = hardness + rng.normal(0, 0.1, 300), hardness + rng.normal(0, 0.1, 300)
    ones = np.ones(300)
    paired = st.paired_difference((base, ones), (head, ones), np.arange(300))
    assert paired.se < 0.2 * st.welch(base, head).se
    assert paired.value == pytest.approx(np.mean(head - base))


def test_a_model_recovers_all_of_itself_without_error():
    value = np.array([1.0, 0.0, 1.0, 1.0])
    task = st.PairedTask(value, np.ones(4), value, np.ones(4), np.arange(4))
    assert st.recovery([task, task]).value == pytest.approx(1)
    assert st.recovery([task, task]).se == pytest.approx(0)


def test_recovery_is_undefined_where_the_teacher_gets_nothing_right():
    task = st.PairedTask(np.ones(3), np.ones(3), np.zeros(3), np.ones(3), np.arange(3))
    assert math.isnan(st.recovery([task]).value)


def answered(rng, clusters=25, size=4):
    """A teacher with 80 % and a model with 56 % right, chance a quarter, on passages of four questions each, which are
    easy or hard for both: the model truly recovers 0.31 / 0.55 of what is above chance."""
    hardness = np.repeat(rng.random(clusters), size)
    draws = 0.5 * hardness + 0.5 * rng.random(clusters * size)
    draws = np.where(draws < 0.5, 2 * draws**2, 1 - 2 * (1 - draws) ** 2)
    again = np.where(rng.random(clusters * size) < 0.5, draws, rng.random(clusters * size))
    teacher, own = (draws < 0.8).astype(float), (again < 0.56).astype(float)
    ones = np.ones(clusters * size)
    return st.PairedTask(own, ones, teacher, ones, np.repeat(np.arange(clusters), size), 0.25)


def test_recovery_above_chance_is_covered_as_often_as_its_interval_says():
    rng = np.random.default_rng(6)
    true, covered = 0.31 / 0.55, 0
    for _ in range(1500):
        task = answered(rng)
        found = st.recovery([task], 0.95)
        assert found.low < found.value < found.high
        covered += found.low <= true <= found.high
    assert 0.935 <= covered / 1500 <= 0.97


def test_paired_differences_are_covered_as_often_as_their_interval_says_and_narrower_than_unpaired_ones():
    rng = np.random.default_rng(7)
    covered, narrower = 0, 0
    for _ in range(1500):
        task = answered(rng, clusters=30, size=2)
        found = st.paired_difference((task.teacher_value, task.weight), (task.value, task.weight), task.clusters)
        low, high = found.interval(0.95)
        covered += low <= -0.24 <= high
        narrower += found.se < st.welch(task.teacher_value, task.value).se
    assert 0.935 <= covered / 1500 <= 0.965
    assert narrower > 1200


def test_fieller_s_interval_is_the_delta_method_s_where_the_teacher_is_far_from_chance():
    rng = np.random.default_rng(8)
    task = answered(rng, clusters=4000)
    found = st.recovery([task], 0.95)
    assert (found.low, found.high) == pytest.approx(found.interval(0.95), abs=1e-3)


def test_fieller_s_interval_is_infinite_where_the_teacher_is_at_chance():
    value = np.tile([1.0, 0.0, 0.0, 0.0], 5)
    lucky = value.copy()
    lucky[1] = 1.0
    task = st.PairedTask(value, np.ones(20), lucky, np.ones(20), np.arange(20), 0.25)
    found = st.recovery([task], 0.95)
    assert (found.low, found.high) == (-math.inf, math.inf)


@pytest.mark.parametrize("right", [0.0, 0.25])
def test_of_a_teacher_that_is_at_or_below_chance_nothing_is_recovered(right):
    """Not even by a model that is as bad, however sure both figures are."""
    value = np.full(20, right)
    found = st.recovery([st.PairedTask(value, np.ones(20), value, np.ones(20), np.arange(20), 0.25)], 0.95)
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_what_a_teacher_shares_with_its_student_narrows_fieller_s_interval():
    rng = np.random.default_rng(9)
    task = answered(rng, clusters=200)
    other = st.PairedTask(
        task.value, task.weight, rng.permutation(task.teacher_value), task.weight, task.clusters, task.chance
    )
    paired, unpaired = st.recovery([task], 0.95), st.recovery([other], 0.95)
    assert paired.value == pytest.approx(unpaired.value)
    assert paired.high - paired.low < 0.9 * (unpaired.high - unpaired.low)


def test_a_bootstrap_finds_the_error_of_a_mean():
    value, weight, clusters = clustered_ratio(np.random.default_rng(10))
    closed = st.ratio(value, weight, clusters)
    found = st.bootstrap(lambda i: value[i].sum() / weight[i].sum(), clusters, 0.95)
    assert found.value == pytest.approx(closed.value)
    assert found.se == pytest.approx(closed.se, rel=0.1)
    assert (found.low, found.high) == pytest.approx(closed.interval(0.95), abs=0.25 * closed.se)


def test_a_quick_bootstrap_finds_the_error_of_a_mean_of_clusters_and_leaves_out_what_is_not_defined():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(300), 4)
    value = rng.normal(size=300)[clusters] + 0.1 * rng.normal(size=1200)
    exact = st.ratio(value, np.ones(1200), clusters).se
    found = st.bootstrap_se(lambda i: float(value[i].mean()), clusters, times=400)
    assert found == pytest.approx(exact, rel=0.12)
    assert found > 1.7 * st.bootstrap_se(lambda i: float(value[i].mean()), range(1200), times=400)
    assert math.isnan(st.bootstrap_se(lambda i: math.nan, range(9)))
    assert math.isnan(st.bootstrap_se(lambda i: 1.0, ["a", "a"]))


def test_bootstrapped_intervals_of_a_median_cover_it_as_often_as_they_say():
    """Three values to a cluster, skewed, around a median of 1."""
    rng = np.random.default_rng(11)
    clusters = np.repeat(np.arange(25), 3)
    covered = 0
    for _ in range(200):
        values = np.exp(np.repeat(rng.normal(0, 0.5, 25), 3) + rng.normal(0, 0.5, 75))
        found = st.bootstrap(lambda i, of=values: float(np.median(of[i])), clusters, 0.95, times=200)
        covered += found.low <= 1 <= found.high
    assert 0.90 <= covered / 200 <= 0.985


def test_a_bootstrap_of_what_never_changes_is_a_point_and_of_one_cluster_nothing():
    same = st.bootstrap(lambda i: 0.5, range(6), 0.95, times=20)
    assert (same.value, same.low, same.high) == (0.5, 0.5, 0.5)
    one = st.bootstrap(lambda i: 0.5, ["a", "a"], 0.95, times=20)
    assert one.value == 0.5
    assert math.isnan(one.low)


def test_seeds_are_averaged_and_their_spread_is_told_apart_from_that_of_items():
    rng = np.random.default_rng(3)
    items, seeds = 200, 4
    value = (rng.random((seeds, items)) < rng.uniform(0.5, 0.9, (seeds, 1))).astype(float)
    estimate = st.over_seeds(
        value.ravel(), np.ones(seeds * items), np.tile(np.arange(items), seeds), np.repeat(np.arange(seeds), items)
    )
    assert estimate.value == pytest.approx(value.mean())
    assert estimate.seed_se == pytest.approx(value.mean(axis=1).std(ddof=1) / math.sqrt(seeds))
    assert estimate.se == pytest.approx(value.mean(axis=0).std(ddof=1) / math.sqrt(items))
    assert estimate.n == items


def test_one_seed_is_the_metric_itself():
    value, weight, clusters = clustered_ratio(np.random.default_rng(4))
    one, averaged = st.ratio(value, weight, clusters), st.over_seeds(value, weight, clusters, [0] * len(value))
    assert (averaged.value, averaged.se) == pytest.approx((one.value, one.se))
    assert math.isnan(averaged.seed_se)


def test_an_average_of_tasks_adds_their_errors_in_squares():
    parts = [st.Estimate(value=0.5, se=0.03, df=10), st.Estimate(value=0.9, se=0.04, df=20)]
    assert st.average(parts).value == pytest.approx(0.7)
    assert st.average(parts).se == pytest.approx(0.025)


def test_quantiles_are_those_of_student_s_tables():
    for level, df, expected in ((0.95, 1, 12.706), (0.99, 2, 9.925), (0.95, 30, 2.042), (0.99, math.inf, 2.576)):
        assert st.t_quantile(level, df) == pytest.approx(expected, abs=5e-4)
    assert math.isnan(st.t_quantile(0.95, 0))


def test_a_quotient_of_geometric_means_is_the_mean_of_paired_quotients():
    numerator, denominator = np.array([2.0, 3.0, 5.0]), np.array([1.0, 2.0, 2.0])
    quotient = st.paired_quotient(numerator, denominator, 0.95)
    assert quotient.value == pytest.approx(st.geometric_mean(numerator).value / st.geometric_mean(denominator).value)
    assert quotient.low < quotient.value < quotient.high
    back = st.paired_quotient(denominator, numerator, 0.95)
    assert (back.low, back.high) == pytest.approx((1 / quotient.high, 1 / quotient.low))


def test_welch_s_freedom_lies_between_the_smaller_group_s_and_the_sum():
    base, head = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.1, 2.2])
    difference = st.welch(base, head)
    assert difference.value == pytest.approx(-0.4)
    assert difference.se == pytest.approx(math.sqrt(base.var(ddof=1) / 4 + head.var(ddof=1) / 3))
    assert 2 <= difference.df <= 5


def test_the_pooled_spread_ignores_the_groups_levels():
    assert st.pooled_sd([[1.0, 3.0], [101.0, 103.0], [7.0]]) == (pytest.approx(math.sqrt(2)), 2)
    assert math.isnan(st.pooled_sd([[1.0], []])[0])


def test_the_detectable_change_is_called_a_failure_four_times_in_five():
    rng = np.random.default_rng(5)
    se, margin, level = 0.01, 0.02, 0.99
    effect = st.detectable(se, math.inf, level, margin)
    estimates = rng.normal(-effect, se, 20000)
    failing = (estimates < -margin) & (estimates + st.t_quantile(level, math.inf) * se < 0)
    assert failing.mean() == pytest.approx(0.8, abs=0.01)
    assert st.detectable(math.nan, 3, level, margin) == math.inf
