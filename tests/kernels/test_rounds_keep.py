"""Filters by kernels leave out what the plain form leaves out, in Triton's interpreter and on a GPU."""

import pytest
import torch
from mambabench.kernels.rounds import fused, keep, reference

FILTERS = [(0, 0.5), (0, 0.97), (3, 1.0), (7, 0.8), (40, 1.0), (1, 0.01), (10**6, 1.0)]


@pytest.fixture
def interpreted(interpret):
    return interpret(fused.KEEPING)


def logits_of(shape, seed, levels=0):
    """Logits with ties, if of few levels, and some that have no probability."""
    dice = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=dice, dtype=torch.float64) * 3
    if levels:
        logits = (logits * levels).round() / levels
    return logits.masked_fill(torch.rand(shape, generator=dice) < 0.2, -torch.inf)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_same_tokens_are_left(interpreted, filters):
    """Of logits that differ, and of those that tie."""
    logits = torch.cat([logits_of((1, 50), levels, levels) for levels in range(3)]).float()
    assert torch.equal(interpreted.keep(logits, 0.8, *filters), reference.keep(logits, 0.8, *filters))


@pytest.mark.parametrize(("shape", "kind"), [((1, 2, 20), torch.float64), ((1, 4100), torch.float32)])
def test_of_any_precision_and_of_several_parts(interpreted, shape, kind):
    logits = logits_of(shape, 3, 2).to(kind)
    assert torch.equal(interpreted.keep(logits, 0.8, 15, 0.9), reference.keep(logits, 0.8, 15, 0.9))


def test_rows_may_lie_apart_and_zeros_are_equal(interpreted):
    both = logits_of((3, 2, 300), 4, 1).float()
    assert torch.equal(interpreted.keep(both[:, 1], 1.0, 5, 0.9), reference.keep(both[:, 1], 1.0, 5, 0.9))
    zeros = torch.tensor([[0.0, -0.0, 0.0, -1.0, -0.0]])
    assert (interpreted.keep(zeros, 1.0, 3, 1.0) > -torch.inf).tolist() == [[True, True, True, False, False]]


@pytest.mark.gpu
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("shape", [(2, 50), (64, 8192), (2, 5, 128_256)])
def test_on_a_gpu_the_same_tokens_are_left(shape, filters):
    for seed, levels in ((0, 0), (1, 1), (2, 50)):
        logits = logits_of(shape, seed, levels).float()
        assert torch.equal(keep(logits.cuda(), 0.8, *filters).cpu(), keep(logits, 0.8, *filters))
