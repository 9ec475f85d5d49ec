"""The decoding step of Mamba layers from a checkpoint and a ring, beside mamba-ssm's kernels (`nox -s kernels`).

Every row has 8 drafts, of which 0 to 8 are accepted with equal chances, and stands somewhere between two writes of its
checkpoint: calls go through successive rounds.
"""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mambabench.backends import state as states
from mambabench.backends.config import HybridConfig
from mambabench.kernels import support
from mambabench.kernels.few_rows import Unscaled
from mambabench.kernels.multistep import (
    Plan,
    convolve,
    multistep_loop,
    ring_multistep,
    selective_multistep_loop,
    selective_ring_multistep,
)
from mambabench.kernels.multistep.fused_step import fused_step, separate_step
from mambabench.kernels.scan.fused import TUNED
from mambabench.kernels.support import Support
from mambabench.kernels.tuning import compile_side_by_side
from torch import Tensor

TOKENS = 9
"""K + 1."""
MAMBA1 = Plan(TOKENS, TOKENS, TOKENS, True)
"""A ring as long as the engine's."""
ROUNDS = 64
BATCHES = (1, 16, 64)


def sizes(*shapes: str, tiny: bool = True) -> pytest.MarkDecorator:
    real = [pytest.param(*both, marks=pytest.mark.gpu) for both in itertools.product(shapes, BATCHES)]
    return pytest.mark.parametrize(("shape", "batch"), [*([("tiny", 2)] if tiny else []), *real])


layers2, layers1 = ("Mamba2-2.7B", "Mamba2-paper"), ("Mamba1-2.8B", "Mamba1-paper")


@pytest.fixture
def group(request: pytest.FixtureRequest) -> str:
    """A kernel and its peers are shown together."""
    given, family = request.node.callspec.params, request.node.originalname.split("_")[1]
    return f"{family}, {given['shape']}, batch {given['batch']}"


