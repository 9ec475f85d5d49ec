"""The small operations of a round in one kernel each equal the plain form, in Triton's interpreter and on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambabench.kernels.rounds import (
    Inputs,
    Ring,
    Rows,
    finish,
    finish_greedy,
    fused,
    greedy,
    match,
    reference,
    streams,
    uniform,
)

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


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("longest", "shortest"), [(1, 1), (4, 1), (3, 3), (9, 2)])
@pytest.mark.parametrize("width", [12, 1100])
def test_the_latest_longest_match_is_found(interpreted, monkeypatch, seed, longest, shortest, width):
    monkeypatch.setattr(interpreted, "BLOCK", 256)
    dice = torch.Generator().manual_seed(seed)
    ids, length, _, _ = texts(dice, 2, 3, width)
    ids = ids + width * torch.randint(0, 3, (2, 1), generator=dice) * torch.arange(width) // 9
    given = (ids, length, 1 + seed % 5, longest, shortest)
    out = Inputs.empty(6, 2, "cpu").drafts(given[2])
    (drafts, real), (wanted, count) = interpreted.match(*given, out), reference.match(*given)
    assert drafts is out
    assert real.dtype == count.dtype
    assert torch.equal(real, count)
    assert torch.equal(drafts[real > 0], wanted[count > 0])
    assert drafts.max() <= ids.max()


def ended(way, k, mode, seed, device="cpu", host=False):
    """What a round's end makes of random texts: all that it changes."""
    dice = torch.Generator().manual_seed(seed)
    batch, slots = 3, 4
    stops = torch.tensor([(), (2,), (1, 2)][seed % 3], dtype=torch.int64)
    rows = [*texts(dice, batch, k), stops, streams(seed, torch.arange(batch))]
    inputs = Inputs.empty(k + 1, batch, device)
    inputs.tokens.copy_(torch.randint(0, 3, (k + 3, batch), generator=dice))
    ring = [torch.zeros(slots, batch, k + 4, dtype=torch.int64), torch.randint(0, 9, (batch,), generator=dice)]
    logits = torch.randint(0, 3, (batch, k + 1, 3), generator=dice).float()
    real = torch.randint(0, k + 2, (batch,), generator=dice, dtype=torch.int32)
    accepted = torch.randint(0, k + 1, (batch,), generator=dice).to(device)
    extra = {"agree": {}, "chance": {"chance": 0.6}, "given": {"accepted": accepted}}[mode]
    rows, ring, (logits, real) = ([x.to(device) for x in xs] for xs in (rows, ring, (logits, real)))
    mirror = torch.zeros(slots, batch, k + 4, dtype=torch.int64, pin_memory=device != "cpu") if host else None
    given = logits if way.__name__ == "finish_greedy" else reference.greedy(logits)
    way(given, inputs.drafts(k), real, Rows(*rows, inputs), Ring(*ring, mirror), **extra)
    if device != "cpu":
        torch.cuda.synchronize()
    if mirror is not None:
        ring[0] = mirror
    return [x.cpu() for x in (*rows, *ring, *inputs)]


def assert_alike(one, two):
    for ours, wanted in zip(one, two, strict=True):
        assert ours.dtype == wanted.dtype
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("mode", ["agree", "chance", "given"])
@pytest.mark.parametrize("k", [0, 1, 3, 4])
def test_a_round_ends_as_in_the_plain_form(interpreted, k, mode, host):
    for seed in range(12):
        wanted = ended(reference.finish, k, mode, seed)
        assert_alike(ended(interpreted.finish, k, mode, seed, host=host), wanted)
        if mode != "given":
            assert_alike(ended(interpreted.finish_greedy, k, mode, seed, host=host), wanted)


@pytest.mark.parametrize(("k", "width"), [(0, 9), (2, 1000), (4, 3001), (0, 16_385)])
@pytest.mark.parametrize("few", [1 << 16, 0], ids=["in one kernel", "in two"])
def test_a_round_ends_with_the_first_of_the_largest(interpreted, monkeypatch, k, width, few):
    monkeypatch.setattr(interpreted, "FEW", few)
    logits = torch.randint(-3, 2, (2, k + 1, width), generator=torch.Generator().manual_seed(k)).float()
    logits[0, 0], logits[1, 0, 3] = -INFINITY, float("nan")
    found = []
    for way in (interpreted.finish_greedy, lambda logits, *rest: reference.finish(greedy(logits), *rest)):
        rows, ring = empty_rows(2, k)
        way(logits, rows.inputs.drafts(k), torch.zeros(2, dtype=torch.int32), rows, ring)
        found.append(ring.slots[0, :, : k + 1].tolist())
    assert found[0] == found[1]
    assert found[0][0][0] == 0
    assert found[0][1][0] == 3


