"""Mamba-1 steps over a ring are the recurrence over what was kept, in PyTorch, in Triton's interpreter and on a GPU."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mambabench.kernels.multistep import Channels, Plan, Projected
from mambabench.kernels.multistep import selective_ring as room
from mambabench.kernels.multistep.selective_ring import plain_selective_ring_multistep
from mambabench.kernels.selective_scan import selective_scan_loop

EPS = 2.0**-22
"""Two roundings to fp32, of which plain PyTorch may make none."""


POSITIONS = 4096
"""That there are angles for."""


def shape(channels=6, size=5, groups=2, c_groups=3, repeat=1, span=1, taps=4, silu=True, gate="none", turned=0):
    """`turned`: as many numbers of B and C are rotated together, if they are."""
    return SimpleNamespace(**locals())


SHAPES = {
    "one of each": shape(1, 1, 1, 1, taps=1),
    "odd": shape(),
    "Mamba-1": shape(37, 16, 1, 1, gate="plain"),
    "the paper's": shape(64, 4, 4, 16, repeat=4, span=8, gate="open"),
    "its released order": shape(64, 4, 4, 16, repeat=4, span=4, gate="plain"),
    "no SiLU, long window": shape(12, 3, 2, 4, repeat=2, span=3, taps=6, silu=False, gate="open"),
    "two taps": shape(40, 2, 40, 1, taps=2),
    "rotated": shape(64, 4, 4, 16, repeat=4, span=8, gate="open", turned=8),
    "rotated within a group": shape(12, 6, 2, 4, gate="plain", turned=6),
}


class Layer:
    """A ring whose unwritten slots hold NaN but for the window before the first token, and every token of a row."""

    def __init__(self, shape, plan, batch, dtype, seed, device="cpu"):
        self.shape, self.plan, self.batch, self.dtype, self.device = shape, plan, batch, dtype, device
        self.dice = torch.Generator().manual_seed(seed)
        sources = shape.channels // shape.repeat
        self.sizes = sources, shape.groups * shape.size, shape.channels
        slots = plan.replay + plan.steps + shape.taps - 1
        self.ring = torch.full((batch, slots, sum(self.sizes)), torch.nan, dtype=dtype, device=device)
        self.ring[:, slots - shape.taps + 1 :] = 0
        self.channels = Channels(
            A=-self.normal(shape.channels, shape.size).exp(),
            D=self.normal(shape.channels),
            dt_bias=self.normal(shape.channels) - 2,
            weight=self.normal(shape.channels, shape.taps),
            bias=self.normal(shape.channels),
            silu=shape.silu,
            gate_bias=self.normal(shape.channels) if shape.gate == "open" else None,
            repeat=shape.repeat,
            span=shape.span,
        )
        angles = self.normal(POSITIONS, shape.turned // 2).double()
        self.spins = torch.polar(torch.ones_like(angles), angles)
        angles = angles.repeat(1, 2)
        self.rotary = torch.stack((angles.cos(), angles.sin()), dim=1).to(dtype) if shape.turned else None
        self.state = self.normal(batch, shape.channels, shape.size)
        self.first, self.saved = self.state.double(), torch.zeros(batch, dtype=torch.int32, device=device)

    def normal(self, *sizes):
        return torch.randn(sizes, generator=self.dice).to(self.device)

    def tokens(self, count):
        """Views of one matrix, as a projection's parts are."""
        widths = *self.sizes[:2], self.shape.c_groups * self.shape.size, self.shape.channels, self.shape.channels
        x, b, c, dt, z = self.normal(self.batch, count, sum(widths)).to(self.dtype).split(widths, dim=2)
        return Projected(x, b, c, dt, None if self.shape.gate == "none" else z, self.rotary)

    def exact(self):
        """The parameters in fp64."""
        names = "A", "D", "dt_bias", "weight", "bias", "gate_bias"
        found = {name: getattr(self.channels, name) for name in names}
        return replace(self.channels, **{name: None if t is None else t.double() for name, t in found.items()})


def exact_tokens(new):
    return Projected(*(None if t is None else t.double() for t in (new.x, new.B, new.C, new.dt, new.z, new.rotary)))


def filled(shape, plan, batch, dtype, seed, starts, device="cpu"):
    """A layer whose rows have `starts` tokens behind their checkpoint."""
    layer = Layer(shape, plan, batch, dtype, seed, device)
    if plan.replay:
        text = layer.tokens(plan.replay)
        kept = torch.cat((text.x, text.B, text.dt), dim=2)
        for row, at in enumerate(starts):
            layer.ring[row, :at] = kept[row, :at]
    return layer, torch.tensor(starts, dtype=torch.int32, device=device)


