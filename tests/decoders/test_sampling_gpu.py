"""The device must draw what the CPU draws."""

import pytest
import torch
from mambabench.decoders.sampling import pick, probabilities
from mambabench.harness.interfaces import Limits
from mambabench.kernels.rounds import TOKEN, draw, streams, uniform

pytestmark = pytest.mark.gpu


def test_random_numbers_are_the_same_bits_as_on_the_cpu():
    stream, position = streams(-7, torch.arange(64)), torch.arange(1000).expand(64, 1000)
    there = uniform(stream.cuda(), position.cuda(), TOKEN)
    assert torch.equal(there.cpu(), uniform(stream, position, TOKEN))


@pytest.mark.parametrize("vocabulary", [7, 1000, 128_256])
def test_ties_go_to_the_lowest_index(vocabulary):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (16, vocabulary), generator=generator).float()
    first = [row.index(max(row)) for row in logits.tolist()]
    place = torch.zeros(16, dtype=torch.int64, device="cuda")
    chosen = pick(logits.cuda().unsqueeze(1), Limits(new_tokens=1), place, place)
    assert chosen.flatten().tolist() == first


@pytest.mark.parametrize("filters", [(0, 1.0), (50, 1.0), (0, 0.9), (50, 0.9)])
def test_draws_are_those_of_the_cpu(filters):
    logits = torch.randn(64, 32_000, generator=torch.Generator().manual_seed(1)) * 3
    limits = Limits(new_tokens=1, temperature=0.8, top_k=filters[0], top_p=filters[1])
    at = uniform(streams(1, torch.arange(64)), torch.full((64,), 5), TOKEN)
    here, there = probabilities(logits, limits), probabilities(logits.cuda(), limits)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-12, atol=0)
    assert torch.equal(draw(there, at.cuda()).cpu(), draw(here, at))