def empty_rows(batch, k):
    """Texts of two tokens."""
    length = torch.full((batch,), 2)
    rows = torch.zeros(batch, 20, dtype=torch.int64), length, length + 10, torch.ones(batch, dtype=torch.bool)
    nothing = torch.zeros(0, dtype=torch.int64), streams(0, torch.arange(batch))
    ring = torch.zeros(2, batch, k + 3, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
    return Rows(*rows, *nothing, Inputs.empty(k + 1, batch, "cpu")), Ring(*ring)


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(0, 10**6))
def test_the_next_inputs_are_the_ends_of_the_texts(k, seed):
    """After any round, also of texts that are over."""
    *rows, _, _, tokens, positions = ended(reference.finish, k, "agree", seed)
    for row, (text, length) in enumerate(zip(rows[0].tolist(), rows[1].tolist(), strict=True)):
        assert tokens[:2, row].tolist() == text[length - 2 : length]
        assert positions[:, row].tolist() == list(range(length - 2, length + k + 1))


@settings(deadline=None)
@given(st.integers(0, 4), st.integers(0, 10**6), st.booleans())
def test_texts_grow_by_the_drafts_that_stand_and_one_token(k, seed, over):
    dice = torch.Generator().manual_seed(seed)
    ids, length, full, running = texts(dice, 1, k)
    if over:
        running[:] = False
    inputs = Inputs.empty(k, 1, "cpu")
    rows = Rows(ids.clone(), length.clone(), full, running.clone(), torch.tensor([2]), torch.zeros_like(length), inputs)
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
@pytest.mark.parametrize("host", [False, True], ids=["device", "host"])
def test_on_a_gpu_rounds_end_as_on_the_cpu(host):
    for mode in ("agree", "chance", "given"):
        for k in (0, 1, 4, 8):
            for seed in range(30):
                wanted = ended(finish, k, mode, seed)
                assert_alike(ended(finish, k, mode, seed, "cuda", host), wanted)
                if mode != "given":
                    assert_alike(ended(finish_greedy, k, mode, seed, "cuda", host), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "k", "width"), [(1, 4, 8192), (64, 4, 8192), (3, 0, 16_384), (2, 7, 8000), (4, 4, 128_256)]
)
def test_on_a_gpu_the_round_ends_with_the_first_of_the_largest(batch, k, width):
    dice = torch.Generator().manual_seed(width)
    logits = torch.randint(-9, 2, (batch, k + 1, width), generator=dice).float().cuda()
    tokens = [torch.empty(0)] * 2
    for number, way in enumerate((finish_greedy, lambda logits, *rest: finish(greedy(logits), *rest))):
        rows, ring = empty_rows(batch, k)
        there = Rows(*(x.cuda() for x in rows[:-1]), Inputs(*(x.cuda() for x in rows.inputs)))
        ring = Ring(*(x.cuda() for x in ring[:2]))
        way(logits, there.inputs.drafts(k), torch.zeros(batch, dtype=torch.int32, device="cuda"), there, ring)
        tokens[number] = ring.slots[0, :, : k + 1].cpu()
    assert torch.equal(*tokens)


@pytest.mark.gpu
def test_on_a_gpu_texts_are_read_as_on_the_cpu():
    for seed in range(30):
        ids, length, _, _ = texts(torch.Generator().manual_seed(seed), 4, 3, 3000 + 3000 * (seed % 2))
        drafts, real = (x.cpu() for x in match(ids.cuda(), length.cuda(), 5, 4, 1))
        wanted, count = match(ids, length, 5, 4, 1)
        assert torch.equal(real, count)
        assert torch.equal(drafts[real > 0], wanted[count > 0])
    stream, position = streams(3, torch.arange(64)), torch.arange(64_000).view(64, 1000)
    assert torch.equal(
        uniform(stream.cuda(), position.cuda(), 1).cpu(), reference.uniform(stream.unsqueeze(1), position, 1)
    )
