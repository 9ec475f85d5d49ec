import doctest
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.harness import metrics

rounds = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda t: (max(t), min(t))), min_size=1)
figures = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30)


def test_examples_hold():
    assert doctest.testmod(metrics).failed == 0


@settings(deadline=None)
@given(rounds)
def test_accepted_length_is_one_and_the_acceptance_of_each_position(drawn):
    accepted = [a for _, a in drawn]
    by_position = metrics.acceptance_by_position(accepted, 6)
    mean = metrics.mean_accepted_length(accepted)
    assert 1 <= mean <= 7
    assert math.isclose(mean, 1 + sum(by_position), rel_tol=1e-12)
    assert by_position == sorted(by_position, reverse=True)


@settings(deadline=None)
@given(figures, st.floats(0, 100))
def test_percentiles_are_those_of_numpy(values, percent):
    assert math.isclose(metrics.percentile(values, percent), np.percentile(values, percent), rel_tol=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)), min_size=1, max_size=20))
def test_the_quotient_of_geometric_means_is_the_mean_of_quotients(pairs):
    one, two = zip(*pairs, strict=True)
    quotient = metrics.speedup(metrics.geometric_mean(one), metrics.geometric_mean(two))
    paired = metrics.geometric_mean([a / b for a, b in pairs])
    assert math.isclose(quotient, paired, rel_tol=1e-9)


def test_nothing_measured_is_not_a_number():
    assert math.isnan(metrics.mean_accepted_length([]))
    assert math.isnan(metrics.acceptance_rate([0], [0]))
    assert math.isnan(metrics.decode_throughput([0.1], [0.1], 0))
    assert math.isnan(metrics.percentile([], 50))
    assert math.isnan(metrics.geometric_mean([]))
