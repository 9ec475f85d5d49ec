import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.decoders.sampling import pick, probabilities
from mambabench.harness.interfaces import Limits
from mambabench.kernels.rounds import ACCEPT, DRAFT, TOKEN, draw, streams, uniform
from scipy.stats import chi2, kstest

seeds = st.integers(-(2**70), 2**70)
coarse = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


def numbers(seed: int, sequence: list[int], position: list[int], purpose: int = TOKEN) -> list[float]:
    return uniform(streams(seed, torch.tensor(sequence)), torch.tensor(position), purpose).tolist()


@settings(deadline=None)
@given(seeds, st.lists(st.integers(0, 2**62), min_size=1, max_size=5), st.integers(0, 2**40))
def test_a_random_number_depends_on_its_key_alone(seed, sequences, position):
    together = numbers(seed, sequences, [position] * len(sequences))
    alone = [numbers(seed, [sequence], [position])[0] for sequence in sequences]
    assert together == alone
    assert all(0 <= number < 1 for number in together)


def test_random_numbers_are_uniform_and_differ_in_every_part_of_the_key():
    rows, places = torch.arange(100), torch.arange(100).expand(100, 100)
    keys = [(streams(seed, rows), purpose) for seed in (0, 1) for purpose in (TOKEN, DRAFT, ACCEPT)]
    drawn = torch.stack([uniform(stream, places, purpose) for stream, purpose in keys]).flatten()
    assert len(drawn.unique()) == len(drawn)
    assert kstest(drawn.numpy(), "uniform").pvalue > 1e-3
    neighbours = np.corrcoef(drawn[:-1].numpy(), drawn[1:].numpy())[0, 1]
    assert abs(neighbours) < 4 / len(drawn) ** 0.5


def filtered(logits: list[int], temperature: float, top_k: int, top_p: float) -> np.ndarray:
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or len(logits)]
    weights = np.exp(np.array(logits) / temperature)
    share = weights / weights[order].sum()
    kept, mass = [], 0.0
    for token in order:
        if kept and mass >= top_p - 1e-12:
            break
        kept.append(token)
        mass += share[token]
    out = np.zeros(len(logits))
    out[kept] = weights[kept] / weights[kept].sum()
    return out


@settings(deadline=None)
@given(coarse, st.sampled_from([0.3, 1.0, 2.5]), st.integers(0, 14), st.sampled_from([0.07, 0.31, 0.62, 0.93, 1.0]))
def test_filters_are_top_k_then_top_p_with_ties_to_the_lowest_index(logits, temperature, top_k, top_p):
    limits = Limits(new_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    ours = probabilities(torch.tensor([logits, logits], dtype=torch.float32), limits)
    wanted = filtered(logits, temperature, top_k, top_p)
    assert torch.equal(ours[0], ours[1])
    np.testing.assert_allclose(ours[0].numpy(), wanted, rtol=1e-12, atol=0)


@settings(deadline=None)
@given(coarse)
def test_the_greedy_token_is_the_first_of_the_largest(logits):
    zero = torch.tensor([0])
    chosen = pick(torch.tensor([[logits]], dtype=torch.float32), Limits(new_tokens=1), zero, zero)
    assert chosen.tolist() == [[logits.index(max(logits))]]


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.0, 1e-9, 0.5, 3.0]), min_size=1, max_size=9), st.floats(0, 1, exclude_max=True))
def test_nothing_of_weight_zero_is_drawn(weights, at):
    token = int(draw(torch.tensor(weights, dtype=torch.float64), torch.tensor(at, dtype=torch.float64)))
    assert weights[token] > 0 or not any(weights)


@pytest.mark.parametrize("top_k", [0, 3])
def test_drawn_tokens_have_their_probabilities(top_k):
    limits = Limits(new_tokens=1, temperature=0.8, top_k=top_k, seed=3)
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, 0.9])
    count = 20_000
    stream = streams(limits.seed, torch.arange(count))
    drawn = pick(logits.expand(count, 1, 5), limits, stream, torch.full((count,), 6)).squeeze(1)
    expected = probabilities(logits, limits) * count
    kept = expected > 0
    seen = drawn.bincount(minlength=5)
    assert not seen[~kept].any()
    statistic = ((seen - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi2.sf(float(statistic), int(kept.sum()) - 1) > 1e-4
