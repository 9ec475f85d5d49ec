"""Steps of a Mamba-2 layer by one kernel are those of separate ones, in Triton's interpreter and on a GPU."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mambabench.kernels import support
from mambabench.kernels.few_rows import Unscaled
from mambabench.kernels.multistep import fused_step as room
from mambabench.kernels.multistep import ring
from mambabench.kernels.multistep.fused_step import Front, Gate, separate_step, tap_by_tap
from mambabench.kernels.multistep.ring import Plan, Ring, Rotation

SHAPES = {
    "one state": (1, 1, 1, 1, 1, 1),
    "odd": (6, 2, 2, 6, 5, 7),
    "x per head": (4, 4, 1, 1, 19, 16),
    "C per head": (4, 2, 2, 4, 16, 16),
    "three kinds of groups": (6, 3, 2, 1, 33, 24),
}
"""H, groups of x, B and C, P, N."""


@pytest.fixture
def kernels(interpret, tensor_cores):
    return interpret(room.MODULE)


class Layer:
    """A layer whose rows have `replayed` tokens between checkpoint and start, around the end of the ring. What nobody
    may read is NaN."""

    def __init__(self, shape, plan, replayed, first, dtype, taps=4, silu=True, device="cpu", seed=0, turned=False):
        heads, *groups, width, size = shape
        self.heads, self.width, self.size, self.plan, self.dtype = heads, width, size, plan, dtype
        batch, self.dice, self.device = len(replayed), torch.Generator().manual_seed(seed), device
        kept = groups[0] * width + groups[1] * size
        channels = kept + groups[2] * size
        slots, window = plan.replay + plan.steps, plan.steps + taps - 1
        whole = torch.full((batch, slots, kept), torch.nan)
        dt = torch.full((batch, slots, heads), torch.nan)
        inputs = torch.full((batch, window, channels + heads), torch.nan)
        start = torch.tensor(first) + torch.tensor(replayed)
        for row, (at, count) in enumerate(zip(start.tolist(), replayed, strict=True)):
            before = torch.arange(at - count, at) % slots
            whole[row, before] = self.normal(count, kept)
            dt[row, before] = 0.1 * self.normal(count, heads).exp()
            inputs[row, torch.arange(at - taps + 1, at) % window] = self.normal(taps - 1, channels + heads)
        projected = self.normal(batch * plan.count, heads * width + channels + heads)
        self.tensors = {
            "projected": projected.to(dtype), "window": inputs.to(dtype), "kept": whole.to(dtype), "dt": dt,
            "weight": self.normal(channels, taps).to(dtype).float(), "bias": self.normal(channels).to(dtype).float(),
            "dt_bias": 3 * self.normal(heads),
            "A": -self.normal(heads).exp(), "D": self.normal(heads), "state": self.normal(batch, heads, width, size),
            "norm": self.normal(heads * width).to(dtype), "gate": self.normal(heads * width),
            "start": start.int(), "saved": torch.tensor(first, dtype=torch.int32),
        }  # fmt: skip
        if turned:
            angles = self.normal(int(start.max()) + plan.count, size // 2).repeat(1, 2)
            self.tensors["rotary"] = torch.stack((angles.cos(), angles.sin()), dim=1).to(dtype)
        self.tensors = {name: t.to(device) for name, t in self.tensors.items()}
        self.sizes, self.silu = [groups[0] * width, groups[1] * size], silu

    left = False

    def normal(self, *shape):
        return torch.randn(shape, generator=self.dice)

    def run(self, way, gate, exact=False):
        """What `way` returns and leaves; exactly: in fp64 on a CPU."""
        kind = (lambda t: t.cpu().double() if t.is_floating_point() else t.cpu()) if exact else (lambda t: t.clone())
        t = {name: kind(one) for name, one in self.tensors.items()}
        batch, inner = t["start"].shape[0], self.heads * self.width
        u = t["projected"][:, inner:].unflatten(0, (batch, self.plan.count))
        x, B = t["kept"].split(self.sizes, dim=2)
        ring = Ring(x.unflatten(2, (-1, self.width)), B.unflatten(2, (-1, self.size)), t["dt"])
        taps = tap_by_tap(t["weight"], t["bias"], t["kept"].dtype)
        rotation = Rotation(t["rotary"], self.sizes[0]) if "rotary" in t else None
        front = Front(t["weight"], t["bias"], t["dt_bias"], t["window"], t["kept"], self.silu, taps, rotation)
        heads, biased = gate
        bias = t["gate"] if biased else None
        gate = Gate(t["norm"], bias, heads * self.width, 1e-5, self.left) if heads else Gate(None, bias)
        cursors = t["start"], t["saved"]
        if t["start"].is_cuda:
            torch.cuda.synchronize()  # which a kernel that begins early does not wait for
        out = way(u, t["projected"][:, :inner], front, ring, t["A"], t["D"], t["state"], *cursors, self.plan, gate)
        if isinstance(out, Unscaled):
            out = out.x.double() / (out.squares.double().sum(1, keepdim=True) / inner + out.eps).sqrt()
        return {"out": out, **{name: t[name] for name in ("state", "kept", "dt", "window")}}


def error(got, want):
    """Relative, of what is a number in both; NaN in the same places."""
    got, want = got.cpu().double(), want.cpu().double()
    assert torch.equal(got.isnan(), want.isnan())
    return float((got - want).nan_to_num().norm() / want.nan_to_num().norm())


def roundings(layer, gate, exact, draws=16):
    """How far off exact steps come out whose convolutions are off by two roundings, at most of a few draws. Where large
    terms cancel that is any multiple of a rounding, and which of two right ways is nearer to the truth is luck."""
    given, dice, found = layer.tensors, torch.Generator().manual_seed(0), []
    for _ in range(draws):
        layer.tensors = dict(given)
        for of in ("projected", "weight", "bias"):
            noise = 2 * torch.rand(given[of].shape, generator=dice, dtype=torch.float64) - 1
            layer.tensors[of] = given[of].cpu().double() * (1 + torch.finfo(layer.dtype).eps * noise)
        found.append(error(layer.run(separate_step, gate, True)["out"], exact["out"]))
    layer.tensors = given
    return max(found)


def check(layer, way, gate):
    """As exact as separate steps in PyTorch, which leave some numbers unrounded, or as their inputs' roundings let it
    be; inputs are kept as they are."""
    exact, plain, made = layer.run(separate_step, gate, True), layer.run(separate_step, gate), layer.run(way, gate)
    assert made["out"].dtype == (torch.float64 if layer.left else layer.dtype)
    assert made["out"].isfinite().all()
    assert torch.equal(made["window"].cpu().nan_to_num(), exact["window"].to(layer.dtype).nan_to_num())
    for name, kind in {"out": layer.dtype, "kept": layer.dtype, "state": torch.float32, "dt": torch.float32}.items():
        once = 2.0**-9 if kind == torch.bfloat16 else 2.0**-21
        off, allowed = error(made[name], exact[name]), 1.5 * error(plain[name].to(kind), exact[name]) + once
        assert off <= allowed or (name == "out" and off <= roundings(layer, gate, exact) + once), name


HEAD, BIASED, ALL = (1, False), (1, True), (-1, True)
"""Gates whose norm is over a head, the same with a bias, and one over all heads."""
BARE, OPEN = (0, False), (0, True)
"""Gates without a norm."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "count", "gate"),
    [
        ("one state", 1, BARE),
        ("one state", 9, HEAD),
        ("odd", 5, BIASED),
        ("odd", 1, ALL),
        ("odd", 3, BARE),
        ("C per head", 5, OPEN),
        ("x per head", 1, BIASED),
        ("x per head", 2, HEAD),
        ("C per head", 3, ALL),
        ("C per head", 1, HEAD),
        ("three kinds of groups", 1, OPEN),
        ("three kinds of groups", 5, HEAD),
    ],
)
def test_in_the_interpreter_one_kernel_is_as_exact_as_separate_ones(kernels, dtype, shape, count, gate):
    plan = Plan(count=count, steps=max(5, count), replay=max(7, count), settle=True)
    layer = Layer(SHAPES[shape], plan, [0, plan.replay, 3], [0, 1003, 10], dtype, silu=shape != "C per head")
    normed = gate in (HEAD, BIASED)
    form = kernels.Form(64 if normed else 16, 1, normed)
    check(layer, lambda *given: kernels.fused_step(*given, form), (layer.heads, True) if gate == ALL else gate)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.sampled_from([(6, 2, 2, 6), (4, 4, 1, 1), (6, 3, 2, 1), (8, 4, 4, 8)]),
    width=st.integers(1, 17),
    half=st.integers(1, 16),
    count=st.sampled_from([1, 2, 3, 5, 9]),
    taps=st.integers(1, 5),
    rows=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 60)), min_size=1, max_size=3),
    silu=st.booleans(),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_in_the_interpreter_b_and_c_may_be_rotated(
    kernels, groups, width, half, count, taps, rows, silu, biased, dtype, seed
):
    """Rows at any place of the ring, up to the last position that there is an angle for. Without a norm, behind which
    errors of heads that come out near 0 are any size."""
    plan = Plan(count=count, steps=count, replay=10, settle=True)
    replayed, first = (list(numbers) for numbers in zip(*rows, strict=True))
    shape = (*groups, width, 2 * half)
    layer = Layer(shape, plan, replayed, first, dtype, taps, silu, seed=seed, turned=True)
    check(layer, lambda *given: kernels.fused_step(*given, kernels.Form(16, 2)), (0, biased))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 5])
