"""Steps over a ring are the recurrence over what was kept, in PyTorch, in Triton's interpreter and on a GPU."""

import itertools
import random

import pytest
import torch
from mambabench.kernels.multistep import ring as room
from mambabench.kernels.multistep.ring import Plan, Ring, plain_ring_multistep
from mambabench.kernels.scan import scan_loop

SHAPES = {
    "one state": (1, 1, 1, 1, 1, 1),
    "odd": (6, 2, 2, 6, 5, 7),
    "x per head": (4, 4, 1, 1, 19, 16),
    "C per head": (4, 2, 2, 4, 16, 16),
    "three kinds of groups": (6, 3, 2, 1, 33, 24),
}
"""H, groups of x, B and C, P, N."""
EPS = 2.0**-23
"""A rounding to fp32: plain PyTorch may make none."""


@pytest.fixture
def kernels(interpret, tensor_cores):
    return interpret(room.MODULE)


class Layer:
    """A ring whose unwritten slots hold NaN, and beside it every token that a row ever got."""

    def __init__(self, shape, plan, batch, dtype, seed, slots=None, device="cpu"):
        self.heads, self.groups, self.width, self.size = shape[0], shape[1:4], shape[4], shape[5]
        self.plan, self.batch, self.dtype, self.device = plan, batch, dtype, device
        self.dice = torch.Generator().manual_seed(seed)
        slots = slots or plan.replay + plan.steps
        sizes = list(zip(self.groups[:2], (self.width, self.size), strict=True))
        whole = torch.full((batch, slots, sum(g * w for g, w in sizes)), torch.nan, dtype=dtype, device=device)
        parts = whole.split([g * w for g, w in sizes], dim=2)
        views = (part.unflatten(2, pair) for part, pair in zip(parts, sizes, strict=True))
        self.ring = Ring(*views, torch.full((batch, slots, self.heads), torch.nan, device=device))
        self.A, self.D = -self.normal(self.heads).exp(), self.normal(self.heads)
        self.state = self.normal(batch, self.heads, self.width, self.size)
        self.first = self.state.double()
        self.saved = torch.zeros(batch, dtype=torch.int32, device=device)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.dice).to(self.device)

    def put(self, start, count):
        """New tokens of every row at its start."""
        for row, at in enumerate(start.tolist()):
            slots = torch.arange(at, at + count) % self.ring.dt.shape[1]
            for t in (self.ring.x, self.ring.B):
                t[row, slots] = self.normal(count, *t.shape[2:]).to(self.dtype)
            self.ring.dt[row, slots] = 0.1 * self.normal(count, self.heads).exp()
        self.C = self.normal(self.batch, count, self.groups[2], self.size).to(self.dtype)

    def exact(self):
        """Everything in fp64."""
        parts = (t.double() for t in self.ring.parts())
        return Ring(*parts), self.C.double(), self.A.double(), self.D.double(), self.state.double()


def filled(shape, plan, batch, dtype, seed, starts, device="cpu"):
    """A layer whose rows have `starts` tokens behind their checkpoint, and the new ones."""
    layer = Layer(shape, plan, batch, dtype, seed, device=device)
    start = torch.tensor(starts, dtype=torch.int32, device=device)
    layer.put(torch.zeros_like(start), plan.replay)
    for t in layer.ring.parts():
        for row, at in enumerate(starts):
            t[row, at:] = torch.nan
    layer.put(start, plan.count)
    return layer, start


def finished():
    """All inputs are written, which a kernel that begins early does not wait for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


def errors(way, layer, start):
    """Of y and of the state, against fp64, and of plain PyTorch with the inputs' dtypes, both on a CPU; y is rounded to
    x's dtype."""
    given = layer.ring, layer.C, layer.A, layer.D, layer.state.clone()
    finished()
    y = way(*given, start, layer.saved, layer.plan)
    made = [(y.cpu(), given[-1].cpu())]
    for exact in (False, True):
        kind = (lambda t: t.double()) if exact else (lambda t: t.clone())
        ring, *others = layer.ring, layer.C, layer.A, layer.D, layer.state
        copies = Ring(*(kind(t.cpu()) for t in ring.parts())), *(kind(t.cpu()) for t in others)
        y = plain_ring_multistep(*copies, start.cpu(), layer.saved.cpu(), layer.plan)
        made.append((y, copies[-1]))
    found = []
    for y, state in made[:2]:
        assert y.shape == made[2][0].shape
        assert y.isfinite().all()
        found.append((error(y.to(layer.dtype), made[2][0]), error(state, made[2][1])))
    return found


