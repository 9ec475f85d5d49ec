"""The small operations of a round in one kernel each equal the plain form, in Triton's interpreter and on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.kernels.rounds import Ring, Rows, ending, finish, fused, greedy, match, reference, streams, uniform

INFINITY = float("inf")


@pytest.fixture
def interpreted(interpret):
    return interpret(fused.MODULE)


def rows_of(logits):
    return [row.index(max(row)) for row in logits.flatten(0, -2).tolist()]


SHAPES = [(1, 7), (2, 3, 1000), (1, 5, 16_384), (2, 16_385), (1, 20_481)]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_pick_is_the_first_of_the_largest(interpreted, shape, kind):
    logits = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0)).to(kind)
    assert interpreted.greedy(logits).flatten().tolist() == rows_of(logits)
    out = torch.full(shape[:-1], -1)
    assert interpreted.greedy(-logits.abs(), out) is out
    assert out.flatten().tolist() == rows_of(-logits.abs())


@pytest.mark.parametrize("width", [5, 17_000])
def test_the_pick_is_always_a_token(interpreted, width):
    logits = torch.full((4, width), -INFINITY)
    logits[1, 3:] = INFINITY
    logits[2, 4] = float("nan")
    logits[3, width - 1] = -1e30
    assert interpreted.greedy(logits).tolist() == [0, 3, 4, width - 1]


def test_random_numbers_are_those_of_the_reference(interpreted):
    stream = streams(-7, torch.arange(5))
    position = torch.randint(0, 2**40, (5, 37), generator=torch.Generator().manual_seed(0))
    for purpose in range(3):
        ours = interpreted.uniform(stream, position, purpose)
        assert torch.equal(ours, reference.uniform(stream.unsqueeze(1), position, purpose))
    assert torch.equal(
        interpreted.uniform(stream, position[:, 0].contiguous(), 1), reference.uniform(stream, position[:, 0], 1)
    )


def texts(dice, batch, k, width=40):
    """Texts with room for a round, some of which are over."""
    ids = torch.randint(0, 3, (batch, width), generator=dice)
    length = torch.randint(2, width - k - 1, (batch,), generator=dice)
    full = length + torch.randint(0, k + 3, (batch,), generator=dice)
    running = (torch.rand(batch, generator=dice) < 0.8) & (length < full)
    return ids, length, full, running


def both(ours, plain, given):
    """Runs both on copies and returns all tensors that they were given or gave."""
    found = []
    for way in (ours, plain):
        own = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
        result = way(*own)
        found.append([*(x for x in own if isinstance(x, torch.Tensor)), *(result or ())])
    return zip(*found, strict=True)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [1, 2])
def test_the_last_tokens_are_found(interpreted, seed, count):
    ids, length, _, _ = texts(torch.Generator().manual_seed(seed), 3, 4)
    for one, two in both(interpreted.ending, reference.ending, (ids, length, count)):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("longest", "shortest"), [(1, 1), (4, 1), (3, 3), (9, 2)])
@pytest.mark.parametrize("width", [12, 1100])
def test_the_latest_longest_match_is_found(interpreted, seed, longest, shortest, width):
    dice = torch.Generator().manual_seed(seed)
    ids, length, _, _ = texts(dice, 2, 3, width)
    ids = ids + width * torch.randint(0, 3, (2, 1), generator=dice) * torch.arange(width) // 9
    given = (ids, length, 1 + seed % 5, longest, shortest)
    (drafts, real), (wanted, count) = interpreted.match(*given), reference.match(*given)
    assert real.dtype == count.dtype
    assert torch.equal(real, count)
    assert torch.equal(drafts[real > 0], wanted[count > 0])
    assert drafts.max() <= ids.max()


def ended(way, k, mode, seed, device="cpu"):
    """What a round's end makes of random texts: all that it changes."""
    dice = torch.Generator().manual_seed(seed)
    batch, slots = 3, 4
    stops = torch.tensor([(), (2,), (1, 2)][seed % 3], dtype=torch.int64)
    rows = [*texts(dice, batch, k), stops]
    ring = [torch.zeros(slots, batch, k + 4, dtype=torch.int64), torch.randint(0, 9, (batch,), generator=dice)]
    tokens, drafts = (torch.randint(0, 3, (batch, width), generator=dice) for width in (k + 1, k + 2))
    real = torch.randint(0, k + 2, (batch,), generator=dice, dtype=torch.int32)
    stands, accepted = torch.rand(batch, k, generator=dice) < 0.6, torch.randint(0, k + 1, (batch,), generator=dice)
    extra = {"agree": (), "stands": (stands,), "given": (None, accepted)}[mode]
    rows, ring, moved = ([x.to(device) for x in xs] for xs in (rows, ring, [tokens, drafts, real]))
    extra = [None if x is None else x.to(device) for x in extra]
    way(moved[0], moved[1][:, :k], moved[2], Rows(*rows), Ring(*ring), *extra)
    return [x.cpu() for x in (*rows, *ring)]


