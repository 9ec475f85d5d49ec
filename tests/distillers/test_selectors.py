"""Which layers keep attention."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mambabench.distillers.plugin import EndsConfig, ListConfig, UniformConfig
from mambabench.distillers.selectors import Ends, Listed, Uniform, spread
from mambabench.harness.interfaces import MambabenchError


def job(layers):
    backend = SimpleNamespace(describe=lambda path: {"layers": layers})
    return SimpleNamespace(parent=SimpleNamespace(path=None), backend=backend)


@pytest.mark.parametrize(
    ("layers", "share", "kept"),
    [
        (32, 0.5, list(range(1, 32, 2))),
        (32, 0.25, [3, 7, 11, 15, 19, 23, 27, 31]),
        (32, 0.125, [7, 15, 23, 31]),
        (4, 0.5, [1, 3]),
        (4, 0.25, [3]),
        (4, 0, []),
        (4, 1, [0, 1, 2, 3]),
        (5, 0.4, [2, 4]),
        (28, 0.5, list(range(1, 28, 2))),
        (4, 0.75, [1, 2, 3]),
    ],
)
def test_uniform_keeps_the_layers_of_the_paper(layers, share, kept):
    assert Uniform(UniformConfig(share=share)).select(job(layers)) == kept


@given(layers=st.integers(1, 80), percent=st.integers(0, 100))
def test_any_share_is_spread_without_gaps_larger_than_needed(layers, percent):
    share = percent / 100
    kept = spread(layers, share)
    assert kept == sorted(set(kept))
    assert all(0 <= layer < layers for layer in kept)
    if share == 0 or 100 % percent == 0:
        return
    assert len(kept) == round(Fraction(percent, 100) * layers)
    if kept:
        assert kept[-1] == layers - 1
        gaps = [b - a for a, b in zip([-1, *kept], kept, strict=False)]
        assert max(gaps) - min(gaps) <= 1


def test_a_share_that_keeps_no_layer_is_refused():
    with pytest.raises(MambabenchError, match=r"0\.125 of 4 layers keeps none"):
        Uniform(UniformConfig(share=0.125)).select(job(4))


def test_list_sorts_and_checks_its_layers():
    assert Listed(ListConfig(layers=(4, 0))).select(job(5)) == [0, 4]
    with pytest.raises(MambabenchError, match="no layer 5; layers are 0 to 4"):
        Listed(ListConfig(layers=(0, 5))).select(job(5))
    with pytest.raises(MambabenchError, match="no layer -1"):
        Listed(ListConfig(layers=(-1,))).select(job(5))
    with pytest.raises(MambabenchError, match="twice"):
        Listed(ListConfig(layers=(1, 1))).select(job(5))


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_outside_of_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        UniformConfig(share=share)


@pytest.mark.parametrize(("layers", "count", "kept"), [(32, 2, [0, 31]), (8, 4, [0, 2, 5, 7]), (3, 4, [0, 1, 2])])
def test_ends_takes_the_first_and_the_last_layer(layers, count, kept):
    assert Ends(EndsConfig(count=count)).select(job(layers)) == kept