@pytest.mark.parametrize("settle", [True, False], ids=["settled", "revocable"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_plain_steps_over_a_ring_are_the_recurrence(shape, settle):
    plan = Plan(count=3, steps=4, replay=6, settle=settle)
    layer, start = filled(shape, plan, 4, torch.float64, 0, [0, 1, 3, 6])
    ring, new_C, A, D, state = layer.exact()
    y = plain_ring_multistep(ring, new_C, A, D, state, start, layer.saved, plan)
    for row, at in enumerate(start.tolist()):
        slots = torch.arange(at + 3) % 10
        whole_C = torch.cat((torch.zeros(at, *new_C.shape[2:]), new_C[row])).unsqueeze(0)
        given = ring.x[row : row + 1, slots], ring.B[row : row + 1, slots], whole_C
        parts = ((t, t.shape[2]) for t in given)
        x, B, C = (part.repeat_interleave(layer.heads // groups, 2) for part, groups in parts)
        dt = ring.dt[row : row + 1, slots]
        want, _ = scan_loop(x, dt, A, B, C, D, layer.first[row : row + 1])
        torch.testing.assert_close(y[row], want[0, at:])
        moved = layer.first[row : row + 1]
        if settle and at > 2:
            _, moved = scan_loop(x[:, :at], dt[:, :at], A, B[:, :at], C[:, :at], D, moved)
        torch.testing.assert_close(state[row], moved[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("count", "replay", "form"),
    [
        (1, 2, (16, 1, 0)),
        (9, 9, (32, 1, 16)),
        (17, 64, (16, 1, 0)),
        (1, 2, (32, 1, 0, True, False)),
        (5, 20, (16, 1, 0, True, True)),
    ],
)
def test_in_the_interpreter_the_kernel_is_as_exact_as_pytorch(kernels, dtype, shape, count, replay, form):
    plan = Plan(count=count, steps=min(count, replay), replay=replay, settle=True)
    layer, start = filled(shape, plan, 4, dtype, 1, [0, replay, 1, replay // 2])
    for pieces in (1, 2) if dtype == torch.bfloat16 and replay == 9 else (1,):

        def way(*given, pieces=pieces):
            return kernels.ring_multistep(*given, kernels.Form(*form), pieces)

        (y, state), (plain_y, plain_state) = errors(way, layer, start)
        assert y <= 2 * plain_y + EPS
        assert state <= 2 * plain_state + EPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [(16, 1), (16, 1, 0, False, True), (16, 1, 0, True), (16, 1, 0, True, True)], ids=str)
def test_in_the_interpreter_it_does_not_matter_where_in_the_ring_tokens_lie(kernels, dtype, form):
    """Every first slot, beside slots that hold NaN."""
    plan, slots = Plan(count=3, steps=4, replay=6, settle=True), 11
    starts, replayed = zip(*itertools.product(range(slots, 2 * slots), (0, 1, 3, 6)), strict=True)
    layer = Layer((1, 1, 1, 1, 3, 4), plan, len(starts), dtype, 5, slots)
    start = torch.tensor(starts, dtype=torch.int32)
    layer.saved = start - torch.tensor(replayed, dtype=torch.int32)
    layer.put(layer.saved, plan.replay)
    for row, (at, done) in enumerate(zip(starts, replayed, strict=True)):
        for t in layer.ring.parts():
            t[row, torch.arange(at, at + plan.replay - done) % slots] = torch.nan
    layer.put(start, plan.count)

    def way(*given):
        return kernels.ring_multistep(*given, kernels.Form(*form))

    (y, state), (plain_y, plain_state) = errors(way, layer, start)
    assert y <= 2 * plain_y + EPS
    assert state <= 2 * plain_state + EPS


def test_in_the_interpreter_a_call_that_settles_nothing_leaves_the_checkpoint(kernels):
    plan = Plan(count=2, steps=4, replay=4, settle=False)
    layer, start = filled(SHAPES["odd"], plan, 3, torch.bfloat16, 2, [4, 0, 2])
    state = layer.state.clone()
    kernels.ring_multistep(layer.ring, layer.C, layer.A, layer.D, state, start, layer.saved, plan)
    assert torch.equal(state, layer.state)


def check_rounds(kernels, shape, replay, rounds, device):
    """Any acceptance, ragged rows, a ring that just fits."""
    dice, steps, count, batch = random.Random(replay), 4, 3, 2
    plan = Plan(count=count, steps=steps, replay=replay, settle=True)
    layer = Layer(shape, plan, batch, torch.bfloat16, 3, device=device)
    exact = layer.first.clone()
    plain, saved, start, written = layer.state.clone(), layer.saved, layer.saved.clone(), 0
    for _ in range(rounds):
        layer.put(start, count)
        given = layer.C, layer.A, layer.D
        finished()
        y = kernels.ring_multistep(layer.ring, *given, layer.state, start, saved, plan)
        plain_ring_multistep(layer.ring, *given, plain, start, saved, plan)
        want = plain_ring_multistep(*layer.exact()[:4], exact, start, saved, plan)
        assert error(y, want) < 2**-8
        due = plan.due(start, saved)
        written += int(due.sum())
        saved = torch.where(due, start, saved)
        assert bool((start - saved + steps <= replay).all())
        start = start + torch.tensor([dice.randint(1, count) for _ in range(batch)], dtype=torch.int32, device=device)
    assert error(layer.state, exact) <= 2 * error(plain, exact) + EPS
    assert written == batch * (rounds - 1) if replay == steps else 0 < written < rounds


@pytest.mark.parametrize("replay", [4, 11])
def test_in_the_interpreter_random_rounds_are_the_recurrence_over_what_was_kept(kernels, replay):
    check_rounds(kernels, (1, 1, 1, 1, 3, 4), replay, 40, "cpu")


def test_without_memory_to_time_forms_the_usual_one_serves(kernels, no_memory):
    plan = Plan(count=1, steps=1, replay=4, settle=True)
    layer, _ = filled((4, 4, 1, 1, 64, 16), plan, 2, torch.float32, 1, [0, 4], "cpu")
    no_memory(kernels)
    for _ in range(2):
        form = kernels.form_for(layer.ring, layer.C, layer.A, layer.D, layer.state, plan)
        assert form == kernels.Form(16, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("replay", [4, 11])
def test_on_a_gpu_a_state_is_as_exact_as_pytorch_s_after_a_thousand_rounds(replay):
    check_rounds(pytest.importorskip(room.MODULE), (4, 4, 1, 1, 64, 128), replay, 1000, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("count", "replay"), [(1, 2), (9, 16), (17, 64)])
def test_on_a_gpu_the_kernel_is_as_exact_as_pytorch(dtype, shape, count, replay):
    kernels = pytest.importorskip(room.MODULE)
    plan = Plan(count=count, steps=min(count, replay), replay=replay, settle=True)
    layer, start = filled(shape, plan, 4, dtype, 1, [0, replay, 1, replay // 2], "cuda")
    assert room.supports(layer.ring, layer.C, layer.state, plan)
    (y, state), (plain_y, plain_state) = errors(kernels.ring_multistep, layer, start)
    assert y <= 2 * plain_y + EPS
    assert state <= 2 * plain_state + EPS


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(80, 80, 1, 1, 64, 128), (32, 8, 8, 32, 128, 128)], ids=["Mamba2-2.7B", "8B hybrid"])
@pytest.mark.parametrize("replay", [9, 24])
def test_on_a_gpu_every_form_is_as_exact_as_pytorch(shape, replay):
    kernels = pytest.importorskip(room.MODULE)
    plan = Plan(count=9, steps=9, replay=replay, settle=True)
    layer, start = filled(shape, plan, 4, torch.bfloat16, 1, [0, replay, 1, replay // 2], "cuda")
    arms = list(itertools.product(kernels.forms_for(layer.ring, layer.state, plan), (1, 2)))

    def run(arm, state, start, saved, warmup):
        given = layer.ring, layer.C, layer.A, layer.D, state, start, saved, plan
        return kernels.ring_multistep(*given, *arm, warmup=warmup)

    pytest.importorskip("mambabench.kernels.multistep.forms").compiled(arms, layer.state, run)
    for arm in arms:

        def way(*given, arm=arm):
            return kernels.ring_multistep(*given, *arm)

        (y, state), (plain_y, plain_state) = errors(way, layer, start)
        assert y <= 2 * plain_y + EPS, arm
        assert state <= 2 * plain_state + EPS, arm
