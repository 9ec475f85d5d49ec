"""Calls begin with the embeddings of their tokens, and positions move as the plan says, in PyTorch, in Triton's
interpreter and on a GPU."""

import pytest
import torch
from mambabench.kernels import entry
from mambabench.kernels.entry import Cursors, enter
from mambabench.kernels.multistep import Plan


def ints(*numbers, device="cpu"):
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def entered(way, plan, dtype=torch.float32, width=5, device="cpu", apart=False, logits=0):
    """Rows whose replay is empty, has room for a round, just has none, and is full. With `apart` ids lie place by
    place. Their last ones are picked of as many `logits`, rows of which lie apart."""
    dice = torch.Generator().manual_seed(width)
    start = ints(7, 7, 8, 12, device=device)
    cursors = Cursors(*(ints(*each, device=device) for each in ((7, 5, 6, 9), (7, 4, 4, 4), (-1,) * 4, (-1,) * 4)))
    table = torch.randn(11, width, generator=dice).to(device, dtype)
    ids = torch.randint(11, (4, plan.count), generator=dice).to(device)
    given, last = ids.T.contiguous().T if apart or logits else ids, None
    if logits:
        last = torch.randint(-3, 3, (4, 2, logits), generator=dice).float()[:, 1].to(device)
        ids = torch.cat([ids[:, :-1], last.argmax(1, keepdim=True) % 11], dim=1)
        last[:, 11:] = -1e9
        last = last.scatter(1, ids[:, -1:], 9.0)
        given[:, -1] = -5
    stream = way(given, table, start, cursors, plan, last)
    assert torch.equal(given, ids)
    assert stream.added is None
    assert torch.equal(stream.h, table[ids.flatten()])
    assert start.tolist() == [7, 7, 8, 12]
    return [t.tolist() for t in cursors], stream


def moved(way, plan, **options):
    return entered(way, plan, **options)[0]


def test_a_checkpoint_moves_when_another_round_might_not_fit():
    start, before = [7, 7, 8, 12], [7, 4, 4, 4]
    assert moved(enter, Plan(3, 5, 8, True)) == [start, [7, 4, 8, 12], before, [10, 10, 11, 15]]
    assert moved(enter, Plan(3, 5, 5, True)) == [start, start, before, [10, 10, 11, 15]]
    assert moved(enter, Plan(2, 5, 8, False)) == [[7, 5, 6, 9], before, before, [9, 9, 10, 14]]


PLANS = [Plan(3, 5, 8, True), Plan(3, 5, 5, True), Plan(2, 5, 8, False), Plan(1, 1, 16, True)]
WIDTHS = [(torch.bfloat16, 16), (torch.bfloat16, 2050), (torch.float16, 5), (torch.float32, 33), (torch.float64, 8)]


def assert_squares(stream, dtype):
    if dtype.itemsize > 2:
        assert stream.squares is None
        return
    assert stream.squares.shape == (len(stream.h), 1)
    exact = stream.h.double().square().sum(1, keepdim=True)
    torch.testing.assert_close(stream.squares.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("given", [{}, {"apart": True}, {"logits": 40}], ids=str)
@pytest.mark.parametrize(("dtype", "width"), WIDTHS, ids=str)
def test_in_the_interpreter_the_kernel_does_the_same(interpret, plan, given, dtype, width):
    cursors, stream = entered(interpret(entry.MODULE).enter, plan, dtype, width, **given)
    assert cursors == moved(enter, plan)
    assert_squares(stream, dtype)


def test_what_is_no_token_has_no_embedding(interpret):
    cursors = Cursors(*(ints(0, 0) for _ in range(4)))
    stream = interpret(entry.MODULE).enter(
        torch.tensor([[-1], [3]]), torch.ones(3, 8, dtype=torch.bfloat16), ints(0, 0), cursors, Plan(1, 1, 1, True)
    )
    assert stream.h.isnan().all()
    assert stream.squares.isnan().all()


@pytest.mark.parametrize("logits", [16_384, 16_385])
@pytest.mark.parametrize("plan", PLANS[2:], ids=str)
def test_the_pick_may_be_of_many(interpret, plan, logits):
    moved(interpret(entry.MODULE).enter, plan, logits=logits)
    moved(enter, plan, logits=logits)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(
    "given", [{}, {"apart": True}, {"logits": 40}, {"logits": 8192}, {"logits": 16_384}, {"logits": 128_256}], ids=str
)
@pytest.mark.parametrize(("dtype", "width"), [*WIDTHS, (torch.bfloat16, 4096)], ids=str)
def test_on_a_gpu_the_kernel_does_the_same(plan, given, dtype, width):
    assert entry.supports(torch.zeros(1, 1, dtype=dtype, device="cuda"), ints(1, device="cuda"))
    cursors, stream = entered(enter, plan, dtype, width, "cuda", **given)
    assert cursors == moved(enter, plan)
    assert_squares(stream, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [512, 4096])
def test_on_a_gpu_sums_are_the_same_bits_whoever_picks(width):
    """And alone or among others."""
    dice = torch.Generator().manual_seed(0)
    table, start = torch.randn(99, width, generator=dice).cuda().bfloat16(), ints(5, 6, device="cuda")
    ids, last = torch.randint(99, (5, 2), generator=dice).cuda().T, torch.randn(2, 8192, generator=dice).cuda()
    last[:, 99:] = -9

    def squares(ids, plan, last=None):
        cursors = Cursors(*(start.clone() for _ in range(4)))
        return enter(ids, table, start, cursors, plan, last).squares.view(len(ids), -1)

    picked = squares(ids, Plan(5, 5, 16, True), last)
    assert torch.equal(ids[:, -1], last.argmax(1))
    assert torch.equal(squares(ids, Plan(5, 5, 16, True)), picked)
    for place in range(5):
        assert torch.equal(squares(ids[:, place : place + 1], Plan(1, 5, 16, False)), picked[:, place : place + 1])