def spun(layer, numbers, at):
    """B or C [T, …] of a row from position `at` on, rotated as complex numbers."""
    if not layer.shape.turned:
        return numbers
    first, second = numbers.unflatten(1, (-1, 2, layer.shape.turned // 2)).unbind(2)
    found = torch.complex(first, second) * layer.spins[at : at + len(numbers)].unsqueeze(1)
    return torch.stack((found.real, found.imag), dim=2).flatten(1)


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


def finished(device):
    """All inputs are written, which a kernel that begins early does not wait for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def errors(way, layer, start):
    """Of y and of the state, against fp64, and of plain PyTorch with the inputs' dtypes; y is rounded to x's dtype."""
    new, exact, ring = layer.tokens(layer.plan.count), layer.state.double(), layer.ring.double()
    y = plain_selective_ring_multistep(exact_tokens(new), layer.exact(), ring, exact, start, layer.saved, layer.plan)
    found, rings = [], []
    for run in (way, plain_selective_ring_multistep):
        state, rings = layer.state.clone(), [*rings, layer.ring.clone()]
        finished(state.device)
        made = run(new, layer.channels, rings[-1], state, start, layer.saved, layer.plan).to(layer.dtype)
        assert made.shape == y.shape
        assert made.isfinite().all()
        found.append((error(made, y), error(state, exact)))
    check_rings(layer, *rings, ring)
    return found


def check_rings(layer, made, plain, exact):
    """What is kept is kept as it is, and a rotated B as near to fp64 as PyTorch's."""
    before, turned, behind = zip(*(t.split(layer.sizes, dim=2) for t in (made, plain, exact)), strict=True)
    for one, two in (before[:2], behind[:2]):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    if not layer.shape.turned:
        torch.testing.assert_close(*turned[:2], rtol=0, atol=0, equal_nan=True)
        return
    assert torch.equal(turned[0].isnan(), turned[1].isnan())
    one, two, truth = (t.double().nan_to_num() for t in turned)
    assert error(one, truth) <= error(two, truth) + EPS


@pytest.mark.parametrize("settle", [True, False], ids=["settled", "revocable"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_plain_steps_over_a_ring_are_the_recurrence(shape, settle):
    plan = Plan(count=3, steps=4, replay=6, settle=settle)
    layer, start = filled(shape, plan, 4, torch.float64, 0, [0, 1, 3, 6])
    new, channels, state = layer.tokens(3), layer.exact(), layer.state.double()
    y = plain_selective_ring_multistep(new, channels, layer.ring, state, start, layer.saved, plan)
    for row, at in enumerate(start.tolist()):
        slots = torch.arange(1 - shape.taps, at + 3) % layer.ring.shape[1]
        x, b, raw = layer.ring[row : row + 1, slots].split(layer.sizes, dim=2)
        x = sum(x[:, tap : tap + at + 3, channels.source()] * channels.weight[:, tap] for tap in range(shape.taps))
        x = F.silu(x + channels.bias) if shape.silu else x + channels.bias
        groups = channels.source() // (layer.sizes[0] // shape.groups)
        torch.testing.assert_close(b[0, -3:], spun(layer, new.B[row], at))
        b = b[:, shape.taps - 1 :].unflatten(2, (-1, shape.size))[:, :, groups]
        c = spun(layer, new.C[row], at).unsqueeze(0).unflatten(2, (-1, shape.size))
        c = F.pad(c.repeat_interleave(shape.channels // shape.c_groups, 2), (0, 0, 0, 0, at, 0))
        given, first = (x, raw[:, shape.taps - 1 :], channels.A, b, c, channels.D, channels.dt_bias), layer.first[row]
        want, _ = selective_scan_loop(*given, state=first.unsqueeze(0))
        want = want[0, at:]
        if new.z is not None:
            want = want * F.silu(new.z[row] + (0 if channels.gate_bias is None else channels.gate_bias))
        torch.testing.assert_close(y[row], want)
        if settle and at > 2:
            before = [t[:, :at] if i in (0, 1, 3, 4) else t for i, t in enumerate(given)]
            first = selective_scan_loop(*before, state=first.unsqueeze(0))[1][0]
        torch.testing.assert_close(state[row], first)


@pytest.fixture
def kernels(interpret, tensor_cores):
    return interpret(room.MODULE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("count", "replay", "form"), [(1, 2, (32, 1, 4)), (5, 5, (32, 1, 1)), (9, 12, (64, 2, 2))])
def test_in_the_interpreter_the_kernel_is_as_exact_as_pytorch(kernels, dtype, shape, count, replay, form):
    plan = Plan(count=count, steps=min(count, replay), replay=replay, settle=True)
    layer, start = filled(shape, plan, 4, dtype, 1, [0, replay, 1, replay // 2])
    form = kernels.Form(*form)
    if form not in (found := kernels.forms_for(layer.state)):
        form = found[-1] if found else kernels.Form(32, 1, 1)

    def way(*given):
        return kernels.selective_ring_multistep(*given, form)

    (y, state), (plain_y, plain_state) = errors(way, layer, start)
    assert y <= 2 * plain_y + EPS
    assert state <= 2 * plain_state + EPS


def test_in_the_interpreter_a_call_that_settles_nothing_leaves_the_checkpoint(kernels):
    plan = Plan(count=2, steps=4, replay=4, settle=False)
    layer, start = filled(SHAPES["odd"], plan, 3, torch.bfloat16, 2, [4, 0, 2])
    state = layer.state.clone()
    kernels.selective_ring_multistep(layer.tokens(2), layer.channels, layer.ring, state, start, layer.saved, plan)
    assert torch.equal(state, layer.state)


def together(size, groups, c_groups, heads):
    """Numbers that may be rotated together: a group's, two groups', or none."""
    wanted = heads * size
    return wanted if wanted % 2 == groups * size % max(wanted, 1) == c_groups * size % max(wanted, 1) == 0 else 0


sizes = st.builds(
    lambda size, groups, per_group, c_groups, repeat, spans, taps, heads, silu, gate: shape(
        channels=groups * per_group * c_groups * repeat * (spans if repeat > 1 else 1),
        size=size,
        groups=groups,
        c_groups=c_groups,
        repeat=repeat,
        span=groups * per_group * c_groups if repeat > 1 else 1,
        taps=taps,
        silu=silu,
        gate=gate,
        turned=together(size, groups, c_groups, heads),
    ),
    *(st.integers(1, most) for most in (9, 3, 3, 3, 3, 2, 5)),
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from(["none", "plain", "open"]),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=sizes,
    seed=st.integers(0, 1000),
    count=st.integers(1, 6),
    longer=st.integers(0, 5),
    row=st.data(),
    settle=st.booleans(),
)
def test_in_the_interpreter_any_call_is_pytorch_s_and_a_call_again_is_the_call(
    kernels, shape, seed, count, longer, row, settle
):
    plan = Plan(count=count, steps=count, replay=count + longer, settle=settle)
    starts = row.draw(st.lists(st.integers(0, plan.replay), min_size=2, max_size=2))
    layer, start = filled(shape, plan, 2, torch.float32, seed, starts)
    new, exact, ring = layer.tokens(count), layer.state.double(), layer.ring.double()
    want = plain_selective_ring_multistep(exact_tokens(new), layer.exact(), ring, exact, start, layer.saved, plan)
    given = new, layer.channels, layer.ring, layer.state, start
    first = kernels.selective_ring_multistep(*given, layer.saved, plan)
    torch.testing.assert_close(first.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.state.double(), exact, rtol=1e-4, atol=1e-5)
    kept, saved = layer.ring.clone(), torch.where(plan.due(start, layer.saved), start, layer.saved)
    again = kernels.selective_ring_multistep(*given, saved, plan)
    torch.testing.assert_close(again, first, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.ring.nan_to_num(7), kept.nan_to_num(7))


def check_rounds(kernels, shape, replay, rounds, device):
    """Any acceptance, ragged rows, a ring that just fits."""
    dice, steps, count, batch = random.Random(replay), 4, 3, 2
    plan = Plan(count=count, steps=steps, replay=replay, settle=True)
    layer = Layer(shape, plan, batch, torch.bfloat16, 3, device=device)
    plain, exact, rings = layer.state.clone(), layer.first.clone(), [layer.ring.clone(), layer.ring.double()]
    saved, start, written = layer.saved, layer.saved.clone(), 0
    for _ in range(rounds):
        new = layer.tokens(count)
        finished(device)
        y = kernels.selective_ring_multistep(new, layer.channels, layer.ring, layer.state, start, saved, plan)
        plain_selective_ring_multistep(new, layer.channels, rings[0], plain, start, saved, plan)
        exactly = exact_tokens(new), layer.exact(), rings[1], exact
        assert error(y, plain_selective_ring_multistep(*exactly, start, saved, plan)) < (
            2**-7 if shape.turned else 2**-8
        )
        due = plan.due(start, saved)
        written += int(due.sum())
        saved = torch.where(due, start, saved)
        assert bool((start - saved + steps <= replay).all())
        start = start + torch.tensor([dice.randint(1, count) for _ in range(batch)], dtype=torch.int32, device=device)
    check_rings(layer, layer.ring, *rings)
    assert error(layer.state, exact) <= 2 * error(plain, exact) + EPS
    assert written == batch * (rounds - 1) if replay == steps else 0 < written < batch * rounds


@pytest.mark.parametrize(("shape", "replay"), [("the paper's", 4), ("the paper's", 11), ("rotated", 11)])
def test_in_the_interpreter_random_rounds_are_the_recurrence_over_what_was_kept(kernels, shape, replay):
    check_rounds(kernels, SHAPES[shape], replay, 30, "cpu")


def test_layers_with_as_large_states_have_their_own_form(kernels, monkeypatch, tmp_path):
    """Where they read other amounts beside these: models on one machine choose for each other."""
    plan = Plan(count=1, steps=1, replay=4, settle=True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernels, "measurable", lambda *_: True)
    timed = []
    monkeypatch.setattr(kernels, "tune", lambda *given: timed.append(given) or kernels.FORMS[1])
    layers = shape(64, 4, 1, 1), shape(64, 4, 16, 1), shape(64, 4, 1, 16), shape(64, 4, 1, 1, gate="plain")
    for number, of in enumerate(layers, 1):
        layer, _ = filled(of, plan, 2, torch.float32, 1, [0, 4])
        given = layer.channels, layer.ring, layer.state, plan
        for _ in range(2):
            monkeypatch.setattr(kernels, "_best", {})
            assert kernels.form_for(layer.tokens(1), *given) == kernels.FORMS[1]
        assert len(timed) == number


def test_without_memory_to_time_forms_the_usual_one_serves(kernels, no_memory):
    plan = Plan(count=1, steps=1, replay=4, settle=True)
    layer, _ = filled(SHAPES["the paper's"], plan, 2, torch.float32, 1, [0, 4])
    no_memory(kernels)
    for _ in range(2):
        form = kernels.form_for(layer.tokens(1), layer.channels, layer.ring, layer.state, plan)
        assert form == kernels.FORMS[0]


LARGE = {
    "Mamba-2.8B": shape(5120, 16, 1, 1, gate="plain"),
    "the paper's": shape(4096, 16, 64, 256, repeat=4, span=128, gate="plain"),
    "the paper's, rotated": shape(4096, 16, 64, 256, repeat=4, span=128, gate="plain", turned=128),
}


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "replay"), [("the paper's", 4), ("the paper's", 11), ("the paper's, rotated", 11)])
def test_on_a_gpu_a_state_is_as_exact_as_pytorch_s_after_a_thousand_rounds(shape, replay):
    check_rounds(pytest.importorskip(room.MODULE), LARGE[shape], replay, 1000, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGE.values()], ids=[*SHAPES, *LARGE])
@pytest.mark.parametrize(("count", "replay"), [(1, 4), (9, 9), (17, 40)])
def test_on_a_gpu_every_form_is_as_exact_as_pytorch(dtype, shape, count, replay):
    kernels = pytest.importorskip(room.MODULE)
    plan = Plan(count=count, steps=min(count, replay), replay=replay, settle=True)
    layer, start = filled(shape, plan, 4, dtype, 1, [0, replay, 1, replay // 2], "cuda")
    assert room.supports(layer.tokens(1), layer.channels, layer.ring, layer.state)

    def run(form, state, start, saved, warmup):
        given = layer.tokens(count), layer.channels, layer.ring, state, start, saved, plan
        return kernels.selective_ring_multistep(*given, form, warmup)

    pytest.importorskip("mambabench.kernels.multistep.forms").compiled(kernels.forms_for(layer.state), layer.state, run)
    for form in kernels.forms_for(layer.state):

        def way(*given, form=form):
            return kernels.selective_ring_multistep(*given, form)

        (y, state), (plain_y, plain_state) = errors(way, layer, start)
        assert y <= 2 * plain_y + EPS, form
        assert state <= 2 * plain_state + EPS, form