def test_in_the_interpreter_a_norm_may_stand_behind_what_is_rotated(kernels, dtype, count):
    plan = Plan(count=count, steps=5, replay=7, settle=True)
    layer = Layer(SHAPES["C per head"], plan, [0, 7, 3], [0, 1003, 10], dtype, turned=True)
    check(layer, lambda *given: kernels.fused_step(*given, kernels.Form(16, 1, True)), BIASED)


@pytest.mark.parametrize("shape", ["odd", "three kinds of groups"])
@pytest.mark.parametrize("count", [1, 3])
def test_in_the_interpreter_the_norm_s_division_may_be_left(kernels, shape, count):
    plan = Plan(count=count, steps=3, replay=4, settle=True)
    layer = Layer(SHAPES[shape], plan, [4, 1], [0, 6], torch.bfloat16)
    layer.left = True

    def way(*given):
        found = kernels.fused_step(*given, kernels.Form(16, 2))
        assert isinstance(found, Unscaled)
        return found

    check(layer, way, (layer.heads, True))


@pytest.mark.parametrize("taps", [1, 2, 6])
def test_in_the_interpreter_convolutions_may_have_other_widths(kernels, taps):
    plan = Plan(count=2, steps=3, replay=3, settle=False)
    layer = Layer(SHAPES["odd"], plan, [3, 0], [2, 0], torch.bfloat16, taps)
    check(layer, kernels.fused_step, OPEN)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"taps": 9}, "convolutions of up to 8 taps, not 9"),
        ({"count": 17}, "calls of up to 16 tokens"),
        ({"replay": 33}, "replays of up to 32"),
        ({"dtype": torch.float16}, "does not serve float16"),
        ({"angles": torch.float32}, "contiguous cos and sin in the inputs' dtype"),
        ({"gate": (2, True)}, "the product behind divides whole rows"),
        ({"faster": False}, "separate kernels are faster for 2 rows of 3 tokens"),
    ],
    ids=str,
)
def test_a_reason_is_given_where_separate_kernels_run(monkeypatch, asked, changes, reason):
    case = {"taps": 4, "count": 3, "replay": 5, "dtype": torch.bfloat16, "gate": (4, True), "faster": True} | changes
    case = {"angles": case["dtype"]} | case
    monkeypatch.setattr(support, "on_cuda", lambda tensor: True)
    for module in (ring, room):
        monkeypatch.setattr(module, "kernel", lambda module, name: lambda *given: case["faster"])
        monkeypatch.setattr(module, "installed", lambda module: support.Support.yes(), raising=False)
    plan = Plan(case["count"], max(3, case["count"]), max(case["replay"], case["count"]), settle=True)
    layer = Layer(SHAPES["C per head"], plan, [1, 2], [0, 4], case["dtype"], case["taps"], turned=True)
    layer.tensors["rotary"] = layer.tensors["rotary"].to(case["angles"])
    layer.left = True
    found = layer.run(lambda *given: given, case["gate"])["out"]
    u, z, front, rings, _, _, state, *_, gate = found
    assert reason in room.supports(u, z, front, rings, state, plan, gate).reason
    assert bool(reason) is not bool(room.supports(u, z, front, rings, state, plan, gate))


