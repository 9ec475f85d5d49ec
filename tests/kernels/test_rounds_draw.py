"""Drawing by kernels equals the plain form, in Triton's interpreter and on a GPU."""

import pytest
import torch
from mambabench.kernels.rounds import (
    DRAFT,
    TOKEN,
    Drawn,
    Inputs,
    Ring,
    Rows,
    drawn,
    finish_rejected,
    fused,
    reference,
    streams,
)

INFINITY = float("inf")
SHAPES = [(3, 7), (2, 4, 100), (2, 4096), (1, 3, 4097), (2, 2, 9000)]


@pytest.fixture
def interpreted(interpret):
    return interpret(fused.DRAWING)


def some(shape, seed, spread=3.0):
    """Logits, some of which have no probability."""
    dice = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=dice, dtype=torch.float64) * spread
    return logits.masked_fill(torch.rand(shape, generator=dice) < 0.2, -INFINITY)


def keys(batch, seed):
    return streams(seed, torch.arange(batch)), torch.arange(5, 5 + batch, dtype=torch.int32) * (seed + 1)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draws_are_those_of_the_plain_form(interpreted, shape, kind, temperature):
    for seed in range(4):
        logits, key = some(shape, seed).to(kind), keys(shape[0], seed)
        ours = interpreted.drawn(logits, temperature, *key, TOKEN, None, 0, None)
        assert torch.equal(ours, reference.drawn(logits, temperature, *key, TOKEN))


def test_what_is_drawn_is_kept_and_rows_may_lie_apart(interpreted):
    both, key = some((3, 2, 5000), 1).float(), keys(3, 1)
    kept, plain = (Drawn.empty(4, 3, 5000, 0.9, both) for _ in range(2))
    out = torch.zeros(4, 3, dtype=torch.int64)
    interpreted.drawn(both[:, 1], 0.9, *key, DRAFT, kept, 2, out[2])
    assert torch.equal(out[2], reference.drawn(both[:, 1], 0.9, *key, DRAFT, plain, 2))
    assert torch.equal(kept.logits[2], plain.logits[2])
    sums = (kept.mass[2] * ((kept.most[2] - both[:, 1].amax(-1, keepdim=True)) / 0.9).exp()).sum(-1)
    whole = ((both[:, 1].double() - both[:, 1].amax(-1, keepdim=True)) / 0.9).exp().sum(-1)
    torch.testing.assert_close(sums, whole, rtol=1e-12, atol=0)


def test_a_part_without_any_probability_is_never_drawn(interpreted):
    logits, key = torch.full((2, 9000), -INFINITY), keys(2, 0)
    logits[0, 8999], logits[1, 4096] = 0.0, -1e30
    assert interpreted.drawn(logits, 1.0, *key, TOKEN, None, 0, None).tolist() == [8999, 4096]


def judged(way, seed, count, drafts, width, chance=None, temperature=0.8, device="cpu"):
    """The end of a round whose drafts were drawn from logits that are close to the target's: the drafts that stand, or
    do by chance, and the token after, and the texts."""
    batch = 3
    target = some((batch, count, width), seed).float()
    near = target[:, :drafts] + 0.4 * torch.randn(batch, drafts, width, generator=torch.Generator().manual_seed(seed))
    stream, before = keys(batch, seed)
    kept, inputs = Drawn.empty(drafts + 1, batch, width, temperature, near), Inputs.empty(drafts + 1, batch, "cpu")
    for place in range(drafts):
        at = (stream, before + place, DRAFT)
        reference.drawn(near[:, place], temperature, *at, kept, place, inputs.tokens[place + 2])
    real = torch.full((batch,), drafts, dtype=torch.int32)
    if seed % 3 == 0:
        real[0] = min(1, drafts)
    kept = Drawn(*(x.to(device) for x in kept[:3]), temperature)
    if way is not reference.finish_rejected:
        measure(kept, drafts)
    length = before.long() + 1
    rows = torch.zeros(batch, 99, dtype=torch.int64), length, length + 20, torch.ones(batch, dtype=torch.bool)
    stops = torch.tensor([3])
    ring = torch.zeros(2, batch, count + 2, dtype=torch.int64), torch.zeros_like(length)
    inputs = Inputs(*(x.to(device) for x in inputs))
    rows, ring = Rows(*(x.to(device) for x in (*rows, stops, stream)), inputs), Ring(*(x.to(device) for x in ring))
    way(target.to(device), kept, inputs.drafts(drafts), real.to(device), rows, ring, chance)
    tokens, accepted, length = ring.slots[0, :, :count].cpu(), ring.slots[0, :, -1].cpu(), rows.length.cpu()
    counted = torch.arange(count) <= accepted.unsqueeze(1)
    text = rows.ids.cpu().where(torch.arange(99) < length.unsqueeze(1), -1)
    return accepted, tokens.where(counted, -1), length, text, inputs.positions.cpu(), inputs.tokens[:2].cpu()


def measure(kept, drafts):
    """What a kernel that draws leaves of each part."""
    parts, part = reference.parts_of(kept.logits.shape[-1])
    for number in range(parts):
        logits = kept.logits[:drafts, :, number * part : (number + 1) * part].double()
        kept.most[:drafts, :, number] = logits.amax(-1)
        kept.mass[:drafts, :, number] = ((logits - logits.amax(-1, keepdim=True)) / kept.temperature).exp().sum(-1)


SIZES = [(2, 1, 9), (4, 3, 50), (4, 4, 50), (5, 4, 5000), (5, 5, 5000), (1, 1, 20)]


@pytest.mark.parametrize(("count", "drafts", "width"), SIZES)
def test_drafts_are_judged_as_in_the_plain_form(interpreted, count, drafts, width):
    seen = set()
    for seed in range(12):
        given = (seed, count, drafts, width)
        ours, plain = judged(interpreted.finish_rejected, *given), judged(reference.finish_rejected, *given)
        assert all(map(torch.equal, ours, plain))
        seen |= set(ours[0].tolist())
    assert seen == set(range(count))


@pytest.mark.parametrize(("count", "drafts", "width"), [(2, 1, 9), (4, 3, 50), (5, 5, 5000)])
@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_chance_decides_in_place_of_the_verdict(interpreted, count, drafts, width, chance):
    seen = set()
    for seed in range(4):
        given = (seed, count, drafts, width, chance)
        ours, plain = judged(interpreted.finish_rejected, *given), judged(reference.finish_rejected, *given)
        assert all(map(torch.equal, ours, plain))
        seen |= set(ours[0].tolist())
    assert seen == {0.0: {0}, 1.0: {count - 1}}.get(chance, seen)
    assert len(seen) > 1 or chance != 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (4, 128_256), (2, 5, 128_256)])
def test_on_a_gpu_draws_are_those_of_the_cpu(shape):
    for seed in range(8):
        logits, (stream, before) = some(shape, seed).float(), keys(shape[0], seed)
        there = drawn(logits.cuda(), 0.7, stream.cuda(), before.cuda(), TOKEN)
        assert torch.equal(there.cpu(), drawn(logits, 0.7, stream, before, TOKEN))


@pytest.mark.gpu
@pytest.mark.parametrize("chance", [None, 0.5])
@pytest.mark.parametrize(("count", "drafts", "width"), [*SIZES, (5, 5, 128_256)])
def test_on_a_gpu_drafts_are_judged_as_on_the_cpu(count, drafts, width, chance):
    for seed in range(12):
        given = (seed, count, drafts, width, chance)
        there = judged(finish_rejected, *given, device="cuda")
        assert all(map(torch.equal, there, judged(reference.finish_rejected, *given)))