@pytest.fixture
def plan(inputs: SimpleNamespace, shape: str) -> Plan:
    """Of a Mamba-2 layer, whose ring is as long as the engine's."""
    return Plan(TOKENS, TOKENS, inputs.REPLAYED[shape], True)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("Mamba2-2.7B", {"mamba_heads": 80, "mamba_head_dim": 64, "mamba_states": 128, "mamba_groups": 1}),
        ("Mamba2-paper", {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}),
        ("Mamba2-28M", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}),
    ],
)
def test_rings_are_as_long_as_the_engine_s(inputs: SimpleNamespace, monkeypatch, shape: str, sizes: Any) -> None:
    monkeypatch.setattr(states, "ring_supports", lambda *given: Support.yes())
    for variable in (states.VARIABLE, support.VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    config = HybridConfig(mixers=["mamba2"], **sizes)
    layer = inputs.MAMBA2[shape]
    assert config.mamba2 == (layer.heads, layer.width, layer.size, *layer[1:4], layer.normed)
    assert states.replayable(config, torch.empty(0, dtype=torch.bfloat16), TOKENS) == inputs.REPLAYED[shape]


def heads_of(t: Tensor, groups: int) -> Tensor:
    """[B, …, G, N] as a peer takes it: fewer groups one after the other."""
    return t.repeat_interleave(groups // t.shape[-2], -2).contiguous()


@sizes(*layers2)
def test_mamba2_step(
    cold, inputs: SimpleNamespace, device: torch.device, assert_near, shape: str, batch: int, plan: Plan
) -> None:
    rounds = inputs.turns(plan, batch, ROUNDS, device)
    now = itertools.cycle(rounds)

    def make() -> tuple[Any]:
        return (inputs.Mamba2(inputs.MAMBA2[shape], batch, plan, device),)

    moved = make()[0].step_bytes(*inputs.means(plan, rounds))
    found = cold(make, lambda layer: ring_multistep(*layer.step(next(now))), moved=moved, calls=ROUNDS)
    (layer,) = cold.inputs(make)
    x, dt, B, C = layer.tokens(rounds[0], 0)
    exact = [t.double() for t in (layer.A, layer.D, layer.state[:1])]
    assert_near(found[:1], multistep_loop(x, dt, exact[0], B, C, *exact[1:], False))


@sizes(*layers2)
def test_mamba2_convolution(
    cold, inputs: SimpleNamespace, device: torch.device, assert_near, shape: str, batch: int, plan: Plan
) -> None:
    starts = [turn.start for turn in inputs.turns(plan, batch, ROUNDS, device)]
    now = itertools.cycle(starts)

    def make() -> tuple[Any]:
        return (inputs.Mamba2(inputs.MAMBA2[shape], batch, plan, device),)

    def run(layer: Any) -> tuple[Tensor, ...]:
        return convolve(*layer.convolution(next(now))), layer.whole, layer.dt

    found = cold(make, run, moved=make()[0].convolution_bytes())
    (layer,) = cold.inputs(make)
    row, start = batch - 1, int(starts[0][batch - 1])
    before = layer.window[row, torch.arange(start - inputs.TAPS + 1, start) % layer.window.shape[1]]
    joined, channels = torch.cat((before, layer.u[row])).double(), len(layer.weight)
    convolved = (joined[:, :channels].unfold(0, inputs.TAPS, 1) * layer.weight).sum(2) + layer.bias
    kept, left = F.silu(convolved).tensor_split((layer.whole.shape[2],), dim=1)
    slots = torch.arange(start, start + TOKENS) % layer.whole.shape[1]
    dt = F.softplus(layer.u[row, :, channels:].double() + layer.dt_bias)
    assert_near([found[0][row], found[1][row, slots], found[2][row, slots]], [left, kept, dt])


@sizes(*layers2)
@pytest.mark.parametrize("form", ["ours", "separate"])
def test_mamba2_between_projections(
    cold, inputs: SimpleNamespace, device: torch.device, assert_near, shape: str, batch: int, plan: Plan, form: str
) -> None:
    """Convolution, step, gate and norm: in one kernel if that is the faster way, and in one for each."""
    rounds = inputs.turns(plan, batch, ROUNDS, device)
    now, way = itertools.cycle(rounds), fused_step if form == "ours" else separate_step

    def make() -> tuple[Any]:
        return (inputs.Mamba2(inputs.MAMBA2[shape], batch, plan, device),)

    moved = make()[0].fused_step_bytes(*inputs.means(plan, rounds))
    found = cold(make, lambda layer: way(*layer.fused_step(next(now))), moved=moved, calls=ROUNDS)
    found = found.divided() if isinstance(found, Unscaled) else found
    (layer,) = cold.inputs(make)
    first = type(rounds[0])(*(at[:1] for at in rounds[0]))
    assert_near(found[:TOKENS], separate_step(*layer.row(0).fused_step(first)), within=2.0**-6)


@sizes(*layers2, tiny=False)
def test_mamba2_update_of_causal_conv1d(
    cold, inputs: SimpleNamespace, device: torch.device, assert_near, shape: str, batch: int
) -> None:
    update = pytest.importorskip("causal_conv1d").causal_conv1d_update

    def make() -> tuple[Tensor, ...]:
        layer = inputs.Mamba2(inputs.MAMBA2[shape], batch, Plan(1, 1, 1, True), device)
        x = layer.u[:, 0, : len(layer.weight)].contiguous()
        window = torch.randn(*x.shape, inputs.TAPS - 1, device=device).bfloat16()
        return x, window, layer.weight.bfloat16(), layer.bias.bfloat16()

    channels = len(inputs.Mamba2(inputs.MAMBA2[shape], 1, Plan(1, 1, 1, True), device).weight)
    found = cold(make, lambda *given: update(*given, "silu"), moved=2 * 2 * batch * channels * inputs.TAPS)
    x, window, weight, bias = (t.double() for t in cold.inputs(make))
    assert_near(found, F.silu((torch.cat((window, x.unsqueeze(2)), dim=2) * weight).sum(2) + bias))


@sizes(*layers2, tiny=False)
def test_mamba2_update_of_mamba_ssm(
    cold, inputs: SimpleNamespace, device: torch.device, assert_near, shape: str, batch: int
) -> None:
    update = pytest.importorskip("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    sizes = inputs.MAMBA2[shape]
    groups = max(sizes.b_groups, sizes.c_groups)

    def make() -> tuple[Tensor, ...]:
        layer = inputs.Mamba2(sizes, batch, Plan(1, 1, 1, True), device)
        x, B, C = (t[:, 0] for t in (layer.ring.x, layer.ring.B, layer.C))
        dt = layer.u[:, 0, : sizes.heads].clone()
        layers = layer.A, layer.D, layer.dt_bias
        return layer.state, heads_of(x, sizes.heads), dt, heads_of(B, groups), heads_of(C, groups), *layers

    def run(state: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        wide = A.view(-1, 1, 1).expand(-1, sizes.width, sizes.size)
        dt, D, bias = (t.unsqueeze(-1).expand(*t.shape, sizes.width) for t in (dt, D, bias))
        return update(state, x, dt, wide, B, C, D, None, bias, True)

    numbers = 2 * sizes.heads * sizes.width + 2 * groups * sizes.size + sizes.heads
    state_bytes = 4 * batch * sizes.heads * sizes.width * sizes.size
    found = cold(make, run, moved=2 * state_bytes + 2 * batch * numbers)
    state, x, dt, B, C, A, D, bias = (t.double() for t in cold.inputs(make))
    x, dt, B, C = (t.unsqueeze(1) for t in (x, F.softplus(dt + bias), B, C))
    assert_near(found, multistep_loop(x, dt, A, B, C, D, state, False)[:, 0])


@sizes(*layers2, tiny=False)
@pytest.mark.parametrize("chunk", [16, 64])
def test_mamba2_chunk_scan_of_mamba_ssm(
    cold, inputs: SimpleNamespace, device: torch.device, assert_near, shape: str, batch: int, chunk: int
) -> None:
    scan = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    compile_side_by_side(TUNED)
    sizes = inputs.MAMBA2[shape]
    groups = max(sizes.b_groups, sizes.c_groups)

    def make() -> tuple[Tensor, ...]:
        layer = inputs.Mamba2(sizes, batch, Plan(TOKENS, TOKENS, 0, True), device)
        B, C = (heads_of(t, groups) for t in (layer.ring.B, layer.C))
        return heads_of(layer.ring.x, sizes.heads), layer.ring.dt, layer.A, B, C, layer.D, layer.state

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
        y, _ = scan(x, dt, A, B, C, chunk, D=D, initial_states=state, return_final_states=True)
        return y

    numbers = 2 * sizes.heads * sizes.width + 2 * groups * sizes.size + 2 * sizes.heads
    state_bytes = 4 * batch * sizes.heads * sizes.width * sizes.size
    found = cold(make, run, moved=2 * state_bytes + 2 * batch * TOKENS * numbers)
    x, dt, A, B, C, D, state = (t.double() for t in cold.inputs(make))
    assert_near(found, multistep_loop(x, dt, A, B, C, D, state, False), within=2.0**-6)


@sizes(*layers1)
def test_mamba1_step(cold, inputs: SimpleNamespace, device: torch.device, assert_near, shape: str, batch: int) -> None:
    rounds = inputs.turns(MAMBA1, batch, ROUNDS, device)
    now = itertools.cycle(rounds)

    def make() -> tuple[Any]:
        return (inputs.Mamba1(inputs.MAMBA1[shape], batch, MAMBA1, device),)

    moved = make()[0].step_bytes(*inputs.means(MAMBA1, rounds))
    found = cold(make, lambda layer: selective_ring_multistep(*layer.step(next(now))), moved=moved, calls=ROUNDS)
    (layer,) = cold.inputs(make)
    x, dt, B, C = layer.tokens(rounds[0], 0)
    exact = [t.double() for t in (layer.layer.A, layer.layer.D, layer.state[:1])]
    y = selective_multistep_loop(x, dt, exact[0], B, C, *exact[1:], False)
    assert_near(found[:1], y * F.silu(layer.new.z[:1].double()))


@sizes(*layers1, tiny=False)
@pytest.mark.parametrize("updates", [1, TOKENS])
def test_mamba1_updates_of_mamba_ssm(
    cold, inputs: SimpleNamespace, device: torch.device, assert_near, shape: str, batch: int, updates: int
) -> None:
    """Gate included, the convolution not; several have one state."""
    update = pytest.importorskip("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    sizes, states = inputs.MAMBA1[shape], inputs.STATES
    wide = sizes.c_groups, sizes.channels // sizes.c_groups

    def make() -> tuple[Tensor, ...]:
        layer = inputs.Mamba1(sizes, batch, Plan(updates, updates, updates, True), device)
        C = layer.new.C.unflatten(2, (-1, states)).transpose(0, 1).contiguous()
        x, z, dt = torch.randn(3, updates, batch, *wide, device=device).bfloat16()
        A, D, bias = layer.layer.A.view(*wide, states), layer.layer.D.view(wide), layer.layer.dt_bias.view(wide)
        return layer.state.view(batch, *wide, states), x, dt, C, z, A, D, bias

    def run(state: Tensor, x: Tensor, dt: Tensor, C: Tensor, z: Tensor, A: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        found = [update(state, x[t], dt[t], A, C[t], C[t], D, z[t], bias, True) for t in range(updates)]
        return torch.stack(found) if updates > 1 else found[0][None]

    numbers = 4 * sizes.channels + 2 * sizes.c_groups * states
    each = 2 * 4 * batch * sizes.channels * states + 4 * sizes.channels * (states + 2) + 2 * batch * numbers
    found = cold(make, run, moved=updates * each)
    state, x, dt, C, z, A, D, bias = (t.double() for t in cold.inputs(make))
    dt = F.softplus(dt + bias)
    tokens = [t.flatten(2).transpose(0, 1) for t in (x, dt)]
    C = C.transpose(0, 1)
    y = selective_multistep_loop(*tokens, A.flatten(0, 1), C, C, D.flatten(), state.flatten(1, 2), False)
    assert_near(found.flatten(2).transpose(0, 1), y * F.silu(z.flatten(2).transpose(0, 1)))