@pytest.mark.parametrize(
    ("shape", "replay", "gate", "form"),
    [
        ((8, 4, 4, 8, 64, 64), 16, HEAD, (64, 4, True)),
        ((8, 4, 4, 8, 33, 64), 16, BIASED, (64, 4, True)),
        ((8, 4, 4, 8, 64, 64), 17, HEAD, (16, 4, False)),
        ((8, 4, 4, 8, 64, 65), 16, HEAD, (16, 4, False)),
        ((8, 4, 4, 8, 8, 8), 17, HEAD, (16, 4, True)),
        ((8, 4, 4, 8, 64, 64), 16, OPEN, (16, 4, False)),
        ((8, 4, 4, 8, 64, 64), 16, (8, True), (16, 4, False)),
    ],
    ids=str,
)
def test_a_head_that_is_small_has_its_norm_inside_before_anything_is_measured(kernels, shape, replay, gate, form):
    """As long as there is a form that makes it, in which products of 64 rows are trusted."""
    plan = Plan(count=1, steps=1, replay=replay, settle=True)
    layer = Layer(shape, plan, [0], [0], torch.bfloat16)
    u, z, front, rings, _, _, state, *_, gate = layer.run(lambda *given: given, gate)["out"]
    assert kernels.form_for(u, z, front, rings, state, plan, gate) == form
    assert not form[2] or form[0] == kernels.forms_for(state, plan, gate)[0].block
    many = state.expand(kernels.FEW + 1, *state.shape[1:])
    assert kernels.form_for(u, z, front, rings, many, plan, gate) is None