@pytest.mark.parametrize("mode", ["agree", "stands", "given"])
@pytest.mark.parametrize("k", [0, 1, 3, 4])
def test_a_round_ends_as_in_the_plain_form(interpreted, k, mode):
    for seed in range(12):
        for one, two in zip(
            ended(interpreted.finish, k, mode, seed), ended(reference.finish, k, mode, seed), strict=True
        ):
            assert one.dtype == two.dtype
            assert torch.equal(one, two)


@settings(deadline=None)
@given(st.integers(0, 4), st.integers(0, 10**6), st.booleans())
def test_texts_grow_by_the_drafts_that_stand_and_one_token(k, seed, over):
    dice = torch.Generator().manual_seed(seed)
    ids, length, full, running = texts(dice, 1, k)
    if over:
        running[:] = False
    rows = Rows(ids.clone(), length.clone(), full, running.clone(), torch.tensor([2]))
    ring = Ring(torch.zeros(2, 1, k + 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    tokens, drafts = (torch.randint(0, 3, (1, width), generator=dice) for width in (k + 1, k))
    reference.finish(tokens, drafts, torch.tensor([k]), rows, ring)
    wanted = []
    for place, token in enumerate(tokens[0].tolist()):
        wanted.append(token)
        if place == k or drafts[0, place] != token:
            break
    assert ring.slots[0, 0, -1] == len(wanted) - 1
    assert ring.slots[0, 0, : len(wanted)].tolist() == wanted
    before = int(length)
    if not running.item():
        assert int(rows.length) == before
        return
    room = int(full) - before
    kept = wanted[: wanted.index(2) + 1] if 2 in wanted else wanted
    assert rows.ids[0, before : int(rows.length)].tolist() == kept[:room]
    assert bool(rows.running) == (kept == wanted and 2 not in kept and len(kept) < room)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (64, 128_256), (1, 5, 128_256)])
def test_on_a_gpu_the_pick_is_the_first_of_the_largest(shape):
    logits = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0)).float()
    assert greedy(logits.cuda()).flatten().tolist() == rows_of(logits)


@pytest.mark.gpu
def test_on_a_gpu_rounds_end_as_on_the_cpu():
    for mode in ("agree", "stands", "given"):
        for k in (0, 1, 4, 8):
            for seed in range(30):
                there = ended(finish, k, mode, seed, "cuda")
                assert all(map(torch.equal, there, ended(finish, k, mode, seed)))


@pytest.mark.gpu
def test_on_a_gpu_texts_are_read_as_on_the_cpu():
    for seed in range(30):
        ids, length, _, _ = texts(torch.Generator().manual_seed(seed), 4, 3, 3000)
        there = (x.cpu() for x in ending(ids.cuda(), length.cuda(), 2))
        assert all(map(torch.equal, there, ending(ids, length, 2)))
        drafts, real = (x.cpu() for x in match(ids.cuda(), length.cuda(), 5, 4, 1))
        wanted, count = match(ids, length, 5, 4, 1)
        assert torch.equal(real, count)
        assert torch.equal(drafts[real > 0], wanted[count > 0])
    stream, position = streams(3, torch.arange(64)), torch.arange(64_000).view(64, 1000)
    assert torch.equal(
        uniform(stream.cuda(), position.cuda(), 1).cpu(), reference.uniform(stream.unsqueeze(1), position, 1)
    )
