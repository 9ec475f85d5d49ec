"""Drawing by kernels equals the plain form, in Triton's interpreter and on a GPU."""

import pytest
import torch
from mambabench.kernels.rounds import DRAFT, TOKEN, Drawn, drawn, fused, reference, rejected, streams

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


def drafted(way, seed, count, judged, width, temperature=0.8, device="cpu"):
    """A round's drafts, drawn from logits that are close to the target's, and their verdict: those that stand and the
    token after."""
    batch = 3
    target = some((batch, count, width), seed).float()
    near = target[:, :judged] + 0.4 * torch.randn(batch, judged, width, generator=torch.Generator().manual_seed(seed))
    stream, before = keys(batch, seed)
    kept = Drawn.empty(judged + 1, batch, width, temperature, near)
    drafts = torch.zeros(judged, batch, dtype=torch.int64)
    for place in range(judged):
        at = (stream, before + place, DRAFT)
        reference.drawn(near[:, place], temperature, *at, kept, place, drafts[place])
    real = torch.full((batch,), judged, dtype=torch.int32)
    if seed % 3 == 0:
        real[0] = min(1, judged)
    kept = Drawn(*(x.to(device) for x in kept[:3]), temperature)
    if way is not reference.rejected:
        measure(kept, judged)
    moved = (x.to(device) for x in (target, drafts.T, real, stream, before))
    target, drafts, real, stream, before = moved
    accepted, tokens = way(target, kept, drafts, real, stream, before)
    counted = torch.arange(count, device=device) <= accepted.unsqueeze(1)
    return accepted.cpu(), tokens.where(counted, -1).cpu()


def measure(kept, judged):
    """What a kernel that draws leaves of each part."""
    parts, part = reference.parts_of(kept.logits.shape[-1])
    for number in range(parts):
        logits = kept.logits[:judged, :, number * part : (number + 1) * part].double()
        kept.most[:judged, :, number] = logits.amax(-1)
        kept.mass[:judged, :, number] = ((logits - logits.amax(-1, keepdim=True)) / kept.temperature).exp().sum(-1)


SIZES = [(2, 1, 9), (4, 3, 50), (4, 4, 50), (5, 4, 5000), (5, 5, 5000), (1, 1, 20)]


@pytest.mark.parametrize(("count", "judged", "width"), SIZES)
def test_drafts_are_judged_as_in_the_plain_form(interpreted, count, judged, width):
    seen = set()
    for seed in range(12):
        given = (seed, count, judged, width)
        ours, plain = drafted(interpreted.rejected, *given), drafted(reference.rejected, *given)
        assert torch.equal(ours[0], plain[0])
        assert torch.equal(ours[1], plain[1])
        seen |= set(ours[0].tolist())
    assert seen == set(range(count))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (4, 128_256), (2, 5, 128_256)])
def test_on_a_gpu_draws_are_those_of_the_cpu(shape):
    for seed in range(8):
        logits, (stream, before) = some(shape, seed).float(), keys(shape[0], seed)
        there = drawn(logits.cuda(), 0.7, stream.cuda(), before.cuda(), TOKEN)
        assert torch.equal(there.cpu(), drawn(logits, 0.7, stream, before, TOKEN))


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "judged", "width"), [*SIZES, (5, 5, 128_256)])
def test_on_a_gpu_drafts_are_judged_as_on_the_cpu(count, judged, width):
    for seed in range(12):
        given = (seed, count, judged, width)
        there = drafted(rejected, *given, device="cuda")
        assert all(map(torch.equal, there, drafted(reference.rejected, *given)))