@pytest.fixture
def chosen(kernels, timed_by, monkeypatch):
    """Chooses as a new process does that times forms as the table says, in milliseconds. Has their calls."""
    calls = {}

    def choose(times, settle=True):
        def ms(turns):
            form = turns[0].args[0]
            calls[form] = turns[0]
            return times.get(form, 2.0)

        timed_by(ms)
        plan = Plan(count=2, steps=3, replay=4, settle=settle)
        layer = Layer(SHAPES["C per head"], plan, [1, 2], [0, 4], torch.float32)
        u, z, front, rings, _, _, state, *_, gate = layer.run(lambda *given: given, HEAD)["out"]
        monkeypatch.setattr(kernels, "_best", {})
        monkeypatch.setattr(kernels, "measurable", lambda *_: True)
        return kernels.form_for(u, z, front, rings, state, plan, gate)

    choose.calls = calls
    return choose


def test_all_processes_choose_alike_where_two_ways_are_as_fast(kernels, chosen):
    inside, apart = kernels.Form(16, 1, True), kernels.Form(16, 4)
    assert chosen({inside: 1.03, apart: 1.0}) == apart
    assert chosen({inside: 1.0, apart: 1.03}) == apart
    assert chosen({inside: 1.03, apart: 1.03, None: 1.0}) == apart
    # Calls that write no checkpoint are other ones.
    assert chosen({inside: 1.03, apart: 1.03, None: 1.0}, settle=False) is None


def test_without_memory_to_time_forms_the_usual_one_serves(kernels, chosen, monkeypatch):
    def full(like):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as without:
        without.setattr(torch, "zeros_like", full)
        assert chosen({None: 1.0}) == kernels.Form(16, 4, True)
    assert chosen({None: 1.0}) is None
    monkeypatch.setattr(torch, "zeros_like", full)
    assert chosen({}) is None, "what is chosen needs no memory"


def test_steps_are_timed_behind_another_kernel(kernels, chosen, monkeypatch):
    """In a layer that is a product, never the steps of another layer."""
    chosen({})
    ran = []
    for name in ("fused_step", "separate_step"):
        monkeypatch.setattr(kernels, name, lambda *given, name=name, **named: ran.append(name))

    class Launched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            ran.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with Launched():
        for form in (kernels.Form(16, 4), None):
            chosen.calls[form]()
    assert ran == ["mul_", "fused_step", "mul_", "separate_step"]


TURNED = {f"{name}, rotated": (shape, True) for name, shape in SHAPES.items() if shape[5] % 2 == 0}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "turned"), [*((shape, False) for shape in SHAPES.values()), *TURNED.values()], ids=[*SHAPES, *TURNED]
)
@pytest.mark.parametrize(("count", "replay"), [(1, 2), (5, 16), (9, 24)])
@pytest.mark.parametrize("gate", [BIASED, OPEN], ids=["norm", "no norm"])
@pytest.mark.parametrize("way", ["one kernel", "separate kernels"])
def test_on_a_gpu_one_kernel_is_as_exact_as_separate_ones(dtype, shape, turned, count, replay, gate, way):
    kernels = pytest.importorskip(room.MODULE)
    plan = Plan(count=count, steps=count, replay=replay, settle=True)
    layer = Layer(shape, plan, [0, replay, 1, replay // 2], [0, 3, 1003, 10], dtype, device="cuda", turned=turned)
    check(layer, kernels.fused_step if way == "one kernel" else separate_step, gate)


LARGE = {"Mamba2-2.7B": (80, 80, 1, 1, 64, 128), "8B hybrid": (32, 8, 8, 32, 128, 128)}
FORMED = {
    **{name: (shape, False) for name, shape in LARGE.items()},
    "8B hybrid, rotated": (LARGE["8B hybrid"], True),
    "28M hybrid, rotated": ((8, 4, 4, 8, 64, 64), True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["divided", "not divided", "no norm"])
@pytest.mark.parametrize(("shape", "turned"), FORMED.values(), ids=FORMED)
@pytest.mark.parametrize("count", [1, 5, 9])
def test_on_a_gpu_every_form_is_as_exact_as_separate_kernels(shape, turned, count, way):
    kernels = pytest.importorskip(room.MODULE)
    plan = Plan(count=count, steps=count, replay=16, settle=True)
    layer = Layer(shape, plan, [0, 16, 16 - count], [0, 3, 1003], torch.bfloat16, device="cuda", turned=turned)
    layer.left = way == "not divided"
    gate = {"divided": BIASED, "not divided": (layer.heads, True), "no norm": OPEN}[way]
    forms = layer.run(lambda *given: tuple(kernels.forms_for(given[6], *given[9:])), gate)["out"]
    assert forms
    for form in forms:
        check(layer, lambda *given, form=form: kernels.fused_step(*given, form), gate)


@pytest.mark.gpu
def test_on_a_gpu_the_faster_way_is_chosen_once_for_a_large_layer(monkeypatch):
    kernels = pytest.importorskip(room.MODULE)
    monkeypatch.setattr(kernels, "_best", {})
    layer = Layer(LARGE["8B hybrid"], Plan(2, 2, 16, True), [0, 4], [0, 3], torch.bfloat16, device="cuda")
    check(layer, room.fused_step, (1, False))
    (form,) = kernels._best.values()
    assert form is None or form in layer.run(lambda *given: kernels.forms_for(given[6], *given[9:]), (1, False))["out"]
    check(layer, room.fused_step, (1, False))
    assert list(kernels._best.values()) == [form]
